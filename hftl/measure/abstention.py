"""Measure what is gained by leaving the least sure inputs unanswered."""

import numpy as np
from scipy.special import softmax

from hftl.measure.calibration import estimate_over_rows
from hftl.measure.facts import AbstentionPoint, AbstentionSection, ScoreEstimate
from hftl.measure.metrics import find_metric
from hftl.measure.scores import score_with_interval

MIN_ROWS = 100
"""Rows of test from which on there is a curve."""
POINTS = 20
MIN_POINT_ROWS = 10
"""Rows from which on a point is shown: of fewer an accuracy says little."""


def compute_aurc(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the area under the risk-coverage curve: the mean over k of the error rate among the k
    rows of the highest scores (Geifman & El-Yaniv 2017, NeurIPS).

    Rows of one score count as one, at their mean: their order says nothing.

    Args:
        scores: (rows,).
        right: (rows,) bool.
    """
    _, ranks, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    rates = np.bincount(ranks, weights=~right) / sizes
    errors = np.cumsum(np.repeat(rates, sizes))
    return float(np.mean(errors / np.arange(1, len(scores) + 1)))


def measure_abstention(
    logits: np.ndarray, labels: np.ndarray, temperature: float | None, units: np.ndarray
) -> AbstentionSection | None:
    """Return the accuracy of the surest rows by their share, with the area under the curve; None of
    fewer than `MIN_ROWS` rows.

    Args:
        logits: (rows, classes) of test.
        labels: (rows,) class ids.
        temperature: that `predict` divides logits by.
        units: (rows,) int ids of rows that belong together.
    """
    if len(labels) < MIN_ROWS:
        return None
    predictions = logits.argmax(1)
    right = predictions == labels
    scores = softmax(logits.astype(np.float64) / (temperature or 1.0), axis=1).max(1)
    order = np.argsort(-scores, kind="stable")
    counts = np.unique(np.ceil(np.arange(1, POINTS + 1) * len(labels) / POINTS).astype(int))
    chosen = [order[:n] for n in counts if n >= MIN_POINT_ROWS]

    def aurc(rows: np.ndarray) -> float:
        return compute_aurc(scores[rows], right[rows])

    return AbstentionSection(
        points=[
            AbstentionPoint(
                share=len(rows) / len(labels),
                accuracy=_score(labels[rows], predictions[rows], units[rows]),
                score=float(scores[rows[-1]]),
            )
            for rows in chosen
        ],
        aurc=estimate_over_rows(aurc, units, 1.0),
        best_aurc=compute_aurc(right.astype(np.float64), right),
    )


def _score(labels: np.ndarray, predictions: np.ndarray, units: np.ndarray) -> ScoreEstimate:
    accuracy = find_metric("accuracy", "classification")
    estimate = score_with_interval(accuracy, labels, predictions, units)
    return ScoreEstimate(value=estimate.value, ci95=estimate.ci95)
