"""One model's score, and one model against another, on the same items: the items alone vary."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.finetune.arm_files import ArmResult, read_arm
from hftl.finetune.context import MEASURED_SPLITS
from hftl.measure.gain import SplitPredictions
from hftl.measure.metrics import (
    METRICS,
    PROPORTIONS,
    Metric,
    accuracy,
    compute_metrics,
    exact_match,
)
from hftl.measure.statistics import (
    assign_blocks,
    effective_count,
    estimate_item_error,
    jackknife,
    rule_of_three_half_width,
    wilson_interval,
)


def score_with_interval(
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
    if metric.name.removeprefix("evaluate:") in PROPORTIONS:
        return _score_proportion(metric, labels, predictions, units)
    found = _estimate_with_interval(
        metric, lambda rows: metric.score(labels[rows], predictions[rows]), len(labels), units
    )
    if found["ci95"] is not None:
        low, high = found["ci95"]
        found["ci95"] = [low, min(high, metric.best)] if metric.sign > 0 else [
            max(low, metric.best), high
        ]  # fmt: skip
    return found


def _score_proportion(
    metric: Metric, labels: np.ndarray, predictions: np.ndarray, units: np.ndarray
) -> dict[str, Any]:
    """The score of a metric of `SHARES`, with Wilson's interval.

    Of rows that are right or wrong, each for itself, their number counts. Where rows of a group
    belong together, or the metric is no mean of rows, as many rows count as would give the
    jackknife's variance.
    """
    value = metric.score(labels, predictions)
    _, sizes = np.unique(units, return_counts=True)
    if len(sizes) < 2:
        return {"value": value, "ci95": None}
    if metric.score in (accuracy, exact_match) and len(sizes) == len(units):
        return {"value": value, "ci95": list(wilson_interval(value, len(units)))}
    values = jackknife(lambda rows: metric.score(labels[rows], predictions[rows]), units)
    error = estimate_item_error(values, np.bincount(assign_blocks(units)))
    if error is None or error.value == 0 or not 0 < value < 1:
        return {"value": value, "ci95": list(wilson_interval(value, effective_count(sizes)))}
    count = value * (1 - value) / error.value**2
    return {"value": value, "ci95": list(wilson_interval(value, count, error.degrees_of_freedom))}


def compare_pair(
    metric: Metric, labels: np.ndarray, own: np.ndarray, other: np.ndarray, units: np.ndarray
) -> dict[str, Any]:
    """How much better `own` is than `other` on the same items; positive is better. See `score_with_interval`."""
    return _estimate_with_interval(
        metric,
        lambda i: (
            metric.sign * (metric.score(labels[i], own[i]) - metric.score(labels[i], other[i]))
        ),
        len(labels),
        units,
        paired=True,
    )


def _estimate_with_interval(
    metric: Metric, statistic: Callable[[np.ndarray], float], rows: int, units: np.ndarray,
    paired: bool = False,
) -> dict[str, Any]:  # fmt: skip
    value = statistic(np.arange(rows))
    if len(np.unique(units)) < 2:
        return {"value": value, "ci95": None}
    values = jackknife(statistic, units)
    error = estimate_item_error(values, np.bincount(assign_blocks(units)))
    if error is None:
        return {"value": value, "ci95": None}
    low, high = error.interval(value)
    if error.value == 0 and metric.best == 1:
        # No item stands out, so the rule of three says how many may.
        count = effective_count(np.unique(units, return_counts=True)[1])
        few = rule_of_three_half_width(count, value if paired else 0.0)
        low, high = value - few, value + few
    return {"value": value, "ci95": [low, high]}


# The arms' files side by side: what every figure of the record is computed from.


def collect_predictions(
    folders: Mapping[str, list[Path]], prepared: PreparedData, metric: Metric
) -> tuple[dict[str, SplitPredictions], list[dict[str, Any]]]:
    """Predictions of all arms a split, and the record's `arms`.

    Args:
        folders: for each arm its folders, one a seed, seeds in one order for all.
        prepared: the rows that were predicted.
        metric: the metric of the recipe, which the arms need not have computed.
    """
    stored = {
        arm: [read_arm(folder, prepared) for folder in found] for arm, found in folders.items()
    }
    told = {}
    for split in MEASURED_SPLITS:
        rows = prepared.rows[split]
        predictions = {arm: np.stack([s.predictions[split] for s in found])
                       for arm, found in stored.items()}  # fmt: skip
        told[split] = SplitPredictions(
            prepared.encode_for_metrics(rows), assign_units(rows), predictions
        )
    return told, [_build_arm_entry(s, prepared, metric) for found in stored.values() for s in found]


def assign_units(rows: list[Row]) -> np.ndarray:
    """An id for each row, (rows,) int64; rows of one group share theirs."""
    if rows[0].group is None:
        return np.arange(len(rows))
    _, ids = np.unique([str(row.group) for row in rows], return_inverse=True)
    return ids.astype(np.int64)


def _build_arm_entry(stored: ArmResult, prepared: PreparedData, metric: Metric) -> dict[str, Any]:
    built_in = list(METRICS[prepared.task].values())
    wanted = built_in if metric in built_in else [*built_in, metric]
    metrics = {
        s: compute_metrics(wanted, stored.labels[s], stored.predictions[s]) for s in MEASURED_SPLITS
    }
    kept = ("arm", "seed", "strategy", "trainable_parameters", "training")
    return {**{key: stored.metrics_file[key] for key in kept}, "metrics": metrics}
