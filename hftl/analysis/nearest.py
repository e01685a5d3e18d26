"""Predict rows by their nearest neighbours in frozen features."""

import numpy as np

from hftl.analysis.neighbours import normalize_rows

NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK_ROWS = 512


def predict_by_neighbours(
    features: np.ndarray, targets: np.ndarray, queries: np.ndarray, k: int = NEIGHBOURS,
    groups: np.ndarray | None = None, query_groups: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the weighted mean of the targets of each query's k nearest rows, (queries, outputs).

    Weights are exp(cosine / .07), as in DINO (Caron et al. 2021, arXiv:2104.14294, appendix F).

    Args:
        features: (rows, width).
        targets: (rows, outputs): one column a class, or the numbers themselves.
        queries: (queries, width).
        k: neighbours, at most as many as there are.
        groups: (rows,) names; a query is not predicted from rows of its own group. The rows
            themselves are queries where each has a group of its own.
        query_groups: (queries,) names of the same kind.
    """
    references, others = normalize_rows(features), normalize_rows(queries)
    targets = targets.astype(np.float64)
    k = min(k, len(references))
    predicted = np.empty((len(others), targets.shape[1]))
    for start in range(0, len(others), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        cosines = others[rows] @ references.T
        if groups is not None and query_groups is not None:
            cosines[query_groups[rows, None] == groups] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(cosines, nearest, 1)
        weights = np.exp((near - near.max(1, keepdims=True)) / TEMPERATURE)
        predicted[rows] = np.einsum("qk,qko->qo", weights, targets[nearest]) / weights.sum(
            1, keepdims=True
        )
    return predicted


def predict_left_out(
    features: np.ndarray, targets: np.ndarray, groups: np.ndarray | None, k: int = NEIGHBOURS
) -> np.ndarray:
    """Return `predict_by_neighbours` of every row from the rows of other groups, or all others."""
    names = np.arange(len(features)) if groups is None else groups
    return predict_by_neighbours(features, targets, features, k, names, names)
