"""Score how well frozen features suit a task, without training: more is better everywhere.

Features are (rows, width), labels (rows,) class ids without gaps. Compared by You et al. 2021
(LogME) and Ibrahim et al. 2021 (shrinkage); Agostinelli et al. 2022 (arXiv:2204.01403) show that no
score wins everywhere, so a table holds several beside the accuracy of plain probes.
"""

import numpy as np
from scipy.special import logsumexp

CODING_PRECISION = 1e-4
"""The distortion of TransRate's code, of features whose mean squared length is 1."""
PCA_WIDTH = 64
CLUSTERS_PER_CLASS = 5
SMALLEST_RATIO, LARGEST_RATIO = 1e-10, 1e8
"""Of noise to weights in LogME, relative to the mean squared singular value."""
NEGLIGIBLE = 1e-13
"""A squared singular value below this share of the largest is rounding."""


def compute_logme(features: np.ndarray, targets: np.ndarray) -> float:
    """Return the log evidence of a Bayesian linear model, a row and output (LogME).

    max over alpha, beta of log N(y; 0, F F^T / alpha + I / beta) / rows (You et al. 2021,
    arXiv:2102.11005), the mean over the columns of y. The authors' fixed point needs hundreds of
    steps where there are fewer rows than columns, and their log |A| then lacks the zero singular
    values. In the basis of F's left singular vectors the evidence is a sum over rows, its scale has
    a closed form, and one number is left to search: the ratio of the two.

    Args:
        features: (rows, width), neither centred nor scaled, as the authors have it.
        targets: (rows,) numbers, or (rows, outputs) of 0 and 1: one column a class.
    """
    wide = features.astype(np.float64)
    targets = targets.astype(np.float64).reshape(len(targets), -1)
    squares, energies = _decompose(wide, targets)
    rest = np.maximum((targets**2).sum(0) - energies.sum(0), 0.0)
    return float(np.mean([
        _maximize_evidence(squares, energies[:, i], rest[i], len(targets))
        for i in range(targets.shape[1])
    ]))  # fmt: skip


def _decompose(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared singular values, and the squared targets in the basis of the left vectors.

    The eigenvalues of the smaller product of the features with themselves take a tenth of the time
    of a singular value decomposition. A direction that float32 features fill with rounding counts
    as none.
    """
    rows, width = features.shape
    if rows <= width:
        squares, left = np.linalg.eigh(features @ features.T)
        return np.maximum(squares, 0.0), (left.T @ targets) ** 2
    squares, right = np.linalg.eigh(features.T @ features)
    present = squares > NEGLIGIBLE * squares[-1]
    squares = np.where(present, squares, 0.0)
    projected = (right.T @ (features.T @ targets)) ** 2
    return squares, projected * np.divide(1.0, squares, out=np.zeros(width), where=present)[:, None]


def _maximize_evidence(squares: np.ndarray, energies: np.ndarray, rest: float, rows: int) -> float:
    """Return the largest evidence a row over the ratio alpha / beta.

    Args:
        squares: the squared singular values.
        energies: the squared targets in the basis of the left singular vectors.
        rest: the squared targets outside of it.
        rows: of the features.
    """
    from scipy.optimize import minimize_scalar

    outside = rows - len(squares)
    scale = float(squares.mean()) or 1.0

    def negative(log_ratio: float) -> float:
        ratio = np.exp(log_ratio) * scale
        variances = squares + ratio
        misfit = float((energies / variances).sum()) + (rest / ratio if outside else 0.0)
        log_det = float(np.log(variances).sum()) + outside * np.log(ratio)
        floor = np.finfo(np.float64).tiny
        return rows / 2 * (np.log(2 * np.pi * max(misfit / rows, floor)) + 1) + log_det / 2

    grid = np.linspace(np.log(SMALLEST_RATIO), np.log(LARGEST_RATIO), 80)
    best = int(np.argmin([negative(point) for point in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    optimum = minimize_scalar(negative, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return -min(float(optimum.fun), negative(grid[best])) / rows


def compute_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Return tr(S^-1 (1 - a) B): the share of the features' variance that the classes explain.

    S is the Ledoit-Wolf covariance with its shrinkage a, B the covariance of the class means
    (Ibrahim, Ponomareva & Mazumder 2021, arXiv:2110.06893). Without shrinkage it is the number of
    classes less one for any features wider than the rows are many (Bao et al. 2019). Both
    covariances divide by the rows.
    """
    from sklearn.covariance import LedoitWolf

    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    estimate = LedoitWolf(assume_centered=True).fit(centred)
    counts = np.bincount(labels)
    means = np.stack([centred[labels == c].mean(0) for c in range(len(counts))])
    weighted = means * (counts / len(labels))[:, None]
    # Features that never vary leave no covariance to invert.
    solved = np.linalg.lstsq(np.asarray(estimate.covariance_), means.T, rcond=1e-12)[0]
    return float((1 - estimate.shrinkage_) * np.sum(weighted * solved.T))


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


def compute_cluster_probabilities(features: np.ndarray, classes: int, seed: int = 0) -> np.ndarray:
    """Return (rows, clusters) posteriors of a Gaussian mixture: a source classifier for encoders
    without one.

    N-LEEP is LEEP of these (Li et al. 2021, arXiv:2011.11200): principal components that hold .8 of
    the variance, at most 64, and five clusters a class, at most one for ten rows; their
    covariances are diagonal, so that few rows suffice.
    """
    from sklearn.mixture import GaussianMixture

    reduced = reduce_width(features, PCA_WIDTH, 0.8)
    clusters = max(2, min(CLUSTERS_PER_CLASS * classes, len(features) // 10))
    mixture = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-4, random_state=seed)
    return mixture.fit(reduced).predict_proba(reduced)


def compute_transrate(features: np.ndarray, labels: np.ndarray, by_rows: bool = True) -> float:
    """Return R(Z) - R(Z | Y), the coding rate in nats that the classes save (TransRate).

    R(Z) = log det(I + Z^T Z / (rows eps)) / 2 of centred features (Huang et al. 2022,
    arXiv:2106.09362), scaled to a mean squared length of 1.

    Args:
        features: (rows, width).
        labels: (rows,).
        by_rows: weigh each class by its rows, as the definition does; False: all alike, as the
            public implementations do, which favours rare classes.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    length = float(np.mean((centred**2).sum(1))) ** 0.5
    scaled = centred / (length or 1.0)
    counts = np.bincount(labels)
    weights = counts / len(labels) if by_rows else np.full(len(counts), 1 / len(counts))
    within = [_compute_coding_rate(scaled[labels == c]) for c in range(len(counts))]
    return _compute_coding_rate(scaled) - float(weights @ within)


def _compute_coding_rate(features: np.ndarray) -> float:
    wide = len(features) <= features.shape[1]
    product = features @ features.T if wide else features.T @ features
    squares = np.maximum(np.linalg.eigvalsh(product), 0.0)
    return float(np.log1p(squares / (len(features) * CODING_PRECISION)).sum() / 2)


def compute_gbc(features: np.ndarray, labels: np.ndarray, spherical: bool = True) -> float:
    """Return minus the sum over ordered pairs of classes of their Bhattacharyya coefficient (GBC).

    Classes are Gaussians with one variance, or one for each of at most 64 principal components
    (Pandy et al. 2022, arXiv:2111.12780).
    """
    reduced = reduce_width(features, PCA_WIDTH)
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


def reduce_width(features: np.ndarray, width: int, share: float | None = None) -> np.ndarray:
    """Return the principal components, at most `width`, and no more than hold a share of variance.

    They are float64, so that scores do not depend on the order of sums. Rows that are all alike, as
    the first token's embedding is, have one component of 0.
    """
    from sklearn.decomposition import PCA

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 1))
    most = min(width, *features.shape)
    solver = "covariance_eigh" if len(features) > features.shape[1] else "full"
    reduction = PCA(most, svd_solver=solver).fit(features.astype(np.float64))
    count = most
    if share is not None:
        held = np.cumsum(reduction.explained_variance_ratio_)
        count = min(most, int(np.searchsorted(held, share)) + 1)
    return reduction.transform(features.astype(np.float64))[:, :count]


def apply_head(features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the class probabilities of a source's own linear head, (rows, source classes)."""
    logits = features.astype(np.float64) @ weight.T + bias
    return np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
