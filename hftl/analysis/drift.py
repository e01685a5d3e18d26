"""Do the same items still lie beside each other? Neighbours in features before and after."""

import numpy as np
from sklearn.model_selection import GroupKFold

from hftl.analysis.probe import fit_probe
from hftl.errors import DataError

CHUNK_ROWS = 512
"""Rows whose similarities to all others are held at once."""


def mean_shared_neighbours(before: np.ndarray, after: np.ndarray, k: int = 10) -> float:
    """The mean share of each row's k nearest neighbours that are the same, see `compute_shared_neighbours`."""
    return float(compute_shared_neighbours(before, after, k).mean())


def compute_shared_neighbours(before: np.ndarray, after: np.ndarray, k: int = 10) -> np.ndarray:
    """(n,) the share of each row's k nearest neighbours that are the same before and after.

    Nearest by cosine, a row itself left out: the mutual k-nearest-neighbour alignment of Huh et
    al. 2024 (arXiv:2405.07987, appendix A). 1 for equal features, or rotated ones, or rows of
    other lengths; about k / (n - 1) for unrelated ones.

    Args:
        before: features (n, d) of the same rows as `after`, in the same order.
        after: features (n, e).
        k: how many neighbours.

    Raises:
        DataError: if there are not more than k rows, their numbers differ, or a feature is not
            finite.
    """
    rows = len(before)
    if rows != len(after):
        raise DataError(
            f"{rows} rows before and {len(after)} after cannot be compared", "Use the same rows"
        )
    if rows <= k:
        raise DataError(f"{rows} rows have no {k} neighbours each", f"Give more than {k} rows")
    sides = normalize_rows(before), normalize_rows(after)
    shares = []
    for start in range(0, rows, CHUNK_ROWS):
        one, other = (find_nearest(side, start, k) for side in sides)
        member = np.zeros((len(one), rows), dtype=bool)
        np.put_along_axis(member, one, True, axis=1)
        shares.append(np.take_along_axis(member, other, axis=1).mean(1))
    return np.concatenate(shares)


def normalize_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays one."""
    wide = features.astype(np.float64)
    if not np.isfinite(wide).all():
        row = int(np.argmin(np.isfinite(wide).all(1)))
        raise DataError(f"the features of row {row} are not finite", "Look for a diverged model")
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, 1)


def find_nearest(rows: np.ndarray, start: int, k: int) -> np.ndarray:
    """Indices (chunk, k) of the nearest rows to those from `start`, in no order; see
    `normalize_rows`."""
    similar = rows[start : start + CHUNK_ROWS] @ rows.T
    chunk = np.arange(len(similar))
    similar[chunk, start + chunk] = -np.inf
    return np.argpartition(similar, -k, axis=1)[:, -k:]


# How far features have moved, and what can no longer be read from them.
#
# Everything is of the same rows, in the same order, before and after; arrays of features are
# (n, width), and all sums are taken in float64.


FOLDS = 5


def compute_neighbour_hits(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where the nearest other row by cosine has the same label, else 0.

    The mean is the leave-one-out accuracy of the nearest neighbour.

    Args:
        features: (n, width), n at least 2.
        labels: (n,) of anything that can be compared.
    """
    rows = normalize_rows(features)
    neighbours = [find_nearest(rows, start, 1)[:, 0] for start in range(0, len(rows), CHUNK_ROWS)]
    return (labels[np.concatenate(neighbours)] == labels).astype(np.float64)


def compute_cosines(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(n,) the cosine of each row with itself."""
    return (normalize_rows(before) * normalize_rows(after)).sum(1)


def compute_cka(before: np.ndarray, after: np.ndarray) -> float:
    """Return the debiased linear centred kernel alignment of two sets of features.

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) (Kornblith et al. 2019, arXiv:1905.00414, section 3)
    of the unbiased HSIC of Song et al. 2012 (JMLR 13:1393-1434, equation 5), as in minibatch CKA
    (Nguyen et al. 2021, arXiv:2010.15327). 1 for features that are rotated or scaled alone, about 0
    for unrelated ones, where the biased estimator is .88 with 50 rows of 384; it may be below 0. 0
    where the rows of either are all the same.

    Args:
        before: (n, width), n at least 4, under which it is 0.
        after: (n, other width).
    """
    x, y = (side.astype(np.float64) - side.mean(0, dtype=np.float64) for side in (before, after))
    rows = len(x)
    if rows < 4:
        return 0.0
    cross, first, second = (_unbiased_hsic(a, b) for a, b in ((x, y), (x, x), (y, y)))
    # Rounding leaves a trace of a variance where there is none.
    tiny = [1e-12 * float(np.sum(side**2)) ** 2 / rows**2 for side in (x, y)]
    if first <= tiny[0] or second <= tiny[1]:
        return 0.0
    return cross / (first * second) ** 0.5


def compute_cka_floor(before: np.ndarray, after: np.ndarray, draws: int = 19) -> float:
    """Return the largest `compute_cka` of `draws` pairings of the rows by chance.

    Unrelated features are above that of 19 once in 20 times.
    """
    draw = np.random.default_rng(0)
    return max(compute_cka(before, after[draw.permutation(len(after))]) for _ in range(draws))


def _unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of linear kernels of centred features; no kernel is held."""
    n = len(x)
    diagonal = [np.einsum("ij,ij->i", side, side) for side in (x, y)]
    # Sums over other rows: centred features sum to 0 over all rows.
    sums = [-squares for squares in diagonal]
    both = float(np.sum((x.T @ y) ** 2)) - float(diagonal[0] @ diagonal[1])
    outer = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float(both + outer - 2 * (sums[0] @ sums[1]) / (n - 2)) / (n * (n - 3))


def compute_relational_kl(before: np.ndarray, after: np.ndarray, tau: float) -> np.ndarray:
    """(n,) in nats: how much less well `after` tells which rows `before` finds alike.

    KL(q0_i || q_i), where q_i is the softmax of cosine / tau over all rows but i: the distribution
    that contrastive encoders are trained on (SEED, Fang et al. 2021, arXiv:2101.04731, equation 4).

    Args:
        before: (n, d), n at least 2.
        after: (n, e).
        tau: the temperature.
    """
    sides = normalize_rows(before), normalize_rows(after)
    divergences = []
    for start in range(0, len(before), CHUNK_ROWS):
        old, new = (compute_log_softmax(side, start, tau) for side in sides)
        # A row itself has no share: -inf on both sides.
        apart = np.where(np.isneginf(old), 0.0, old) - np.where(np.isneginf(new), 0.0, new)
        divergences.append((np.exp(old) * apart).sum(1))
    return np.maximum(np.concatenate(divergences), 0.0)


def compute_log_softmax(rows: np.ndarray, start: int, tau: float) -> np.ndarray:
    """Return the log of the softmax over the other rows, (chunk, n), -inf for a row itself."""
    logits = rows[start : start + CHUNK_ROWS] @ rows.T / tau
    chunk = np.arange(len(logits))
    logits[chunk, start + chunk] = -np.inf
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def compute_probe_hits(
    fitted_on: np.ndarray, tested_on: list[np.ndarray], labels: np.ndarray, units: np.ndarray,
    penalty: float,
) -> list[np.ndarray]:  # fmt: skip
    """Which rows a cross-validated linear probe gets right, (n,) float64 of 0 and 1.

    Each fold's probe is fitted on the other folds' rows of `fitted_on` and answers for its own
    rows, in each of `tested_on`.

    Args:
        fitted_on: features (n, width).
        tested_on: features of the same rows and width; their own encoder may be another.
        labels: (n,) int64 class ids.
        units: (n,) int64; rows of one unit share a fold.
        penalty: C of the logistic regression.
    """
    hits = [np.zeros(len(labels)) for _ in tested_on]
    folds = GroupKFold(min(FOLDS, len(np.unique(units))))
    for train, test in folds.split(fitted_on, labels, units):
        outputs = int(labels.max()) + 1
        probe = fit_probe(fitted_on[train], labels[train], outputs, None, np.array([penalty]))
        for correct, features in zip(hits, tested_on, strict=True):
            correct[test] = probe.logits(features[test]).argmax(1) == labels[test]
    return hits


def choose_penalty(features: np.ndarray, labels: np.ndarray, units: np.ndarray) -> float:
    """The C that a probe of these features chooses by cross-validation, units whole."""
    return fit_probe(features, labels, int(labels.max()) + 1, units).penalty
