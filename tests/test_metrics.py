"""Every formula against an independent one, and what no metric may do."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from seqeval import metrics as seq
from sklearn import metrics as sk

from hftl.errors import HubError, NumericError, RecipeError
from hftl.measure.metrics import METRICS, Metric, compute_metrics, find_metric

ALL = [(task, name) for task, known in METRICS.items() for name in known]
ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "f1": lambda y, p: sk.f1_score(y, p, average="macro"),
    "matthews": lambda y, p: rk_correlation(y, p),
    "pearson": lambda y, p: stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
    "r2": sk.r2_score,
    "rmse": lambda y, p: stats.pmean(np.abs(y - p), 2),
    "mae": lambda y, p: sum(abs(a - b) for a, b in zip(y, p, strict=True)) / len(y),
}
OF_TASK: dict[str, dict[str, Callable[[Any, Any], float]]] = {
    "multi-label": {
        "micro_f1": lambda y, p: sk.f1_score(y, p, average="micro"),
        "f1": lambda y, p: sk.f1_score(y, p, average="macro"),
        "accuracy": sk.accuracy_score,
    },
    "token-classification": {
        "f1": lambda y, p: seq.f1_score(list(map(list, y)), list(map(list, p))),
        "precision": lambda y, p: seq.precision_score(list(map(list, y)), list(map(list, p))),
        "recall": lambda y, p: seq.recall_score(list(map(list, y)), list(map(list, p))),
        "accuracy": lambda y, p: sk.accuracy_score(
            [t for r in y for t in r], [t for r in p for t in r]
        ),
    },
}
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def rk_correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Gorodkin's R_K, the correlation of the one-hot rows, by brute force."""
    classes = np.union1d(labels, predictions)
    x = (labels[:, None] == classes).astype(float)
    y = (predictions[:, None] == classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))


def draw(task: str, seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions that are right more often than not."""
    rng = np.random.default_rng(seed)
    if task == "classification":
        labels = rng.choice(5, rows, p=[0.5, 0.3, 0.15, 0.05, 0.0])
        return labels, np.where(rng.random(rows) < 0.6, labels, rng.integers(5, size=rows))
    if task == "multi-label":
        labels = (rng.random((rows, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(float)
        return labels, np.where(rng.random(labels.shape) < 0.8, labels, 1 - labels)
    if task == "token-classification":
        return tags(rng, rows)
    labels = rng.normal(3, 2, rows).round(1)
    return labels, (labels + rng.normal(0.5, 1, rows)).round(1)


def tags(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tags of unequal length, and predictions that keep most of them."""
    labels, predictions = np.empty(rows, object), np.empty(rows, object)
    lengths = np.tile(rng.integers(1, 9, rows // 2), 2)
    for row in range(rows):
        told = rng.choice(TAGS, lengths[row], p=[0.4, 0.2, 0.15, 0.15, 0.1])
        kept = rng.random(len(told)) < 0.8
        labels[row] = tuple(map(str, told))
        predictions[row] = tuple(map(str, np.where(kept, told, rng.choice(TAGS, len(told)))))
    return labels, predictions


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("task", "name"), ALL)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_equals_its_oracle(task: str, name: str, seed: int) -> None:
    labels, predictions = draw(task, seed)
    assert find_metric(name, task).score(labels, predictions) == pytest.approx(
        OF_TASK.get(task, ORACLES)[name](labels, predictions), abs=1e-12
    )


@pytest.mark.parametrize(("task", "name"), ALL)
def test_perfect_is_best_and_worse_is_worse(task: str, name: str) -> None:
    metric = find_metric(name, task)
    labels, predictions = draw(task, 1)
    good = metric.score(labels, predictions)
    assert metric.score(labels, labels) == pytest.approx(metric.best)
    assert metric.sign * good < metric.sign * metric.best
    worse = np.concatenate([predictions[30:], predictions[:30]])
    assert metric.sign * metric.score(labels, worse) < metric.sign * good


@pytest.mark.parametrize(("task", "name"), ALL)
def test_order_of_rows_does_not_matter(task: str, name: str) -> None:
    metric = find_metric(name, task)
    labels, predictions = draw(task, 2)
    order = np.random.default_rng(0).permutation(len(labels))
    assert metric.score(labels[order], predictions[order]) == pytest.approx(
        metric.score(labels, predictions), abs=1e-12
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_ignore_unit_and_offset(name: str) -> None:
    score = find_metric(name, "regression").score
    labels, predictions = draw("regression", 3)
    assert score(labels, 7 * predictions - 4) == pytest.approx(score(labels, predictions))
    assert score(labels, -predictions) == pytest.approx(-score(labels, predictions))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_correlation_with_a_constant_is_zero(name: str, constant: float) -> None:
    score = find_metric(name, "regression").score
    labels = np.random.default_rng(0).normal(size=11)
    flat = np.full(11, constant)
    assert score(labels, flat) == score(flat, labels) == score(flat, flat) == 0.0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_r2_of_labels_that_do_not_vary_is_zero(constant: float) -> None:
    assert find_metric("r2", "regression").score(np.full(3, constant), np.array([1.0, 2, 3])) == 0.0


@pytest.mark.parametrize(
    ("labels", "predictions"), [([0, 3, 3], [0, 3, 0]), ([2, 2], [2, 5]), ([4], [4])]
)
def test_f1_leaves_out_classes_that_do_not_occur(labels: list[int], predictions: list[int]) -> None:
    found = find_metric("f1", "classification").score(np.array(labels), np.array(predictions))
    assert found == pytest.approx(sk.f1_score(labels, predictions, average="macro"))


@pytest.mark.parametrize("name", ["balanced_accuracy", "f1", "matthews"])
def test_majority_scores_what_chance_scores(name: str) -> None:
    labels = np.array([0] * 90 + [1] * 10)
    expected = {"balanced_accuracy": 0.5, "f1": 90 / 190, "matthews": 0.0}[name]
    assert find_metric(name, "classification").score(labels, np.zeros(100, int)) == pytest.approx(
        expected
    )


def test_compute_gives_every_metric_by_name() -> None:
    labels, predictions = draw("regression", 4)
    found = compute_metrics(list(METRICS["regression"].values()), labels, predictions)
    assert list(found) == ["pearson", "spearman", "r2", "rmse", "mae"]
    assert found["mae"] == pytest.approx(ORACLES["mae"](labels, predictions))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_prediction_that_is_not_finite_is_refused(bad: float) -> None:
    predictions = np.array([0.0, 1.0, bad, bad])
    with pytest.raises(NumericError, match=rf"prediction 2 is {bad}.*learning rate"):
        compute_metrics(list(METRICS["regression"].values()), np.zeros(4), predictions)


@pytest.mark.parametrize(
    ("name", "task", "close"),
    [("acuracy", "classification", "accuracy"), ("RMSE", "regression", None),
     ("spearmann", "regression", "spearman"), ("rmse", "classification", None)],
)  # fmt: skip
def test_unknown_metric_is_refused_with_the_closest(
    name: str, task: str, close: str | None
) -> None:
    with pytest.raises(RecipeError, match=rf"no metric '{name}' for {task}") as caught:
        find_metric(name, task)
    assert ", ".join(METRICS[task]) in str(caught.value)
    assert (f"did you mean '{close}'?" in str(caught.value)) == (close is not None)


def fake_evaluate(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    def load(identifier: str) -> SimpleNamespace:
        assert identifier in ("accuracy", "wer", "f1")
        if isinstance(told, Exception):
            raise told
        return SimpleNamespace(compute=lambda **given: told)

    monkeypatch.setattr("evaluate.load", load)


def test_metric_of_evaluate_gives_its_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluate(monkeypatch, {"wer": 0.25, "per_class": [0.1, 0.4]})
    metric = find_metric("evaluate:wer", "classification")
    assert isinstance(metric, Metric) and metric.name == "evaluate:wer"
    assert metric.score(np.zeros(2), np.zeros(2)) == 0.25
    assert (metric.sign, metric.best) == (-1, 0.0), "less of an error is better"
    fake_evaluate(monkeypatch, {"accuracy": 0.5})
    score = find_metric("evaluate:accuracy", "classification")
    assert (score.sign, score.best) == (1, 1.0)


def test_metric_of_evaluate_of_unknown_direction_is_refused() -> None:
    with pytest.raises(RecipeError, match="whether more or less of evaluate:team/metric is better"):
        find_metric("evaluate:team/metric", "classification")


def test_metric_of_evaluate_that_cannot_take_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(**_: Any) -> None:
        raise ValueError("Target is multiclass but average='binary'")

    monkeypatch.setattr("evaluate.load", lambda _: SimpleNamespace(compute=compute))
    with pytest.raises(RecipeError, match="evaluate:f1 does not take these labels: Target is"):
        find_metric("evaluate:f1", "classification").score(np.zeros(2), np.zeros(2))


def test_metric_of_evaluate_with_two_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluate(monkeypatch, {"precision": 0.5, "recall": 0.6})
    metric = find_metric("evaluate:f1", "classification")
    with pytest.raises(RecipeError, match=r"\['precision', 'recall'\], not one number"):
        metric.score(np.zeros(2), np.zeros(2))


def test_metric_of_evaluate_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluate(monkeypatch, ConnectionError("no route"))
    with pytest.raises(HubError, match="evaluate:accuracy cannot be fetched: no route"):
        find_metric("evaluate:accuracy", "classification")
