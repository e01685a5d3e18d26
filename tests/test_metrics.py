"""Compute metrics: every formula against an independent one, and properties that all share."""

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
    """Compute Gorodkin's R_K, the correlation of the one-hot rows, by brute force."""
    classes = np.union1d(labels, predictions)
    x = (labels[:, None] == classes).astype(float)
    y = (predictions[:, None] == classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))


def draw(task: str, seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels, and predictions that are right more often than not."""
    rng = np.random.default_rng(seed)
    if task == "classification":
        labels = rng.choice(5, rows, p=[0.5, 0.3, 0.15, 0.05, 0.0])
        return labels, np.where(rng.random(rows) < 0.6, labels, rng.integers(5, size=rows))
    if task == "multi-label":
        labels = (rng.random((rows, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(float)
        return labels, np.where(rng.random(labels.shape) < 0.8, labels, 1 - labels)
    if task == "token-classification":
        return draw_tags(rng, rows)
    labels = rng.normal(3, 2, rows).round(1)
    return labels, (labels + rng.normal(0.5, 1, rows)).round(1)


def draw_tags(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of tags of unequal length, and predictions that are mostly right."""
    labels, predictions = np.empty(rows, object), np.empty(rows, object)
    lengths = np.tile(rng.integers(1, 9, rows // 2), 2)
    for row in range(rows):
        tags = rng.choice(TAGS, lengths[row], p=[0.4, 0.2, 0.15, 0.15, 0.1])
        right = rng.random(len(tags)) < 0.8
        labels[row] = tuple(map(str, tags))
        predictions[row] = tuple(map(str, np.where(right, tags, rng.choice(TAGS, len(tags)))))
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
def test_perfect_is_best_worse_is_worse_and_the_order_does_not_matter(task: str, name: str) -> None:
    metric = find_metric(name, task)
    labels, predictions = draw(task, 1)
    good = metric.score(labels, predictions)
    assert metric.score(labels, labels) == pytest.approx(metric.best)
    assert metric.sign * good < metric.sign * metric.best
    worse = np.concatenate([predictions[30:], predictions[:30]])
    assert metric.sign * metric.score(labels, worse) < metric.sign * good
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = metric.score(labels[order], predictions[order])
    assert shuffled == pytest.approx(good, abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_ignore_unit_and_offset(name: str) -> None:
    score = find_metric(name, "regression").score
    labels, predictions = draw("regression", 3)
    assert score(labels, 7 * predictions - 4) == pytest.approx(score(labels, predictions))
    assert score(labels, -predictions) == pytest.approx(-score(labels, predictions))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_a_constant_correlates_with_nothing_and_leaves_no_variance(constant: float) -> None:
    labels, flat = np.random.default_rng(0).normal(size=11), np.full(11, constant)
    for name in ("pearson", "spearman"):
        score = find_metric(name, "regression").score
        assert score(labels, flat) == score(flat, labels) == score(flat, flat) == 0.0
    assert find_metric("r2", "regression").score(flat, labels) == 0.0


@pytest.mark.parametrize(
    ("labels", "predictions"), [([0, 3, 3], [0, 3, 0]), ([2, 2], [2, 5]), ([4], [4])]
)
def test_f1_leaves_out_classes_that_do_not_occur(labels: list[int], predictions: list[int]) -> None:
    score = find_metric("f1", "classification").score(np.array(labels), np.array(predictions))
    assert score == pytest.approx(sk.f1_score(labels, predictions, average="macro"))


@pytest.mark.parametrize("name", ["balanced_accuracy", "f1", "matthews"])
def test_majority_scores_what_chance_scores(name: str) -> None:
    labels = np.array([0] * 90 + [1] * 10)
    expected = {"balanced_accuracy": 0.5, "f1": 90 / 190, "matthews": 0.0}[name]
    assert find_metric(name, "classification").score(labels, np.zeros(100, int)) == pytest.approx(
        expected
    )


def test_compute_gives_every_metric_by_name() -> None:
    labels, predictions = draw("regression", 4)
    scores = compute_metrics(list(METRICS["regression"].values()), labels, predictions)
    assert list(scores) == ["pearson", "spearman", "r2", "rmse", "mae"]
    assert scores["mae"] == pytest.approx(ORACLES["mae"](labels, predictions))


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


def fake_evaluate(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    """Make `evaluate` compute this result, or raise it: on loading where no network is."""

    def raise_or_return(**_: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    def load(identifier: str) -> SimpleNamespace:
        if isinstance(result, ConnectionError):
            raise result
        return SimpleNamespace(compute=raise_or_return)

    monkeypatch.setattr("evaluate.load", load)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_metric_of_evaluate_that_is_undefined_is_an_error(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_evaluate(monkeypatch, {"pearsonr": value})
    metric = find_metric("evaluate:pearsonr", "regression")
    with pytest.raises(NumericError, match=rf"evaluate:pearsonr is {value} for 3 rows.*from 2\.0"):
        metric.score(np.arange(3.0), np.full(3, 2.0))


def test_metric_of_evaluate_gives_its_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluate(monkeypatch, {"wer": 0.25, "per_class": [0.1, 0.4]})
    metric = find_metric("evaluate:wer", "classification")
    assert isinstance(metric, Metric) and metric.name == "evaluate:wer"
    assert metric.score(np.zeros(2), np.zeros(2)) == 0.25
    assert (metric.sign, metric.best) == (-1, 0.0), "less of an error is better"
    accuracy = find_metric("evaluate:accuracy", "classification")
    assert (accuracy.sign, accuracy.best) == (1, 1.0)


@pytest.mark.parametrize(
    ("result", "name", "error", "message"),
    [
        ({}, "team/metric", RecipeError, "whether more or less of evaluate:team/metric is better"),
        (ValueError("Target is multiclass"), "f1", RecipeError,
         "evaluate:f1 does not take these labels: Target is"),
        ({"precision": 0.5, "recall": 0.6}, "f1", RecipeError,
         r"\['precision', 'recall'\], not one number"),
        (ConnectionError("no route"), "accuracy", HubError,
         "evaluate:accuracy cannot be fetched: no route"),
    ],
    ids=["unknown direction", "labels", "two numbers", "no network"],
)  # fmt: skip
def test_a_metric_of_evaluate_is_refused(
    result: Any, name: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_evaluate(monkeypatch, result)
    with pytest.raises(error, match=message):
        find_metric(f"evaluate:{name}", "classification").score(np.zeros(2), np.zeros(2))
