"""Measure how far two samples of features lie from each other, with intervals.

All take (rows, width) features of as many rows on both sides, in an order that means nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import rel_entr

from hftl.analysis.out_of_fold import predict_out_of_fold
from hftl.measure.statistics import estimate_item_error, jackknife, wilson_interval

PERMUTATIONS = 500
INDEPENDENT_SHARE = 2 / 3
"""The rows of a fold share a classifier: simulated, their errors vary as those of so many rows."""
BLOCKS = 20
"""Blocks of the jackknife."""
MAX_WORDS = 10_000
"""The most frequent words whose overlap counts (Gururangan et al. 2020, arXiv:2004.10964)."""


class Distance(NamedTuple):
    """Hold a distance and its 95 % interval."""

    value: float
    low: float
    high: float


class DomainClassifier(NamedTuple):
    """Hold what a held-out domain classifier says of two samples."""

    a_distance: Distance
    h_divergence: Distance


def classify_domains(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None
) -> DomainClassifier:
    """Return the proxy A-distance and the H-divergence of two samples, both at most 2.

    2 (1 - 2 e), e the cross-validated error of a linear classifier of the domains (Ben-David et al.
    2007, NIPS 19; 2010, Machine Learning 79:151-175). On training rows e is 0 for any two samples
    wider than they are long. The H-divergence takes the best threshold on the same held-out scores,
    2 max |F - G|, so it is above 0 for equal domains.

    Args:
        first: (rows, width).
        second: (rows, width).
        groups: (2 rows,) names, first's rows before second's; rows of one group share a fold.
    """
    rows = len(first)
    domains = np.repeat(np.array([0, 1]), [rows, len(second)])
    logits = predict_out_of_fold(
        np.concatenate([first, second]).astype(np.float32), domains, 2, groups
    )
    error = float(np.mean(logits.argmax(1) != domains))
    units = len(domains) if groups is None else len(np.unique(groups))
    low, high = wilson_interval(error, units * INDEPENDENT_SHARE)
    scores = logits[:, 1] - logits[:, 0]
    j, threshold = _find_best_threshold(scores, domains)
    wrong = float(np.mean((scores > threshold) != domains))
    spread = wilson_interval(min(wrong, 1 - wrong), units * INDEPENDENT_SHARE)
    return DomainClassifier(
        Distance(2 - 4 * error, 2 - 4 * high, 2 - 4 * low),
        Distance(2 * j, max(0.0, 2 - 4 * spread[1]), 2 - 4 * spread[0]),
    )


def _find_best_threshold(scores: np.ndarray, domains: np.ndarray) -> tuple[float, float]:
    """Return the largest gap between the two samples' distribution functions, and where it is."""
    order = np.sort(scores)
    shares = [
        np.searchsorted(np.sort(scores[domains == d]), order, "right") / np.sum(domains == d)
        for d in (0, 1)
    ]
    gaps = np.abs(shares[0] - shares[1])
    best = int(gaps.argmax())
    return float(gaps[best]), float(order[best])


class MeanDiscrepancy(NamedTuple):
    """Hold the unbiased MMD^2 of two samples and the p-value of no difference."""

    distance: Distance
    p_value: float


def compute_mmd(
    first: np.ndarray, second: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0
) -> MeanDiscrepancy:
    """Return the unbiased squared maximum mean discrepancy under a Gaussian kernel.

    exp(-d^2 / (2 s^2)), s the median distance of the pooled rows (Gretton et al. 2012, JMLR
    13:723-773, lemma 6); it may be negative. The p-value permutes the rows; the interval is of the
    normal distribution, its variance that of a U-statistic with both of its terms, since the first
    is 0 for equal domains.
    """
    pooled = np.concatenate([first, second]).astype(np.float64)
    count, rows = len(pooled), len(first)
    squares = np.maximum(_square_distances(pooled), 0.0)
    median = float(np.median(squares[np.triu_indices(count, 1)]))
    kernel = np.exp(-squares / (2 * (median or 1.0)))
    np.fill_diagonal(kernel, 0.0)
    rng = np.random.default_rng(seed)
    own = np.arange(count) < rows
    members = np.stack([own, *(rng.permutation(own) for _ in range(permutations))]).astype(float)
    values = _estimate_mmd(kernel, members)
    p_value = float((1 + np.sum(values[1:] >= values[0])) / (1 + permutations))
    half = 1.96 * _estimate_mmd_variance(kernel, rows) ** 0.5
    value = float(values[0])
    return MeanDiscrepancy(Distance(value, value - half, value + half), p_value)


def _square_distances(rows: np.ndarray) -> np.ndarray:
    lengths = np.einsum("ij,ij->i", rows, rows)
    return lengths[:, None] + lengths - 2 * rows @ rows.T


def _estimate_mmd(kernel: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the estimate for each assignment of rows to the first sample, (assignments, rows)."""
    sums = kernel.sum(1)
    within = np.einsum("pi,pi->p", members @ kernel, members)
    touching = members @ sums
    m = members.sum(1)
    n = len(kernel) - m
    others = sums.sum() - 2 * touching + within
    return within / (m * (m - 1)) + others / (n * (n - 1)) - 2 * (touching - within) / (m * n)


def _estimate_mmd_variance(kernel: np.ndarray, rows: int) -> float:
    """Return the variance of a U-statistic of order 2 over the pairs (x_i, y_i)."""
    n = min(rows, len(kernel) - rows)
    x, y = kernel[:rows][:n], kernel[rows:][:n]
    h = x[:, :n] + y[:, rows : rows + n] - x[:, rows : rows + n] - y[:, :n]
    off = ~np.eye(n, dtype=bool)
    means = np.where(off, h, 0).sum(1) / (n - 1)
    pairs = float(h[off].var())
    single = max(float(means.var(ddof=1)) - pairs / (n - 1), 0.0)
    return (4 * (n - 2) * single + 2 * pairs) / (n * (n - 1))


def compute_frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Fréchet distance of two Gaussians with the samples' moments.

    |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982). The last trace is the sum of the
    singular values of X Y^T over the centred rows, less one in number: no root of a singular
    covariance is taken. It is biased upward by as much as rows are few.
    """
    x, y = (side.astype(np.float64) - side.mean(0, dtype=np.float64) for side in (first, second))
    gap = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    traces = (x**2).sum() / (len(x) - 1) + (y**2).sum() / (len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:
        x, y = (np.asarray(np.linalg.qr(side, mode="r")) for side in (x, y))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    scale = ((len(first) - 1) * (len(second) - 1)) ** 0.5
    return float(gap @ gap + traces - 2 * cross / scale)


def extrapolate_frechet(first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the Fréchet distance at infinitely many rows, with its jackknife interval.

    The bias falls as 1 / rows (Chong & Forsyth 2020, arXiv:1911.07023), so twice the distance of
    all rows less that of halves has none to first order; it may be negative.
    """

    def estimate(rows: np.ndarray) -> float:
        x, y = first[rows], second[rows]
        half = len(rows) // 2
        parts = [compute_frechet(x[:half], y[:half]), compute_frechet(x[half:], y[half:])]
        return 2 * compute_frechet(x, y) - float(np.mean(parts))

    count = min(len(first), len(second))
    return _jackknife_distance(estimate, count)


def _jackknife_distance(estimate: Callable[[np.ndarray], float], count: int) -> Distance:
    rows = np.arange(count)
    values = jackknife(estimate, rows, BLOCKS)
    error = estimate_item_error(values)
    value = estimate(rows)
    low, high = (value, value) if error is None else error.interval(value)
    return Distance(value, low, high)


# Words.


def compute_word_overlap(first: list[list[str]], second: list[list[str]]) -> Distance:
    """Return the share of the frequent words of one sample that are frequent in the other.

    Args:
        first: the words of each text.
        second: the same, of as many texts.
    """

    def estimate(rows: np.ndarray) -> float:
        sides = [_find_frequent_words([side[i] for i in rows]) for side in (first, second)]
        return len(sides[0] & sides[1]) / max(1, min(map(len, sides)))

    return _clip(_jackknife_distance(estimate, min(len(first), len(second))))


def compute_word_divergence(first: list[list[str]], second: list[list[str]]) -> Distance:
    """Return the Jensen-Shannon divergence of the words, in bits: 0 for equal, 1 for disjoint."""
    vocabulary = {w: i for i, w in enumerate(sorted({w for t in [*first, *second] for w in t}))}
    counts = [_count_words(side, vocabulary) for side in (first, second)]

    def estimate(rows: np.ndarray) -> float:
        p, q = (_share(side[rows].sum(0)) for side in counts)
        middle = (p + q) / 2
        return float((rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / (2 * np.log(2)))

    return _clip(_jackknife_distance(estimate, min(len(first), len(second))))


def _find_frequent_words(texts: list[list[str]]) -> set[str]:
    return {w for w, _ in Counter(w for text in texts for w in text).most_common(MAX_WORDS)}


def _count_words(texts: list[list[str]], vocabulary: dict[str, int]) -> np.ndarray:
    counts = np.zeros((len(texts), len(vocabulary)), dtype=np.float32)
    for row, text in enumerate(texts):
        np.add.at(counts[row], [vocabulary[word] for word in text], 1)
    return counts


def _share(counts: np.ndarray) -> np.ndarray:
    return counts / max(float(counts.sum()), 1.0)


def _clip(distance: Distance) -> Distance:
    return Distance(distance.value, max(0.0, distance.low), min(1.0, distance.high))
