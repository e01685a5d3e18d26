"""Transfer gain: own arm minus another on the same test items, over seeds, with its interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.measure.metrics import Metric
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

MARGIN = 0.01
"""Gains within a point either way count as none: the interval inside it is `equivalent`.

For an error in the label's own unit it is a hundredth of the other arm's error.
"""
BASELINES = ("scratch", "classical")
"""The arms that a transfer gain is measured over."""


@dataclass(frozen=True)
class SplitPredictions:
    """What the arms of a run predicted on one split.

    `labels` (rows,), `units` (rows,) int ids whose rows belong together, and for each arm
    `predictions[arm]` of shape (seeds, rows), seeds in one order for all.
    """

    labels: np.ndarray
    units: np.ndarray
    predictions: Mapping[str, np.ndarray]


def compute_gain(metric: Metric, told: SplitPredictions, own: str, other: str) -> dict[str, Any]:
    """How much better `own` is than `other`, in the metric's unit, positive is better.

    Returns:
        metric, value, ci95 ([low, high], or None with one seed), seeds, p_value (None under 6
        seeds), relative_error_reduction, outcome.
    """
    pairs = list(zip(told.predictions[own], told.predictions[other], strict=True))
    deltas = np.array([_score_difference(metric, told.labels, a, b) for a, b in pairs])
    interval, p_value = _estimate_interval(metric, told, pairs, float(deltas.mean()))
    scores = [compute_mean_score(metric, told, arm) for arm in (own, other)]
    margin = MARGIN if metric.best else MARGIN * abs(scores[1])
    return {
        "metric": metric.name,
        "value": float(deltas.mean()),
        "ci95": None if interval is None else list(interval),
        "seeds": len(deltas),
        "p_value": p_value if len(deltas) >= MIN_SEEDS_FOR_P else None,
        "relative_error_reduction": relative_error_reduction(scores[0], scores[1], metric.best),
        "outcome": classify_gain(interval, margin),
    }


def compute_transfer_gain(
    metric: Metric, test: SplitPredictions, own: str
) -> dict[str, Any] | None:
    """Return the gain over `scratch` or `classical`, whichever is less on test; None without.

    A choice on validation would favour the baseline that validation was used most for: scratch
    chooses its epoch and rate there. The lesser gain can be that of a baseline that is known well
    while the other, known badly, may be as good as `own`: it is `positive` only where the gains
    over both are, so that false alarms are no more frequent than those of one interval.

    Returns:
        The keys of `compute_gain`, `baseline`, and `baselines`, by name the gains over both.
    """
    gains = {
        arm: compute_gain(metric, test, own, arm) for arm in BASELINES if arm in test.predictions
    }
    return select_lesser_gain(gains) if gains else None


def select_lesser_gain(gains: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the least of the gains, see `compute_transfer_gain`; of equals the first.

    Args:
        gains: by the baseline's name, see `compute_gain`; at least one.
    """
    baseline = min(gains, key=lambda arm: gains[arm]["value"])
    least = gains[baseline]
    outcomes = {found["outcome"] for found in gains.values()}
    sure = least["outcome"] != "positive" or outcomes == {"positive"}
    told = {**least, "outcome": least["outcome"] if sure else "undetermined"}
    return {**told, "baseline": baseline, "baselines": dict(gains)}


def compute_mean_score(metric: Metric, told: SplitPredictions, arm: str) -> float:
    """The metric, averaged over seeds."""
    return float(np.mean([metric.score(told.labels, p) for p in told.predictions[arm]]))


def find_best_seed(metric: Metric, validation: SplitPredictions, own: str) -> int:
    """The position of the seed that is best on validation; the first of equals."""
    scores = [metric.sign * metric.score(validation.labels, p) for p in validation.predictions[own]]
    return int(np.argmax(scores))


def build_ladder(
    metric: Metric, validation: SplitPredictions, test: SplitPredictions, own: str
) -> list[dict[str, Any]]:
    """A row an arm, best on test first: its mean, spread, and what `own` gains over it."""
    rows = []
    for arm, predictions in test.predictions.items():
        scores = np.array([metric.score(test.labels, p) for p in predictions])
        rows.append(
            {
                "arm": arm,
                "validation": compute_mean_score(metric, validation, arm),
                "test": float(scores.mean()),
                "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
                "gain_of_own": None if arm == own else compute_gain(metric, test, own, arm),
            }
        )
    return sorted(rows, key=lambda row: -metric.sign * row["test"])


def _score_difference(metric: Metric, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return metric.sign * (metric.score(labels, a) - metric.score(labels, b))


def _estimate_interval(
    metric: Metric, told: SplitPredictions, pairs: list[tuple[np.ndarray, np.ndarray]], value: float
) -> tuple[tuple[float, float] | None, float | None]:
    """The variance-components interval and p-value of the jackknife values, centred on the gain
    itself; None with one seed or one unit."""
    if len(pairs) < 2 or len(np.unique(told.units)) < 2:
        return None, None
    values = np.stack(
        [
            jackknife(
                lambda i, a=a, b=b: _score_difference(metric, told.labels[i], a[i], b[i]),
                told.units,
            )
            for a, b in pairs
        ]
    )
    error = estimate_mean_error(values, np.bincount(assign_blocks(told.units)))
    if error is None:
        return None, None
    if error.value == 0 and metric.best == 1:
        # No item stands out, so the rule of three says how many may.
        units = effective_count(np.unique(told.units, return_counts=True)[1])
        half = rule_of_three_half_width(units, value)
        return (value - half, value + half), rule_of_three_p_value(value, units)
    return error.interval(value), error.p_value(value)


# What an adaptation did: its losses before and after, and what it was worth to the task.


MAX_EXPONENT = 700.0
"""Above this loss exp leaves the range of floats."""


def summarize_adaptation(told: dict[str, Any]) -> dict[str, Any]:
    """The record of one adaptation, from the evaluations it was judged by.

    Args:
        told: `history`, a list of {step, target, general, guard} whose first is the start, the
            `step` that was kept, and how it was made, which is taken over.

    Returns:
        `loss` {before, after, fall: the share by which it fell} on held-out corpus, `general` the
        same on general data, `guard` {kind, tolerance, before, after}; with mlm each loss has its
        `perplexity` [before, after] a hidden token.
    """
    history = told["history"]
    start = history[0]
    kept = next(seen for seen in history if seen["step"] == told["step"])
    words = told["objective"] == "mlm"
    guarded = {"kind": told["guard"], "tolerance": told["tolerance"]}
    more: dict[str, Any] = {"loss": _compare_losses(start["target"], kept["target"], words)}
    more["general"] = (
        None
        if start["general"] is None
        else _compare_losses(start["general"], kept["general"], words)
    )
    return told | more | {
        "guard": guarded | {"before": start["guard"], "after": kept["guard"]}
    }  # fmt: skip


def describe_adaptation_outcome(stages: list[dict[str, Any]], gain: dict[str, Any] | None) -> str:
    """Whether adaptation beat no adaptation, in plain words.

    Args:
        stages: the record's adaptations.
        gain: the own arm's gain over `source`, the same without adaptation; None without a task.
    """
    if all(stage["kept"] == "original" for stage in stages):
        return f"Adaptation was undone: {stages[-1]['why']}; the original weights were kept"
    if gain is None:
        return "Whether adaptation helps a task was not measured: the recipe has none"
    if gain["ci95"] is None:
        return "Whether adaptation beat no adaptation is not known: no interval could be made"
    return {
        "positive": "Adaptation helped",
        "equivalent": "Adaptation made practically no difference",
        "negative": "Adaptation did harm: without it the model is better",
        "undetermined": "Adaptation did not beat no adaptation beyond noise",
    }[gain["outcome"]]


def _compare_losses(before: float, after: float, words: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"before": before, "after": after, "fall": 1 - after / before}
    if words:
        found["perplexity"] = [_perplexity(before), _perplexity(after)]
    return found


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < MAX_EXPONENT else None
