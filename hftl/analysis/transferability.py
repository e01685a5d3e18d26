"""Score how well frozen features suit a task, without training: more is better everywhere.

Features are (rows, width), labels (rows,) class ids without gaps. Compared by You et al. 2021
(LogME) and Ibrahim et al. 2021 (shrinkage); Agostinelli et al. 2022 (arXiv:2204.01403) show that no
score wins everywhere, so a table holds several beside the accuracy of plain probes. Scores that do
not depend on the mean read `CentredFeatures`, whose decomposition they share.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from scipy import linalg
from scipy.special import logsumexp

CODING_PRECISION = 1e-4
"""The distortion of TransRate's code, of features whose mean squared length is 1."""
PCA_WIDTH = 64
CLUSTERS_PER_CLASS = 5
SMALLEST_RATIO, LARGEST_RATIO = 1e-10, 1e8
"""Of noise to weights in LogME, relative to the mean squared singular value."""
GRID = 40
"""Ratios that are tried first: neighbours are a factor of 2.9 apart, and the evidence is smooth."""
NEGLIGIBLE = 1e-13
"""A squared singular value below this share of the largest is rounding."""
lapack: Any = linalg.lapack  # Its types name none of its functions.


@dataclass(frozen=True)
class CentredFeatures:
    """Hold features less their mean, (rows, width) float64, and their principal directions.

    `squares` (directions,) are the eigenvalues of their scatter, the largest first, and
    `directions` (width, directions) its vectors. Scores in float64 do not depend on the order of
    sums.
    """

    rows: np.ndarray
    squares: np.ndarray
    directions: np.ndarray

    @classmethod
    def compute(cls, features: np.ndarray) -> Self:
        """Decompose features, (rows, width).

        A direction that they fill with rounding counts as none; rows that are all alike, as the
        first token's embedding is, have none.
        """
        rows = features.astype(np.float64) - features.mean(0, dtype=np.float64)
        if not np.ptp(features, axis=0).any():
            return cls(np.zeros_like(rows), np.zeros(0), np.zeros((rows.shape[1], 0)))
        is_wide = len(rows) <= rows.shape[1]
        squares, vectors = np.linalg.eigh(rows @ rows.T if is_wide else rows.T @ rows)
        present = np.flatnonzero(squares > NEGLIGIBLE * squares[-1])[::-1]
        squares, vectors = squares[present], vectors[:, present]
        return cls(rows, squares, rows.T @ vectors / squares**0.5 if is_wide else vectors)

    def reduce(self, width: int, share: float = 1.0) -> np.ndarray:
        """Return the principal components, at most `width`, and no more than hold a share of
        variance; one of 0 where there is none."""
        if not len(self.squares):
            return np.zeros((len(self.rows), 1))
        held = np.cumsum(self.squares) / self.squares.sum()
        count = min(width, int(np.searchsorted(held, share)) + 1, len(held))
        return self.rows @ self.directions[:, :count]


def compute_logme(features: np.ndarray, targets: np.ndarray) -> float:
    """Return the log evidence of a Bayesian linear model, a row and output (LogME).

    max over alpha, beta of log N(y; 0, F F^T / alpha + I / beta) / rows (You et al. 2021,
    arXiv:2102.11005), the mean over the columns of y. The authors' fixed point needs hundreds of
    steps where there are fewer rows than columns, and their log |A| then lacks the zero singular
    values. The scale of the evidence has a closed form, and one number is left to search: the ratio
    of alpha to beta. For each it takes a determinant and one solution of F F^T plus the ratio, both
    cheap once the smaller product of F with itself is tridiagonal, at a quarter of the time of its
    eigenvectors.

    Args:
        features: (rows, width), neither centred nor scaled, as the authors have it.
        targets: (rows,) numbers, or (rows, outputs) of 0 and 1: one column a class.
    """
    targets = targets.astype(np.float64).reshape(len(targets), -1)
    return float(np.mean(_EvidenceProblem.compute(features.astype(np.float64), targets).maximize()))


@dataclass(frozen=True)
class _EvidenceProblem:
    """Hold the smaller of F F^T and F^T F in tridiagonal form, and the targets in its basis.

    `diagonal` (n,), `beside` (n - 1,), n the smaller of rows and width; `rotated` (n, outputs) are
    y, or F^T y where F^T F is the smaller; `lengths` (outputs,) the squared targets.
    """

    diagonal: np.ndarray
    beside: np.ndarray
    rotated: np.ndarray
    lengths: np.ndarray
    rows: int
    is_wide: bool

    @classmethod
    def compute(cls, features: np.ndarray, targets: np.ndarray) -> Self:
        """Reduce features (rows, width) and targets (rows, outputs), of two rows or more."""
        if features.shape[1] == 1:  # A column of 0 changes nothing, and no matrix of one is solved.
            features = np.hstack([features, 0 * features])
        is_wide = len(features) <= features.shape[1]
        product = features @ features.T if is_wide else features.T @ features
        rotated = targets if is_wide else features.T @ targets
        lengths = (targets**2).sum(0)
        work = int(lapack.dsytrd_lwork(len(product), lower=1)[0])
        reflectors, diagonal, beside, scales, _ = lapack.dsytrd(product, lower=1, lwork=work)
        below = np.asfortranarray(rotated[1:])
        turned, _, _ = lapack.dormqr("L", "T", reflectors[1:, :-1], scales, below, 64 * len(below))
        rotated = np.vstack([rotated[:1], turned])
        return cls(diagonal, beside, rotated, lengths, len(features), is_wide)

    def maximize(self) -> list[float]:
        """Return the largest evidence a row over the ratio alpha / beta, one for each output."""
        from scipy.optimize import minimize_scalar

        scale = float(self.diagonal.sum()) / len(self.diagonal) or 1.0
        grid = np.linspace(np.log(SMALLEST_RATIO), np.log(LARGEST_RATIO), GRID) + np.log(scale)
        coarse = np.stack([self._compute_losses(point, slice(None)) for point in grid])
        evidences = []
        for output, best in enumerate(coarse.argmin(0)):
            own = slice(output, output + 1)
            optimum: Any = minimize_scalar(
                lambda point, own=own: float(self._compute_losses(point, own)[0]),
                bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
                method="bounded", options={"xatol": 1e-6},
            )  # fmt: skip
            evidences.append(-min(float(optimum.fun), float(coarse[best, output])) / self.rows)
        return evidences

    def _compute_losses(self, log_ratio: float, outputs: slice) -> np.ndarray:
        """Return minus the log evidence, (outputs,); inf where the ratio is lost in rounding."""
        ratio, own = float(np.exp(log_ratio)), self.rotated[:, outputs]
        pivots, _, solved, info = lapack.dptsv(self.diagonal + ratio, self.beside, own)
        if info:
            return np.full(own.shape[1], np.inf)
        explained = np.einsum("ij,ij->j", own, solved)
        misfits = explained if self.is_wide else (self.lengths[outputs] - explained) / ratio
        log_det = float(np.log(pivots).sum()) + (self.rows - len(own)) * log_ratio
        misfits = np.maximum(misfits / self.rows, np.finfo(np.float64).tiny)
        return self.rows / 2 * (np.log(2 * np.pi * misfits) + 1) + log_det / 2


def compute_h_score(features: CentredFeatures, labels: np.ndarray) -> float:
    """Return tr(S^-1 (1 - a) B): the share of the features' variance that the classes explain.

    S is the Ledoit-Wolf covariance with its shrinkage a, B the covariance of the class means
    (Ibrahim, Ponomareva & Mazumder 2021, arXiv:2110.06893). Without shrinkage it is the number of
    classes less one for any features wider than the rows are many (Bao et al. 2019). Both
    covariances divide by the rows.
    """
    rows, counts = features.rows, np.bincount(labels)
    shrinkage = _compute_shrinkage(features)
    mean_variance = features.squares.sum() / rows.size
    variances = (1 - shrinkage) * features.squares / len(rows) + shrinkage * mean_variance
    means = np.stack([rows[labels == c].mean(0) for c in range(len(counts))])
    projected = (means @ features.directions) ** 2 / variances
    return (1 - shrinkage) * float(counts / len(rows) @ projected.sum(1))


def _compute_shrinkage(features: CentredFeatures) -> float:
    """Return the shrinkage of Ledoit & Wolf 2004 (J. Multivariate Analysis 88:365-411).

    The mean of x x^T, entry by entry, has a variance of sum |x|^4 less the squared covariance.
    """
    rows, width = features.rows.shape
    squared = float((features.squares**2).sum()) / rows**2
    apart = squared - float(features.squares.sum() / rows) ** 2 / width
    noise = float((np.einsum("ij,ij->i", features.rows, features.rows) ** 2).sum()) / rows - squared
    return min(noise / rows / apart, 1.0) if width > 1 and apart > 0 else 0.0


def compute_leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log likelihood of the labels under the source classifier's joint (LEEP).

    mean of log sum_z P(y | z) p(z | x), P(y, z) the mean over rows (Nguyen et al. 2020,
    arXiv:2002.12462).

    Args:
        probabilities: (rows, source classes) of the source's own classifier.
        labels: (rows,).
    """
    joint = np.eye(labels.max() + 1)[labels].T @ probabilities / len(labels)
    conditional = joint / np.maximum(joint.sum(0), np.finfo(np.float64).tiny)
    return float(np.log((probabilities @ conditional.T)[np.arange(len(labels)), labels]).mean())


def compute_nce(source_labels: np.ndarray, labels: np.ndarray) -> float:
    """Return -H(Y | Z), the negative conditional entropy in nats of the labels given the source's.

    Tran, Nguyen & Hassner 2019 (arXiv:1908.08142).
    """
    joint = np.zeros((source_labels.max() + 1, labels.max() + 1))
    np.add.at(joint, (source_labels, labels), 1 / len(labels))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(joint / joint.sum(1, keepdims=True))
    return float(np.sum(joint * np.where(joint > 0, logs, 0.0)))


def compute_cluster_probabilities(
    features: CentredFeatures, classes: int, seed: int = 0
) -> np.ndarray:
    """Return (rows, clusters) posteriors of a Gaussian mixture: a source classifier for encoders
    without one.

    N-LEEP is LEEP of these (Li et al. 2021, arXiv:2011.11200): principal components that hold .8 of
    the variance, at most 64, and five clusters a class, at most one for ten rows; their
    covariances are diagonal, so that few rows suffice.
    """
    from sklearn.mixture import GaussianMixture

    reduced = features.reduce(PCA_WIDTH, 0.8)
    clusters = max(2, min(CLUSTERS_PER_CLASS * classes, len(reduced) // 10))
    mixture = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-4, random_state=seed)
    return mixture.fit(reduced).predict_proba(reduced)


class TransRate(NamedTuple):
    """Hold the coding rate that classes save, each weighted by its rows, or all alike.

    The definition weighs by rows; the public implementations do not, which favours rare classes.
    """

    by_rows: float
    by_class: float


def compute_transrate(features: CentredFeatures, labels: np.ndarray) -> TransRate:
    """Return R(Z) - R(Z | Y), the coding rate in nats that the classes save.

    R(Z) = log det(I + Z^T Z / (rows eps)) / 2 of centred features (Huang et al. 2022,
    arXiv:2106.09362), scaled to a mean squared length of 1.
    """
    square = float(features.squares.sum()) / len(labels) or 1.0
    scaled, counts = features.rows / square**0.5, np.bincount(labels)
    within = np.array([_compute_coding_rate(scaled[labels == c]) for c in range(len(counts))])
    whole = _sum_coding_rate(features.squares / square, len(labels))
    return TransRate(whole - float(counts / len(labels) @ within), whole - float(within.mean()))


def _compute_coding_rate(rows: np.ndarray) -> float:
    is_wide = len(rows) <= rows.shape[1]
    product = (rows @ rows.T if is_wide else rows.T @ rows) / (len(rows) * CODING_PRECISION)
    # Half the log determinant of I and the product, by the pivots of its Cholesky factor.
    return float(np.log(np.diag(np.linalg.cholesky(np.eye(len(product)) + product))).sum())


def _sum_coding_rate(squares: np.ndarray, rows: int) -> float:
    return float(np.log1p(squares / (rows * CODING_PRECISION)).sum() / 2)


def compute_gbc(features: CentredFeatures, labels: np.ndarray, spherical: bool = True) -> float:
    """Return minus the sum over ordered pairs of classes of their Bhattacharyya coefficient (GBC).

    Classes are Gaussians with one variance, or one for each of at most 64 principal components
    (Pandy et al. 2022, arXiv:2111.12780).
    """
    reduced = features.reduce(PCA_WIDTH)
    classes = range(int(labels.max()) + 1)
    means = np.stack([reduced[labels == c].mean(0) for c in classes])
    variances = np.stack([reduced[labels == c].var(0) for c in classes])
    if spherical:
        variances = np.repeat(variances.mean(1, keepdims=True), reduced.shape[1], 1)
    variances = np.maximum(variances, 1e-12 * max(float(variances.max()), 1e-12))
    total = 0.0
    for i in classes:
        for j in classes:
            if i != j:
                middle = (variances[i] + variances[j]) / 2
                distance = np.sum((means[i] - means[j]) ** 2 / middle) / 8
                spread = np.log(middle) - (np.log(variances[i]) + np.log(variances[j])) / 2
                total -= float(np.exp(-distance - spread.sum() / 2))
    return total


def apply_head(features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the class probabilities of a source's own linear head, (rows, source classes)."""
    logits = features.astype(np.float64) @ weight.T + bias
    return np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
