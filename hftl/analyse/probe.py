"""The probe, which is also the strategy `head`: a linear solver on frozen features.

Multinomial logistic or ridge regression on standardised features, its penalty chosen by
cross-validation on the training rows alone (Alain & Bengio 2016, arXiv:1610.01644).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
)

FOLDS = 5
STEPS = 1000
CS = np.logspace(-5, 2, 8)
ALPHAS = np.logspace(-2, 6, 17)
FLAT = 1e-6
"""A feature that varies less than this, relative to a mean above 1, carries rounding alone."""


@dataclass(frozen=True)
class Probe:
    """A linear layer: `weight` (outputs, width), `bias` (outputs,), float32.

    `penalty` is the one chosen, C for classes and alpha for a target.
    """

    weight: np.ndarray
    bias: np.ndarray
    penalty: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(rows, outputs) of (rows, width)."""
        return features @ self.weight.T + self.bias


def fit_probe(
    features: np.ndarray, labels: np.ndarray, outputs: int, groups: list[str | None]
) -> Probe:
    """Fits the probe.

    Args:
        features: (rows, width) float32.
        labels: (rows,) int64 class ids below `outputs`, or float64 targets.
        outputs: classes; 1 for regression.
        groups: a name for each row whose fold is shared, or None throughout.
    """
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale < FLAT * np.maximum(1, np.abs(mean))] = np.inf  # such a feature weighs nothing
    standard = (features - mean) / scale
    grouped = None if groups[0] is None else np.array(groups)
    if outputs == 1:
        weight, bias, penalty = ridge(standard, labels, grouped, ALPHAS)
    else:
        weight, bias, penalty = logistic(standard, labels, grouped, CS)
    weight = weight / scale
    return Probe(weight.astype(np.float32), (bias - weight @ mean).astype(np.float32), penalty)


def logistic(
    x: Any, y: np.ndarray, groups: np.ndarray | None, cs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Multinomial logistic regression, C by cross-validated log loss.

    Args:
        x: (rows, width), dense or sparse.
        y: (rows,) class ids, every class present.
        groups: (rows,) names whose rows share a fold, or None.
        cs: the penalties to choose from.

    Returns:
        Weights (classes, width), biases (classes,) and the C chosen.
    """
    smallest = int(np.bincount(y).min())
    folds = min(FOLDS, smallest if groups is None else min(smallest, len(set(groups))))
    if folds < 2:
        # One row of a class cannot be held out: the middle of the grid stands in for a choice.
        chosen = float(cs[len(cs) // 2])
    else:
        splitter = StratifiedKFold(folds) if groups is None else StratifiedGroupKFold(folds)
        with warnings.catch_warnings():
            # A group fold may lack a class, the weakest penalty need more steps: neither decides.
            warnings.simplefilter("ignore")
            settings: dict[str, Any] = {
                "Cs": cs, "cv": list(splitter.split(x, y, groups)), "scoring": "neg_log_loss",
                "max_iter": STEPS, "l1_ratios": (0.0,), "use_legacy_attributes": False,
            }  # fmt: skip
            search: Any = LogisticRegressionCV(**settings).fit(x, y)
        chosen = float(np.ravel(search.C_)[0])
    solver = LogisticRegression(C=chosen, max_iter=STEPS, tol=1e-6).fit(x, y)
    weight, bias = solver.coef_, solver.intercept_
    if len(weight) == 1:
        weight = np.concatenate([-weight / 2, weight / 2])
        bias = np.concatenate([-bias / 2, bias / 2])
    return weight, bias, chosen


def ridge(
    x: Any, y: np.ndarray, groups: np.ndarray | None, alphas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ridge regression, alpha by cross-validated squared error; shapes as `logistic`, one output.

    With fewer than two rows, or groups, it predicts their mean.
    """
    units = len(y) if groups is None else len(set(groups))
    if units < 2:
        return np.zeros((1, x.shape[1])), np.array([y.mean()]), float("inf")
    folds = min(FOLDS, units)
    splitter = KFold(folds) if groups is None else GroupKFold(folds)
    search = GridSearchCV(
        Ridge(), {"alpha": alphas}, cv=list(splitter.split(x, y, groups)),
        scoring="neg_mean_squared_error",
    ).fit(x, y)  # fmt: skip
    solver: Any = search.best_estimator_
    return solver.coef_[None], np.array([solver.intercept_]), float(search.best_params_["alpha"])
