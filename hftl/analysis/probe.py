"""Fit the probe, which is also the strategy `head`: a linear solver on frozen features.

Multinomial logistic or ridge regression on standardised features, its penalty chosen by
cross-validation on the training rows alone (Alain & Bengio 2016, arXiv:1610.01644).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDS = 5
MAX_STEPS = 1000
MAX_SEARCH_ROWS = 20_000
"""Rows that the penalty is chosen on, at most; the probe is fitted on all."""
C_GRID = np.logspace(-5, 2, 8)
ALPHA_GRID = np.logspace(-2, 6, 17)
MIN_RELATIVE_STD = 1e-6
"""A feature that varies less, relative to a mean above 1, varies by rounding alone."""


@dataclass(frozen=True)
class Probe:
    """Hold a linear layer: `weight` (outputs, width), `bias` (outputs,), float32.

    `penalty` is the chosen one, C for classes and alpha for a target. `exact` holds weight and bias
    in float64, as they were solved.
    """

    weight: np.ndarray
    bias: np.ndarray
    penalty: float
    exact: tuple[np.ndarray, np.ndarray]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return (rows, outputs) of (rows, width)."""
        return features @ self.weight.T + self.bias


def fit_probe(
    features: np.ndarray, labels: np.ndarray, outputs: int, groups: np.ndarray | None,
    cs: np.ndarray = C_GRID, intercept: bool = True, weights: np.ndarray | None = None,
) -> Probe:  # fmt: skip
    """Fit the probe on standardised features, and fold the standardisation into its weights.

    Args:
        features: (rows, width) float32.
        labels: (rows,) int64 class ids below `outputs`, float64 targets, or (rows, outputs)
            float64 of 0 and 1.
        outputs: classes; 1 for regression.
        groups: (rows,) names; rows of one group share a fold. None: every row for itself.
        cs: the values of C to choose from, for classes; a single one is taken as it is.
        intercept: whether the layer has a bias; if not, features are scaled and not centred.
        weights: of the labels, of their shape; an element of weight 0 does not count. None: all 1.
    """
    # Words that were cut off have no features.
    known = np.isfinite(features).all(1)
    features, labels = features[known], labels[known]
    weights = None if weights is None else weights[known]
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale < MIN_RELATIVE_STD * np.maximum(1, np.abs(mean))] = np.inf  # its weight becomes 0
    standard = (features - mean if intercept else features) / scale
    grouped = None if groups is None else groups[known]
    weight, bias, penalty = fit_linear(
        standard, labels, outputs, grouped, cs, ALPHA_GRID, intercept, weights
    )
    weight = weight / scale
    bias = bias - weight @ mean if intercept else np.zeros_like(bias)
    return Probe(weight.astype(np.float32), bias.astype(np.float32), penalty, (weight, bias))


def fit_linear(
    x: Any, labels: np.ndarray, outputs: int, groups: np.ndarray | None,
    cs: np.ndarray, alphas: np.ndarray, intercept: bool = True, weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Fit a linear model: logistic for classes, one a class for multi-label, ridge for a target.

    Shapes as in `fit_probe` and `fit_logistic`.
    """
    if isinstance(x, np.ndarray) and x.shape[0] < x.shape[1]:
        # The penalty depends on lengths alone, so the solution lies in the span of the rows: the
        # same solution, with as many unknowns as there are rows.
        left, values, right = np.linalg.svd(x, full_matrices=False)
        weight, bias, penalty = fit_linear(
            left * values, labels, outputs, groups, cs, alphas, intercept, weights
        )
        return weight @ right, bias, penalty
    if labels.ndim == 2:
        own_weights = [None] * outputs if weights is None else list(weights.T)
        pairs = [
            fit_logistic(x, column, 2, groups, cs, intercept, own)
            for column, own in zip(labels.T.astype(np.int64), own_weights, strict=True)
        ]
        weight = np.stack([w[1] - w[0] for w, _, _ in pairs])
        bias = np.array([b[1] - b[0] for _, b, _ in pairs])
        return weight, bias, float(np.median([penalty for _, _, penalty in pairs]))
    if outputs == 1:
        return fit_ridge(x, labels, groups, alphas, intercept)
    return fit_logistic(x, labels, outputs, groups, cs, intercept, weights)


def fit_logistic(
    x: Any,
    y: np.ndarray,
    outputs: int,
    groups: np.ndarray | None,
    cs: np.ndarray,
    intercept: bool = True,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit multinomial logistic regression, C by cross-validated log loss.

    Args:
        x: (rows, width), dense or sparse.
        y: (rows,) class ids below `outputs`.
        outputs: classes; one without rows is never predicted.
        groups: (rows,) names; rows of one group share a fold. None: every row for itself.
        cs: the values of C to choose from.
        intercept: whether to fit biases, else 0.
        weights: (rows,) of the rows' losses, in the choice of C, too; see `fit_probe`.

    Returns:
        Weights (outputs, width), biases (outputs,) and the chosen C.
    """
    from sklearn.linear_model import LogisticRegression

    if weights is not None:
        counts = weights > 0
        x, y, weights = x[counts], y[counts], weights[counts]
        groups = None if groups is None else groups[counts]
    present = np.unique(y)
    if len(present) < 2:
        lone = np.zeros((1, x.shape[1])), np.zeros(1)
        return *_fill_absent_classes(*lone, present, outputs, len(y)), float(cs[len(cs) // 2])
    chosen = _choose_c(x, y, groups, cs, intercept, weights)
    solver = LogisticRegression(
        C=chosen, max_iter=MAX_STEPS, tol=1e-6, fit_intercept=intercept
    ).fit(x, y, weights)
    weight, bias = solver.coef_, solver.intercept_
    if len(weight) == 1:
        weight = np.concatenate([-weight / 2, weight / 2])
        bias = np.concatenate([-bias / 2, bias / 2])
    return *_fill_absent_classes(weight, bias, present, outputs, len(y)), chosen


def _choose_c(
    x: Any, y: np.ndarray, groups: np.ndarray | None, cs: np.ndarray, intercept: bool,
    weights: np.ndarray | None,
) -> float:  # fmt: skip
    """Return the C of the least cross-validated log loss, weighted where the fit is.

    Classes too rare to be held out are left out; where fewer than two classes remain, it is the
    middle of the grid.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if len(cs) == 1:
        return float(cs[0])
    counts = np.bincount(y)
    enough = next((n for n in (FOLDS, 2) if (counts >= n).sum() >= 2), None)
    if enough is None:
        return float(cs[len(cs) // 2])
    rows = np.flatnonzero(counts[y] >= enough)[:MAX_SEARCH_ROWS]
    x, y = x[rows], y[rows]
    groups = None if groups is None else groups[rows]
    weights = None if weights is None else weights[rows]
    smallest = int(np.bincount(y)[np.unique(y)].min())
    folds = min(FOLDS, smallest if groups is None else min(smallest, len(set(groups))))
    if folds < 2 or len(np.unique(y)) < 2:
        return float(cs[len(cs) // 2])
    splitter = StratifiedKFold(folds) if groups is None else StratifiedGroupKFold(folds)
    splits = [
        (train, test)
        for train, test in splitter.split(x, y, groups)
        if len(np.unique(y[train])) == len(np.unique(y))
    ]
    if not splits:
        return float(cs[len(cs) // 2])
    with warnings.catch_warnings():
        # A fold of groups may lack a class, and the weakest penalty may need more steps: the
        # choice does not depend on either.
        warnings.simplefilter("ignore")
        solver: Any = LogisticRegressionCV  # Its types name the defaults alone.
        search: Any = solver(
            Cs=cs, cv=splits, scoring="neg_log_loss", max_iter=MAX_STEPS, l1_ratios=(0.0,),
            use_legacy_attributes=False, fit_intercept=intercept,
        ).fit(x, y, sample_weight=weights)  # fmt: skip
    return float(np.ravel(search.C_)[0])


def _fill_absent_classes(
    weight: np.ndarray, bias: np.ndarray, present: np.ndarray, outputs: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add outputs for classes without rows, lower than all others near the rows."""
    if len(present) == outputs:
        return weight, bias
    whole = np.tile(weight.mean(0), (outputs, 1))
    biases = np.full(outputs, bias.min() - np.log(rows + 1))
    whole[present], biases[present] = weight, bias
    return whole, biases


def fit_ridge(
    x: Any,
    y: np.ndarray,
    groups: np.ndarray | None,
    alphas: np.ndarray,
    intercept: bool = True,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit ridge regression, alpha by cross-validated squared error; shapes as `fit_logistic`.

    With fewer than two rows or groups it predicts their mean, without an intercept 0.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold, KFold

    units = len(y) if groups is None else len(set(groups))
    if units < 2:
        return np.zeros((1, x.shape[1])), np.array([y.mean() * intercept]), float("inf")
    folds = min(FOLDS, units)
    splitter = KFold(folds) if groups is None else GroupKFold(folds)
    search = GridSearchCV(
        Ridge(fit_intercept=intercept),
        {"alpha": alphas},
        cv=list(splitter.split(x, y, groups)),
        scoring="neg_mean_squared_error",
    ).fit(x, y)
    solver: Any = search.best_estimator_
    return (
        solver.coef_[None],
        np.array([float(solver.intercept_)]),
        float(search.best_params_["alpha"]),
    )
