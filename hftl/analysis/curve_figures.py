"""Compute the figures of few-shot curves: what they would be, and what labels are worth.

Scores are signed, so that more is better. Of every curve there are the points, and `draws` of what
the points might have been, from one draw for all curves: they share seeds and test items.
"""

from typing import NamedTuple

import numpy as np

from hftl.analysis.power_law import MIN_POINTS, PowerLaw, fit_power_law

ROUNDING = 1e-12
"""Of the largest score: equal scores may differ by it, as sums are rounded."""


class Quantity(NamedTuple):
    """Hold a number of labels or a ratio, and its 95 % interval; inf is beyond all sizes."""

    value: float
    low: float
    high: float
    is_at_most: bool = False
    """Known to be no more than the value, the smallest size."""


def compute_area(sizes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the mean score over the logarithm of the labels, of (..., sizes)."""
    logs = np.log(sizes)
    return np.trapezoid(points, logs, axis=-1) / (logs[-1] - logs[0])


def make_monotone(points: np.ndarray) -> np.ndarray:
    """Return the nearest rising curves, of (..., sizes): isotonic regression of many at once.

    Its value at k is max over i <= k of min over j >= k of the mean of i to j (Robertson, Wright &
    Dykstra 1988, Order Restricted Statistical Inference, section 1.4).
    """
    sums = np.concatenate([np.zeros((*points.shape[:-1], 1)), np.cumsum(points, -1)], -1)
    places = range(points.shape[-1])

    def average(first: int, last: int) -> np.ndarray:
        return (sums[..., last + 1] - sums[..., first]) / (last + 1 - first)

    return np.stack([
        np.max([np.min([average(i, j) for j in places[k:]], 0) for i in places[: k + 1]], 0)
        for k in places
    ], -1)  # fmt: skip


def _find_needed(sizes: np.ndarray, rising: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the labels at which rising curves, (curves, sizes), reach a score each, (curves,).

    They are interpolated in the logarithm; inf beyond a curve's end.
    """
    # A score that equals the curve's is reached there: two arms of one accuracy are usual.
    targets = targets - ROUNDING * np.abs(rising).max()
    place = np.maximum(np.argmax(rising >= targets[:, None], axis=1), 1)
    low, high = (np.take_along_axis(rising, p[:, None], 1)[:, 0] for p in (place - 1, place))
    gap = np.where(high > low, high - low, 1.0)
    share = np.clip((targets - low) / gap, 0, 1)
    needed = sizes[place - 1] * (sizes[place] / sizes[place - 1]) ** share
    return np.where(targets > rising[:, -1], np.inf, needed)


def compare_labels(
    sizes: np.ndarray, own: np.ndarray, other: np.ndarray, own_draws: np.ndarray,
    other_draws: np.ndarray,
) -> list[Quantity]:  # fmt: skip
    """Return, for each size, how many times the labels the other curve needs for the same score.

    The label-efficiency ratio; inf where the other curve never reaches it. Curves are interpolated
    in the logarithm of the labels; a score below the other's first is worth its first size.

    Args:
        sizes: (sizes,) labels.
        own: (sizes,) scores.
        other: (sizes,) of the other curve.
        own_draws: (draws, sizes).
        other_draws: (draws, sizes).
    """
    ratios = []
    rising = make_monotone(np.vstack([other, other_draws]))
    for place, size in enumerate(sizes):
        targets = np.append(own[place], own_draws[:, place])
        value, *drawn = _find_needed(sizes, rising, targets) / size
        is_enough = bool(rising[0, 0] > own[place])
        ratios.append(_summarize(value, np.array(drawn))._replace(is_at_most=is_enough))
    return ratios


def find_crossing(
    sizes: np.ndarray, own: np.ndarray, other: np.ndarray, own_draws: np.ndarray,
    other_draws: np.ndarray,
) -> Quantity:  # fmt: skip
    """Return the labels from which on the other curve is as good; inf where it is not at the end.

    Arguments as of `compare_labels`.
    """
    drawn = [_find_crossing(sizes, b - a) for a, b in zip(own_draws, other_draws, strict=True)]
    quantity = _summarize(_find_crossing(sizes, other - own), np.array(drawn))
    return quantity._replace(is_at_most=bool((other >= own).all()))


def _find_crossing(sizes: np.ndarray, lead: np.ndarray) -> float:
    """Return where a lead becomes positive for good, interpolated in the logarithm."""
    if lead[-1] < 0:
        return np.inf
    behind = np.flatnonzero(lead < 0)
    if not len(behind):
        return float(sizes[0])
    place = int(behind[-1])
    share = -lead[place] / (lead[place + 1] - lead[place])
    logs = np.log(sizes[place : place + 2])
    return float(np.exp(logs[0] * (1 - share) + logs[1] * share))


def _summarize(value: float, drawn: np.ndarray) -> Quantity:
    """Return the quantity with the percentiles of its draws, of which some may be infinite."""
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf")
    return Quantity(float(value), float(low), float(high))


class Extrapolation(NamedTuple):
    """Hold the law of a curve, and what it predicts; scores are signed."""

    law: PowerLaw
    predicted: Quantity
    """At twice the largest size."""
    held_out: Quantity
    """At the largest size, from the smaller ones."""
    held_out_covered: bool
    """Whether the difference of that and what came is within noise."""
    next_point: Quantity
    """Labels at which the score is better by `step`."""


def extrapolate(
    sizes: np.ndarray, points: np.ndarray, draws: np.ndarray, best: float, step: float
) -> Extrapolation | None:
    """Fit a power law to the error of a curve and predict; None with too few sizes.

    Args:
        sizes: (sizes,) labels.
        points: (sizes,) signed scores.
        draws: (draws, sizes).
        best: the signed score of no error.
        step: the gain that more labels are asked for.
    """
    if len(sizes) < MIN_POINTS or not np.isfinite(best):
        return None
    weights = 1 / np.maximum(draws.var(0), 1e-8)
    errors = np.maximum(best - np.vstack([points, draws]), 0.0)
    law = fit_power_law(sizes, errors, weights)
    before = fit_power_law(sizes[:-1], errors[:, :-1], weights[:-1])
    held = best - before.predict(sizes[-1])
    miss = abs(held[0] - points[-1])
    low, high = np.quantile(held[1:] - draws[:, -1], (0.025, 0.975))
    ahead = best - law.predict(2 * sizes[-1])
    needed = law.solve(law.predict(sizes[-1]) - step)
    return Extrapolation(
        PowerLaw(law.a[:1], law.b[:1], law.c[:1]),
        _widen(_summarize(ahead[0], ahead[1:]), miss, best),
        _summarize(held[0], held[1:]),
        bool(low <= 0 <= high),
        _summarize(needed[0], needed[1:]),
    )


def _widen(quantity: Quantity, miss: float, best: float) -> Quantity:
    """Return the interval with the miss at a held-out size added to each half, as errors add."""
    value, low, high, _ = quantity
    low, high = value - np.hypot(value - low, miss), value + np.hypot(high - value, miss)
    return Quantity(value, float(low), float(min(high, best)))
