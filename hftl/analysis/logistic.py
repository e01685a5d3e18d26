"""Fit logistic regression for many penalties, each fit from the one before.

The penalty depends on lengths alone: rows may be turned, and their span is all that counts. Turned
to the axes along which they vary, their columns are independent of each other, and a variable that
is scaled by its column's part of the curvature needs few steps at a strong penalty. The curvature
that is taken is that of the probabilities at the start of a fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_STEPS = 1000
MEMORY = 10
"""Steps that the solver's picture of the curvature is made of."""
MAX_AXES = 1024
"""Rows, or columns where they are fewer, up to which axes are computed: cubic in their number."""
MIN_SHARE = 1e-14
"""An axis with less of the longest one's variance holds rounding errors."""
MIN_CURVATURE = 1e-3
"""Of the mean probability times its complement, where the rows are far from every border."""
ROUNDING = 64 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Axes:
    """Hold the axes of rows as a product, (axes, by) times (by, width).

    Of few rows with many columns, such as those of a vocabulary, the second is the rows themselves:
    the product would be dense, and as wide for each axis.
    """

    factor: np.ndarray
    by: Any

    def expand(self, weights: np.ndarray) -> np.ndarray:
        """Return weights (outputs, axes) of turned rows as those of the rows, (outputs, width)."""
        return np.asarray((self.by.T @ (weights @ self.factor).T).T)

    @property
    def matrix(self) -> np.ndarray:
        """Return the axes themselves, (axes, width)."""
        return self.expand(np.eye(len(self.factor)))


def turn_rows(x: Any) -> tuple[np.ndarray, Axes] | None:
    """Return rows (rows, axes) on the axes of their span, and the axes.

    A linear model with weights (outputs, axes) of the turned rows has the weights that the axes
    expand them to of the rows themselves, which are as long.

    Args:
        x: (rows, width), dense or sparse.

    Returns:
        None where there are more rows and columns than it pays for.
    """
    if min(x.shape) > MAX_AXES:
        return None
    # Products square the lengths: in single precision, that of pixels, short axes would be lost.
    x = x.astype(np.float64, copy=False)
    is_wide = x.shape[0] < x.shape[1]
    products = x @ x.T if is_wide else x.T @ x
    squares, vectors = np.linalg.eigh(products if isinstance(x, np.ndarray) else products.toarray())
    counts = squares > MIN_SHARE * max(squares[-1], 0.0)
    lengths, vectors = np.sqrt(squares[counts]), vectors[:, counts]
    if is_wide:
        return vectors * lengths, Axes((vectors / lengths).T, x)
    return np.asarray(x @ vectors), Axes(np.eye(len(lengths)), vectors.T)


def fit_path(
    x: np.ndarray, classes: np.ndarray, count: int, cs: Sequence[float] | np.ndarray,
    intercept: bool = True, weights: np.ndarray | None = None, tolerance: float = 1e-6,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Yield weights (count, width) and biases (count,) of logistic regression for each C.

    The objective is scikit-learn's: C times the summed loss plus half the squared weights; of two
    classes there is one vector of weights, which is split evenly.

    Args:
        x: (rows, width), best turned, see `turn_rows`.
        classes: (rows,) int64 below `count`, each of which occurs.
        count: of classes, at least 2.
        cs: in the order of the fits; best from the smallest on.
        intercept: whether biases are fitted, else 0.
        weights: (rows,) above 0 of the rows' losses; None: all 1.
        tolerance: of the gradient of the mean loss, in variables of unit curvature.
    """
    from scipy.optimize import minimize

    problem = _Problem.describe(x, classes, intercept, weights)
    variables = np.zeros((x.shape[1] + 1, 1 if count == 2 else count))
    options = {"maxiter": MAX_STEPS, "maxcor": MEMORY, "gtol": tolerance, "ftol": ROUNDING}
    for c in cs:
        penalties = np.full(len(variables), 1 / (c * problem.total))
        penalties[-1] = 0.0
        curvatures = problem.measure_curvatures(variables) + penalties
        # 0 where nothing depends on a variable: a bias that is not fitted, a column of zeros.
        scales = np.sqrt(np.divide(1.0, curvatures, out=0 * curvatures, where=curvatures > 0))
        begin = np.divide(variables.T, scales, out=0 * variables.T, where=scales > 0).T
        solved = minimize(
            problem.compute, begin.ravel(), args=(scales[:, None], penalties[:, None]),
            method="L-BFGS-B", jac=True, options=options,
        )  # fmt: skip
        variables = solved.x.reshape(variables.shape) * scales[:, None]
        yield _split_evenly(variables)


@dataclass(frozen=True)
class _Problem:
    """Hold the rows of a fit, and the share of each in the mean loss.

    Variables are (width + 1, outputs), the last row biases; of two classes there is one output.
    `squares` (width + 1,) are the means of each column's squares, 0 for biases that are not fitted.
    """

    x: np.ndarray
    classes: np.ndarray
    shares: np.ndarray
    total: float
    squares: np.ndarray

    @classmethod
    def describe(
        cls, x: np.ndarray, classes: np.ndarray, intercept: bool, weights: np.ndarray | None
    ) -> "_Problem":
        """Return the problem of rows; see `fit_path`."""
        weights = np.ones(len(classes)) if weights is None else weights
        shares = weights / weights.sum()
        squares = np.append((x * x).T @ shares, float(intercept))
        return cls(x, classes, shares, float(weights.sum()), squares)

    def compute(
        self, flat: np.ndarray, scales: np.ndarray, penalties: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the mean loss with its penalty, and the gradient, of scaled variables."""
        variables = flat.reshape(len(scales), -1) * scales
        losses, residuals = _compare(self.x @ variables[:-1] + variables[-1], self.classes)
        residuals *= self.shares[:, None]
        shrunk = penalties * variables
        gradient = np.vstack([self.x.T @ residuals, residuals.sum(0)])
        gradient = (gradient + shrunk) * scales
        return float(self.shares @ losses + 0.5 * np.vdot(shrunk, variables)), gradient.ravel()

    def measure_curvatures(self, variables: np.ndarray) -> np.ndarray:
        """Return the curvature of the mean loss along each row of variables, as in their mean."""
        logits = self.x @ variables[:-1] + variables[-1]
        if logits.shape[1] == 1:
            logits = np.hstack([logits, 0 * logits])
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        spread = (probabilities * (1 - probabilities)).mean(1)
        return self.squares * max(float(self.shares @ spread), MIN_CURVATURE)


def compute_losses(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the log loss of each row, of logits (rows, classes)."""
    return _compare(logits, classes)[0]


def _compare(logits: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's loss, and probabilities minus targets, of logits (rows, 1 or classes)."""
    if logits.shape[1] == 1:
        margins = logits[:, 0]
        losses = np.logaddexp(0.0, margins)
        residuals = np.exp(margins - losses) - classes
        return losses - classes * margins, residuals[:, None]
    logits = logits - logits.max(1, keepdims=True)
    shares = np.exp(logits)
    sums = shares.sum(1)
    shares /= sums[:, None]
    places = np.arange(len(classes)), classes
    losses = np.log(sums) - logits[places]
    shares[places] -= 1.0
    return losses, shares


def _split_evenly(variables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (classes, width) and biases, those of two classes opposite to each other."""
    if variables.shape[1] == 1:
        variables = np.concatenate([-variables / 2, variables / 2], axis=1)
    return variables[:-1].T.copy(), variables[-1].copy()
