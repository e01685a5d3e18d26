"""Find labels that are right under another map of their names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

LEVEL = 0.001
MIN_MAP_GAIN = 0.1


class Exchange(NamedTuple):
    """Hold how often predictions are right by the names as they are, and by the other map."""

    straight: float
    mapped: float
    gain: float
    names: str


def match_labels(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the permutation of classes under which predictions agree best with labels."""
    table = np.zeros((classes, classes))
    np.add.at(table, (predicted, labels), 1)
    # Of equally good maps the one that leaves names as they are.
    rows, columns = linear_sum_assignment(-(table + 1e-6 * np.eye(classes)))
    mapping = np.empty(classes, dtype=np.int64)
    mapping[rows] = columns
    return mapping


def find_exchange(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Exchange | None:
    """Return the other map of names under which predictions are right more often beyond noise.

    Args:
        predicted: (rows,) class ids.
        labels: the same, of the rows themselves.
        names: of the classes.
    """
    mapping = match_labels(predicted, labels, len(names))
    straight, mapped = predicted == labels, mapping[predicted] == labels
    gained, lost = int((mapped & ~straight).sum()), int((straight & ~mapped).sum())
    gain = (gained - lost) / len(labels)
    if gain < MIN_MAP_GAIN:
        return None
    if binomtest(gained, gained + lost, alternative="greater").pvalue >= LEVEL:
        return None
    pairs = [f"{names[j]!r} for {names[i]!r}" for i, j in enumerate(mapping.tolist()) if i != j]
    return Exchange(float(straight.mean()), float(mapped.mean()), gain, ", ".join(pairs[:4]))
