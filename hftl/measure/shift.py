"""Estimate the class shares of unlabelled inputs from what a classifier says of them.

All assume label shift: other shares of classes, and the same inputs within each class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 200
"""Bootstrap draws of an interval."""
COUNT_DRAWS, FEWEST_DRAWS, SOLVED_CLASSES = 100, 20, 4000
"""The same of estimates by counts of predicted classes, which are solved anew in each: at most, at
least, and the classes that all draws together solve for, as a solution takes longer the more there
are."""
MIN_SINGULAR_VALUE = 0.1
"""Of the matrix of predicted by true class, columns adding up to 1. Below it shares that differ
much look the same to the classifier."""
TOLERANCE, MAX_STEPS = 1e-7, 5000
LOG_RIDGES = (-30.0, 10.0)
"""Logarithms of the strengths of ridge regression between which that of `estimate_rlls` lies."""


@dataclass(frozen=True)
class ShareEstimate:
    """Hold the shares of the classes with 95 % intervals, (classes,) and (classes, 2)."""

    shares: np.ndarray
    interval: np.ndarray


def compute_conditionals(confusion: np.ndarray) -> np.ndarray:
    """Return P(predicted | true) of counts (true, predicted), as (predicted, true)."""
    return (confusion / np.maximum(confusion.sum(1, keepdims=True), 1e-12)).T


def measure_separability(confusion: np.ndarray) -> float:
    """Return the least singular value of P(predicted | true): 1 of no error, 0 of a class that
    predictions do not distinguish from the others."""
    return float(np.linalg.svd(compute_conditionals(confusion), compute_uv=False)[-1])


def estimate_bbse(confusion: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the shares of classes by black-box shift estimation (Lipton et al. 2018, ICML).

    Args:
        confusion: (true, predicted) counts of labelled rows.
        predicted: (classes,) counts, or summed probabilities, of the unlabelled ones.
    """
    # A draw of a bootstrap may have classes that are predicted alike, which share alike then.
    solution = np.linalg.lstsq(
        compute_conditionals(confusion), predicted / predicted.sum(), rcond=None
    )
    shares = np.clip(solution[0], 0, None)
    return shares / shares.sum()


def estimate_rlls(
    confusion: np.ndarray, predicted: np.ndarray, strength: float = 0.01, confidence: float = 0.05
) -> np.ndarray:
    """Return the shares by regularized learning under label shift (Azizzadenesheli et al. 2019,
    ICLR): the weights w >= 0 of classes minimize |C w - q| + d |w - 1|.

    Neither norm is squared, so that the weights of a confusion matrix which is far from singular
    are those of BBSE. The least sum lies on the path of ridge regressions towards 1, and falls and
    then rises along it.

    Args:
        confusion: as in `estimate_bbse`.
        predicted: the same.
        strength: of the penalty d, which falls as 1 / sqrt(rows); theirs.
        confidence: that the bound on the error of C, which d comes from, does not hold; theirs.
    """
    from scipy.optimize import minimize_scalar, nnls

    rows, classes = confusion.sum(), len(confusion)
    joint, shares = confusion.T / rows, predicted / predicted.sum()
    log = np.log(2 * classes / confidence)
    penalty = strength * 3 * (2 * log / (3 * rows) + np.sqrt(2 * log / rows))

    def find_weights(ridge: float) -> np.ndarray:
        root = np.sqrt(ridge)
        matrix = np.vstack([joint, root * np.eye(classes)])
        return nnls(matrix, np.concatenate([shares, np.full(classes, root)]))[0]

    def loss(weights: np.ndarray) -> float:
        misfit = np.linalg.norm(joint @ weights - shares)
        return float(misfit + penalty * np.linalg.norm(weights - 1))

    path: Any = minimize_scalar(
        lambda log_ridge: loss(find_weights(np.exp(log_ridge))),
        bounds=LOG_RIDGES, method="bounded", options={"xatol": 1e-6},
    )  # fmt: skip
    ends = [find_weights(0.0), find_weights(float(np.exp(path.x))), np.ones(classes)]
    estimate = min(ends, key=loss) * confusion.sum(1)
    return estimate / estimate.sum()


def estimate_em(probabilities: np.ndarray, source_shares: np.ndarray) -> np.ndarray:
    """Return the shares of maximum likelihood by expectation maximization (Saerens et al. 2002,
    Neural Computation 14:21-41). The likelihood is concave: there is one maximum.

    Args:
        probabilities: (rows, classes), calibrated under the source's shares.
        source_shares: (classes,) that they are calibrated under.
    """
    likelihood = probabilities / np.maximum(source_shares, 1e-12)
    shares = source_shares.copy()
    for _ in range(MAX_STEPS):
        joint = likelihood * shares
        updated = (joint / joint.sum(1, keepdims=True)).mean(0)
        if np.abs(updated - shares).max() < TOLERANCE:
            return updated
        shares = updated
    return shares


def estimate_shares(
    confusion: np.ndarray, probabilities: np.ndarray, seed: int = 0
) -> ShareEstimate:
    """Return the shares of unlabelled inputs by EM, with intervals over both samples.

    The error over the unlabelled rows is that of EM in a bootstrap of them; what the labelled rows
    leave open is that of BBSE in a bootstrap of their confusion, for EM has no error of theirs.

    Args:
        confusion: (true, predicted) counts of labelled rows.
        probabilities: (rows, classes) of the unlabelled ones, calibrated on the labelled ones.
        seed: of the draws.
    """
    source = confusion.sum(1) / confusion.sum()
    shares = estimate_em(probabilities, source)
    rng = np.random.default_rng(seed)
    rows, classes = probabilities.shape
    predicted = np.bincount(probabilities.argmax(1), minlength=classes).astype(np.float64)
    own = _draw(lambda: estimate_em(probabilities[rng.integers(0, rows, rows)], source))
    labelled = _draw(lambda: estimate_bbse(_resample(confusion, rng), predicted))
    return _build_estimate(shares, own.var(0) + labelled.var(0))


def estimate_by_counts(
    estimate: Callable[[np.ndarray, np.ndarray], np.ndarray],
    confusion: np.ndarray, predicted: np.ndarray, seed: int = 0,
) -> ShareEstimate:  # fmt: skip
    """Return the shares that `estimate_bbse` or `estimate_rlls` gives, with intervals over both
    samples: of the labelled rows within each class, and of the unlabelled ones.

    Args:
        estimate: either function.
        confusion: (true, predicted) counts of labelled rows.
        predicted: (classes,) counts of the unlabelled ones.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rows, chances = int(predicted.sum()), predicted / predicted.sum()
    drawn = _draw(
        lambda: estimate(_resample(confusion, rng), rng.multinomial(rows, chances) + 1e-3),
        min(COUNT_DRAWS, max(FEWEST_DRAWS, SOLVED_CLASSES // len(predicted))),
    )
    return _build_estimate(estimate(confusion, predicted), drawn.var(0))


def _build_estimate(shares: np.ndarray, variance: np.ndarray) -> ShareEstimate:
    half = 1.96 * np.sqrt(variance)
    interval = np.stack([np.clip(shares - half, 0, 1), np.clip(shares + half, 0, 1)], axis=1)
    return ShareEstimate(shares, interval)


def _draw(estimate: Callable[[], np.ndarray], draws: int = DRAWS) -> np.ndarray:
    return np.stack([estimate() for _ in range(draws)])


def _resample(confusion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return counts of as many rows of each class, drawn again; every cell has half a row more, so
    that a mistake which no row has shown may be drawn."""
    counts = confusion + 0.5
    return np.stack([
        rng.multinomial(int(row.sum()), smooth / smooth.sum()) + 1e-3
        for row, smooth in zip(confusion, counts, strict=True)
    ])  # fmt: skip


def correct_probabilities(
    probabilities: np.ndarray, source_shares: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """Return probabilities under other shares of classes: by Bayes' rule, (rows, classes)."""
    weighed = probabilities * (shares / np.maximum(source_shares, 1e-12))
    return weighed / weighed.sum(1, keepdims=True)
