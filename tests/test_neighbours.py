"""Compare shared neighbours and their labels with double loops, and check their properties."""

import numpy as np
import pytest

from hftl.analysis.neighbours import (
    jackknife_neighbour_hits,
    mean_shared_neighbours,
    rank_neighbours,
)
from hftl.errors import DataError


def draw_features(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def list_nearest(side: np.ndarray, row: int, k: int) -> set[int]:
    """Return the k nearest other rows by cosine, by a loop."""
    unit = [np.array(other, float) / np.linalg.norm(other) for other in side]
    others = [i for i in range(len(side)) if i != row]
    return set(sorted(others, key=lambda i: -float(unit[row] @ unit[i]))[:k])


@pytest.mark.parametrize("k", [1, 10, 59])
def test_shared_neighbours_are_those_of_a_double_loop(k: int) -> None:
    before = draw_features(60, 12)
    after = before[:, :9] + draw_features(60, 9, 1) * 0.5
    shared = [
        len(list_nearest(before, row, k) & list_nearest(after, row, k)) / k for row in range(60)
    ]
    assert mean_shared_neighbours(before, after, k) == pytest.approx(np.mean(shared), abs=1e-12)


@pytest.mark.parametrize("labels", [np.arange(60) % 3, np.array(list("abcd") * 15)])
def test_neighbour_hits_are_those_of_a_double_loop(labels: np.ndarray) -> None:
    side = draw_features(60, 8)
    hits = [labels[list_nearest(side, row, 1).pop()] == labels[row] for row in range(60)]
    estimate = jackknife_neighbour_hits(rank_neighbours(side, 10), labels, np.arange(60) // 6)
    assert estimate.value == pytest.approx(np.mean(hits)) and 0 < estimate.value < 1


def test_rotation_and_the_lengths_of_rows_change_nothing() -> None:
    before = draw_features(200, 16)
    before[3] = 0
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    lengths = np.random.default_rng(2).uniform(0.1, 10, (200, 1))
    for after in (before, before @ turn, before * lengths):
        assert mean_shared_neighbours(before, after) == 1
    assert mean_shared_neighbours(before, before + 3) < 0.9


def test_refuses_too_few_or_other_or_broken_rows() -> None:
    with pytest.raises(DataError, match="10 rows have no 10 neighbours"):
        mean_shared_neighbours(draw_features(10, 3), draw_features(10, 3))
    assert mean_shared_neighbours(draw_features(11, 3), draw_features(11, 5, 1)) == 1
    with pytest.raises(DataError, match="12 rows before and 13 after"):
        mean_shared_neighbours(draw_features(12, 3), draw_features(13, 3))
    broken = draw_features(20, 3)
    broken[4, 1] = np.nan
    with pytest.raises(DataError, match="row 4 are not finite"):
        mean_shared_neighbours(draw_features(20, 3), broken)
