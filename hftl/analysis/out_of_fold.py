"""Predict every labelled row by a probe that has not seen it, or by its neighbours."""

from collections.abc import Sequence

import numpy as np

from hftl.analysis.nearest import predict_left_out
from hftl.analysis.probe import C_GRID, FOLDS, Probe, find_axes, find_penalty, fit_probe
from hftl.errors import DataError
from hftl.plurals import count_noun

MIN_ROWS = 2 * FOLDS
STRONG = 5
"""Values of C, the smallest ones, that are tried first."""


def assign_folds(labels: np.ndarray, groups: np.ndarray | None, folds: int = FOLDS) -> np.ndarray:
    """Return the fold of every row, (rows,): classes in turn, and groups whole.

    Raises:
        DataError: if there are fewer rows than ten, or fewer groups than two.
    """
    units = len(labels) if groups is None else len(np.unique(groups))
    if len(labels) < MIN_ROWS or units < 2:
        unit = "row" if groups is None or len(labels) < MIN_ROWS else "group"
        count = count_noun(len(labels) if unit == "row" else units, unit)
        raise DataError(
            f"train has {count}, fewer than {MIN_ROWS if unit == 'row' else 2} for "
            "cross-validation",
            "Give more rows, raise data.shots, or lower the fractions",
        )
    if groups is not None:
        _, units_of = np.unique(groups, return_inverse=True)
        return deal_groups(np.bincount(units_of), min(folds, units))[units_of]
    kinds = labels if labels.dtype == np.int64 else np.zeros(len(labels), dtype=np.int64)
    order = np.argsort(kinds, kind="stable")
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def deal_groups(sizes: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of every group: the largest first, each to the fold with the fewest rows."""
    fold, filled = np.empty(len(sizes), dtype=np.int64), np.zeros(folds)
    for group in np.argsort(-sizes, kind="stable"):
        fold[group] = filled.argmin()
        filled[fold[group]] += sizes[group]
    return fold


def predict_out_of_fold(
    features: np.ndarray, targets: np.ndarray, outputs: int, groups: np.ndarray | None,
    intercept: bool = True,
) -> np.ndarray:  # fmt: skip
    """Return the logits of every row, (rows, outputs), each by a probe fitted on the other folds.

    A row without features, as a word that was cut off, has NaN. Arguments as of `fit_folds`.
    """
    folds, probes = fit_folds(features, targets, outputs, groups, intercept)
    return predict_folds(features, folds, probes)


def fit_folds(
    features: np.ndarray, targets: np.ndarray, outputs: int, groups: np.ndarray | None,
    intercept: bool = True,
) -> tuple[np.ndarray, list[Probe]]:  # fmt: skip
    """Return the fold of every row, and for each fold the probe of the rows outside of it.

    The penalty of classes is chosen once, on all rows.

    Args:
        features: (rows, width).
        targets: as of `fit_probe`.
        outputs: classes, or 1.
        groups: (rows,) names; rows of one group share a fold.
        intercept: whether the probe has one, see `fit_probe`.
    """
    folds = assign_folds(targets, groups)
    cs, axes = C_GRID, find_axes(features, intercept)
    if outputs > 1:
        cs = np.array([_choose_penalty(features, targets, groups, intercept, axes)])
    probes = []
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        own = None if groups is None else groups[train]
        probes.append(
            fit_probe(features[train], targets[train], outputs, own, cs, intercept, axes=axes)
        )
    return folds, probes


def _choose_penalty(
    features: np.ndarray, targets: np.ndarray, groups: np.ndarray | None, intercept: bool,
    axes: np.ndarray | None,
) -> float:  # fmt: skip
    """Return the C of the least cross-validated loss.

    Weak penalties take most of the steps and hardly ever serve, so they are tried where the weakest
    of the others is the best.
    """
    chosen = find_penalty(features, targets, groups, C_GRID[:STRONG], intercept, axes)
    if chosen < C_GRID[STRONG - 1]:
        return chosen
    return find_penalty(features, targets, groups, C_GRID[STRONG - 1 :], intercept, axes)


def predict_folds(features: np.ndarray, folds: np.ndarray, probes: Sequence[Probe]) -> np.ndarray:
    """Return the logits of every row, (rows, outputs), by the probe of its fold."""
    logits = np.full((len(features), len(probes[0].weight)), np.nan)
    for fold, probe in enumerate(probes):
        logits[folds == fold] = probe.logits(features[folds == fold])
    return logits


def predict_by_others(
    features: np.ndarray, targets: np.ndarray, outputs: int, groups: np.ndarray | None
) -> np.ndarray:
    """Return what the nearest rows of other groups say of each, as logits (rows, outputs)."""
    known = np.isfinite(features).all(1)
    numbers = encode_columns(targets, outputs)
    own = None if groups is None else groups[known]
    predicted = np.full((len(features), outputs), np.nan)
    predicted[known] = predict_left_out(features[known], numbers[known], own)
    return to_logits(predicted, targets)


def encode_columns(targets: np.ndarray, outputs: int) -> np.ndarray:
    """Return targets as (rows, outputs) float64: a column a class, or the numbers."""
    if targets.ndim == 2:
        return targets.astype(np.float64)
    if targets.dtype == np.int64:
        return np.eye(outputs)[targets]
    return targets[:, None]


def to_logits(means: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return mean targets as the logits that a model would give: of shares, their log odds."""
    if targets.ndim == 1 and targets.dtype == np.float64:
        return means
    shares = np.clip(means, 1e-9, 1 - 1e-9)
    return np.log(shares) if targets.ndim == 1 else np.log(shares / (1 - shares))
