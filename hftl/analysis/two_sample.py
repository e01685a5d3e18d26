"""Test by a held-out classifier whether two samples of features are of one distribution."""

from typing import NamedTuple

import numpy as np

from hftl.analysis.probe import fit_probe

PERMUTATIONS = 500
PROBE_C = np.array([0.01])
"""The penalty on standardised features; a choice by cross-validation would cost more than it
gains."""


class TwoSampleTest(NamedTuple):
    """Hold how well a held-out classifier tells two samples apart (.5: not at all), and the
    p-value of one distribution."""

    auc: float
    p_value: float


def compare_by_classifier(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> TwoSampleTest:
    """Return the area under the ROC curve on the half that a classifier has not seen.

    The classifier stays as it is while the sides of the held-out half are permuted, so that the
    p-value is exact (Lopez-Paz & Oquab 2017, arXiv:1610.06545, with permutations for its normal
    approximation). Groups are in one half, and permuted, as wholes.

    Args:
        first: (rows, width).
        second: the same.
        groups: (rows of both,) names, first's before second's. None: every row for itself.
        seed: of the halves and permutations.
    """
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    rows = np.concatenate([first, second]).astype(np.float32)
    sides = np.repeat(np.array([0, 1]), [len(first), len(second)])
    names = np.arange(len(rows)) if groups is None else np.unique(groups, return_inverse=True)[1]
    held = _draw_half(sides, names, rng)
    probe = fit_probe(rows[~held], sides[~held], 2, None, PROBE_C)
    logits = probe.logits(rows[held])
    ranks = rankdata(logits[:, 1] - logits[:, 0])
    # A group with rows on both sides is two clusters, each of which stays whole.
    clusters, members = np.unique(np.stack([sides[held], names[held]]), axis=1, return_inverse=True)
    draws = np.stack([clusters[0], *(rng.permutation(clusters[0]) for _ in range(PERMUTATIONS))])
    areas = _compute_areas(ranks, draws[:, members])
    p_value = float((1 + np.sum(areas[1:] >= areas[0])) / (1 + PERMUTATIONS))
    return TwoSampleTest(float(areas[0]), p_value)


def _draw_half(sides: np.ndarray, names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return which rows are held out, (rows,) bool: every second of the groups of each side."""
    count = names.max() + 1
    first, second = (np.bincount(names[sides == side], minlength=count) > 0 for side in (0, 1))
    # Groups of the first side alone, of both, of the second alone: those of each side lie together,
    # so that dealing all of them once in turn halves both sides.
    order = np.lexsort([rng.random(count), second.astype(int) - first])
    is_held = np.zeros(count, dtype=bool)
    is_held[order[::2]] = True
    return is_held[names]


def _compute_areas(ranks: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return the area under the curve for each assignment of sides, (assignments,)."""
    second = sides.sum(1)
    first = len(ranks) - second
    return (sides @ ranks - second * (second + 1) / 2) / np.maximum(first * second, 1)
