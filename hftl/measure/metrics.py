"""Define metrics: pure functions of labels and predictions, each with one entry in `METRICS`.

Classification takes integer class ids, regression floats, both (rows,); multi-label 0 and 1,
(rows, classes); token-classification a tuple of tags a row in the form that seqeval reads, `O`,
`B-PER`, `I-PER`, `E-PER` and `S-PER`, (rows,) of objects.

A new metric is a function and an entry here: gain, interval, card, plots and leaderboard files
read its direction and bounds from the entry. Accuracy, F1, Pearson and RMSE are written in numpy
because the jackknife calls them hundreds of times a gain, and scikit-learn and scipy validate
their arguments each time: 400 rows take 0.4 to 1.6 ms there and 0.004 to 0.03 ms here. The tests
compare every one with the library's.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hftl.errors import HubError, NumericError, RecipeError, format_error_line, suggest_closest

ScoreFunction = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class MetricSpec:
    """Describe a metric: its name as in the recipe, its direction, and the bounds of its values."""

    name: str
    lower_is_better: bool = False
    minimum: float = 0.0
    maximum: float = 1.0

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if self.lower_is_better else 1

    @property
    def best(self) -> float:
        """The value of a perfect prediction."""
        return self.minimum if self.lower_is_better else self.maximum

    @property
    def is_proportion(self) -> bool:
        """Return whether it is a share of something or a mean of shares, between 0 and 1."""
        return (self.minimum, self.maximum) == (0.0, 1.0)

    @property
    def label(self) -> str:
        """The name in a table's header, with the direction where less is better."""
        return f"{self.name}, less is better" if self.lower_is_better else self.name


@dataclass(frozen=True, kw_only=True)
class Metric(MetricSpec):
    """Add the function, `score(labels, predictions)`."""

    score: ScoreFunction


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of rows whose predicted class is right."""
    return float(np.mean(labels == predictions))


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean over the classes present of the share of their rows predicted right."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return F1 averaged over the classes that occur in labels or predictions, equally weighted."""
    classes = int(max(labels.max(), predictions.max())) + 1
    correct = np.bincount(labels[labels == predictions], minlength=classes)
    counts = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return float(np.mean(2 * correct[counts > 0] / counts[counts > 0]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the Matthews correlation coefficient; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where either side does not vary."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    x, y = labels - labels.mean(), predictions - predictions.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 where a side is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(labels), rankdata(predictions))


def r2(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return 1 - residual / total sum of squares; 0 where the labels do not vary."""
    if np.ptp(labels) == 0:
        return 0.0
    total = float(np.sum((labels - labels.mean()) ** 2))
    return 1 - float(np.sum((labels - predictions) ** 2)) / total


def rmse(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the root mean squared error, in the label's unit."""
    return float(np.sqrt(np.mean((labels - predictions) ** 2)))


def mae(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean absolute error, in the label's unit."""
    return float(np.mean(np.abs(labels - predictions)))


def exact_match(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of rows whose whole set of names is right."""
    return float(np.mean((labels == predictions).all(1)))


def micro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return F1 of all names of all rows counted together; 0 where there is none."""
    return _f1(float(np.sum(labels * predictions)), float(np.sum(predictions)), float(labels.sum()))


def multi_label_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return F1 averaged over the names that occur in labels or predictions, equally weighted."""
    correct, counts = (labels * predictions).sum(0), labels.sum(0) + predictions.sum(0)
    return float(np.mean(2 * correct[counts > 0] / counts[counts > 0])) if counts.any() else 0.0


@lru_cache(maxsize=200_000)
def extract_entities(tags: tuple[str, ...]) -> frozenset[tuple[str, int, int]]:
    """Return the entities of one row, (type, first word, last word), as seqeval reads the tags.

    A prediction need not be well-formed; as in conlleval, an entity without its beginning counts.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return frozenset(get_entities(list(tags)))


def entity_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return F1 of entities, type and both ends right; 0 where there is none."""
    return _f1(*_count_entities(labels, predictions))


def entity_precision(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of the predicted entities that are right; 0 where none is predicted."""
    correct, predicted, _ = _count_entities(labels, predictions)
    return correct / predicted if predicted else 0.0


def entity_recall(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of the true entities that are predicted; 0 where there is none."""
    correct, _, actual = _count_entities(labels, predictions)
    return correct / actual if actual else 0.0


def tag_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of words whose tag is right."""
    pairs = list(zip(labels, predictions, strict=True))
    correct = sum(a == b for tags, guesses in pairs for a, b in zip(tags, guesses, strict=True))
    return correct / sum(map(len, labels))


def _count_entities(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float, float]:
    """Return the numbers of entities that are right, predicted and true."""
    correct = predicted = actual = 0
    for tags, guesses in zip(labels, predictions, strict=True):
        true, guessed = extract_entities(tags), extract_entities(guesses)
        correct += len(true & guessed)
        predicted += len(guessed)
        actual += len(true)
    return float(correct), float(predicted), float(actual)


def _f1(correct: float, predicted: float, actual: float) -> float:
    return 2 * correct / (predicted + actual) if predicted + actual else 0.0


def _index(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS: dict[str, dict[str, Metric]] = {
    "classification": _index(
        Metric("accuracy", score=accuracy),
        Metric("balanced_accuracy", score=balanced_accuracy),
        Metric("f1", score=macro_f1),
        Metric("matthews", minimum=-1.0, score=matthews),
    ),
    "regression": _index(
        Metric("pearson", minimum=-1.0, score=pearson),
        Metric("spearman", minimum=-1.0, score=spearman),
        Metric("r2", minimum=-math.inf, score=r2),
        Metric("rmse", lower_is_better=True, maximum=math.inf, score=rmse),
        Metric("mae", lower_is_better=True, maximum=math.inf, score=mae),
    ),
    "multi-label": _index(
        Metric("micro_f1", score=micro_f1),
        Metric("f1", score=multi_label_f1),
        Metric("accuracy", score=exact_match),
    ),
    "token-classification": _index(
        Metric("f1", score=entity_f1),
        Metric("precision", score=entity_precision),
        Metric("recall", score=entity_recall),
        Metric("accuracy", score=tag_accuracy),
    ),
}
"""The built-in metrics of each task. A name that several tasks have has one direction."""
SELECTION_METRICS = {
    "classification": "accuracy", "regression": "rmse", "multi-label": "micro_f1",
    "token-classification": "f1",
}  # fmt: skip
"""The metrics that choose epochs and rates on validation: a fine-tuned classifier's loss rises with
its confidence while its accuracy still grows."""
EVALUATE_METRICS = {
    f"evaluate:{name}": MetricSpec(f"evaluate:{name}", lower, low, high)
    for names, lower, low, high in (
        (("accuracy", "f1", "precision", "recall"), False, 0.0, 1.0),
        (
            ("matthews_correlation", "pearsonr", "spearmanr", "r_squared", "roc_auc",
             "exact_match"),
            False, -math.inf, 1.0,
        ),
        (
            ("mse", "mae", "mape", "smape", "mase", "brier_score", "wer", "cer"),
            True, 0.0, math.inf,
        ),
    )
    for name in names
}  # fmt: skip
"""The metrics of the package evaluate whose direction is known; for bounds the widest that hold."""


def find_metric(name: str, task: str) -> Metric:
    """Return the metric of a built-in name or `evaluate:<id>`.

    Raises:
        RecipeError: if there is none of that name for the task.
        HubError: if an `evaluate:` metric cannot be fetched.
    """
    if name.startswith("evaluate:"):
        if task not in ("classification", "regression"):
            raise RecipeError(
                f"measure.metric: {name} takes one number a row, which {task} does not have",
                f"Use one of {', '.join(METRICS[task])}",
            )
        return _load_evaluate_metric(name)
    if name not in METRICS[task]:
        raise RecipeError(
            f"measure.metric: no metric {name!r} for {task}"
            + suggest_closest(name, list(METRICS[task])),
            f"Built in: {', '.join(METRICS[task])}; or evaluate:<id>",
        )
    return METRICS[task][name]


def describe_metric(name: str) -> MetricSpec:
    """Return the direction and bounds of a metric that a record names, without loading it."""
    every = EVALUATE_METRICS | {k: m for metrics in METRICS.values() for k, m in metrics.items()}
    return every.get(name) or MetricSpec(name, minimum=-math.inf, maximum=math.inf)


def compute_all_metrics(task: str, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return every built-in metric of the task; see `compute_metrics`."""
    return compute_metrics(list(METRICS[task].values()), labels, predictions)


def compute_metrics(
    metrics: list[Metric], labels: np.ndarray, predictions: np.ndarray
) -> dict[str, float]:
    """Return every metric's value by name.

    Raises:
        NumericError: if a prediction is not finite.
    """
    if predictions.dtype.kind == "f" and not np.isfinite(predictions).all():
        row = int(np.flatnonzero(~np.isfinite(predictions))[0])
        raise NumericError(f"prediction {row} is {predictions[row]}", "Lower the learning rate")
    with warnings.catch_warnings():
        # scikit-learn warns where a class is never predicted, and returns the 0 that is meant here.
        warnings.simplefilter("ignore")
        return {metric.name: metric.score(labels, predictions) for metric in metrics}


def _load_evaluate_metric(name: str) -> Metric:
    import evaluate

    spec = EVALUATE_METRICS.get(name)
    if spec is None:
        raise RecipeError(
            f"measure.metric: whether more or less of {name} is better is not known",
            f"Use one of {', '.join(k.removeprefix('evaluate:') for k in EVALUATE_METRICS)}, or a "
            "built-in metric",
        )
    try:
        module = evaluate.load(name.removeprefix("evaluate:"))
    except OSError as error:
        raise HubError(
            f"measure.metric: the metric {name} cannot be fetched: {format_error_line(error)}",
            "Check its id and the network, or use a built-in metric",
        ) from error

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        try:
            results = module.compute(predictions=predictions, references=labels) or {}
        except (ValueError, TypeError) as error:
            raise RecipeError(
                f"measure.metric: {name} does not take these labels: {format_error_line(error)}",
                "Use a built-in metric",
            ) from error
        values: list[Any] = [value for value in results.values() if np.isscalar(value)]
        if len(values) != 1:
            raise RecipeError(
                f"measure.metric: {name} gives {sorted(results)}, not one number",
                "Choose a metric that gives one",
            )
        value = float(values[0])
        if not math.isfinite(value):
            raise NumericError(
                f"measure.metric: {name} is {value} for {len(labels)} rows whose predictions "
                f"range from {np.min(predictions)} to {np.max(predictions)}",
                "Use a built-in metric",
            )
        return value

    return Metric(**vars(spec), score=score)
