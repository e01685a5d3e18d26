"""Compute gains: one arm minus another on the same test items, over seeds, with its interval."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.arm_files import ArmResult, read_arm
from hftl.finetune.strategies import GAIN_BASELINES
from hftl.measure.metrics import METRICS, Metric, accuracy, compute_metrics, exact_match
from hftl.measure.record import AdaptStage, BaselineGain, Gain, Interval, LadderRow
from hftl.measure.statistics import (
    MIN_SEEDS_FOR_P,
    assign_blocks,
    classify_gain,
    effective_count,
    estimate_item_error,
    estimate_mean_error,
    jackknife,
    relative_error_reduction,
    rule_of_three_half_width,
    rule_of_three_p_value,
    wilson_interval,
)
from hftl.measure.verdict import Estimate
from hftl.train.facts import ArmEntry, SplitMetrics

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


def compute_gain(metric: Metric, test: SplitPredictions, own: str, other: str) -> Gain:
    """Return how much better `own` is than `other`, in the metric's unit; positive is better."""
    pairs = list(zip(test.predictions[own], test.predictions[other], strict=True))
    deltas = np.array([_score_difference(metric, test.labels, a, b) for a, b in pairs])
    value = float(deltas.mean())
    interval, p_value = _estimate_interval(metric, test, pairs, value)
    scores = [compute_mean_score(metric, test, arm) for arm in (own, other)]
    margin = MARGIN if metric.best else MARGIN * abs(scores[1])
    return Gain(
        metric=metric.name,
        value=value,
        ci95=interval,
        seeds=len(deltas),
        p_value=p_value if len(deltas) >= MIN_SEEDS_FOR_P else None,
        relative_error_reduction=relative_error_reduction(scores[0], scores[1], metric.best),
        outcome=classify_gain(interval, margin),
    )


def compute_transfer_gain(metric: Metric, test: SplitPredictions, own: str) -> BaselineGain | None:
    """Return the gain over `scratch` or `classical`, whichever is less on test; None without.

    A choice on validation would favour the baseline that validation was used most for: scratch
    chooses its epoch and rate there. The lesser gain can be that of a baseline that is known well
    while the other, known badly, may be as good as `own`: it is `positive` only where the gains
    over both are, so that false alarms are no more frequent than those of one interval.
    """
    gains = {
        arm: compute_gain(metric, test, own, arm)
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


def compute_mean_score(metric: Metric, split: SplitPredictions, arm: str) -> float:
    """Return the metric of an arm, averaged over seeds."""
    return float(np.mean([metric.score(split.labels, p) for p in split.predictions[arm]]))


def find_best_seed(metric: Metric, validation: SplitPredictions, own: str) -> int:
    """Return the position of the seed that is best on validation; of equals the first."""
    scores = [metric.sign * metric.score(validation.labels, p) for p in validation.predictions[own]]
    return int(np.argmax(scores))


def build_ladder(
    metric: Metric, validation: SplitPredictions, test: SplitPredictions, own: str
) -> list[LadderRow]:
    """Return a row an arm, best on test first: its mean, spread, and what `own` gains over it."""
    rows: list[LadderRow] = []
    for arm, predictions in test.predictions.items():
        scores = np.array([metric.score(test.labels, p) for p in predictions])
        rows.append(
            LadderRow(
                arm=arm,
                validation=compute_mean_score(metric, validation, arm),
                test=float(scores.mean()),
                sd=float(scores.std(ddof=1)) if len(scores) > 1 else None,
                gain_of_own=None if arm == own else compute_gain(metric, test, own, arm),
            )
        )
    return sorted(rows, key=lambda row: -metric.sign * row.test)


def _score_difference(metric: Metric, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return metric.sign * (metric.score(labels, a) - metric.score(labels, b))


def _estimate_interval(
    metric: Metric, test: SplitPredictions, pairs: list[tuple[np.ndarray, np.ndarray]], value: float
) -> tuple[Interval | None, float | None]:
    """Return the variance-components interval and p-value of the jackknife values, centred on the
    gain itself; None with one seed or one unit."""
    if len(pairs) < 2 or len(np.unique(test.units)) < 2:
        return None, None
    values = np.stack(
        [
            jackknife(
                lambda i, a=a, b=b: _score_difference(metric, test.labels[i], a[i], b[i]),
                test.units,
            )
            for a, b in pairs
        ]
    )
    error = estimate_mean_error(values, np.bincount(assign_blocks(test.units)))
    if error is None:
        return None, None
    if error.value == 0 and metric.best == 1:
        # No item differs from the rest, so the rule of three says how many may.
        units = effective_count(np.unique(test.units, return_counts=True)[1])
        half = rule_of_three_half_width(units, value)
        return (value - half, value + half), rule_of_three_p_value(value, units)
    return error.interval(value), error.p_value(value)


# One model's score, and one model against another: the items alone vary.


@dataclass(frozen=True)
class ComparedModel:
    """Describe one of several models on the same items; `against_first` is paired."""

    model: str
    metric: str
    score: Estimate
    against_first: Estimate | None
    parameters: int


def score_with_interval(
    metric: Metric, labels: np.ndarray, predictions: np.ndarray, units: np.ndarray
) -> Estimate:
    """Return a model's score with its interval over items, inside the metric's bounds.

    Args:
        metric: what is computed.
        labels: (rows,) or (rows, classes), see `metrics`.
        predictions: the same of the model.
        units: (rows,) int ids whose rows belong together.
    """
    if metric.is_proportion:
        return _score_proportion(metric, labels, predictions, units)
    estimate = _estimate_over_items(
        metric, lambda rows: metric.score(labels[rows], predictions[rows]), len(labels), units
    )
    if estimate.ci95 is None:
        return estimate
    low, high = estimate.ci95
    # No better than a perfect prediction; the other bound is too far to be reached.
    if metric.lower_is_better:
        return Estimate(estimate.value, (max(low, metric.best), high))
    return Estimate(estimate.value, (low, min(high, metric.best)))


def _score_proportion(
    metric: Metric, labels: np.ndarray, predictions: np.ndarray, units: np.ndarray
) -> Estimate:
    """Return the score of a proportion with Wilson's interval.

    Of rows that are right or wrong, each for itself, their number counts. Where rows of a group
    belong together, or the metric is no mean of rows, as many rows count as would give the
    jackknife's variance.
    """
    value = metric.score(labels, predictions)
    _, sizes = np.unique(units, return_counts=True)
    if len(sizes) < 2:
        return Estimate(value, None)
    if metric.score in (accuracy, exact_match) and len(sizes) == len(units):
        return Estimate(value, wilson_interval(value, len(units)))
    values = jackknife(lambda rows: metric.score(labels[rows], predictions[rows]), units)
    error = estimate_item_error(values, np.bincount(assign_blocks(units)))
    if error is None or error.value == 0 or not 0 < value < 1:
        return Estimate(value, wilson_interval(value, effective_count(sizes)))
    count = value * (1 - value) / error.value**2
    return Estimate(value, wilson_interval(value, count, error.degrees_of_freedom))


def compare_pair(
    metric: Metric, labels: np.ndarray, own: np.ndarray, other: np.ndarray, units: np.ndarray
) -> Estimate:
    """Return how much better `own` is than `other` on the same items; positive is better."""
    return _estimate_over_items(
        metric,
        lambda i: _score_difference(metric, labels[i], own[i], other[i]),
        len(labels),
        units,
        paired=True,
    )


def _estimate_over_items(
    metric: Metric, statistic: Callable[[np.ndarray], float], rows: int, units: np.ndarray,
    paired: bool = False,
) -> Estimate:  # fmt: skip
    value = statistic(np.arange(rows))
    if len(np.unique(units)) < 2:
        return Estimate(value, None)
    error = estimate_item_error(jackknife(statistic, units), np.bincount(assign_blocks(units)))
    if error is None:
        return Estimate(value, None)
    if error.value == 0 and metric.best == 1:
        # No item differs from the rest, so the rule of three says how many may.
        count = effective_count(np.unique(units, return_counts=True)[1])
        half = rule_of_three_half_width(count, value if paired else 0.0)
        return Estimate(value, (value - half, value + half))
    return Estimate(value, error.interval(value))


# The arms' files side by side: every figure of the record is computed from them.


def collect_predictions(
    folders: Mapping[str, list[Path]], prepared: PreparedData, metric: Metric
) -> tuple[dict[str, SplitPredictions], list[ArmEntry]]:
    """Return the predictions of all arms by split, and the record's `arms`.

    Args:
        folders: for each arm its folders, one a seed, seeds in one order for all.
        prepared: the rows that were predicted.
        metric: the metric of the recipe, which the arms need not have computed.
    """
    results = {
        arm: [read_arm(folder, prepared) for folder in seeds] for arm, seeds in folders.items()
    }
    splits: dict[str, SplitPredictions] = {}
    for split in MEASURED_SPLITS:
        rows = prepared.rows[split]
        predictions = {
            arm: np.stack([result.predictions[split] for result in seeds])
            for arm, seeds in results.items()
        }
        splits[split] = SplitPredictions(
            prepared.encode_for_metrics(rows), assign_units(rows), predictions
        )
    entries = [
        _build_arm_entry(result, prepared, metric) for seeds in results.values() for result in seeds
    ]
    return splits, entries


def assign_units(rows: list[Row]) -> np.ndarray:
    """Return an id for each row, (rows,) int64; rows of one group share theirs."""
    if rows[0].group is None:
        return np.arange(len(rows))
    _, ids = np.unique([str(row.group) for row in rows], return_inverse=True)
    return ids.astype(np.int64)


def _build_arm_entry(result: ArmResult, prepared: PreparedData, metric: Metric) -> ArmEntry:
    built_in = list(METRICS[prepared.task].values())
    every = built_in if metric in built_in else [*built_in, metric]
    metrics = {
        split: compute_metrics(every, result.labels[split], result.predictions[split])
        for split in MEASURED_SPLITS
    }
    file = result.metrics_file
    return ArmEntry(
        arm=file.arm,
        seed=file.seed,
        strategy=file.strategy,
        metrics=SplitMetrics(**metrics),
        trainable_parameters=file.trainable_parameters,
        training=file.training,
    )


def average_metrics(entries: list[ArmEntry], arm: str) -> dict[str, float]:
    """Return every metric of an arm on test, averaged over its seeds."""
    scores = [entry.metrics.test for entry in entries if entry.arm == arm]
    return {name: float(np.mean([by_name[name] for by_name in scores])) for name in scores[0]}


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
