"""Metrics: pure functions of labels and predictions.

Classification takes integer class ids, regression floats; both as arrays of shape (rows,).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.errors import HubError, NumericError, RecipeError
from hftl.explain import closest

Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """`score(labels, predictions)`; `sign` is 1 where more is better, -1 where less is.

    `best` is the value of a perfect prediction.
    """

    name: str
    score: Score
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
}


def find(name: str, task: str) -> Metric:
    """The metric of a built-in name or `evaluate:<id>`.

    Raises:
        RecipeError: if there is none of that name for the task.
        HubError: if an `evaluate:` metric cannot be fetched.
    """
    if name.startswith("evaluate:"):
        return _from_evaluate(name)
    if name not in METRICS[task]:
        raise RecipeError(
            f"measure.metric: no metric {name!r} for {task}{closest(name, list(METRICS[task]))}",
            f"Built in: {', '.join(METRICS[task])}; or evaluate:<id>",
        )
    return METRICS[task][name]


def less_is_better(name: str) -> bool:
    """Whether a built-in metric is an error."""
    return any(known[name].sign < 0 for known in METRICS.values() if name in known)


def compute(metrics: list[Metric], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Every metric's value.

    Raises:
        NumericError: if a prediction is not finite.
    """
    if not np.isfinite(predictions).all():
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


def _from_evaluate(name: str) -> Metric:
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
            f"measure.metric: the metric {name} cannot be fetched: {str(error).splitlines()[0]}",
            "Check its id and the network, or use a built-in metric",
        ) from error

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        try:
            found = module.compute(predictions=predictions, references=labels) or {}
        except (ValueError, TypeError) as error:
            raise RecipeError(
                f"measure.metric: {name} does not take these labels: {str(error).splitlines()[0]}",
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
