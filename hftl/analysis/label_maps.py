"""Find labels that are right under another map of their names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hftl.analysis.out_of_fold import MIN_ROWS, assign_folds

HALF_LEVEL = 0.01
"""Significance in each half of the rows, of which both must show a gain."""
MIN_MAP_GAIN = 0.1
MIN_SUPPORT = 3
"""Rows predicted as one class and labelled another from which on the two are said to be exchanged.
"""


class Exchange(NamedTuple):
    """Hold how often predictions are right by the names as they are, and by the other map."""

    straight: float
    mapped: float
    gain: float
    names: str


def match_labels(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the permutation of classes under which predictions agree best with labels."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((classes, classes))
    np.add.at(table, (predicted, labels), 1)
    # Of equally good maps the one that leaves names as they are.
    rows, columns = linear_sum_assignment(-(table + 1e-6 * np.eye(classes)))
    mapping = np.empty(classes, dtype=np.int64)
    mapping[rows] = columns
    return mapping


def find_exchange(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], groups: np.ndarray | None
) -> Exchange | None:
    """Return the other map of names under which predictions are right more often beyond noise.

    The best of all maps fits the rows that it is chosen on, whatever they are, and the better the
    more classes there are. Each half of the rows is therefore judged by the map of the other half,
    and both must gain. At least two classes must be exchanged in the maps of both halves: where
    one alone is taken for another, as in a table that lacks it, no name is wrong.

    Args:
        predicted: (rows,) class ids.
        labels: the same, of the rows themselves.
        names: of the classes.
        groups: (rows,) names; rows of one group are in one half, and count once. None: every row
            for itself.
    """
    units = np.arange(len(labels))
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1]
    if len(labels) < MIN_ROWS or units.max() < 1:
        return None
    half = assign_folds(labels, groups, 2)
    maps = np.stack([
        match_labels(predicted[half != part], labels[half != part], len(names)) for part in (0, 1)
    ])  # fmt: skip
    straight, mapped = predicted == labels, maps[half, predicted] == labels
    change = mapped.astype(np.float64) - straight
    # What a map gains where predictions have nothing to do with labels, by the shares of both.
    shares = np.bincount(labels, minlength=len(names)) / len(labels)
    by_chance = shares[maps[half, predicted]] - shares[predicted]
    for part in (half == 0, half == 1):
        gain = min(change[part].mean(), (change - by_chance)[part].mean())
        if gain < MIN_MAP_GAIN or _test_sign(change[part], units[part]) >= HALF_LEVEL:
            return None
    pairs = _list_exchanged(predicted, labels, maps)
    if len(pairs) < 2:
        return None
    exchanged = ", ".join(f"{names[j]!r} for {names[i]!r}" for i, j in pairs[:4])
    return Exchange(float(straight.mean()), float(mapped.mean()), float(change.mean()), exchanged)


def _test_sign(change: np.ndarray, units: np.ndarray) -> float:
    """Return the p-value that no more units gain than lose, by the sign test."""
    from scipy.stats import binom

    totals = np.bincount(units, weights=change)
    gained, lost = int((totals > 0).sum()), int((totals < 0).sum())
    return float(binom.sf(gained - 1, gained + lost, 0.5))


def _list_exchanged(
    predicted: np.ndarray, labels: np.ndarray, maps: np.ndarray
) -> list[tuple[int, int]]:
    """Return the classes that both maps (2, classes) exchange alike, with enough rows."""
    agreed = np.flatnonzero((maps[0] == maps[1]) & (maps[0] != np.arange(maps.shape[1])))
    return [
        (i, j)
        for i, j in zip(agreed.tolist(), maps[0, agreed].tolist(), strict=True)
        if ((predicted == i) & (labels == j)).sum() >= MIN_SUPPORT
    ]
