"""Give ranks their uncertainty: which of several scores on the same rows can be told apart."""

from collections.abc import Callable

import numpy as np

DRAWS = 1000


def bootstrap_scores(
    score: Callable[[int, np.ndarray], float], count: int, units: np.ndarray, draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Return the scores of resampled units, the same for all, (draws, count).

    Args:
        score: maps a number below `count` and row positions, with repeats, to a score.
        count: how many scores there are.
        units: (rows,) integers; rows of one unit are drawn together.
        draws: how many times.
        seed: of the draw.
    """
    draw = np.random.default_rng(seed)
    order = np.argsort(units, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(units[order]))[:-1])
    members = [rows for rows in members if len(rows)]
    are_single = len(members) == len(units)
    values = np.empty((draws, count))
    for number in range(draws):
        picked = draw.integers(0, len(members), len(members))
        rows = order[picked] if are_single else np.concatenate([members[i] for i in picked])
        values[number] = [score(i, rows) for i in range(count)]
    return values


def compute_rank_intervals(
    points: np.ndarray, draws: np.ndarray, level: float = 0.95
) -> list[tuple[int, int]]:
    """Return the lowest and highest rank that each score may have, 1 for the largest score.

    The set of Mogstad, Romano, Shaikh & Wilhelm 2024 (Review of Economic Studies 91:476-518): a
    score cannot rank below those that it is significantly better than, by the bootstrap's largest
    |t| over its differences to all others. Percentiles of bootstrapped ranks do not cover the true
    rank where scores are near each other.

    Args:
        points: (count,) scores, more is better.
        draws: (draws, count) of `bootstrap_scores`.
        level: of each interval.
    """
    intervals = []
    for own in range(len(points)):
        others = [i for i in range(len(points)) if i != own]
        if not others:
            intervals.append((1, 1))
            continue
        gaps = points[others] - points[own]
        noise = draws[:, others] - draws[:, [own]] - gaps
        error = np.maximum(noise.std(0, ddof=1), 1e-12)
        critical = np.quantile(np.abs(noise / error).max(1), level)
        better, worse = gaps > critical * error, gaps < -critical * error
        intervals.append((1 + int(better.sum()), len(points) - int(worse.sum())))
    return intervals


def compute_gap_interval(
    first: int, second: int, points: np.ndarray, draws: np.ndarray
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the gap between two scores."""
    gaps = draws[:, first] - draws[:, second]
    centre = points[first] - points[second]
    low, high = np.quantile(gaps - gaps.mean(), (0.025, 0.975))
    return float(centre + low), float(centre + high)
