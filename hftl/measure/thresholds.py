"""Fit the probability above which each of several labels is predicted."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.special import expit, logit

from hftl.data.labels import MULTI_LABEL_THRESHOLD
from hftl.measure.facts import ScoreEstimate, ThresholdSection
from hftl.measure.label_calibration import compute_probabilities, fit_label_curves, invert_curve
from hftl.measure.metrics import METRICS, find_metric
from hftl.measure.scores import compare_pair, score_with_interval

MIN_LABEL_ROWS = 10
"""Rows of validation with a label from which on it has a threshold of its own."""
EDGE = 1e-12
"""How near to 0 and 1 a threshold may be."""

ThresholdMetric = Literal["f1", "micro_f1"]


def fit_thresholds(logits: np.ndarray, labels: np.ndarray, metric: ThresholdMetric) -> np.ndarray:
    """Return the thresholds of the sigmoid with the greatest metric, (labels,) float64.

    `f1`, the mean over labels, is greatest where that of each label is. For `micro_f1` one
    threshold of the true probabilities is best for all labels (Lipton et al. 2014, ECML PKDD), so
    that it is chosen on calibrated ones and taken back through the curve of each label. Where fewer
    than `MIN_LABEL_ROWS` rows have a label, for `micro_f1` any label, .5 stays.

    Args:
        logits: (rows, labels) of validation.
        labels: (rows, labels) of 0 and 1.
        metric: the recipe's.
    """
    logits, holds = logits.astype(np.float64), labels > 0
    if metric == "f1":
        return np.array([fit_threshold(*column) for column in zip(logits.T, holds.T, strict=True)])
    if holds.sum() < MIN_LABEL_ROWS:
        return np.full(logits.shape[1], MULTI_LABEL_THRESHOLD)
    curves = fit_label_curves(logits, labels)
    log_odds = logit(np.clip(compute_probabilities(logits, curves), EDGE, 1 - EDGE))
    common = fit_threshold(log_odds.ravel(), holds.ravel())
    thresholds = expit([invert_curve(curve, common) for curve in curves])
    return np.clip(thresholds, EDGE, 1 - EDGE)


def fit_threshold(logits: np.ndarray, holds: np.ndarray) -> float:
    """Return the threshold of the sigmoid with the greatest F1; of equals the nearest to .5.

    It lies in the middle between two logits, so that rounding does not decide.

    Args:
        logits: (rows,).
        holds: (rows,) bool.
    """
    if holds.sum() < MIN_LABEL_ROWS:
        return MULTI_LABEL_THRESHOLD
    order = np.argsort(-logits, kind="stable")
    ordered = logits[order]
    counts = np.arange(1, len(logits) + 1)
    scores = 2 * np.cumsum(holds[order]) / (counts + holds.sum())
    # Rows of one logit are predicted together; below the last nothing is left out.
    below = np.append(ordered[1:], ordered[-1] - 1)
    middles = np.clip(expit((ordered + below) / 2), EDGE, 1 - EDGE)
    scores[ordered == below] = -1
    best = scores >= scores.max() - 1e-12
    at_half = int((logits > 0).sum())
    if at_half and best[at_half - 1]:
        return MULTI_LABEL_THRESHOLD
    candidates = middles[best]
    return float(candidates[np.abs(candidates - MULTI_LABEL_THRESHOLD).argmin()])


def measure_thresholds(
    thresholds: np.ndarray, metric: ThresholdMetric, logits: np.ndarray, labels: np.ndarray,
    names: Sequence[str], units: np.ndarray,
) -> ThresholdSection:  # fmt: skip
    """Return what thresholds are worth on rows that they were not fitted on.

    Args:
        thresholds: (labels,).
        metric: that they were fitted for.
        logits: (rows, labels) of test.
        labels: (rows, labels) of 0 and 1.
        names: of the labels.
        units: (rows,) int ids of rows that belong together.
    """
    probabilities = expit(logits.astype(np.float64))
    plain, fitted = (
        (probabilities > limit).astype(labels.dtype)
        for limit in (MULTI_LABEL_THRESHOLD, thresholds)
    )
    gain = compare_pair(find_metric(metric, "multi-label"), labels, fitted, plain, units)
    return ThresholdSection(
        metric=metric,
        thresholds={name: float(t) for name, t in zip(names, thresholds, strict=True)},
        before=_score(labels, plain, units),
        after=_score(labels, fitted, units),
        gain=ScoreEstimate(value=gain.value, ci95=gain.ci95),
    )


def _score(
    labels: np.ndarray, predictions: np.ndarray, units: np.ndarray
) -> dict[str, ScoreEstimate]:
    scores = {
        name: score_with_interval(metric, labels, predictions, units)
        for name, metric in METRICS["multi-label"].items()
    }
    return {name: ScoreEstimate(value=s.value, ci95=s.ci95) for name, s in scores.items()}
