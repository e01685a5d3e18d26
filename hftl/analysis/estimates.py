"""Estimate scores over seeds and items, and draw what they might have been."""

from collections.abc import Sequence

import numpy as np

from hftl.analysis.facts import Estimate, Interval
from hftl.measure.metrics import Metric
from hftl.measure.scores import score_with_interval
from hftl.measure.statistics import assign_blocks, effective_count, jackknife, mean_interval

DRAWS, SIMULTANEOUS_DRAWS = 1000, 4000
NO_WIDTH = 1e-9
"""Of an interval: less is rounding."""


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

    Seeds that all score alike show no spread: the interval is then that of the first one's items.

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
    if interval is not None and interval[1] - interval[0] < NO_WIDTH:
        # They err on other items, or on none: two seeds often do. The mean varies no more than one.
        interval = score_with_interval(metric, labels, predictions[0], units).ci95
    return Estimate(value=value, ci95=clip_interval(interval, metric))


def clip_interval(interval: Interval | None, metric: Metric) -> Interval | None:
    """Return the interval inside the metric's bounds."""
    if interval is None:
        return None
    low, high = (min(max(end, metric.minimum), metric.maximum) for end in interval)
    return float(low), float(high)


def draw_points(
    values: np.ndarray, points: np.ndarray, sizes: np.ndarray | None = None, draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Return what the points might have been, (draws, points), centred on the points.

    Seeds and units are two random factors. The part of the seeds is a multivariate t, for their
    covariance is known from a few alone (Searle, Casella & McCulloch 1992, Variance Components,
    chapter 4); the resampling of three or five seeds would leave out a third or a fifth of it.

    Args:
        values: (points, seeds, units) jackknife values of all curves and sizes.
        points: (points,).
        sizes: (units,) rows of each, None where they are equal.
        draws: how many.
        seed: of the draw.
    """
    count, seeds, units = values.shape
    rng = np.random.default_rng(seed)
    of_seeds = np.atleast_2d(np.cov(values.mean(2), bias=False)) if seeds > 1 else 0.0
    of_units = np.atleast_2d(np.cov(values.mean(1), bias=False))
    if seeds > 1:
        # Each of the two holds the error of single cells, which counts once.
        cells = values - values.mean(1, keepdims=True) - values.mean(2, keepdims=True)
        cells = (cells + values.mean((1, 2), keepdims=True)).reshape(count, -1)
        of_units = of_units - cells @ cells.T / ((seeds - 1) * (units - 1)) / seeds
    freedom = (units if sizes is None else effective_count(sizes)) - 1
    drawn = _draw_t(rng, of_units / units, max(freedom, 1), draws)
    if seeds > 1:
        drawn += _draw_t(rng, of_seeds / seeds, seeds - 1, draws)
    return points + drawn


def _draw_t(
    rng: np.random.Generator, covariance: np.ndarray, freedom: float, draws: int
) -> np.ndarray:
    """Return draws of a multivariate t around 0; negative variances count as none."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    normal = rng.normal(size=(draws, len(values))) @ root.T
    return normal * np.sqrt(freedom / rng.chisquare(freedom, size=(draws, 1)))


def compute_simultaneous_intervals(
    values: np.ndarray, points: np.ndarray, sizes: np.ndarray | None = None
) -> list[Interval]:
    """Return intervals that hold all true values at once in 95 % of cases.

    So the interval of one that was chosen for its value holds too. The width is the 95 % quantile
    of the largest standardised error (single-step max-t; Hothorn, Bretz & Westfall 2008,
    Biometrical Journal 50:346-363).

    Args:
        values: see `draw_points`.
        points: (points,).
        sizes: see `draw_points`.
    """
    noise = draw_points(values, points, sizes, SIMULTANEOUS_DRAWS) - points
    error = noise.std(0)
    standardised = np.divide(noise, error, out=np.zeros_like(noise), where=error > 0)
    reach = float(np.quantile(np.abs(standardised).max(1), 0.95)) * error
    return [
        (float(low), float(high)) for low, high in zip(points - reach, points + reach, strict=True)
    ]
