"""Compare measures of drift with loops and textbook formulas, and check their properties."""

import itertools
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hftl.analysis import drift
from hftl.analysis.drift import (
    JackknifeProbes,
    compute_cka,
    compute_cka_floor,
    compute_cosines,
    jackknife_relational_kl,
)

ROWS, WIDTH = 60, 8


def draw_features(seed: int, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def rotate(features: np.ndarray) -> np.ndarray:
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(features.shape[1],) * 2))[0]
    return (features @ turn).astype(np.float32)


def compute_mean_kl(before: np.ndarray, after: np.ndarray, tau: float = 0.05) -> float:
    return jackknife_relational_kl(before, after, tau, np.arange(ROWS) // 10).value


@pytest.mark.parametrize(("tau", "chunk"), [(0.05, 7), (0.7, 512)])
def test_relational_kl_is_a_double_loop(
    tau: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "CHUNK_ROWS", chunk)
    before, after = draw_features(0), draw_features(0) + 0.5 * draw_features(1)
    expected = []
    for i in range(ROWS):
        shares = []
        for side in (before, after):
            unit = side.astype(float) / np.linalg.norm(side.astype(float), axis=1, keepdims=True)
            raw = {j: math.exp(unit[i] @ unit[j] / tau) for j in range(ROWS) if j != i}
            shares.append({j: value / sum(raw.values()) for j, value in raw.items()})
        old, new = shares
        expected.append(sum(p * math.log(p / new[j]) for j, p in old.items()))
    assert compute_mean_kl(before, after, tau) == pytest.approx(np.mean(expected), rel=1e-6)
    assert compute_mean_kl(after, before, tau) != pytest.approx(np.mean(expected), rel=0.01)


def test_cka_is_the_ratio_of_unbiased_independence_criteria() -> None:
    """Average Song et al.'s kernel over all ordered quadruples of different rows."""
    before = draw_features(0)[:9]
    after = before[:, :5] + draw_features(1, width=5)[:9]

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean([
            k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
            for i, j, q, r in itertools.permutations(range(9), 4)
        ]))  # fmt: skip

    k, other = (side.astype(float) @ side.astype(float).T for side in (before, after))
    expected = hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))
    assert compute_cka(before, after) == pytest.approx(expected, rel=1e-10)


def test_cka_of_unrelated_features_is_about_zero_and_under_its_floor() -> None:
    draw = np.random.default_rng(0)
    pairs = [draw.normal(size=(2, 50, 384)) for _ in range(30)]
    values = [compute_cka(*pair) for pair in pairs]
    assert abs(np.mean(values)) < 0.03 and np.max(np.abs(values)) < 0.25
    above = [compute_cka(*pair) > compute_cka_floor(*pair) for pair in pairs]
    assert np.mean(above) <= 0.2
    near = pairs[0][0] + 0.5 * pairs[0][1]
    assert compute_cka(pairs[0][0], near) > 3 * compute_cka_floor(pairs[0][0], near)


def test_features_that_stay_or_turn() -> None:
    """Let a rotation change only what is tied to the axes."""
    before = draw_features(0)
    assert compute_mean_kl(before, before) == 0
    assert compute_cka(before, before) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(compute_cosines(before, before), 1, atol=1e-12)
    np.testing.assert_allclose(compute_cosines(before, -2 * before), -1, atol=1e-12)
    assert compute_cka(before + 5, 3 * before) == pytest.approx(1, abs=1e-6)
    assert compute_cka(before, np.ones_like(before)) == 0
    turned = rotate(before)
    assert compute_mean_kl(before, turned) < 1e-5
    assert compute_cka(before, turned) == pytest.approx(1, abs=1e-6)
    assert compute_cosines(before, turned).mean() < 0.5


def measure_accuracy(
    train: np.ndarray, test: np.ndarray, labels: np.ndarray, units: np.ndarray, penalty: float = 0.1
) -> float:
    """Return the accuracy of probes fitted on one set of features, on another."""
    one_block = np.zeros(ROWS, np.int64)
    return JackknifeProbes.fit(train, labels, units, penalty, one_block).score(test, labels).value


def draw_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features of three classes, the class ids, and units of four rows."""
    labels = np.arange(ROWS) % 3
    centres = 1.5 * np.random.default_rng(3).normal(size=(3, WIDTH))
    return (draw_features(0) + centres[labels]).astype(np.float32), labels, np.arange(ROWS) // 4


def test_fixed_and_refitted_probes_are_those_of_scikit_learn() -> None:
    before, labels, units = draw_classes()
    after = (before + draw_features(2)).astype(np.float32)
    scores = []
    for fitted, tested in ((before, before), (before, after), (after, after)):
        right = np.zeros(ROWS)
        for train, test in GroupKFold(5).split(before, labels, units):
            solver = LogisticRegression(C=0.1, max_iter=1000, tol=1e-6)
            probe = make_pipeline(StandardScaler(), solver)
            probe.fit(fitted[train].astype(float), labels[train])
            right[test] = probe.predict(tested[test]) == labels[test]
        scores.append(measure_accuracy(fitted, tested, labels, units))
        assert scores[-1] == right.mean()
    assert 0.4 < scores[1] < scores[0] <= 1


def test_rows_of_one_unit_share_a_fold() -> None:
    """Copy a row under a class that is drawn for its unit: only a leak could predict it."""
    units = np.repeat(np.arange(12), 5)
    before = np.repeat(draw_features(0, 12), 5, axis=0)
    labels = np.repeat(np.random.default_rng(5).integers(0, 2, 12), 5)
    assert measure_accuracy(before, before, labels, units, 1.0) < 0.9
