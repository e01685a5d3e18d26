"""Fit the probe, which is also the strategy `head`: a linear solver on frozen features.

Multinomial logistic or ridge regression on standardised features, its penalty chosen by
cross-validation on the training rows alone (Alain & Bengio 2016, arXiv:1610.01644).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.analysis.logistic import (
    MAX_AXES,
    MAX_STEPS,
    Axes,
    compute_losses,
    fit_path,
    turn_rows,
)

FOLDS = 5
SEARCH_TOLERANCE = 1e-3
"""Of the fits that the penalty is chosen by; see `fit_path`."""
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
    axes: np.ndarray | None = None,
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
        axes: of `find_axes`, of these rows or of some that they are a part of: it takes less time.
    """
    # Words that were cut off have no features.
    known = np.isfinite(features).all(1)
    features, labels = features[known], labels[known]
    weights = None if weights is None else weights[known]
    standard, mean, scale = _standardize(features, intercept)
    grouped = None if groups is None else groups[known]
    weight, bias, penalty = fit_linear(
        standard, labels, outputs, grouped, cs, ALPHA_GRID, intercept, weights, axes
    )
    weight = weight / scale
    bias = bias - weight @ mean if intercept else np.zeros_like(bias)
    return Probe(weight.astype(np.float32), bias.astype(np.float32), penalty, (weight, bias))


def find_axes(features: np.ndarray, intercept: bool = True) -> np.ndarray | None:
    """Return the axes (width, width) of standardised features, those without variance among them.

    Probes of parts of the rows, each part standardised by itself, are solved on them as well: a
    probe does not depend on axes that are as many as the columns. None where there are as many
    columns as rows, or more than it pays for.
    """
    known = features[np.isfinite(features).all(1)]
    if not known.shape[1] < len(known) or known.shape[1] > MAX_AXES:
        return None
    standard = _standardize(known, intercept)[0]
    return np.linalg.eigh(standard.T @ standard)[1].T


def _standardize(
    features: np.ndarray, intercept: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (rows, width) of variance 1, and centred for a bias; and means and scales."""
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale < MIN_RELATIVE_STD * np.maximum(1, np.abs(mean))] = np.inf  # its weight becomes 0
    return (features - mean if intercept else features) / scale, mean, scale


def fit_linear(
    x: Any, labels: np.ndarray, outputs: int, groups: np.ndarray | None,
    cs: np.ndarray, alphas: np.ndarray, intercept: bool = True, weights: np.ndarray | None = None,
    axes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Fit a linear model: logistic for classes, one a class for multi-label, ridge for a target.

    Shapes as in `fit_probe` and `fit_logistic`.
    """
    turned = _turn(x, axes)
    if turned is not None:
        rows, span = turned
        weight, bias, penalty = _fit_turned(
            rows, labels, outputs, groups, cs, alphas, intercept, weights
        )
        return span.expand(weight), bias, penalty
    return _fit_turned(x, labels, outputs, groups, cs, alphas, intercept, weights)


def _turn(x: Any, axes: np.ndarray | None) -> tuple[np.ndarray, Axes] | None:
    """Return rows on given axes or on their own; None as `turn_rows`, and where they have none."""
    turned = turn_rows(x) if axes is None else (x @ axes.T, Axes(np.eye(len(axes)), axes))
    # scikit-learn's ridge regression refuses rows without a column.
    return turned if turned is not None and turned[0].shape[1] else None


def find_penalty(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, cs: np.ndarray,
    intercept: bool = True, axes: np.ndarray | None = None,
) -> float:  # fmt: skip
    """Return the C of classes that `fit_probe` takes under the same arguments, without its fit."""
    known = np.isfinite(features).all(1)
    standard, labels = _standardize(features[known], intercept)[0], labels[known]
    groups = None if groups is None else groups[known]
    turned = _turn(standard, axes)
    rows = standard if turned is None else turned[0]
    columns = [labels] if labels.ndim == 1 else list(labels.T.astype(np.int64))
    chosen = [_choose_c(rows, column, groups, cs, intercept, None) for column in columns]
    return float(np.median(chosen))


def _fit_turned(
    x: Any, labels: np.ndarray, outputs: int, groups: np.ndarray | None,
    cs: np.ndarray, alphas: np.ndarray, intercept: bool, weights: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Fit a linear model of rows that may be turned; see `fit_linear`."""
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
    if weights is not None:
        counts = weights > 0
        x, y, weights = x[counts], y[counts], weights[counts]
        groups = None if groups is None else groups[counts]
    present = np.unique(y)
    if len(present) < 2:
        lone = np.zeros((1, x.shape[1])), np.zeros(1)
        return *_fill_absent_classes(*lone, present, outputs, len(y)), float(cs[len(cs) // 2])
    chosen = _choose_c(x, y, groups, cs, intercept, weights)
    if _is_turned(x):
        classes = np.searchsorted(present, y)
        ((weight, bias),) = fit_path(x, classes, len(present), [chosen], intercept, weights)
    else:
        weight, bias = _fit_by_scikit_learn(x, y, chosen, intercept, weights)
    return *_fill_absent_classes(weight, bias, present, outputs, len(y)), chosen


def _choose_c(
    x: Any, y: np.ndarray, groups: np.ndarray | None, cs: np.ndarray, intercept: bool,
    weights: np.ndarray | None,
) -> float:  # fmt: skip
    """Return the C of the least cross-validated log loss, weighted where the fit is.

    Classes too rare to be held out are left out; where there are no folds, it is the middle of the
    grid.
    """
    if len(cs) == 1:
        return float(cs[0])
    rows, splits = split_folds(y, groups)
    if not splits:
        return float(cs[len(cs) // 2])
    x, (present, classes) = x[rows], np.unique(y[rows], return_inverse=True)
    weights = np.ones(len(rows)) if weights is None else weights[rows]
    if not _is_turned(x):
        return _choose_by_scikit_learn(x, classes, splits, cs, intercept, weights)
    losses = np.zeros(len(cs))
    for train, test in splits:
        path = fit_path(
            x[train], classes[train], len(present), cs, intercept, weights[train], SEARCH_TOLERANCE
        )
        for place, (weight, bias) in enumerate(path):
            each = compute_losses(np.asarray(x[test] @ weight.T) + bias, classes[test])
            losses[place] += np.average(each, weights=weights[test])
    return float(cs[int(losses.argmin())])


def _is_turned(x: Any) -> bool:
    """Return whether rows are dense and narrow, as all are that `turn_rows` has turned.

    Without that scikit-learn's solver takes less time than a path.
    """
    return isinstance(x, np.ndarray) and x.shape[1] <= MAX_AXES


def _fit_by_scikit_learn(
    x: Any, y: np.ndarray, c: float, intercept: bool, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (classes, width) and biases of scikit-learn's solver."""
    from sklearn.linear_model import LogisticRegression

    solver = LogisticRegression(C=c, max_iter=MAX_STEPS, tol=1e-6, fit_intercept=intercept)
    solver.fit(x, y, weights)
    weight, bias = solver.coef_, np.asarray(solver.intercept_)
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


def _choose_by_scikit_learn(
    x: Any, y: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]], cs: np.ndarray,
    intercept: bool, weights: np.ndarray,
) -> float:  # fmt: skip
    """Return the C of the least log loss over the folds by scikit-learn's solver."""
    from sklearn.linear_model import LogisticRegressionCV

    with warnings.catch_warnings():
        # The weakest penalty may need more steps: the choice does not depend on it.
        warnings.simplefilter("ignore")
        solver: Any = LogisticRegressionCV  # Its types name the defaults alone.
        search: Any = solver(
            Cs=cs, cv=splits, scoring="neg_log_loss", max_iter=MAX_STEPS, l1_ratios=(0.0,),
            use_legacy_attributes=False, fit_intercept=intercept,
        ).fit(x, y, sample_weight=weights)  # fmt: skip
    return float(np.ravel(search.C_)[0])


def split_folds(
    y: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the rows that a penalty is chosen on, and places of train and test among them.

    Args:
        y: (rows,) class ids.
        groups: (rows,) names; rows of one group share a fold. None: every row for itself.

    Returns:
        No folds where fewer than two classes remain, or no fold's training rows have all.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    counts = np.bincount(y)
    enough = next((n for n in (FOLDS, 2) if (counts >= n).sum() >= 2), None)
    if enough is None:
        return np.arange(0), []
    rows = np.flatnonzero(counts[y] >= enough)[:MAX_SEARCH_ROWS]
    y, groups = y[rows], None if groups is None else groups[rows]
    present, sizes = np.unique(y, return_counts=True)
    folds = min(FOLDS, int(sizes.min()), len(y) if groups is None else len(set(groups)))
    if folds < 2 or len(present) < 2:
        return rows, []
    splitter = StratifiedKFold(folds) if groups is None else StratifiedGroupKFold(folds)
    with warnings.catch_warnings():
        # A fold of groups may lack a class; it is left out below.
        warnings.simplefilter("ignore")
        splits = list(splitter.split(rows, y, groups))
    return rows, [(a, b) for a, b in splits if len(np.unique(y[a])) == len(present)]


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
