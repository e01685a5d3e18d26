"""Transfer gain: own arm minus another on the same test items, over seeds, with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.metrics import Metric
from hftl.statistics import (
    jackknife,
    mean_interval,
    outcome,
    relative_error_reduction,
    sign_flip_p,
)

MARGIN = 0.01
"""Gains within a point either way count as none: the interval inside it is `equivalent`.

For an error in the label's own unit it is a hundredth of the other arm's error.
"""


@dataclass(frozen=True)
class Predicted:
    """What the arms of a run predicted on one split.

    `labels` (rows,), `units` (rows,) int ids whose rows belong together, and for each arm
    `predictions[arm]` of shape (seeds, rows), seeds in one order for all.
    """

    labels: np.ndarray
    units: np.ndarray
    predictions: Mapping[str, np.ndarray]


def gain(metric: Metric, told: Predicted, own: str, other: str) -> dict[str, Any]:
    """How much better `own` is than `other`, in the metric's unit, positive is better.

    Returns:
        metric, value, ci95 ([low, high], or None with one seed), seeds, p_value (None under 6
        seeds), relative_error_reduction, outcome.
    """
    pairs = list(zip(told.predictions[own], told.predictions[other], strict=True))
    deltas = np.array([_difference(metric, told.labels, a, b) for a, b in pairs])
    interval = _interval(metric, told, pairs, float(deltas.mean()))
    scores = [mean_score(metric, told, arm) for arm in (own, other)]
    margin = MARGIN if metric.best else MARGIN * abs(scores[1])
    return {
        "metric": metric.name,
        "value": float(deltas.mean()),
        "ci95": None if interval is None else list(interval),
        "seeds": len(deltas),
        "p_value": sign_flip_p(deltas),
        "relative_error_reduction": relative_error_reduction(scores[0], scores[1], metric.best),
        "outcome": outcome(interval, margin),
    }


def transfer_gain(
    metric: Metric, validation: Predicted, test: Predicted, own: str
) -> dict[str, Any] | None:
    """The gain over `scratch` or `classical`, whichever is better on validation; None without."""
    present = [arm for arm in ("scratch", "classical") if arm in test.predictions]
    if not present:
        return None
    baseline = max(present, key=lambda arm: metric.sign * mean_score(metric, validation, arm))
    return {**gain(metric, test, own, baseline), "baseline": baseline}


def mean_score(metric: Metric, told: Predicted, arm: str) -> float:
    """The metric, averaged over seeds."""
    return float(np.mean([metric.score(told.labels, p) for p in told.predictions[arm]]))


def best_seed(metric: Metric, validation: Predicted, own: str) -> int:
    """The position of the seed that is best on validation; the first of equals."""
    scores = [metric.sign * metric.score(validation.labels, p) for p in validation.predictions[own]]
    return int(np.argmax(scores))


def ladder(
    metric: Metric, validation: Predicted, test: Predicted, own: str
) -> list[dict[str, Any]]:
    """A row an arm, best on test first: its mean, spread, and what `own` gains over it."""
    rows = []
    for arm, predictions in test.predictions.items():
        scores = np.array([metric.score(test.labels, p) for p in predictions])
        rows.append(
            {
                "arm": arm,
                "validation": mean_score(metric, validation, arm),
                "test": float(scores.mean()),
                "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
                "gain_of_own": None if arm == own else gain(metric, test, own, arm),
            }
        )
    return sorted(rows, key=lambda row: -metric.sign * row["test"])


def _difference(metric: Metric, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return metric.sign * (metric.score(labels, a) - metric.score(labels, b))


def _interval(
    metric: Metric, told: Predicted, pairs: list[tuple[np.ndarray, np.ndarray]], value: float
) -> tuple[float, float] | None:
    """The variance-components interval of the jackknife values, centred on the gain itself."""
    if len(pairs) < 2 or len(np.unique(told.units)) < 2:
        return None
    values = np.stack(
        [
            jackknife(
                lambda i, a=a, b=b: _difference(metric, told.labels[i], a[i], b[i]), told.units
            )
            for a, b in pairs
        ]
    )
    interval = mean_interval(values)
    if interval is None:
        return None
    if interval[0] == interval[1] and metric.best == 1:
        # No item differed: with n items up to 3 / n of all may (rule of three, Hanley & Lippman-
        # Hand 1983, JAMA 249:1743).
        few = 3 / len(np.unique(told.units))
        return value - few, value + few
    shift = value - float(values.mean())
    return interval[0] + shift, interval[1] + shift
