"""Agreement of neighbours, against scikit-learn and by its properties."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from hftl.analysis import drift
from hftl.analysis.drift import mean_shared_neighbours
from hftl.errors import DataError


def features(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def reference(before: np.ndarray, after: np.ndarray, k: int) -> float:
    sides = []
    for side in (before, after):
        search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(side)
        sides.append(search.kneighbors(return_distance=False))
    shared = [len(set(one) & set(other)) for one, other in zip(*sides, strict=True)]
    return float(np.mean(shared)) / k


@pytest.mark.parametrize("chunk", [7, 50, 512])
@pytest.mark.parametrize("k", [1, 10, 119])
def test_equals_scikit_learn(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "CHUNK_ROWS", chunk)
    before = features(120, 12)
    after = before[:, :9] + features(120, 9, 1) * 0.5
    assert mean_shared_neighbours(before, after, k) == pytest.approx(
        reference(before, after, k), abs=1e-12
    )


def test_rotation_and_the_lengths_of_rows_change_nothing() -> None:
    before = features(200, 16)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    lengths = np.random.default_rng(2).uniform(0.1, 10, (200, 1))
    assert mean_shared_neighbours(before, before) == 1
    assert mean_shared_neighbours(before, before @ turn) == 1
    assert mean_shared_neighbours(before, before * lengths) == 1
    assert mean_shared_neighbours(before, before + 3) < 0.9


def test_unrelated_features_agree_by_chance() -> None:
    found = mean_shared_neighbours(features(1000, 20), features(1000, 30, 1))
    assert abs(found - 10 / 999) < 0.003


def test_it_falls_as_features_drift_and_is_symmetric() -> None:
    before, noise = features(300, 16), features(300, 16, 1)
    found = [mean_shared_neighbours(before, before + scale * noise) for scale in (0.05, 0.3, 1, 3)]
    assert found == sorted(found, reverse=True) and found[0] > 0.8 and found[-1] < 0.3
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
