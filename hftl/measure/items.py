"""One model's score, and one model against another, on the same items: the items alone vary."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hftl.metrics import Metric
from hftl.statistics import block_of_rows, effective_count, item_error, jackknife, no_change


def score(
    metric: Metric, labels: np.ndarray, predictions: np.ndarray, units: np.ndarray
) -> dict[str, Any]:
    """A model's score with its interval over items.

    Args:
        metric: what is computed.
        labels: (rows,) or (rows, classes), see `metrics`.
        predictions: the same of the model.
        units: (rows,) int ids whose rows belong together.

    Returns:
        value and ci95 ([low, high], None under two units), in the metric's unit, no better than a
        perfect prediction's.
    """
    found = _told(
        metric, lambda rows: metric.score(labels[rows], predictions[rows]), len(labels), units
    )
    if found["ci95"] is not None:
        low, high = found["ci95"]
        found["ci95"] = [low, min(high, metric.best)] if metric.sign > 0 else [
            max(low, metric.best), high
        ]  # fmt: skip
    return found


def difference(
    metric: Metric, labels: np.ndarray, own: np.ndarray, other: np.ndarray, units: np.ndarray
) -> dict[str, Any]:
    """How much better `own` is than `other` on the same items; positive is better. See `score`."""
    return _told(
        metric,
        lambda i: (
            metric.sign * (metric.score(labels[i], own[i]) - metric.score(labels[i], other[i]))
        ),
        len(labels),
        units,
        paired=True,
    )


def _told(
    metric: Metric, statistic: Callable[[np.ndarray], float], rows: int, units: np.ndarray,
    paired: bool = False,
) -> dict[str, Any]:  # fmt: skip
    value = statistic(np.arange(rows))
    if len(np.unique(units)) < 2:
        return {"value": value, "ci95": None}
    values = jackknife(statistic, units)
    error = item_error(values, np.bincount(block_of_rows(units)))
    if error is None:
        return {"value": value, "ci95": None}
    low, high = error.interval(value)
    if error.value == 0 and metric.best == 1:
        # No item stands out, so the rule of three says how many may.
        count = effective_count(np.unique(units, return_counts=True)[1])
        few = no_change(count, value if paired else 0.0)
        low, high = value - few, value + few
    return {"value": value, "ci95": [low, high]}
