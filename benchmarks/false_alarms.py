"""Count how often a run without a fault is called faulty, in simulations of known truth.

    python benchmarks/false_alarms.py             # five minutes on one core
    python benchmarks/false_alarms.py slices      # one part; the others stay as they were
    python benchmarks/false_alarms.py negative_transfer --runs 2000    # its level is nearly used up

Every part draws runs in which nothing is wrong and judges them by the functions that a run uses.
`calibration.py` counts negative transfer, too, in more runs, whose epochs are chosen.

- `slices`: the own arm is as good as its baseline in every slice; a slice is called worse (Holm).
- `negative_transfer`: the own arm is as good as scratch and classical, and the verdict says that
  transfer is negative.
- `head_better`, `adaptation_harm`: it is as good as head, or as itself without adaptation, and the
  verdict says that head is better, or that adaptation did harm.
- `equivalent`: it is better by the equivalence margin, and the gain is said to be practically none.
- `label_shift`: `hftl check` warns of other shares of classes in a table of the same shares, each
  row for itself or in groups of one class.
- `predicted_shift`: the same of unlabelled inputs, by what a probe predicts, where train's rows are
  each for itself or in groups of one class.
- `calibration`: a temperature makes the Brier score worse by the margin, or is fitted on few rows
  of logits that need none, and the verdict says that calibration made probabilities worse.
- `label_map`: labels are said to be exchanged, where predictions are random or mostly right.

Results: benchmarks/results/false_alarms.json.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from calibration import compute_row_gain
from scipy.optimize import brentq
from scipy.special import expit, ndtri, softmax
from simulations import Part, run_parts

from hftl.analysis import label_faults, row_faults
from hftl.analysis.label_maps import HALF_LEVEL, find_exchange
from hftl.analysis.source_faults import ExaminedRows
from hftl.config.data import Data, Table
from hftl.data.rows import Row
from hftl.data.slices import RowSlice, SlicedColumn
from hftl.finetune.strategies import GAIN_BASELINES
from hftl.measure.calibration import (
    PRIOR_SPREAD,
    compute_row_brier,
    estimate_change,
    fit_temperature,
)
from hftl.measure.facts import CalibrationScores, CalibrationSection, ScoreEstimate
from hftl.measure.gain import MARGIN, SplitPredictions, select_lesser_gain
from hftl.measure.metrics import find_metric
from hftl.measure.record import Gain
from hftl.measure.slices import LEVEL as SLICE_LEVEL
from hftl.measure.slices import measure_slices
from hftl.measure.verdict import CALIBRATION_MARGIN, VerdictEvidence, decide_verdict

RESULT = Path(__file__).parent / "results" / "false_alarms.json"
RUNS = 200
ACCURACY = find_metric("accuracy", "classification")
COLUMNS = {"city": 5, "length": 4, "topic": 12}
"""Columns of slices, each with so many values, the first the most frequent."""


MEAN_ODDS, SHARED_SD, OWN_SD = 1.5, 2.0, 1.0
"""Of the items' log-odds of being right: the mean, and the spread that arms share and do not."""


def draw_predictions(
    rng: np.random.Generator, arms: tuple[str, ...], seeds: int, rows: int, sd: float,
    ahead: float = 0.0,
) -> SplitPredictions:  # fmt: skip
    """Draw what equally good arms predict: items have a difficulty that arms and seeds share, and
    each seed of an arm has log-odds of its own. The log-odds of the first arm are `ahead`."""
    labels = rng.integers(0, 2, rows)
    shared = MEAN_ODDS + SHARED_SD * rng.standard_normal(rows)
    predictions: dict[str, np.ndarray] = {}
    for arm in arms:
        odds = shared + OWN_SD * rng.standard_normal(rows) + sd * rng.standard_normal((seeds, 1))
        right = rng.random((seeds, rows)) < expit(odds + (ahead if arm == arms[0] else 0.0))
        predictions[arm] = np.where(right, labels, 1 - labels)
    return SplitPredictions(labels, np.arange(rows), predictions)


def judge_slices(runs: int) -> list[dict[str, Any]]:
    """Count the runs in which a slice is called worse."""
    results = []
    for seeds, rows, sd in itertools.product((2, 3, 6), (400,), (0.05, 0.2)):
        rng = np.random.default_rng([seeds, rows, round(100 * sd)])
        alarms = sum(has_losing_slice(rng, seeds, rows, sd) for _ in range(runs))
        setting = {"seeds": seeds, "rows": rows, "seed_sd": sd}
        results.append(setting | {"slices": sum(COLUMNS.values()), "runs": runs, "alarms": alarms})
    return results


def has_losing_slice(
    rng: np.random.Generator, seeds: int, rows: int, sd: float, lost: float = 0.0
) -> bool:
    """Return whether a slice of a drawn run is called worse.

    Args:
        rng: of the draws.
        seeds: of each arm.
        rows: of test.
        sd: of the seeds' log-odds.
        lost: share of the rows of the first slice that the own arm gets wrong besides.
    """
    test = draw_predictions(rng, ("own", "scratch"), seeds, rows, sd)
    columns = [_draw_column(rng, name, count, rows) for name, count in COLUMNS.items()]
    worse = columns[0].slices[0].rows
    worse = worse[rng.random(len(worse)) < lost]
    test.predictions["own"][:, worse] = 1 - test.labels[worse]
    return bool(measure_slices(ACCURACY, test, "own", "scratch", columns).losers)


def _draw_column(rng: np.random.Generator, name: str, count: int, rows: int) -> SlicedColumn:
    weights = 1 / np.arange(1, count + 1)
    values = rng.choice(count, rows, p=weights / weights.sum())
    slices = [
        RowSlice(str(value), "value", np.flatnonzero(values == value))
        for value in np.unique(values)
    ]
    return SlicedColumn(name, slices)


def judge_negative_transfer(runs: int) -> list[dict[str, Any]]:
    """Count the runs whose verdict says that transfer is negative."""
    return _judge_verdicts(runs, 0, ("own", "scratch", "classical"), "negative transfer")


def judge_head_better(runs: int) -> list[dict[str, Any]]:
    """Count the runs whose verdict says that the frozen encoder is better."""
    return _judge_verdicts(runs, 1, ("own", "scratch", "head"), "the frozen encoder with a linear")


def judge_adaptation_harm(runs: int) -> list[dict[str, Any]]:
    """Count the runs whose verdict says that adaptation did harm."""
    return _judge_verdicts(runs, 2, ("own", "scratch", "source"), "adaptation did harm")


def _judge_verdicts(
    runs: int, stream: int, arms: tuple[str, ...], alarm: str
) -> list[dict[str, Any]]:
    """Count the runs with a reason that starts so; each stream has draws of its own."""
    results = []
    for seeds, rows, sd in itertools.product((3, 8), (400, 1500), (0.05, 0.2)):
        rng = np.random.default_rng([seeds, rows, round(100 * sd), stream])
        reasons = [draw_reasons(rng, arms, seeds, rows, sd) for _ in range(runs)]
        count = sum(any(reason.startswith(alarm) for reason in own) for own in reasons)
        setting = {"seeds": seeds, "rows": rows, "seed_sd": sd}
        results.append(setting | {"runs": runs, "alarms": count})
    return results


def draw_reasons(
    rng: np.random.Generator, arms: tuple[str, ...], seeds: int, rows: int, sd: float,
    ahead: float = 0.0,
) -> list[str]:  # fmt: skip
    """Return the reasons of the verdict on a drawn run, see `draw_predictions`."""
    over = _draw_gains(rng, arms, seeds, rows, sd, ahead)
    gain = select_lesser_gain({arm: over[arm] for arm in GAIN_BASELINES if arm in over})
    evidence = VerdictEvidence(
        gain=gain, over_head=over.get("head"), reload_difference=0.0, over_source=over.get("source")
    )
    return decide_verdict(evidence).reasons


def _draw_gains(
    rng: np.random.Generator, arms: tuple[str, ...], seeds: int, rows: int, sd: float, ahead: float
) -> dict[str, Gain]:
    """Return the gain of the first arm over each other one, as a run computes it."""
    test = draw_predictions(rng, arms, seeds, rows, sd, ahead)
    rights = {
        arm: (predicted == test.labels).astype(np.int8)
        for arm, predicted in test.predictions.items()
    }
    return {arm: compute_row_gain(rights[arms[0]] - rights[arm]) for arm in arms[1:]}


def judge_equivalent(runs: int) -> list[dict[str, Any]]:
    """Count the runs whose gain is said to be practically none, where it is the margin itself.

    So many rows, as of fewer no interval fits between the margins.
    """
    results = []
    for seeds, rows, sd in itertools.product((3, 8), (20_000,), (0.0, 0.02)):
        rng = np.random.default_rng([seeds, rows, round(100 * sd)])
        ahead = find_odds(MARGIN, sd)
        alarms = sum(is_equivalent(rng, seeds, rows, sd, ahead) for _ in range(runs))
        setting = {"seeds": seeds, "rows": rows, "seed_sd": sd}
        results.append(setting | {"runs": runs, "alarms": alarms})
    return results


def is_equivalent(
    rng: np.random.Generator, seeds: int, rows: int, sd: float, ahead: float = 0.0
) -> bool:
    """Return whether the gain of a drawn run is said to be practically none."""
    gains = _draw_gains(rng, ("own", "scratch"), seeds, rows, sd, ahead)
    return gains["scratch"].outcome == "equivalent"


def find_odds(gain: float, sd: float) -> float:
    """Return the log-odds by which an arm must be ahead to be right in so many more of all rows."""
    spread = (SHARED_SD**2 + OWN_SD**2 + sd**2) ** 0.5
    odds = MEAN_ODDS + spread * ndtri((np.arange(2000) + 0.5) / 2000)
    ahead = np.linspace(-1, 1, 2001)
    gains = expit(odds + ahead[:, None]).mean(1) - expit(odds).mean()
    return float(np.interp(gain, gains, ahead))


def judge_label_shift(runs: int) -> list[dict[str, Any]]:
    """Count the runs in which the classes of test are said to have other shares than train's."""
    results = []
    for classes, rows, size in itertools.product((2, 5, 20), (100, 1000), (1, 8)):
        rng = np.random.default_rng([classes, rows, size])
        alarms = sum(has_shifted_table(rng, classes, rows, size) for _ in range(runs))
        setting = {"classes": classes, "test_rows": rows, "rows_a_group": size}
        results.append(setting | {"runs": runs, "alarms": alarms})
    return results


def has_shifted_table(
    rng: np.random.Generator, classes: int, rows: int, size: int, moved: float = 0.0
) -> bool:
    """Return whether the check warns of a drawn test table.

    Args:
        rng: of the draws.
        classes: with shares that differ.
        rows: of test; train has 2 000.
        size: rows of a group, which have one class.
        moved: share of the rows of test that are of the first class besides.
    """
    shares = rng.dirichlet(np.full(classes, 3.0))

    def draw_rows(count: int, table: str, moved: float) -> list[Row]:
        groups = -(-count // size)
        labels = np.where(rng.random(groups) < moved, 0, rng.choice(classes, groups, p=shares))
        return [
            Row(("",), str(labels[i // size]), str(i // size) if size > 1 else None, i, "", table)
            for i in range(count)
        ]

    prepared: Any = SimpleNamespace(
        task="classification",
        names=[str(number) for number in range(classes)],
        rows={"train": draw_rows(2000, "train", 0.0), "test": draw_rows(rows, "test", moved)},
        encode_targets=lambda rows: np.array([int(row.label) for row in rows]),
    )
    recipe: Any = SimpleNamespace(
        data=SimpleNamespace(validation=None, test=Table(path="test.csv"))
    )
    return any(True for _ in row_faults.check_label_shares(recipe, prepared))


def judge_predicted_shift(runs: int) -> list[dict[str, Any]]:
    """Count the runs in which the classes predicted of unlabelled inputs have other shares."""
    results = []
    with TemporaryDirectory() as folder:
        table = write_texts(Path(folder))
        for classes, (rows, size) in itertools.product((2, 5), ((100, 1), (400, 1), (400, 8))):
            rng = np.random.default_rng([classes, rows, size])
            alarms = sum(
                has_shifted_predictions(rng, table, classes, rows, size) for _ in range(runs)
            )
            setting = {"classes": classes, "rows": rows, "rows_a_group": size}
            results.append(setting | {"runs": runs, "alarms": alarms})
    return results


def write_texts(folder: Path) -> Table:
    """Write as many unlabelled texts as the check reads."""
    lines = [f"text {number}" for number in range(label_faults.MAX_COMPARED)]
    (folder / "unlabeled.csv").write_text("\n".join(["text", *lines]) + "\n", encoding="utf-8")
    return Table(path=str(folder / "unlabeled.csv"))


def has_shifted_predictions(
    rng: np.random.Generator, table: Table, classes: int, rows: int, size: int, moved: float = 0.0
) -> bool:
    """Return whether the check warns of drawn unlabelled inputs.

    Args:
        rng: of the draws.
        table: of the unlabelled texts.
        classes: with shares that differ.
        rows: of train.
        size: rows of a group of train, which have one class.
        moved: share of the unlabelled rows that are of the first class besides.
    """
    centres = rng.normal(size=(classes, 16))
    shares = rng.dirichlet(np.full(classes, 3.0))

    def draw(count: int, size: int, moved: float) -> tuple[np.ndarray, np.ndarray]:
        groups = -(-count // size)
        labels = np.where(rng.random(groups) < moved, 0, rng.choice(classes, groups, p=shares))
        labels = np.repeat(labels, size)[:count]
        return (centres[labels] + 2 * rng.normal(size=(count, 16))).astype(np.float32), labels

    features, labels = draw(rows, size, 0.0)
    parts = {"train": features, "unlabeled": draw(label_faults.MAX_COMPARED, 1, moved)[0]}
    train = [
        Row((str(i),), str(label), str(i // size) if size > 1 else None, i, "")
        for i, label in enumerate(labels)
    ]
    context: Any = SimpleNamespace(
        prepared=SimpleNamespace(
            task="classification",
            names=[str(number) for number in range(classes)],
            encode_targets=lambda rows: np.array([int(row.label) for row in rows]),
        ),
        inputs=None,
        num_outputs=classes,
        group_outputs=lambda rows: np.array([row.group for row in rows]) if size > 1 else None,
        extract_features=lambda pooling, seed, rows: np.stack([
            parts[row.table][row.index] for row in rows
        ]),
    )  # fmt: skip
    recipe: Any = SimpleNamespace(data=Data(train=Table(path="train.csv"), unlabeled=table))
    examined = ExaminedRows(recipe, context, "mean", train, 0, [])
    return any(True for _ in label_faults.check_unlabeled_shares(examined))


def judge_label_maps(runs: int) -> list[dict[str, Any]]:
    """Count the runs in which labels are said to be exchanged against what is predicted."""
    results = []
    for classes, accuracy in itertools.product((3, 20, 150), (0.0, 0.8)):
        rng = np.random.default_rng([classes, round(10 * accuracy)])
        alarms = sum(has_exchanged_labels(rng, classes, accuracy) for _ in range(runs))
        setting = {"classes": classes, "rows": 300, "accuracy": accuracy}
        results.append(setting | {"runs": runs, "alarms": alarms})
    return results


def has_exchanged_labels(
    rng: np.random.Generator, classes: int, accuracy: float, exchanged: bool = False
) -> bool:
    """Return whether drawn labels are said to be exchanged.

    Args:
        rng: of the draws.
        classes: whose shares differ among the labels, and otherwise among wrong predictions.
        accuracy: share of the rows that are predicted right; the others are at random.
        exchanged: whether every label is written as the next one.
    """
    labels, others = (
        rng.choice(classes, 300, p=rng.dirichlet(np.full(classes, 3.0))) for _ in range(2)
    )
    predicted = np.where(rng.random(300) < accuracy, labels, others)
    written = (labels + 1) % classes if exchanged else labels
    names = [str(number) for number in range(classes)]
    return find_exchange(predicted, written, names, None) is not None


def judge_calibration(runs: int) -> list[dict[str, Any]]:
    """Count the runs whose verdict says that calibration made probabilities worse."""
    results = []
    for classes, rows, validation in itertools.product((2, 5), (400, 2000), (None, 40, 400)):
        rng = np.random.default_rng([classes, rows, validation or 0])
        harmful = None if validation else find_temperature(rng, classes, CALIBRATION_MARGIN)
        alarms = sum(
            has_worse_calibration(rng, classes, rows, validation, harmful) for _ in range(runs)
        )
        setting = {"classes": classes, "rows": rows, "validation_rows": validation}
        results.append(setting | {"runs": runs, "alarms": alarms})
    return results


def draw_logits(rng: np.random.Generator, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits (rows, classes), and labels of the probabilities that they say."""
    logits = rng.normal(0, 2, (rows, classes))
    labels = (rng.random((rows, 1)) > softmax(logits, axis=1).cumsum(1)).sum(1)
    return logits, labels.clip(max=classes - 1)


def find_temperature(rng: np.random.Generator, classes: int, worse: float) -> float:
    """Return the temperature above 1 that makes the Brier score of all rows worse by so much."""
    logits, _ = draw_logits(rng, 100_000, classes)
    true = softmax(logits, axis=1)

    def miss(temperature: float) -> float:
        # By as much as the squared distance from the true probabilities.
        return float(((softmax(logits / temperature, axis=1) - true) ** 2).sum(1).mean()) - worse

    root: Any = brentq(miss, 1.0, 20.0)
    return float(root)


def has_worse_calibration(
    rng: np.random.Generator, classes: int, rows: int, validation: int | None,
    temperature: float | None = None,
) -> bool:  # fmt: skip
    """Return whether the verdict on a drawn run says that calibration made probabilities worse.

    Args:
        rng: of the draws.
        classes: of the task.
        rows: of test.
        validation: rows that a temperature is fitted on; None: none is.
        temperature: that logits are divided by where none is fitted; None: 1.
    """
    logits, labels = draw_logits(rng, rows, classes)
    if validation is not None:
        temperature = fit_temperature(*draw_logits(rng, validation, classes), PRIOR_SPREAD)
    squares = [
        compute_row_brier(softmax(logits / t, axis=1), labels) for t in (1.0, temperature or 1.0)
    ]
    before, after = (
        CalibrationScores(ece=score, brier=score)
        for score in (ScoreEstimate(value=float(s.mean()), ci95=None) for s in squares)
    )
    section = CalibrationSection(
        temperature=temperature, bins=1, before=before, after=after,
        change=estimate_change(squares[1] - squares[0], np.arange(rows)),
    )  # fmt: skip
    evidence = VerdictEvidence(
        gain=None, over_head=None, reload_difference=0.0, calibration=section
    )
    reasons = decide_verdict(evidence).reasons
    return any(reason.startswith("calibration made") for reason in reasons)


PARTS: dict[str, Part] = {
    "negative_transfer": judge_negative_transfer,
    "head_better": judge_head_better,
    "adaptation_harm": judge_adaptation_harm,
    "equivalent": judge_equivalent,
    "slices": judge_slices,
    "label_shift": judge_label_shift,
    "predicted_shift": judge_predicted_shift,
    "calibration": judge_calibration,
    "label_map": judge_label_maps,
}
WORDS = {
    "negative_transfer": "negative transfer", "head_better": "head is better",
    "adaptation_harm": "adaptation did harm", "equivalent": "practically no gain",
    "slices": "a slice loses", "label_shift": "label shift of a table",
    "predicted_shift": "label shift of unlabelled inputs",
    "calibration": "calibration made it worse", "label_map": "exchanged labels",
}  # fmt: skip
LEVELS = {
    "negative_transfer": 0.05, "head_better": 0.025, "adaptation_harm": 0.025,
    "equivalent": 0.025, "slices": SLICE_LEVEL, "label_shift": row_faults.LEVEL,
    "predicted_shift": label_faults.LEVEL, "calibration": 0.025, "label_map": HALF_LEVEL,
}  # fmt: skip
"""The share of runs without a fault that a test may call faulty, at most."""


def format_table(result: dict[str, Any]) -> list[str]:
    """Return a line for each part: the fewest and the most alarms over its settings."""
    lines = []
    for part in PARTS:
        if rows := result.get(part):
            alarms, runs = ([row[key] for row in rows] for key in ("alarms", "runs"))
            lines.append(
                f"{WORDS[part]}: {min(alarms)} to {max(alarms)} of {runs[0]} runs without one "
                f"({len(rows)} settings, {sum(alarms) / sum(runs):.1%} of all)"
            )
    return lines


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RUNS, RESULT, format_table)
