"""Measure how far two samples of features lie from each other, with intervals.

All take (rows, width) features of as many rows on both sides, in an order that means nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from hftl.analysis.out_of_fold import fit_folds, predict_folds
from hftl.analysis.probe import Probe
from hftl.measure.statistics import (
    MeanError,
    assign_blocks,
    compute_pseudo_values,
    estimate_item_error,
    jackknife,
    wilson_interval,
)

PERMUTATIONS = 500
BLOCKS = 20
"""Blocks of the jackknife."""
THRESHOLDS = 101
"""Of a classifier, that are tried: quantiles of its scores."""


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
    wider than they are long. The H-divergence is 2 (F - G) of the same held-out scores at the
    threshold where the rows of the other folds lie furthest apart: the largest gap of these very
    rows is above 0 for equal domains, and the interval around it misses that in one case of six.
    The intervals are of what classifiers of so many rows attain, which the best one surpasses where
    features are wide. That of the H-divergence is a little too wide for equal domains, where the
    threshold may be anywhere and hardly a row beyond it.

    Args:
        first: (rows, width).
        second: (rows, width).
        groups: (2 rows,) names, first's rows before second's; rows of one group share a fold.
    """
    pooled = np.concatenate([first, second]).astype(np.float32)
    domains = np.repeat(np.array([0, 1]), [len(first), len(second)])
    folds, probes = fit_folds(pooled, domains, 2, groups)
    logits = predict_folds(pooled, folds, probes)
    units = len(domains) if groups is None else len(np.unique(groups))
    noise = _estimate_noise_share(probes, pooled.std(0))
    error = float(np.mean(logits.argmax(1) != domains))
    low, high = _bound_error(error, units, noise, len(probes))
    placed = _place_by_best_thresholds(logits[:, 1] - logits[:, 0], domains, folds)
    wrong = float(np.mean(placed != domains))
    least, most = _bound_error(wrong, units, noise, len(probes))
    return DomainClassifier(
        Distance(2 - 4 * error, 2 - 4 * high, 2 - 4 * low),
        Distance(2 - 4 * wrong, 2 - 4 * most, 2 - 4 * least),
    )


def _estimate_noise_share(probes: Sequence[Probe], scale: np.ndarray) -> float:
    """Return the share of the classifiers' squared weights that is noise of their rows.

    Those of two folds have all but one part in k - 1 of their rows in common. So the cosine of
    their weights on standardised features is 1 where all is signal, and short of it by 1 / (k - 1)
    where all is noise. The estimate may exceed 1: cut off there it would be too low on average.
    """
    weights = np.stack([(probe.weight[1] - probe.weight[0]) * scale for probe in probes])
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    if not lengths.all():
        return 1.0
    unit = weights / lengths
    others = len(probes) - 1
    cosine = (np.sum(unit.sum(0) ** 2) - len(probes)) / (len(probes) * others)
    return float(others * (1 - cosine))


def _bound_error(error: float, units: int, noise: float, folds: int) -> tuple[float, float]:
    """Return the interval of a cross-validated error around what such classifiers attain."""
    variance = error * (1 - error)
    together = compute_shared_variance(error, noise, folds)
    share = variance / (variance + together) if variance else 1.0
    return wilson_interval(error, units * share)


def compute_shared_variance(error: float, noise: float, folds: int) -> float:
    """Return what the variance of a cross-validated error, times the rows, has beyond e (1 - e).

    Each row is held out from one classifier and trains the others. So two rows err together: the
    one moves the boundary towards where it would itself be classified rightly, by as much as the
    other moves it for the one. And the rows that are easy to classify make the classifiers better
    that the others are held out from. For the difference of two means, of scores that are normal in
    each domain, the terms of first and second order in the noise of the classifiers sum up to

        phi(z)^2 r (1 + (1 + 2 h) u - (1 + h - h^2) u^2 / 2),  u = 1 - r,  h = 1 / (folds - 1),

    z the normal quantile of e: .64 of e (1 - e) for equal domains, where the classifier is all
    noise, r = 1, and nothing where it is known. Without the terms in u the interval is of what
    these very classifiers attain, and not of what others of as many rows would (Bates, Hastie &
    Tibshirani 2024, JASA 119:1434-1445, on the two).

    Args:
        error: e.
        noise: r, see `_estimate_noise_share`; above 1, where it is by chance, it stands for itself.
        folds: of the cross-validation.
    """
    from scipy.stats import norm

    signal, h = max(0.0, 1 - noise), 1 / (folds - 1)
    terms = 1 + (1 + 2 * h) * signal - (1 + h - h**2) * signal**2 / 2
    return noise * terms * float(norm.pdf(norm.ppf(error))) ** 2


def _place_by_best_thresholds(
    scores: np.ndarray, domains: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Return whether each row scores above the threshold that is best for the other folds."""
    placed = np.empty(len(scores), dtype=bool)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        placed[held] = scores[held] > _find_best_threshold(scores[~held], domains[~held])
    return placed


def _find_best_threshold(scores: np.ndarray, domains: np.ndarray) -> float:
    """Return up to which score the first sample's share exceeds the second's most, F - G.

    Of distribution functions smoothed by Gaussians of Silverman's width: where steps are furthest
    apart hangs on single rows.
    """
    points = np.quantile(scores, np.linspace(0.0, 1.0, THRESHOLDS))
    first, second = (_smooth_distribution(scores[domains == d], points) for d in (0, 1))
    return float(points[int((first - second).argmax())])


def _smooth_distribution(scores: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the smoothed share of scores up to each point."""
    width = 1.06 * float(scores.std()) * len(scores) ** -0.2
    return ndtr((points[:, None] - scores) / max(width, float(np.finfo(np.float32).tiny))).mean(1)


class MeanDiscrepancy(NamedTuple):
    """Hold the unbiased MMD^2 of two samples and the p-value of no difference."""

    distance: Distance
    p_value: float


def compute_mmd(
    first: np.ndarray, second: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0,
    groups: np.ndarray | None = None,
) -> MeanDiscrepancy:  # fmt: skip
    """Return the unbiased squared maximum mean discrepancy under a Gaussian kernel.

    exp(-d^2 / (2 s^2)), s the median distance of the pooled rows (Gretton et al. 2012, JMLR
    13:723-773, lemma 6); it may be negative. The p-value permutes the rows, or groups as wholes,
    and pairs of one group do not count, as a row and itself do not. The interval is that of its
    root, by a jackknife: the square is skewed.

    Args:
        first: (rows, width).
        second: (rows, width).
        permutations: how many.
        seed: of them.
        groups: see `classify_domains`.
    """
    pooled = np.concatenate([first, second]).astype(np.float64)
    count, rows = len(pooled), len(first)
    squares = np.maximum(_square_distances(pooled), 0.0)
    median = float(np.median(squares[np.triu_indices(count, 1)]))
    names = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    counted = (names[:, None] != names).astype(np.float64)
    kernel = counted * np.exp(-squares / (2 * (median or 1.0)))
    own = (np.arange(count) < rows).astype(np.float64)
    # A document with rows on both sides is two clusters, each of which stays whole.
    sides, clusters = np.unique(np.stack([own, names]), axis=1, return_inverse=True)
    rng = np.random.default_rng(seed)
    members = np.stack([own, *(rng.permutation(sides[0])[clusters] for _ in range(permutations))])
    values = _estimate_mmd(kernel, counted, members, 1 - members)
    p_value = float((1 + np.sum(values[1:] >= values[0])) / (1 + permutations))
    units = assign_units(rows, len(second), groups)
    blocks = assign_blocks(units, BLOCKS)
    left = blocks != np.arange(blocks.max() + 1)[:, None]
    without = _estimate_mmd(kernel, counted, left * own, left * (1 - own))
    sizes = np.bincount(blocks)
    error = estimate_item_error(compute_pseudo_values(values[0], without, sizes), sizes)
    assert error is not None
    return MeanDiscrepancy(_take_root_interval(float(values[0]), error), p_value)


def _square_distances(rows: np.ndarray) -> np.ndarray:
    lengths = np.einsum("ij,ij->i", rows, rows)
    return lengths[:, None] + lengths - 2 * rows @ rows.T


def _estimate_mmd(
    kernel: np.ndarray, counted: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Return the estimate for each assignment of rows to the two samples.

    Args:
        kernel: (rows, rows), 0 where a pair does not count.
        counted: (rows, rows) of 0 and 1.
        first: (assignments, rows) of 0 and 1.
        second: the same.
    """

    def average(side: np.ndarray, other: np.ndarray) -> np.ndarray:
        total, pairs = (np.einsum("pi,pi->p", side @ part, other) for part in (kernel, counted))
        return total / np.maximum(pairs, 1)

    return average(first, first) + average(second, second) - 2 * average(first, second)


def _take_root_interval(value: float, error: MeanError) -> Distance:
    """Return the interval of a square by the delta method on its root, where that is above 0."""
    low, high = error.interval(value)
    if low <= 0:
        return Distance(value, low, high)
    root = value**0.5
    ends = MeanError(error.value / (2 * root), error.degrees_of_freedom).interval(root)
    return Distance(value, ends[0] ** 2, ends[1] ** 2)


def assign_units(first: int, second: int, groups: np.ndarray | None) -> np.ndarray:
    """Return an int for every row, first's before second's: rows of a group share theirs.

    Each side counts from 0, so that as many units of both are left out together.
    """
    if groups is None:
        return np.concatenate([np.arange(first), np.arange(second)])
    numbers: dict[str, int] = {}
    for side in (groups[:first], groups[first:]):
        new = [name for name in dict.fromkeys(side.tolist()) if name not in numbers]
        numbers |= {name: number for number, name in enumerate(new)}
    return np.array([numbers[name] for name in groups.tolist()])


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


def extrapolate_frechet(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None
) -> Distance:
    """Return the Fréchet distance at infinitely many rows, with its jackknife interval.

    The bias falls as 1 / rows (Chong & Forsyth 2020, arXiv:1911.07023), so twice the distance of
    all rows less that of halves has none to first order; it may be negative.
    """
    rows = len(first)
    units = assign_units(rows, len(second), groups)
    # Of every block of the jackknife as many units are in each half.
    half = (units + units // BLOCKS) % 2
    halves = half[:rows], half[rows:]

    def estimate(left: np.ndarray, right: np.ndarray) -> float:
        x, y = first[left], second[right]
        whole, inverse = compute_frechet(x, y), 1 / len(x) + 1 / len(y)
        parts, inverses = [], []
        for number in (0, 1):
            a, b = x[halves[0][left] == number], y[halves[1][right] == number]
            parts.append(compute_frechet(a, b))
            inverses.append(1 / len(a) + 1 / len(b))
        slope = (np.mean(parts) - whole) / (np.mean(inverses) - inverse)
        return float(whole - slope * inverse)

    return jackknife_distance(estimate, units, rows)


def jackknife_distance(
    estimate: Callable[[np.ndarray, np.ndarray], float], units: np.ndarray, rows: int
) -> Distance:
    """Return a distance with its interval over units.

    Args:
        estimate: maps row positions of the two samples to the distance.
        units: see `assign_units`.
        rows: of the first sample.
    """

    def score(positions: np.ndarray) -> float:
        split = np.searchsorted(positions, rows)
        return estimate(positions[:split], positions[split:] - rows)

    sizes = np.bincount(assign_blocks(units, BLOCKS))
    error = estimate_item_error(jackknife(score, units, BLOCKS), sizes)
    assert error is not None
    value = score(np.arange(len(units)))
    return Distance(value, *error.interval(value))
