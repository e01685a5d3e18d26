"""Make prediction sets that hold the truth as often as asked: split conformal prediction.

A set holds every class that is no farther from the input than a quantile of how far the labels of
validation are from theirs (Vovk et al. 2005; Sadinle et al. 2019, JASA 114:223-234). For an input
that is exchangeable with the rows of validation it holds the label with at least the nominal
probability, and at most 1 / (rows + 1) more, whatever the model. Where validation also chose the
epoch or the seed that is published, this is approximate.

Of one class an input, a set is never empty: the likeliest class is always in it. Where the model is
nearly always right the quantile is so small that inputs it is hardly less sure of would have empty
sets, which cover as often as asked and tell nobody anything. The class that is added can only raise
coverage above the nominal (Sadinle et al. 2019 give this as a remedy of null predictions). For
several labels an empty set is an answer: none holds.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, expit, softmax

MAX_SCORES = 500
"""Scores that are stored. Of more rows the quantile is the next greater stored one, so that
coverage is up to 1 / MAX_SCORES above the nominal."""
TASKS = ("classification", "multi-label", "regression")
"""Tasks whose rows have one answer; the words of a row depend on each other."""


def compute_distances(logits: np.ndarray, task: str) -> np.ndarray:
    """Return how far each class is from each row, (rows, classes): 1 - its probability.

    The probabilities are those before calibration, which was fitted on validation too.
    """
    logits = logits.astype(np.float64)
    return 1 - (softmax(logits, axis=1) if task == "classification" else expit(logits))


def compute_scores(logits: np.ndarray, labels: np.ndarray, task: str) -> np.ndarray:
    """Return how far each row is from its label, (rows,) float64.

    Classification: the distance of its class; multi-label: the largest distance of the labels that
    hold, 0 without any; regression: the absolute error.

    Args:
        logits: (rows, outputs).
        labels: (rows,) class ids or targets, or (rows, labels) of 0 and 1.
        task: the recipe's.
    """
    if task == "regression":
        return np.abs(logits[:, 0].astype(np.float64) - labels)
    distances = compute_distances(logits, task)
    if task == "classification":
        return distances[np.arange(len(labels)), labels]
    return np.where(labels > 0, distances, 0.0).max(1)


def find_members(logits: np.ndarray, task: str, quantile: float) -> np.ndarray:
    """Return which classes are in the set of each row, (rows, classes) bool.

    Args:
        logits: (rows, classes).
        task: classification, whose sets hold the likeliest class at least, or multi-label.
        quantile: see `find_quantile`.
    """
    members = compute_distances(logits, task) <= quantile
    if task == "classification":
        members[np.arange(len(logits)), logits.argmax(1)] = True
    return members


def select_scores(scores: np.ndarray) -> list[float]:
    """Return the scores in ascending order; of more than `MAX_SCORES` as many, evenly spaced."""
    ranks = _list_ranks(len(scores), min(len(scores), MAX_SCORES))
    return np.sort(scores)[ranks - 1].tolist()


def find_quantile(rows: int, scores: Sequence[float], coverage: float) -> float | None:
    """Return the score of rank ceil((rows + 1) coverage), or the next that is stored.

    None where the rows are too few for the coverage.

    Args:
        rows: of validation.
        scores: see `select_scores`.
        coverage: between 0 and 1.
    """
    rank = find_stored_rank(rows, len(scores), coverage)
    if rank is None:
        return None
    return scores[int(np.searchsorted(_list_ranks(rows, len(scores)), rank))]


def find_stored_rank(rows: int, count: int, coverage: float) -> int | None:
    """Return the rank that the coverage needs, or the next of which the score is stored.

    None where the rows are too few for the coverage.

    Args:
        rows: of validation.
        count: of the scores that are stored, see `select_scores`.
        coverage: between 0 and 1.
    """
    rank = find_rank(rows, coverage)
    if rank > rows:
        return None
    ranks = _list_ranks(rows, count)
    return int(ranks[np.searchsorted(ranks, rank)])


def find_rank(rows: int, coverage: float) -> int:
    """Return the rank among the scores of validation that the coverage needs."""
    return max(1, math.ceil((rows + 1) * coverage - 1e-9))


def _list_ranks(rows: int, count: int) -> np.ndarray:
    return -(-np.arange(1, count + 1) * rows // count)


def count_rows_needed(coverage: float) -> int:
    """Return the fewest rows of validation that a coverage can be had from."""
    rows = max(1, math.floor(coverage / (1 - coverage)) - 1)
    while find_rank(rows, coverage) > rows:
        rows += 1
    return rows


def estimate_spread(rows: int, rank: int) -> tuple[float, float]:
    """Return where the coverage of 95 % of such validation splits lies: over further inputs it is
    Beta(k, rows + 1 - k) for the score of rank k (Vovk 2012, ACML).

    Args:
        rows: of validation.
        rank: of the score that is used, see `find_stored_rank`.
    """
    low, high = (float(betaincinv(rank, rows + 1 - rank, p)) for p in (0.025, 0.975))
    return low, high
