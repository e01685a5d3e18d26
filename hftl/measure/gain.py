"""Compute gains: one arm minus another on the same test items, over seeds, with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hftl.adapt.facts import AdaptStage
from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import NumericError
from hftl.finetune.arm_files import read_metrics_file, read_predictions
from hftl.finetune.strategies import GAIN_BASELINES
from hftl.measure.facts import Estimate
from hftl.measure.metrics import METRICS, Metric, compute_metrics
from hftl.measure.record import BaselineGain, Gain, Interval, LadderRow
from hftl.measure.scores import (
    clip_estimate,
    estimate_proportion,
    score_difference,
    score_with_interval,
)
from hftl.measure.statistics import (
    MIN_SEEDS_FOR_P,
    assign_blocks,
    classify_gain,
    effective_count,
    estimate_mean_error,
    jackknife,
    relative_error_reduction,
    rule_of_three_half_width,
    rule_of_three_p_value,
)
from hftl.train.facts import ArmEntry, ArmFile, Score, SplitMetrics

MARGIN = 0.01
"""Gains within a point either way count as none: the interval inside it is `equivalent`.

For an error in the label's own unit it is a hundredth of the other arm's error.
"""


@dataclass(frozen=True)
class SplitPredictions:
    """Hold what the arms of a run predicted on one split.

    `labels` (rows,), `units` (rows,) int ids whose rows belong together, and for each arm
    `predictions[arm]` of shape (seeds, rows), seeds in one order for all.
    """

    labels: np.ndarray
    units: np.ndarray
    predictions: Mapping[str, np.ndarray]


def compute_gain(
    metric: Metric, test: SplitPredictions, own: str, other: str, margin: float | None = None
) -> Gain:
    """Return how much better `own` is than `other`, in the metric's unit; positive is better.

    `margin` is the smallest gain that matters; None: `MARGIN`, of errors without a bound that share
    of the other's.
    """
    estimate, p_value = estimate_gain(metric, test, own, other)
    means = [float(score_seeds(metric, test, arm).mean()) for arm in (own, other)]
    if margin is None:
        margin = MARGIN if metric.best else MARGIN * abs(means[1])
    seeds = len(test.predictions[own])
    return Gain(
        metric=metric.name,
        value=estimate.value,
        ci95=estimate.ci95,
        seeds=seeds,
        p_value=p_value if seeds >= MIN_SEEDS_FOR_P else None,
        relative_error_reduction=relative_error_reduction(means[0], means[1], metric.best),
        outcome=classify_gain(estimate.ci95, margin),
    )


def estimate_gain(
    metric: Metric, test: SplitPredictions, own: str, other: str, values: np.ndarray | None = None
) -> tuple[Estimate, float | None]:
    """Return the gain with its interval, and the p-value of no gain that agrees with the interval.

    Without an interval, with one seed or one unit, there is no p-value either. `values` are those
    of `compute_gain_values`, where they are known.
    """
    own_scores, other_scores = (score_seeds(metric, test, arm) for arm in (own, other))
    value = float((metric.sign * (own_scores - other_scores)).mean())
    if values is None:
        values = compute_gain_values(metric, test, own, other)
    interval, p_value = _estimate_interval(metric, test, values, value)
    return Estimate(value, interval), p_value


def compute_transfer_gain(
    metric: Metric, test: SplitPredictions, own: str, margin: float | None = None
) -> BaselineGain | None:
    """Return the gain over `scratch` or `classical`, whichever is less on test; None without.

    A choice on validation would favour the baseline that validation was used most for: scratch
    chooses its epoch and rate there. The lesser gain can be that of a baseline that is known well
    while the other, known badly, may be as good as `own`: it is `positive` only where the gains
    over both are, so that false alarms are no more frequent than those of one interval.
    """
    gains = {
        arm: compute_gain(metric, test, own, arm, margin)
        for arm in GAIN_BASELINES
        if arm in test.predictions
    }
    return select_lesser_gain(gains) if gains else None


def select_lesser_gain(gains: Mapping[str, Gain]) -> BaselineGain:
    """Return the least of the gains, see `compute_transfer_gain`; of equals the first.

    Args:
        gains: by the baseline's name; at least one.
    """
    baseline = min(gains, key=lambda arm: gains[arm].value)
    least = gains[baseline]
    outcomes = {gain.outcome for gain in gains.values()}
    settled = least.outcome != "positive" or outcomes == {"positive"}
    facts = least.to_dict() | {"outcome": least.outcome if settled else "undetermined"}
    return BaselineGain.model_validate(facts | {"baseline": baseline, "baselines": dict(gains)})


def score_seeds(metric: Metric, split: SplitPredictions, arm: str) -> np.ndarray:
    """Return the metric of an arm, (seeds,) float64."""
    return np.array([metric.score(split.labels, p) for p in split.predictions[arm]])


def score_arm(metric: Metric, split: SplitPredictions, arm: str) -> Estimate:
    """Return an arm's mean score over its seeds, with its interval over seeds and items."""
    seeds = split.predictions[arm]
    if len(seeds) == 1:
        return score_with_interval(metric, split.labels, seeds[0], split.units)
    value = float(score_seeds(metric, split, arm).mean())
    _, sizes = np.unique(split.units, return_counts=True)
    if len(sizes) < 2:
        return Estimate(value, None)
    values = np.stack(
        [jackknife(lambda i, p=p: metric.score(split.labels[i], p[i]), split.units) for p in seeds]
    )
    error = estimate_mean_error(values, np.bincount(assign_blocks(split.units)))
    if metric.is_proportion:
        return estimate_proportion(value, error, sizes)
    return clip_estimate(metric, Estimate(value, error and error.interval(value)))


def find_best_seed(metric: Metric, entries: Sequence[ArmEntry], own: str) -> int:
    """Return the seed of the arm that is best on validation; of equals the first."""
    own_entries = [entry for entry in entries if entry.arm == own]
    scores = [metric.sign * entry.get_score("validation", metric.name) for entry in own_entries]
    return own_entries[int(np.argmax(scores))].seed


def build_ladder(
    metric: Metric, entries: Sequence[ArmEntry], test: SplitPredictions, own: str,
    margin: float | None = None,
) -> list[LadderRow]:  # fmt: skip
    """Return a row an arm, best on test first: its mean, spread, and what `own` gains over it.

    Args:
        metric: the recipe's.
        entries: every arm and seed, with its scores.
        test: what the gains are computed from.
        own: the recipe's own arm.
        margin: see `compute_gain`.
    """
    rows: list[LadderRow] = []
    for arm in test.predictions:
        of_arm = [entry for entry in entries if entry.arm == arm]
        validation = [entry.get_score("validation", metric.name) for entry in of_arm]
        scores = np.array([entry.get_score("test", metric.name) for entry in of_arm])
        rows.append(
            LadderRow(
                arm=arm,
                validation=float(np.mean(validation)),
                test=float(scores.mean()),
                sd=float(scores.std(ddof=1)) if len(scores) > 1 else None,
                gain_of_own=None if arm == own else compute_gain(metric, test, own, arm, margin),
            )
        )
    return sorted(rows, key=lambda row: -metric.sign * row.test)


def compute_gain_values(
    metric: Metric, test: SplitPredictions, own: str, other: str
) -> np.ndarray | None:
    """Return the jackknife values of the gain, (seeds, blocks); None with one seed or one unit."""
    pairs = list(zip(test.predictions[own], test.predictions[other], strict=True))
    if len(pairs) < 2 or len(np.unique(test.units)) < 2:
        return None
    return np.stack(
        [
            jackknife(
                lambda i, a=a, b=b: score_difference(metric, test.labels[i], a[i], b[i]),
                test.units,
            )
            for a, b in pairs
        ]
    )


def _estimate_interval(
    metric: Metric, test: SplitPredictions, values: np.ndarray | None, value: float
) -> tuple[Interval | None, float | None]:
    """Return the variance-components interval and p-value of the jackknife values, centred on the
    gain itself; None with one seed or one unit."""
    if values is None:
        return None, None
    error = estimate_mean_error(values, np.bincount(assign_blocks(test.units)))
    if error is None:
        return None, None
    if error.value == 0 and metric.best == 1:
        # No item differs from the rest, so the rule of three says how many may.
        units = effective_count(np.unique(test.units, return_counts=True)[1])
        half = rule_of_three_half_width(units, value)
        return (value - half, value + half), rule_of_three_p_value(value, units)
    low, high = error.interval(value)
    if metric.is_proportion:
        # With two seeds Student's quantile is 12.7, and reaches beyond what shares can differ by.
        low, high = max(low, -1.0), min(high, 1.0)
    return (low, high), error.p_value(value)


# The arms' files side by side: every figure of the record is computed from them.


def read_arms(
    folders: Mapping[str, list[Path]], prepared: PreparedData, metric: Metric
) -> tuple[SplitPredictions, list[ArmFile]]:
    """Return what all arms predicted on test, and metrics.json of every arm and seed.

    The scores are those that an arm computed itself. Those that it lacks are computed here: of
    `evaluate:<id>`, of which arms know nothing, and of a built-in metric that is younger than it.

    Args:
        folders: for each arm its folders, one a seed, seeds in one order for all.
        prepared: the rows that were predicted.
        metric: the metric of the recipe.
    """
    built_in = list(METRICS[prepared.task].values())
    metrics = built_in if metric in built_in else [*built_in, metric]
    labels = {split: prepared.encode_for_metrics(prepared.rows[split]) for split in MEASURED_SPLITS}
    test: dict[str, np.ndarray] = {}
    files: list[ArmFile] = []
    for arm, seeds in folders.items():
        predictions = [read_predictions(folder, prepared) for folder in seeds]
        files += [
            _complete_scores(read_metrics_file(folder), metrics, labels, by_split)
            for folder, by_split in zip(seeds, predictions, strict=True)
        ]
        test[arm] = np.stack([by_split["test"] for by_split in predictions])
    rows = prepared.rows["test"]
    return SplitPredictions(labels["test"], assign_units(rows), test), files


def _complete_scores(
    file: ArmFile, metrics: list[Metric],
    labels: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray],
) -> ArmFile:  # fmt: skip
    """Return metrics.json with every one of the metrics."""
    scores = file.metrics.model_dump()
    for split, known in scores.items():
        missing = [metric for metric in metrics if metric.name not in known]
        try:
            known |= compute_metrics(missing, labels[split], predictions[split])
        except NumericError as error:
            where = f"{file.arm} seed {file.seed} on {split}"
            raise NumericError(f"{where}: {error.what}", error.fix) from error
    return file.model_copy(update={"metrics": SplitMetrics.model_validate(scores)})


def assign_units(rows: list[Row]) -> np.ndarray:
    """Return an id for each row, (rows,) int64; rows of one group share theirs."""
    if rows[0].group is None:
        return np.arange(len(rows))
    _, ids = np.unique([str(row.group) for row in rows], return_inverse=True)
    return ids.astype(np.int64)


def average_metrics(entries: Sequence[ArmEntry], arm: str) -> dict[str, Score]:
    """Return every metric of an arm on test, averaged over its seeds; None where one has none."""
    scores = [entry.metrics.test for entry in entries if entry.arm == arm]
    means: dict[str, Score] = {}
    for name in scores[0]:
        values = [value for by_name in scores if (value := by_name[name]) is not None]
        means[name] = float(np.mean(values)) if len(values) == len(scores) else None
    return means


# Adaptation: what it was worth to the task.


def describe_adaptation_outcome(stages: list[AdaptStage], gain: Gain | None) -> str:
    """Return in plain words whether adaptation beat no adaptation.

    Args:
        stages: the record's adaptations.
        gain: the own arm's gain over `source`, the same without adaptation; None without a task.
    """
    if all(stage.kept == "original" for stage in stages):
        return f"Adaptation was undone: {stages[-1].why}; the original weights were kept"
    if gain is None:
        return "Whether adaptation helps a task was not measured: the recipe has none"
    if gain.ci95 is None:
        return "Whether adaptation beat no adaptation is not known: no interval could be made"
    return {
        "positive": "Adaptation helped",
        "equivalent": "Adaptation made practically no difference",
        "negative": "Adaptation did harm: without it the model is better",
        "undetermined": "Adaptation did not beat no adaptation beyond noise",
    }[gain.outcome]
