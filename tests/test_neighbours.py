"""Compare shared neighbours and their labels with double loops, and check their properties."""

import numpy as np
import pytest

from hftl.analysis.neighbours import (
    jackknife_neighbour_hits,
    mean_shared_neighbours,
    rank_neighbours,
)
from hftl.errors import DataError


def features(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def list_nearest(side: np.ndarray, row: int, k: int) -> set[int]:
    """Return the k nearest other rows by cosine, by a loop."""
    unit = [np.array(other, float) / np.linalg.norm(other) for other in side]
    others = [i for i in range(len(side)) if i != row]
    return set(sorted(others, key=lambda i: -float(unit[row] @ unit[i]))[:k])


@pytest.mark.parametrize("k", [1, 10, 59])
def test_shared_neighbours_are_those_of_a_double_loop(k: int) -> None:
    before = features(60, 12)
    after = before[:, :9] + features(60, 9, 1) * 0.5
    shared = [
        len(list_nearest(before, row, k) & list_nearest(after, row, k)) / k for row in range(60)
    ]
    assert mean_shared_neighbours(before, after, k) == pytest.approx(np.mean(shared), abs=1e-12)


@pytest.mark.parametrize("labels", [np.arange(60) % 3, np.array(list("abcd") * 15)])
def test_neighbour_hits_are_those_of_a_double_loop(labels: np.ndarray) -> None:
    side = features(60, 8)
    hits = [labels[list_nearest(side, row, 1).pop()] == labels[row] for row in range(60)]
    estimate = jackknife_neighbour_hits(rank_neighbours(side, 10), labels, np.arange(60) // 6)
    assert estimate.value == pytest.approx(np.mean(hits)) and 0 < estimate.value < 1


def test_rotation_and_the_lengths_of_rows_change_nothing() -> None:
    before = features(200, 16)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    lengths = np.random.default_rng(2).uniform(0.1, 10, (200, 1))
    assert mean_shared_neighbours(before, before) == 1
    assert mean_shared_neighbours(before, before @ turn) == 1
    assert mean_shared_neighbours(before, before * lengths) == 1
    assert mean_shared_neighbours(before, before + 3) < 0.9


def test_unrelated_features_agree_by_chance() -> None:
    share = mean_shared_neighbours(features(1000, 20), features(1000, 30, 1))
    assert abs(share - 10 / 999) < 0.003


def test_it_falls_as_features_drift_and_is_symmetric() -> None:
    before, noise = features(300, 16), features(300, 16, 1)
    shares = [mean_shared_neighbours(before, before + scale * noise) for scale in (0.05, 0.3, 1, 3)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.8 and shares[-1] < 0.3
    assert mean_shared_neighbours(before + noise, before) == mean_shared_neighbours(
        before, before + noise
    )


def test_a_row_of_zeros_is_taken() -> None:
    before = features(30, 4)
    before[3] = 0
    assert mean_shared_neighbours(before, before) == 1


def test_too_few_or_other_or_broken_rows_are_refused() -> None:
    with pytest.raises(DataError, match="10 rows have no 10 neighbours"):
        mean_shared_neighbours(features(10, 3), features(10, 3))
    assert mean_shared_neighbours(features(11, 3), features(11, 5, 1)) == 1
    with pytest.raises(DataError, match="12 rows before and 13 after"):
        mean_shared_neighbours(features(12, 3), features(13, 3))
    broken = features(20, 3)
    broken[4, 1] = np.nan
    with pytest.raises(DataError, match="row 4 are not finite"):
        mean_shared_neighbours(features(20, 3), broken)
