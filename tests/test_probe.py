"""Compare the probe with scikit-learn's own solvers on standardised features."""

from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import model_selection
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from hftl.analysis import probe as module
from hftl.analysis.probe import ALPHA_GRID, C_GRID, Probe, fit_probe

ROWS, WIDTH = 60, 4


def draw_problem(outputs: int, seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy features of very different scales, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(rows, WIDTH))
    features = (plain * 10.0 ** np.arange(-2, WIDTH - 2) + np.arange(WIDTH)).astype(np.float32)
    scores = plain @ rng.normal(size=(WIDTH, max(outputs, 1))) + rng.normal(size=(rows, outputs))
    if outputs == 1:
        return features, scores[:, 0]
    labels = scores.argmax(1)
    labels[:outputs] = np.arange(outputs)
    return features, labels


def fit(features: np.ndarray, labels: np.ndarray, groups: list[Any] | None = None) -> Probe:
    outputs = 1 if labels.dtype == np.float64 else int(labels.max()) + 1
    return fit_probe(features, labels, outputs, np.array(groups) if groups else None)


def center(logits: np.ndarray) -> np.ndarray:
    """Return logits without each row's mean, which the softmax ignores; one output as it is."""
    return logits - logits.mean(1, keepdims=True) if logits.shape[1] > 1 else logits


def compute_reference_logits(
    x: np.ndarray, y: np.ndarray, penalty: float, rows: np.ndarray
) -> np.ndarray:
    """Return the logits of scikit-learn's own solver, two columns for a binary problem."""
    if y.dtype == np.float64:
        return Ridge(alpha=penalty).fit(x, y).predict(rows)[:, None]
    solver = LogisticRegression(C=penalty, max_iter=10_000, tol=1e-8).fit(x, y)
    scores = solver.decision_function(rows)
    return scores if scores.ndim > 1 else np.stack([-scores / 2, scores / 2], axis=1)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_probe_is_scikit_learns_at_the_best_penalty_of_the_grid(outputs: int) -> None:
    features, labels = draw_problem(outputs, seed=1)
    probe = fit(features, labels)
    standard = StandardScaler().fit_transform(features.astype(np.float64))
    expected = compute_reference_logits(standard, labels, probe.penalty, standard)
    assert probe.weight.shape == (outputs, WIDTH) and probe.bias.shape == (outputs,)
    assert probe.weight.dtype == probe.bias.dtype == np.float32
    np.testing.assert_allclose(
        center(probe.logits(features)), center(expected), atol=1e-3 * np.abs(expected).max()
    )
    grid, splitter = (ALPHA_GRID, KFold(5)) if outputs == 1 else (C_GRID, StratifiedKFold(5))
    losses = []
    for penalty in grid:
        folds = []
        for train, test in splitter.split(standard, labels):
            logits = compute_reference_logits(
                standard[train], labels[train], penalty, standard[test]
            )
            if outputs == 1:
                folds.append(np.mean((logits[:, 0] - labels[test]) ** 2))
            else:
                folds.append(log_loss(labels[test], softmax(logits, axis=1)))
        losses.append(np.mean(folds))
    assert probe.penalty == pytest.approx(grid[int(np.argmin(losses))])


@pytest.mark.parametrize("constant", [0.0, 1000.1])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_feature_that_does_not_vary_changes_nothing(outputs: int, constant: float) -> None:
    features, labels = draw_problem(outputs)
    more = np.concatenate([features, np.full((ROWS, 1), constant, np.float32)], axis=1)
    without, probe = fit(features, labels), fit(more, labels)
    assert probe.penalty == without.penalty
    np.testing.assert_allclose(probe.weight[:, -1], 0, atol=1e-9)
    np.testing.assert_allclose(probe.logits(more), without.logits(features), atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_rows_that_are_all_alike_are_predicted_alike(outputs: int) -> None:
    _, labels = draw_problem(outputs)
    features = np.full((ROWS, WIDTH), 0.3, np.float32)
    probe = fit(features, labels)
    assert not probe.weight.any()
    if outputs == 1:
        np.testing.assert_allclose(probe.logits(features), labels.mean(), rtol=1e-6)
    else:
        shares = np.bincount(labels) / ROWS
        np.testing.assert_allclose(softmax(probe.logits(features), axis=1)[0], shares, atol=1e-4)


def test_rounding_noise_on_a_large_constant_is_no_feature() -> None:
    features, labels = draw_problem(2)
    noise = np.nextafter(np.float32(1000), np.where(labels > 0, 2000, 0).astype(np.float32))
    more = np.concatenate([features, noise[:, None]], axis=1)
    np.testing.assert_allclose(
        fit(more, labels).logits(more), fit(features, labels).logits(features), atol=1e-3
    )


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_fit_is_deterministic_and_the_unit_of_features_does_not_matter(outputs: int) -> None:
    features, labels = draw_problem(outputs, seed=2)
    other = (features * np.array([1e-2, 3, 1e2, 0.5]) + 2).astype(np.float32)
    first, again, second = fit(features, labels), fit(features, labels), fit(other, labels)
    assert first.weight.tobytes() == again.weight.tobytes()
    assert first.bias.tobytes() == again.bias.tobytes()
    assert first.penalty == second.penalty
    scale = np.abs(first.logits(features)).max()
    np.testing.assert_allclose(second.logits(other), first.logits(features), atol=5e-3 * scale)


def test_folds_never_split_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw_problem(3)
    groups = np.array([f"g{i}" for i in np.random.default_rng(0).integers(20, size=ROWS)])
    of_classes: list[Any] = []
    of_targets: list[Any] = []
    split, solve = module.split_folds, model_selection.GridSearchCV

    def spy_on_classes(*args: Any) -> Any:
        chosen, folds = split(*args)
        assert chosen.tolist() == list(range(ROWS))
        of_classes.extend(folds)
        return chosen, folds

    def spy_on_targets(*args: Any, cv: list[Any], **kwargs: Any) -> Any:
        of_targets.extend(cv)
        return solve(*args, cv=cv, **kwargs)

    monkeypatch.setattr(module, "split_folds", spy_on_classes)
    monkeypatch.setattr(model_selection, "GridSearchCV", spy_on_targets)
    fit(features, labels, groups.tolist())
    fit(features, labels.astype(np.float64), groups.tolist())
    for folds in (of_classes, of_targets):
        assert len(folds) == 5
        assert sorted(i for _, test in folds for i in test) == list(range(ROWS))
        for train, test in folds:
            assert not set(groups[train]) & set(groups[test])


@pytest.mark.parametrize("groups", [None, ["a"] * 3])
def test_one_row_a_class_takes_the_middle_of_the_grid(groups: list[str] | None) -> None:
    features = np.eye(3, dtype=np.float32)
    probe = fit(features, np.arange(3), groups)
    assert probe.penalty == C_GRID[len(C_GRID) // 2]
    assert probe.logits(features).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("outputs", [2, 3])
def test_class_that_only_one_group_has(outputs: int) -> None:
    features, labels = draw_problem(outputs)
    groups = ["rare" if label == 0 else f"g{i % 7}" for i, label in enumerate(labels)]
    probe = fit(features, labels, groups)
    assert probe.weight.shape == (outputs, WIDTH) and np.isfinite(probe.weight).all()
    assert np.mean(probe.logits(features).argmax(1) == labels) > 0.6


@pytest.mark.parametrize("groups", [None, ["one"] * 4])
def test_target_without_a_second_unit_is_its_mean(groups: list[str] | None) -> None:
    rows = 1 if groups is None else 4
    features, labels = draw_problem(1, rows=rows)
    probe = fit(features, labels, groups)
    np.testing.assert_allclose(probe.logits(features)[:, 0], labels.mean(), rtol=1e-6)
