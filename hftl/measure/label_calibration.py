"""Calibrate the probabilities of several labels at once: a curve for each, and how far they are
off."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from hftl.measure.calibration import choose_bins, estimate_change, estimate_over_rows
from hftl.measure.facts import CalibrationScores, CalibrationSection, LabelCurve

MIN_SIDE_ROWS = 5
"""Rows that have a label, and rows that lack it, from which on its probabilities are calibrated."""
ISOTONIC_ROWS, ISOTONIC_SIDE_ROWS = 1000, 100
"""Rows, and rows of the rarer side, from which on calibration is isotonic. With fewer it follows
noise, and the two parameters of Platt's method are better (Niculescu-Mizil & Caruana 2005,
ICML)."""


def fit_label_curves(logits: np.ndarray, labels: np.ndarray) -> list[LabelCurve]:
    """Return a curve for each label: isotonic where there are enough rows, else Platt's.

    `none` for a label that too few rows have or lack, or whose logits do not rise with it.

    Args:
        logits: (rows, labels) of validation.
        labels: (rows, labels) of 0 and 1.
    """
    columns = zip(logits.astype(np.float64).T, labels.T > 0, strict=True)
    return [_fit_label_curve(*column) for column in columns]


def _fit_label_curve(logits: np.ndarray, holds: np.ndarray) -> LabelCurve:
    rarer = min(holds.sum(), (~holds).sum())
    curve = None
    if len(logits) >= ISOTONIC_ROWS and rarer >= ISOTONIC_SIDE_ROWS:
        curve = fit_isotonic(logits, holds)
    elif rarer >= MIN_SIDE_ROWS:
        curve = fit_platt(logits, holds)
    return curve or LabelCurve(method="none")


def fit_platt(logits: np.ndarray, holds: np.ndarray) -> LabelCurve | None:
    """Return the sigmoid of greatest likelihood; None where it does not rise.

    The targets are those of Platt (1999, Advances in Large Margin Classifiers, 61-74), which keep
    the slope finite where a threshold separates the rows: (n + 1) / (n + 2) for the n rows that
    have the label, 1 / (m + 2) for the m that lack it. A row counts once with its target's weight
    as one that has the label, and once with the rest as one that lacks it.

    Args:
        logits: (rows,).
        holds: (rows,) bool.
    """
    from sklearn.linear_model import LogisticRegression

    positives, rows = int(holds.sum()), len(holds)
    targets = np.where(holds, (positives + 1) / (positives + 2), 1 / (rows - positives + 2))
    scale = float(np.abs(logits).max()) or 1.0
    model: Any = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(
        np.tile(logits / scale, 2)[:, None],
        np.repeat([1, 0], rows),
        np.concatenate([targets, 1 - targets]),
    )
    slope = float(model.coef_[0, 0]) / scale
    if slope <= 0:
        return None
    return LabelCurve(method="platt", slope=slope, intercept=float(model.intercept_[0]))


def fit_isotonic(logits: np.ndarray, holds: np.ndarray) -> LabelCurve | None:
    """Return the rising curve of least squares; None where it is flat.

    It stays off 0 and 1 by as much as the number of rows leaves open.

    Args:
        logits: (rows,).
        holds: (rows,) bool.
    """
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(holds) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least).fit(logits, holds.astype(np.float64))
    probabilities: list[float] = model.y_thresholds_.tolist()
    if probabilities[0] == probabilities[-1]:
        return None
    return LabelCurve(
        method="isotonic", logits=model.X_thresholds_.tolist(), probabilities=probabilities
    )


def compute_probabilities(logits: np.ndarray, curves: Sequence[LabelCurve]) -> np.ndarray:
    """Return the probability of each label, (rows, labels) float64.

    Args:
        logits: (rows, labels).
        curves: one a label, in their order.
    """
    columns = zip(logits.astype(np.float64).T, curves, strict=True)
    return np.stack([_apply_curve(*column) for column in columns], axis=1)


def _apply_curve(logits: np.ndarray, curve: LabelCurve) -> np.ndarray:
    if curve.method == "isotonic":
        return np.interp(logits, curve.logits, curve.probabilities)
    return expit(curve.slope * logits + curve.intercept)


def invert_curve(curve: LabelCurve, probability: float) -> float:
    """Return the logit above which a label's probability is greater than this one.

    It is infinite where the curve is always above or never. An isotonic curve rises between two
    rows of validation: there it is the middle of their logits, so that rounding does not decide.
    """
    if curve.method != "isotonic":
        return float((logit(probability) - curve.intercept) / curve.slope)
    above = int(np.searchsorted(curve.probabilities, probability, side="right"))
    if above == 0:
        return -math.inf
    if above == len(curve.logits):
        return math.inf
    return (curve.logits[above - 1] + curve.logits[above]) / 2


def measure_label_calibration(
    validation: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray],
    names: Sequence[str], units: np.ndarray,
) -> CalibrationSection:  # fmt: skip
    """Return the curves that validation gives, and the errors on test before and after them.

    Args:
        validation: logits (rows, labels) and labels (rows, labels) of 0 and 1.
        test: the same.
        names: of the labels.
        units: (rows,) int ids of test rows that belong together.
    """
    curves = fit_label_curves(*validation)
    logits, labels = test
    bins = choose_bins(len(labels))
    plain = compute_probabilities(logits, [LabelCurve(method="none")] * len(curves))
    before = _score(plain, labels, units, bins)
    after = change = None
    if any(curve.method != "none" for curve in curves):
        calibrated = compute_probabilities(logits, curves)
        after = _score(calibrated, labels, units, bins)
        old, new = (((p - labels) ** 2).mean(1) for p in (plain, calibrated))
        change = estimate_change(new - old, units)
    return CalibrationSection(
        temperature=None,
        labels=dict(zip(names, curves, strict=True)),
        bins=bins,
        before=before,
        after=after,
        change=change,
    )


def _score(
    probabilities: np.ndarray, labels: np.ndarray, units: np.ndarray, bins: int
) -> CalibrationScores:
    squares = ((probabilities - labels) ** 2).mean(1)
    return CalibrationScores(
        ece=estimate_over_rows(_build_ece(probabilities, labels, bins), units, 1.0),
        brier=estimate_over_rows(lambda rows: float(squares[rows].mean()), units, 1.0),
    )


def _build_ece(
    probabilities: np.ndarray, labels: np.ndarray, bins: int
) -> Callable[[np.ndarray], float]:
    """Return the calibration error, the mean over labels, as a function of rows.

    That of one label is the sum over bins of equal mass of rows / n |share that has it - mean
    probability|. Rows are sorted once, as a jackknife calls often.

    Args:
        probabilities: (rows, labels).
        labels: (rows, labels) of 0 and 1.
        bins: how many.
    """
    order = np.argsort(probabilities, axis=0, kind="stable").T
    gaps = np.take_along_axis(labels - probabilities, order.T, axis=0).T

    def ece(rows: np.ndarray) -> float:
        chosen = np.zeros(len(labels), dtype=bool)
        chosen[rows] = True
        in_order = gaps[chosen[order]].reshape(len(gaps), len(rows))
        parts = np.array_split(in_order, min(bins, len(rows)), axis=1)
        return float(sum(np.abs(part.sum(1)).mean() for part in parts) / len(rows))

    return ece
