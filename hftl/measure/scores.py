"""Score one model, and one against another, with intervals: the items alone vary."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hftl.measure.facts import Estimate
from hftl.measure.metrics import Metric, accuracy, exact_match
from hftl.measure.statistics import (
    MeanError,
    assign_blocks,
    effective_count,
    estimate_item_error,
    jackknife,
    rule_of_three_half_width,
    wilson_interval,
)


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
    return clip_estimate(metric, estimate)


def clip_estimate(metric: Metric, estimate: Estimate) -> Estimate:
    """Return an estimate that is no better than a perfect prediction; the other bound is too far
    to be reached."""
    if estimate.ci95 is None:
        return estimate
    low, high = estimate.ci95
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
    return estimate_proportion(value, error, sizes)


def estimate_proportion(value: float, error: MeanError | None, sizes: np.ndarray) -> Estimate:
    """Return a share with Wilson's interval of as many rows as would have this error."""
    if error is None or error.value == 0 or not 0 < value < 1:
        return Estimate(value, wilson_interval(value, effective_count(sizes)))
    count = value * (1 - value) / error.value**2
    return Estimate(value, wilson_interval(value, count, error.degrees_of_freedom))


def score_difference(metric: Metric, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Return how much better the predictions `a` are than `b`; positive is better."""
    return metric.sign * (metric.score(labels, a) - metric.score(labels, b))


def compare_pair(
    metric: Metric, labels: np.ndarray, own: np.ndarray, other: np.ndarray, units: np.ndarray
) -> Estimate:
    """Return how much better `own` is than `other` on the same items; positive is better."""
    return _estimate_over_items(
        metric,
        lambda i: score_difference(metric, labels[i], own[i], other[i]),
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
