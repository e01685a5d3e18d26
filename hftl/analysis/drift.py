"""Measure how far features have moved, and what can no longer be read from them.

Features are (rows, width) arrays of the same rows, in the same order, before and after; all sums
are taken in float64. For the `jackknife_` functions and their blocks see `neighbours.py`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from hftl.analysis.neighbours import JackknifeEstimate, normalize_rows
from hftl.analysis.probe import Probe, fit_probe

CHUNK_ROWS = 512
"""Rows whose similarities to all others are held at once."""
FOLDS = 5


def compute_cosines(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the cosine of each row with itself, (rows,)."""
    return (normalize_rows(before) * normalize_rows(after)).sum(1)


def compute_cka(before: np.ndarray, after: np.ndarray) -> float:
    """Return the debiased linear centred kernel alignment of two sets of features.

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) (Kornblith et al. 2019, arXiv:1905.00414, section 3)
    of the unbiased HSIC of Song et al. 2012 (JMLR 13:1393-1434, equation 5), as in minibatch CKA
    (Nguyen et al. 2021, arXiv:2010.15327). 1 for features that are only rotated or scaled; about 0
    for unrelated ones, for which the biased estimator is .88 with 50 rows of 384; it may be
    negative. 0 where the rows of either are all the same. scikit-learn and torch have no CKA.

    Args:
        before: (n, width), n at least 4, under which it is 0.
        after: (n, other width).
    """
    x, y = (side.astype(np.float64) - side.mean(0, dtype=np.float64) for side in (before, after))
    rows = len(x)
    if rows < 4:
        return 0.0
    cross, first, second = (_unbiased_hsic(a, b) for a, b in ((x, y), (x, x), (y, y)))
    # Rounding leaves a trace of variance where there is none.
    tiny = [1e-12 * float(np.sum(side**2)) ** 2 / rows**2 for side in (x, y)]
    if first <= tiny[0] or second <= tiny[1]:
        return 0.0
    return cross / (first * second) ** 0.5


def compute_cka_floor(before: np.ndarray, after: np.ndarray, draws: int = 19) -> float:
    """Return the largest `compute_cka` of `draws` random pairings of the rows.

    The CKA of unrelated features is above that of 19 once in 20 times.
    """
    draw = np.random.default_rng(0)
    return max(compute_cka(before, after[draw.permutation(len(after))]) for _ in range(draws))


def _unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased HSIC of linear kernels of centred features, without holding a kernel."""
    n = len(x)
    diagonal = [np.einsum("ij,ij->i", side, side) for side in (x, y)]
    # Sums over other rows: centred features sum to 0 over all rows.
    sums = [-squares for squares in diagonal]
    both = float(np.sum((x.T @ y) ** 2)) - float(diagonal[0] @ diagonal[1])
    outer = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float(both + outer - 2 * (sums[0] @ sums[1]) / (n - 2)) / (n * (n - 3))


def jackknife_relational_kl(
    before: np.ndarray, after: np.ndarray, tau: float, blocks: np.ndarray
) -> JackknifeEstimate:
    """Return the mean KL, in nats, between the rows' similarity distributions before and after.

    KL(q0_i || q_i), where q_i is the softmax of cosine / tau over all rows but i: the distribution
    that contrastive encoders are trained on (SEED, Fang et al. 2021, arXiv:2101.04731, equation 4).
    A softmax without a block is the softmax over the rest, so sums over blocks suffice.

    Args:
        before: (rows, width), at least 2 rows.
        after: (rows, other width).
        tau: the temperature.
        blocks: (rows,) int64 from 0 on.
    """
    sides = normalize_rows(before), normalize_rows(after)
    count = int(blocks.max()) + 1
    member = np.eye(count)[blocks]
    rest = 1.0 - np.eye(count)
    values, sums = np.zeros(len(blocks)), np.zeros(count)
    for start in range(0, len(blocks), CHUNK_ROWS):
        old, new = (_log_softmax_over_others(side, start, tau) for side in sides)
        # Not scipy.special.rel_entr: at small temperatures exp(new) is 0 where its log is finite.
        ratio = np.where(np.isneginf(old), 0.0, old) - np.where(np.isneginf(new), 0.0, new)
        p, q = np.exp(old), np.exp(new)
        rows = slice(start, start + len(old))
        values[rows] = np.maximum((p * ratio).sum(1), 0.0)
        p_rest, q_rest = p @ member @ rest, q @ member @ rest
        # A row that remains alone has no distribution.
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = (p * ratio) @ member @ rest / p_rest
            kl += np.log(q_rest) - np.log(p_rest)
        sums += (np.maximum(kl, 0.0) * (1 - member[rows])).sum(0)
    return JackknifeEstimate(float(values.mean()), sums / (len(blocks) - np.bincount(blocks)))


def _log_softmax_over_others(rows: np.ndarray, start: int, tau: float) -> np.ndarray:
    """Return the log softmax over the other rows, (chunk, rows), -inf for a row itself."""
    logits = rows[start : start + CHUNK_ROWS] @ rows.T / tau
    chunk = np.arange(len(logits))
    logits[chunk, start + chunk] = -np.inf
    return log_softmax(logits, axis=1)


def jackknife_cka(before: np.ndarray, after: np.ndarray, blocks: np.ndarray) -> JackknifeEstimate:
    """Return the jackknife of the debiased CKA, 0 where either side does not vary beyond noise."""
    x, y = (side.astype(np.float64) - side.mean(0, dtype=np.float64) for side in (before, after))
    cross, first, second = (_jackknife_hsic(a, b, blocks) for a, b in ((x, y), (x, x), (y, y)))
    own = np.maximum(first, 0.0) * np.maximum(second, 0.0)
    cka = np.divide(cross, np.sqrt(own), out=np.zeros_like(cross), where=own > 0)
    return JackknifeEstimate(float(cka[0]), cka[1:])


def _jackknife_hsic(x: np.ndarray, y: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return the unbiased HSIC of all rows, then without each block, (1 + blocks,).

    Song et al. 2012 (JMLR 13:1393-1434), equation 5, with linear kernels.
    """
    count, rows = int(blocks.max()) + 1, len(blocks)
    member = np.eye(count)[blocks]
    parts = {name: np.zeros((rows, count)) for name in ("x", "y", "both")}
    for start in range(0, rows, CHUNK_ROWS):
        place = slice(start, min(rows, start + CHUNK_ROWS))
        kernels = [side[place] @ side.T for side in (x, y)]
        for kernel in kernels:
            kernel[np.arange(len(kernel)), np.arange(start, place.stop)] = 0.0
        for name, kernel in zip(parts, (*kernels, kernels[0] * kernels[1]), strict=True):
            parts[name][place] = kernel @ member
    sums = {name: part.sum(1) for name, part in parts.items()}
    inside = 1 - member
    n = rows - np.r_[0, np.bincount(blocks)]

    def total(name: str) -> np.ndarray:
        within_blocks = member.T @ parts[name]
        removed = 2 * (member.T @ sums[name]) - np.diag(within_blocks)
        return np.r_[sums[name].sum(), sums[name].sum() - removed]

    row = [sums[name][:, None] - parts[name] for name in ("x", "y")]
    mixed = np.r_[sums["x"] @ sums["y"], (row[0] * row[1] * inside).sum(0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = (
            total("both") + total("x") * total("y") / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)
        ) / (n * (n - 3))
    return np.where(n > 3, estimate, 0.0)


@dataclass(frozen=True)
class JackknifeProbes:
    """Hold linear probes of one set of features, of all rows and without each block.

    The folds are always those of all rows: other folds would add noise.
    """

    folds: np.ndarray
    blocks: np.ndarray
    fitted: list[list[Probe]]

    @classmethod
    def fit(
        cls, features: np.ndarray, labels: np.ndarray, units: np.ndarray, penalty: float,
        blocks: np.ndarray,
    ) -> "JackknifeProbes":  # fmt: skip
        """Fit a probe for each fold on the other folds' rows, of all rows and without each block.

        Args:
            features: (rows, width).
            labels: (rows,) int64 class ids.
            units: (rows,) int64; rows of one unit share a fold.
            penalty: C of the logistic regression.
            blocks: (rows,) int64 from 0 on.
        """
        from sklearn.model_selection import GroupKFold

        folds = np.zeros(len(labels), dtype=np.int64)
        splitter = GroupKFold(min(FOLDS, len(np.unique(units))))
        for number, (_, test) in enumerate(splitter.split(features, labels, units)):
            folds[test] = number
        outputs, grid = int(labels.max()) + 1, np.array([penalty])
        fitted = [
            [
                fit_probe(features[train], labels[train], outputs, None, grid)
                for fold in range(int(folds.max()) + 1)
                for train in [np.flatnonzero((folds != fold) & (blocks != block))]
            ]
            for block in range(-1, int(blocks.max()) + 1 if blocks.any() else 0)
        ]
        return cls(folds, blocks, fitted)

    def score(self, features: np.ndarray, labels: np.ndarray) -> JackknifeEstimate:
        """Return the share of rows predicted right, each by the probe that did not see its fold."""
        hits = []
        for probes in self.fitted:
            right = np.zeros(len(labels))
            for fold, probe in enumerate(probes):
                rows = np.flatnonzero(self.folds == fold)
                right[rows] = probe.logits(features[rows]).argmax(1) == labels[rows]
            hits.append(right)
        count = len(hits) - 1
        without = [hits[j + 1][self.blocks != j].mean() for j in range(count)]
        effects = np.zeros((count, count))
        for j in range(count):
            remaining = self.blocks != j
            change = (hits[j + 1] - hits[0])[remaining]
            effects[j] = np.bincount(self.blocks[remaining], change, minlength=count) / len(labels)
        return JackknifeEstimate(float(hits[0].mean()), np.array(without), effects)


def choose_penalty(features: np.ndarray, labels: np.ndarray, units: np.ndarray) -> float:
    """Return the C that a probe chooses by cross-validation; rows of one unit share a fold."""
    return fit_probe(features, labels, int(labels.max()) + 1, units).penalty
