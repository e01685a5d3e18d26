"""Count how often a run without a fault is called faulty, in simulations of known truth.

    python benchmarks/false_alarms.py             # four minutes on one core
    python benchmarks/false_alarms.py slices      # one part; the others stay as they were

Every part draws runs in which nothing is wrong and judges them by the functions that a run uses.
Negative transfer is counted by `calibration.py`.

- `slices`: the own arm is as good as its baseline in every slice; a slice is called worse (Holm).
- `label_shift`: `hftl check` warns of other shares of classes in a table of the same shares, each
  row for itself or in groups of one class.
- `predicted_shift`: the same of unlabelled inputs, by what a probe predicts; train's predictions
  are by probes that have not seen their rows.

Results: benchmarks/results/false_alarms.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.special import expit

from hftl.analysis.out_of_fold import assign_folds
from hftl.analysis.probe import fit_probe
from hftl.analysis.row_faults import LEVEL, MIN_SHIFT, check_label_shares, compare_shares
from hftl.analysis.source_faults import PROBE_C
from hftl.config.data import Table
from hftl.data.rows import Row
from hftl.data.slices import RowSlice, SlicedColumn
from hftl.measure.gain import SplitPredictions
from hftl.measure.metrics import find_metric
from hftl.measure.slices import measure_slices

RESULT = Path(__file__).parent / "results" / "false_alarms.json"
RUNS = 200
ACCURACY = find_metric("accuracy", "classification")
COLUMNS = {"city": 5, "length": 4, "topic": 12}
"""Columns of slices, each with so many values, the first the most frequent."""


def draw_predictions(
    rng: np.random.Generator, arms: tuple[str, ...], seeds: int, rows: int, sd: float
) -> SplitPredictions:
    """Draw what equally good arms predict: items have a difficulty that arms and seeds share, and
    each seed of an arm has log-odds of its own."""
    labels = rng.integers(0, 2, rows)
    shared = 1.5 + 2.0 * rng.standard_normal(rows)
    predictions: dict[str, np.ndarray] = {}
    for arm in arms:
        odds = shared + rng.standard_normal(rows) + sd * rng.standard_normal((seeds, 1))
        right = rng.random((seeds, rows)) < expit(odds)
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
    return any(True for _ in check_label_shares(recipe, prepared))


def judge_predicted_shift(runs: int) -> list[dict[str, Any]]:
    """Count the runs in which the classes predicted of unlabelled inputs have other shares."""
    results = []
    for classes, rows in itertools.product((2, 5), (100, 400)):
        rng = np.random.default_rng([classes, rows])
        alarms = sum(_is_called_shifted(rng, classes, rows) for _ in range(runs))
        results.append({"classes": classes, "rows": rows, "runs": runs, "alarms": alarms})
    return results


def _is_called_shifted(rng: np.random.Generator, classes: int, rows: int) -> bool:
    centres = rng.normal(size=(classes, 16))
    shares = rng.dirichlet(np.full(classes, 3.0))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.choice(classes, count, p=shares)
        return (centres[labels] + 2 * rng.normal(size=(count, 16))).astype(np.float32), labels

    features, labels = draw(rows)
    unlabeled, _ = draw(1000)
    before, folds = np.empty(rows, dtype=np.int64), assign_folds(labels, None)
    for fold in np.unique(folds):
        probe = fit_probe(features[folds != fold], labels[folds != fold], classes, None, PROBE_C)
        before[folds == fold] = probe.logits(features[folds == fold]).argmax(1)
    after = fit_probe(features, labels, classes, None, PROBE_C).logits(unlabeled).argmax(1)
    counts = [np.bincount(part, minlength=classes) for part in (before, after)]
    distance = np.abs(counts[0] / rows - counts[1] / len(unlabeled)).sum() / 2
    return bool(compare_shares(counts[0], counts[1], 1.0) < LEVEL and distance >= MIN_SHIFT)


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "slices": judge_slices,
    "label_shift": judge_label_shift,
    "predicted_shift": judge_predicted_shift,
}
WORDS = {
    "slices": "a slice loses", "label_shift": "label shift of a table",
    "predicted_shift": "label shift of unlabelled inputs",
}  # fmt: skip


def format_table(result: dict[str, Any]) -> list[str]:
    """Return a line for each part: the fewest and the most alarms over its settings."""
    return [
        f"{WORDS[part]}: {min(row['alarms'] for row in result[part])} to "
        f"{max(row['alarms'] for row in result[part])} of {result[part][0]['runs']} runs without "
        f"one ({len(result[part])} settings)"
        for part in PARTS
        if part in result
    ]


def main() -> None:
    """Run the parts named, all without names, and write and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    for part in given.parts or PARTS:
        result[part] = PARTS[part](given.runs)
        for row in result[part]:
            print(part, row)
        result["table"] = format_table(result)
        RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join(result["table"]))


if __name__ == "__main__":
    main()
