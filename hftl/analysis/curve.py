"""Score arms against the number of labels, on nested draws that all arms share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from hftl.analysis.curve_figures import (
    Quantity,
    compare_labels,
    compute_area,
    extrapolate,
    find_crossing,
)
from hftl.analysis.estimates import compute_item_values, draw_points, estimate_score
from hftl.analysis.facts import (
    CurveAnalysis,
    CurveArm,
    CurveForecast,
    CurvePoint,
    Estimate,
    LabelCount,
    LabelValue,
    Provenance,
)
from hftl.analysis.feature_store import FeatureStore, describe_provenance
from hftl.config.recipe import Recipe
from hftl.data.rows import Row
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS, draw_shots, hash_row, limit_rows
from hftl.errors import DataError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import assign_units
from hftl.measure.metrics import Metric, find_metric
from hftl.measure.statistics import assign_blocks
from hftl.runtime.progress import open_bar

DEFAULT_ARMS = ("head", "classical")
LARGEST_DEFAULT = 320
TOTAL_FACTOR = 4
"""Of the default sizes, where labels are counted in all and not a class."""
STEP = 0.01
"""The gain that more labels are asked for: one point."""
Predict = Callable[[ExperimentContext, int], np.ndarray]
"""Return the logits of test under a context's training rows, of one draw."""


class CurveOptions(NamedTuple):
    """Hold what a curve is made of; sizes may be left to the data."""

    sizes: tuple[int, ...] = ()
    draws: int = 5
    arms: tuple[str, ...] = DEFAULT_ARMS
    most_rows: int = 2000


def compute_curve(
    recipe: Recipe, context: ExperimentContext, store: FeatureStore, options: CurveOptions,
    find_arm: Callable[[str, ExperimentContext], Predict],
) -> CurveAnalysis:  # fmt: skip
    """Score every arm at every size and draw on test.

    Args:
        recipe: metric and arms.
        context: source and rows; its own number of shots does not count.
        store: the features.
        options: see there; `most_rows` of train are drawn from, and as many of test are scored.
        find_arm: returns what trains the arm of a name, given the context of the largest size.

    Raises:
        DataError: if a class has fewer rows than the largest size.
        RecipeError: if sizes are too few, and what `find_arm` raises.
    """
    metric = find_metric(recipe.measure.metric, context.prepared.task)
    pooled = _pool_rows(context, options.most_rows)
    sizes = _choose_sizes(pooled, options.sizes)
    test = pooled.prepared.rows["test"]
    labels, units = pooled.prepared.encode_for_metrics(test), assign_units(test)
    store.compute([*pooled.prepared.rows["train"], *test])
    predictions: dict[str, list[list[np.ndarray]]] = {}
    total = len(options.arms) * len(sizes) * options.draws
    # Two threads solve a few hundred rows in more time than one.
    with open_bar("curve", total) as advance, threadpool_limits(1, user_api="blas"):
        for name in options.arms:
            predict = find_arm(name, _cut_context(pooled, sizes[-1]))
            predictions[name] = []
            for size in sizes:
                drawn = _cut_context(pooled, size)
                logits = [predict(drawn, seed) for seed in range(options.draws)]
                predictions[name].append(
                    [pooled.prepared.decode_for_metrics(test, one) for one in logits]
                )
                advance(sum(map(len, predictions.values())) * options.draws, f"curve: {name}")
    provenance = describe_provenance(context, recipe.finetune.pooling, range(options.draws))
    return _summarize_curves(
        metric, context, sizes, options, predictions, labels, units, provenance
    )


def _pool_rows(context: ExperimentContext, most: int) -> ExperimentContext:
    """Return the context with so many rows of train and test at most."""
    rows = dict(context.prepared.rows)
    for split in ("train", "test"):
        rows[split] = limit_rows(rows[split], most, context.prepared.task, 0, "curve")
    prepared = replace(context.prepared, rows=rows)
    return replace(context, prepared=prepared, shots=None, _probes={}, class_scores={})


def _choose_sizes(context: ExperimentContext, given: Sequence[int]) -> list[int]:
    """Return the sizes in order; by default they double as far as every class has rows.

    Raises:
        DataError: if a class has fewer rows than the largest size, or too few for two sizes.
        RecipeError: if fewer than two sizes are given.
    """
    rows, task = context.prepared.rows["train"], context.prepared.task
    if given:
        sizes = sorted(set(given))
        if len(sizes) < 2 or sizes[0] < 1:
            raise RecipeError(
                f"--sizes {','.join(map(str, given))} is no curve", "Give two or more"
            )
        try:
            draw_shots(rows, sizes[-1], task, 0)
        except DataError as error:
            what = error.what.replace("shots=", "--sizes ")
            raise DataError(what, "Give smaller --sizes, or more rows") from error
        return sizes
    factor = TOTAL_FACTOR if task in TASKS_WITHOUT_CLASS_SHOTS else 1
    sizes = [5 * factor]
    while sizes[-1] < LARGEST_DEFAULT * factor and _holds(rows, 2 * sizes[-1], task):
        sizes.append(2 * sizes[-1])
    if len(sizes) < 2:
        raise DataError(
            f"a class has fewer than {2 * sizes[0]} rows left for training, too few for a curve",
            "Give more rows, or smaller --sizes",
        )
    return sizes


def _holds(rows: list[Row], size: int, task: str) -> bool:
    try:
        draw_shots(rows, size, task, 0)
    except DataError:
        return False
    return True


def _cut_context(context: ExperimentContext, size: int) -> ExperimentContext:
    """Return the context at a number of labels: who has few has no more for validation."""
    prepared = context.prepared
    count = size if prepared.task in TASKS_WITHOUT_CLASS_SHOTS else size * len(prepared.names)
    held = limit_rows(prepared.rows["validation"], count, prepared.task, 0, "curve")
    rows = {**prepared.rows, "validation": sorted(held, key=hash_row)}
    # A probe is known by its seed, and entailment by its prompts: those of other rows are others.
    prepared = replace(prepared, rows=rows)
    return replace(context, prepared=prepared, shots=size, _probes={}, class_scores={})


def _summarize_curves(
    metric: Metric, context: ExperimentContext, sizes: list[int], options: CurveOptions,
    predictions: dict[str, list[list[np.ndarray]]], labels: np.ndarray, units: np.ndarray,
    provenance: Provenance,
) -> CurveAnalysis:  # fmt: skip
    """Return all figures of the curves from what was predicted."""
    count, counts = len(sizes), np.array(sizes, dtype=np.float64)
    scores = {
        name: [estimate_score(metric, labels, draws, units) for draws in by_size]
        for name, by_size in predictions.items()
    }
    points = metric.sign * np.array([[one.value for one in scores[name]] for name in predictions])
    values = [
        compute_item_values(metric, labels, draws, units)
        for by_size in predictions.values()
        for draws in by_size
    ]
    # Items of one unit say nothing of their spread: then there are values without intervals.
    drawn = np.repeat(points.reshape(1, -1), 2, axis=0)
    present = [value for value in values if value is not None]
    has_spread = len(present) == len(values)
    if has_spread:
        sizes_of = np.bincount(assign_blocks(units))
        drawn = draw_points(metric.sign * np.stack(present), points.ravel(), sizes_of)
    drawn = drawn.reshape(len(drawn), len(points), count)
    arms = [
        _describe_arm(metric, name, sizes, scores[name], points[i], drawn[:, i], has_spread)
        for i, name in enumerate(predictions)
    ]
    names = list(predictions)
    values_of = [
        _compare_arms(names[0], names[i], counts, points[[0, i]], drawn[:, [0, i]], has_spread)
        for i in range(1, len(names))
    ]
    return CurveAnalysis(
        source=context.source.name, metric=metric.name, lower_is_better=metric.lower_is_better,
        per_class=context.prepared.task not in TASKS_WITHOUT_CLASS_SHOTS, sizes=sizes,
        draws=options.draws, test_rows=len(labels), arms=arms, labels=values_of,
        provenance=provenance,
    )  # fmt: skip


def _describe_arm(
    metric: Metric, name: str, sizes: list[int], scores: list[Estimate], points: np.ndarray,
    draws: np.ndarray, has_spread: bool,
) -> CurveArm:  # fmt: skip
    counts = np.array(sizes, dtype=np.float64)
    return CurveArm(
        arm=name,
        points=[CurvePoint(labels=n, score=s) for n, s in zip(sizes, scores, strict=True)],
        area=float(metric.sign * compute_area(counts, points)),
        forecast=_forecast(metric, counts, points, draws, has_spread),
    )


def _compare_arms(
    first: str, other: str, sizes: np.ndarray, points: np.ndarray, draws: np.ndarray,
    has_spread: bool,
) -> LabelValue:  # fmt: skip
    """Return what the labels of two arms are worth; points (2, sizes), draws (draws, 2, sizes)."""
    curves = sizes, points[0], points[1], draws[:, 0], draws[:, 1]
    return LabelValue(
        arm=first,
        baseline=other,
        catches_up=_count(find_crossing(*curves), has_spread),
        ratios=[_count(ratio, has_spread) for ratio in compare_labels(*curves)],
    )


def _forecast(
    metric: Metric, sizes: np.ndarray, points: np.ndarray, draws: np.ndarray, has_spread: bool
) -> CurveForecast | None:
    """Return the extrapolation of one arm in the metric's own direction."""
    fit = extrapolate(sizes, points, draws, metric.sign * metric.best, STEP)
    if fit is None:
        return None
    return CurveForecast(
        a=float(fit.law.a[0]), b=float(fit.law.b[0]), c=float(fit.law.c[0]),
        labels=int(2 * sizes[-1]), predicted=_estimate(metric, fit.predicted, has_spread),
        held_out=_estimate(metric, fit.held_out, has_spread),
        held_out_covered=fit.held_out_covered if has_spread else None, step=STEP,
        next_point=_count(fit.next_point, has_spread),
    )  # fmt: skip


def _estimate(metric: Metric, quantity: Quantity, has_spread: bool) -> Estimate:
    ends = sorted((metric.sign * quantity.low, metric.sign * quantity.high))
    interval = (ends[0], ends[1]) if has_spread else None
    return Estimate(value=metric.sign * quantity.value, ci95=interval)


def _count(quantity: Quantity, has_spread: bool) -> LabelCount:
    value, low, high = (one if np.isfinite(one) else None for one in quantity[:3])
    interval = (low, high) if has_spread else None
    return LabelCount(value=value, ci95=interval, is_at_most=quantity.is_at_most)
