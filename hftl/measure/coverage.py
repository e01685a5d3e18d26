"""Measure how often prediction sets hold the truth on test."""

import numpy as np

from hftl.measure.conformal import compute_scores, find_members, find_quantile, select_scores
from hftl.measure.facts import ConformalSection, CoverageFigure, ScoreEstimate
from hftl.measure.metrics import find_metric
from hftl.measure.scores import score_with_interval

MEASURED_COVERAGES = (0.8, 0.9, 0.95)


def measure_conformal(
    validation: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], task: str,
    units: np.ndarray, groups: int | None,
) -> ConformalSection:  # fmt: skip
    """Return the scores of validation, and how often the sets made of them hold on test.

    Args:
        validation: logits and labels, see `compute_scores`.
        test: the same.
        task: the recipe's.
        units: (rows,) int ids of test rows that belong together.
        groups: that the rows of validation come in; None where each is for itself.
    """
    rows, scores = len(validation[1]), select_scores(compute_scores(*validation, task))
    figures: list[CoverageFigure] = []
    for coverage in MEASURED_COVERAGES:
        quantile = find_quantile(rows, scores, coverage)
        if quantile is not None:
            holds, size = _measure_sets(*test, task, quantile)
            held = _estimate_share(holds, units)
            figures.append(CoverageFigure(coverage=coverage, held=held, size=size))
    return ConformalSection(rows=rows, groups=groups, scores=scores, test=figures)


def _measure_sets(
    logits: np.ndarray, labels: np.ndarray, task: str, quantile: float
) -> tuple[np.ndarray, float]:
    """Return which rows' sets or intervals hold the truth, (rows,) bool, and their mean size."""
    if task == "regression":
        return compute_scores(logits, labels, task) <= quantile, 2 * quantile
    members = find_members(logits, task, quantile)
    if task == "classification":
        return members[np.arange(len(labels)), labels], float(members.sum(1).mean())
    return np.asarray((members | (labels <= 0)).all(1)), float(members.sum(1).mean())


def _estimate_share(holds: np.ndarray, units: np.ndarray) -> ScoreEstimate:
    accuracy = find_metric("accuracy", "classification")
    share = score_with_interval(accuracy, np.ones(len(holds), dtype=int), holds.astype(int), units)
    return ScoreEstimate(value=share.value, ci95=share.ci95)
