"""Metrics: pure functions of labels and predictions.

Classification takes integer class ids, regression floats, both (rows,); multi-label 0 and 1,
(rows, classes); token-classification a tuple of tags a row in the form that seqeval reads, `O`,
`B-PER`, `I-PER`, `E-PER` and `S-PER`, (rows,) of objects.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hftl.config.errors import suggest_closest
from hftl.errors import HubError, NumericError, RecipeError, format_error_line

ScoreFunction = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """`score(labels, predictions)`; `sign` is 1 where more is better, -1 where less is.

    `best` is the value of a perfect prediction.
    """

    name: str
    score: ScoreFunction
    sign: int = 1
    best: float = 1.0


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of rows whose predicted class is right."""
    return float(np.mean(labels == predictions))


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes present of the share of their rows predicted right."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 averaged over the classes that occur in labels or predictions, each the same weight."""
    classes = int(max(labels.max(), predictions.max())) + 1
    right = np.bincount(labels[labels == predictions], minlength=classes)
    told = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return float(np.mean(2 * right[told > 0] / told[told > 0]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation coefficient; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation; 0 where either side does not vary."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    x, y = labels - labels.mean(), predictions - predictions.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where either side does not vary."""
    from scipy.stats import rankdata

    return pearson(rankdata(labels), rankdata(predictions))


def r2(labels: np.ndarray, predictions: np.ndarray) -> float:
    """1 - residual / total sum of squares; 0 where the labels do not vary."""
    if np.ptp(labels) == 0:
        return 0.0
    total = float(np.sum((labels - labels.mean()) ** 2))
    return 1 - float(np.sum((labels - predictions) ** 2)) / total


def rmse(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Root mean squared error, in the label's unit."""
    return float(np.sqrt(np.mean((labels - predictions) ** 2)))


def mae(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean absolute error, in the label's unit."""
    return float(np.mean(np.abs(labels - predictions)))


def exact_match(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of rows whose whole set of names is right."""
    return float(np.mean((labels == predictions).all(1)))


def micro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of all names of all rows counted together; 0 where none is held or predicted."""
    return _f1(float(np.sum(labels * predictions)), float(np.sum(predictions)), float(labels.sum()))


def multi_label_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 averaged over the names that are held or predicted, each the same weight."""
    right, told = (labels * predictions).sum(0), labels.sum(0) + predictions.sum(0)
    return float(np.mean(2 * right[told > 0] / told[told > 0])) if told.any() else 0.0


@lru_cache(maxsize=200_000)
def extract_entities(tags: tuple[str, ...]) -> frozenset[tuple[str, int, int]]:
    """Return the entities of one row, (type, first word, last word), as seqeval reads the tags.

    A prediction need not be well-formed; as in conlleval, an entity without its beginning counts.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return frozenset(get_entities(list(tags)))


def entity_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of entities, type and both ends right; 0 where none is held or predicted."""
    return _f1(*_count_entities(labels, predictions))


def entity_precision(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of the predicted entities that are right; 0 where none is predicted."""
    right, predicted, _ = _count_entities(labels, predictions)
    return right / predicted if predicted else 0.0


def entity_recall(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of the entities that are found; 0 where there is none."""
    right, _, held = _count_entities(labels, predictions)
    return right / held if held else 0.0


def tag_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of words whose tag is right."""
    pairs = list(zip(labels, predictions, strict=True))
    right = sum(a == b for told, found in pairs for a, b in zip(told, found, strict=True))
    return right / sum(map(len, labels))


def _count_entities(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float, float]:
    """Entities right, predicted and held."""
    right = predicted = held = 0
    for told, found in zip(labels, predictions, strict=True):
        true, guess = extract_entities(told), extract_entities(found)
        right, predicted, held = right + len(true & guess), predicted + len(guess), held + len(true)
    return float(right), float(predicted), float(held)


def _f1(right: float, predicted: float, held: float) -> float:
    return 2 * right / (predicted + held) if predicted + held else 0.0


METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        m.name: m
        for m in (
            Metric("accuracy", accuracy),
            Metric("balanced_accuracy", balanced_accuracy),
            Metric("f1", macro_f1),
            Metric("matthews", matthews),
        )
    },
    "regression": {
        m.name: m
        for m in (
            Metric("pearson", pearson),
            Metric("spearman", spearman),
            Metric("r2", r2),
            Metric("rmse", rmse, sign=-1, best=0.0),
            Metric("mae", mae, sign=-1, best=0.0),
        )
    },
    "multi-label": {
        m.name: m
        for m in (
            Metric("micro_f1", micro_f1),
            Metric("f1", multi_label_f1),
            Metric("accuracy", exact_match),
        )
    },
    "token-classification": {
        m.name: m
        for m in (
            Metric("f1", entity_f1),
            Metric("precision", entity_precision),
            Metric("recall", entity_recall),
            Metric("accuracy", tag_accuracy),
        )
    },
}
PROPORTIONS = ("accuracy", "balanced_accuracy", "f1", "micro_f1", "precision", "recall")
"""Metrics that are a share of something, or a mean of shares: between 0 and 1."""
SELECTION_METRICS = {
    "classification": "accuracy", "regression": "rmse", "multi-label": "micro_f1",
    "token-classification": "f1",
}  # fmt: skip
"""What epochs and rates are chosen by on validation: a fine-tuned classifier's loss rises with its
confidence while its accuracy still grows."""


def compute_all_metrics(task: str, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Every built-in metric of the task, see `compute_metrics`."""
    return compute_metrics(list(METRICS[task].values()), labels, predictions)


def find_metric(name: str, task: str) -> Metric:
    """The metric of a built-in name or `evaluate:<id>`.

    Raises:
        RecipeError: if there is none of that name for the task.
        HubError: if an `evaluate:` metric cannot be fetched.
    """
    if name.startswith("evaluate:"):
        if task not in ("classification", "regression"):
            raise RecipeError(
                f"measure.metric: {name} takes one number a row, which {task} has not",
                f"Use one of {', '.join(METRICS[task])}",
            )
        return _load_evaluate_metric(name)
    if name not in METRICS[task]:
        raise RecipeError(
            f"measure.metric: no metric {name!r} for {task}{suggest_closest(name, list(METRICS[task]))}",
            f"Built in: {', '.join(METRICS[task])}; or evaluate:<id>",
        )
    return METRICS[task][name]


def is_lower_better(name: str) -> bool:
    """Whether a built-in metric is an error."""
    return any(known[name].sign < 0 for known in METRICS.values() if name in known)


def compute_metrics(
    metrics: list[Metric], labels: np.ndarray, predictions: np.ndarray
) -> dict[str, float]:
    """Every metric's value.

    Raises:
        NumericError: if a prediction is not finite.
    """
    if predictions.dtype.kind == "f" and not np.isfinite(predictions).all():
        row = int(np.flatnonzero(~np.isfinite(predictions))[0])
        raise NumericError(f"prediction {row} is {predictions[row]}", "Lower the learning rate")
    with warnings.catch_warnings():
        # sklearn warns where a class is never predicted; the value it defines is what we want.
        warnings.simplefilter("ignore")
        return {metric.name: metric.score(labels, predictions) for metric in metrics}


EVALUATE_ERRORS = ("mse", "mae", "mape", "smape", "mase", "brier_score", "wer", "cer")
EVALUATE_SCORES = (
    "accuracy", "f1", "precision", "recall", "matthews_correlation", "pearsonr", "spearmanr",
    "r_squared", "roc_auc", "exact_match",
)  # fmt: skip
"""The ids whose direction is known: less is better of the errors, more of the scores."""


def _load_evaluate_metric(name: str) -> Metric:
    import evaluate

    identifier = name.removeprefix("evaluate:")
    if identifier not in EVALUATE_ERRORS + EVALUATE_SCORES:
        raise RecipeError(
            f"measure.metric: whether more or less of {name} is better is not known",
            f"Use one of {', '.join(EVALUATE_SCORES + EVALUATE_ERRORS)}, or a built-in metric",
        )
    try:
        module = evaluate.load(identifier)
    except (OSError, ConnectionError) as error:
        raise HubError(
            f"measure.metric: the metric {name} cannot be fetched: {format_error_line(error)}",
            "Check its id and the network, or use a built-in metric",
        ) from error

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        try:
            found = module.compute(predictions=predictions, references=labels) or {}
        except (ValueError, TypeError) as error:
            raise RecipeError(
                f"measure.metric: {name} does not take these labels: {format_error_line(error)}",
                "Use a built-in metric",
            ) from error
        values: list[Any] = [value for value in found.values() if np.isscalar(value)]
        if len(values) != 1:
            raise RecipeError(
                f"measure.metric: {name} gives {sorted(found)}, not one number",
                "Choose a metric that gives one",
            )
        return float(values[0])

    if identifier in EVALUATE_ERRORS:
        return Metric(name, score, sign=-1, best=0.0)
    return Metric(name, score)
