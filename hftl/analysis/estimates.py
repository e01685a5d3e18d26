"""Estimate scores over seeds and items, and draw what they might have been."""

from collections.abc import Sequence

import numpy as np

from hftl.analysis.facts import Estimate, Interval
from hftl.measure.gain import score_with_interval
from hftl.measure.metrics import Metric
from hftl.measure.statistics import assign_blocks, jackknife, mean_interval


def compute_item_values(
    metric: Metric, labels: np.ndarray, predictions: Sequence[np.ndarray], units: np.ndarray
) -> np.ndarray | None:
    """Return each seed's jackknife values, (seeds, blocks) in the metric's unit.

    None where the items are of one unit. Values of two models on the same items can be subtracted.
    """
    if len(np.unique(units)) < 2:
        return None
    return np.stack([
        jackknife(lambda rows, own=own: metric.score(labels[rows], own[rows]), units)
        for own in predictions
    ])  # fmt: skip


def estimate_score(
    metric: Metric, labels: np.ndarray, predictions: Sequence[np.ndarray], units: np.ndarray
) -> Estimate:
    """Return the mean score over seeds with its interval over seeds and items.

    Args:
        metric: what is computed.
        labels: (rows, ...), see `metrics`.
        predictions: the same, one a seed.
        units: (rows,) int ids whose rows belong together.
    """
    if len(predictions) == 1:
        single = score_with_interval(metric, labels, predictions[0], units)
        return Estimate(value=single.value, ci95=single.ci95)
    value = float(np.mean([metric.score(labels, own) for own in predictions]))
    values = compute_item_values(metric, labels, predictions, units)
    if values is None:
        return Estimate(value=value, ci95=None)
    interval = mean_interval(values, sizes=np.bincount(assign_blocks(units)))
    return Estimate(value=value, ci95=clip_interval(interval, metric))


def estimate_gap(values: np.ndarray, units: np.ndarray) -> Interval | None:
    """Return the interval of a mean difference from its values, (seeds, blocks)."""
    if len(values) == 1:
        values = np.repeat(values, 2, axis=0)
    return mean_interval(values, sizes=np.bincount(assign_blocks(units)))


def clip_interval(interval: Interval | None, metric: Metric) -> Interval | None:
    """Return the interval inside the metric's bounds."""
    if interval is None:
        return None
    low, high = (min(max(end, metric.minimum), metric.maximum) for end in interval)
    return float(low), float(high)
