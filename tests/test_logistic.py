"""Compare fits along a path of penalties with scikit-learn's own solver."""

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from hftl.analysis import logistic, probe
from hftl.analysis.logistic import compute_losses, fit_path, turn_rows

CS = np.logspace(-4, 2, 4)


def draw_problem(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return correlated features, classes that depend on them, and weights of rows."""
    rng = np.random.default_rng(rows + width + classes)
    x = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) / width**0.5
    y = (x[:, :classes] + rng.normal(size=(rows, classes))).argmax(1)
    y[:classes] = np.arange(classes)
    return x, y, rng.uniform(0.5, 2, rows)


def solve_by_scikit_learn(
    x: Any, y: np.ndarray, c: float, intercept: bool, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and biases, those of two classes opposite to each other."""
    solver = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, fit_intercept=intercept)
    solver.fit(x, y, weights)
    weight, bias = solver.coef_, np.broadcast_to(solver.intercept_, len(solver.coef_))
    if len(weight) == 1:
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def evaluate(
    x: Any, y: np.ndarray, c: float, fit: tuple[np.ndarray, np.ndarray], weights: np.ndarray | None
) -> float:
    """Return the objective of scikit-learn's solver."""
    weight, bias = fit
    losses = compute_losses(np.asarray(x @ weight.T) + bias, y)
    loss = losses.sum() if weights is None else weights @ losses
    return c * float(loss) + float((weight**2).sum()) / (1 if len(weight) == 2 else 2)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "width", "classes"), [(60, 5, 2), (60, 5, 4), (20, 30, 2)])
def test_path_ends_at_scikit_learns_optimum_for_each_penalty(
    rows: int, width: int, classes: int, intercept: bool, is_weighted: bool
) -> None:
    x, y, drawn = draw_problem(rows, width, classes)
    weights = drawn if is_weighted else None
    turned, axes = turn_rows(x) or pytest.fail("few rows are turned")
    for c, (weight, bias) in zip(
        CS, fit_path(turned, y, classes, CS, intercept, weights, 1e-7), strict=True
    ):
        ours = axes.expand(weight), bias
        expected = solve_by_scikit_learn(x, y, c, intercept, weights)
        least = evaluate(x, y, c, expected, weights)
        assert evaluate(x, y, c, ours, weights) <= least * (1 + 1e-8)
        np.testing.assert_allclose(ours[0], expected[0], atol=2e-3 * np.abs(expected[0]).max())
        assert intercept or not bias.any()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("most_axes", [0, 100])
def test_sparse_rows_are_fitted_turned_or_by_scikit_learn(
    most_axes: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "MAX_AXES", most_axes)
    x, y, weights = draw_problem(40, 60, classes)
    x = csr_matrix(np.where(x > 0.5, x, 0))
    assert (turn_rows(x) is None) == (most_axes == 0)
    weight, bias, c = probe.fit_linear(x, y, classes, None, CS, CS, weights=weights)
    least = evaluate(x, y, c, solve_by_scikit_learn(x, y, c, True, weights), weights)
    assert evaluate(x, y, c, (weight, bias), weights) <= least * (1 + 1e-6)
    monkeypatch.setattr(logistic, "MAX_AXES", 100 - most_axes)
    assert probe.fit_linear(x, y, classes, None, CS, CS, weights=weights)[2] == c


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_turned_rows_have_the_products_of_the_rows(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    x[1] = x[0]
    rows, axes = turn_rows(x) or pytest.fail("few rows are turned")
    matrix = axes.matrix
    np.testing.assert_allclose(rows @ matrix, x, atol=1e-9)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-7)
    weights = np.random.default_rng(1).normal(size=(3, len(matrix)))
    np.testing.assert_allclose(axes.expand(weights), weights @ matrix, atol=1e-12)
    assert rows.shape[1] == np.linalg.matrix_rank(x)


def test_rows_of_single_precision_keep_their_short_axes() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (8, 40))
    x = (left * np.logspace(0, -5, 8) @ right.T).astype(np.float32)
    rows, axes = turn_rows(x) or pytest.fail("few rows are turned")
    lengths = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=0)[::-1], lengths, rtol=1e-4)
    np.testing.assert_allclose(axes.matrix @ axes.matrix.T, np.eye(8), atol=1e-4)


def test_rows_without_a_difference_have_no_axes() -> None:
    rows, axes = turn_rows(np.zeros((3, 5))) or pytest.fail("few rows are turned")
    ((weight, bias),) = fit_path(rows, np.array([0, 1, 1]), 2, [1.0])
    assert weight.shape == (2, 0) and axes.matrix.shape == (0, 5)
    assert bias[1] - bias[0] == pytest.approx(np.log(2), abs=1e-4)
