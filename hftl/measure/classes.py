"""Scores class by class: how well each is told apart, with what it is confused, against whom."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl.measure.gain import Predicted
from hftl.metrics import entities


def class_scores(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every class; 0 where it is never predicted or never holds.

    Args:
        labels: (rows, classes) of 0 and 1.
        predictions: the same.
        names: of the classes, in their order.

    Returns:
        `{label, precision, recall, f1, rows}` a class, `rows` in which it holds.
    """
    right = (labels * predictions).sum(0)
    told, held = predictions.sum(0), labels.sum(0)
    return [
        {
            "label": name,
            "precision": float(right[i] / told[i]) if told[i] else 0.0,
            "recall": float(right[i] / held[i]) if held[i] else 0.0,
            "f1": float(2 * right[i] / (told[i] + held[i])) if told[i] + held[i] else 0.0,
            "rows": int(held[i]),
        }
        for i, name in enumerate(names)
    ]


def entity_scores(
    labels: np.ndarray, predictions: np.ndarray, types: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of every type of entity, as of `class_scores`.

    Args:
        labels: (rows,) tuples of tags, see `answers.measured`.
        predictions: the same.
        types: of entities, in their order.

    Returns:
        `{label, precision, recall, f1, rows}` a type, `rows` the number of its entities.
    """
    places = {name: i for i, name in enumerate(types)}
    pairs = [(entities(one), entities(other))
             for one, other in zip(labels, predictions, strict=True)]  # fmt: skip
    # Each entity that is held or predicted is a row, of its own type.
    spans = [(span, *pair) for pair in pairs for span in sorted(pair[0] | pair[1])]
    held, predicted = np.zeros((2, len(spans), len(types)), dtype=np.int64)
    for row, (span, true, guess) in enumerate(spans):
        held[row, places[span[0]]] = span in true
        predicted[row, places[span[0]]] = span in guess
    return class_scores(held, predicted, types)


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: a row what is true, a column what was predicted.

    Args:
        labels: (rows,) class ids.
        predictions: the same.
        classes: how many there are.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def one_hot(ids: np.ndarray, classes: int) -> np.ndarray:
    """(rows, classes) of 0 and 1 from (rows,) class ids."""
    return np.eye(classes, dtype=np.int64)[ids]


def class_gains(
    told: Predicted, own: str, baseline: str | None, names: Sequence[str]
) -> dict[str, Any] | None:
    """F1 of every class under the own arm and under its baseline, means over seeds.

    Args:
        told: predictions on the test items, class ids or 0 and 1 by class.
        own: the own arm.
        baseline: the arm it is compared with; None where there is none.
        names: of the classes, or of the types of entities; none where the task has neither.

    Returns:
        `{baseline, rows: [{label, own, baseline, rows}]}`, or None.
    """
    if baseline is None or not names:
        return None

    def mean_f1(arm: str) -> np.ndarray:
        found = [_scores(told.labels, seed, names) for seed in told.predictions[arm]]
        return np.mean([[row["f1"] for row in scores] for scores in found], axis=0)

    held = [row["rows"] for row in _scores(told.labels, told.labels, names)]
    rows = [
        {"label": name, "own": float(mine), "baseline": float(other), "rows": int(count)}
        for name, mine, other, count in zip(
            names, mean_f1(own), mean_f1(baseline), held, strict=True
        )
    ]
    return {"baseline": baseline, "rows": rows}


def mean_metrics(entries: Sequence[dict[str, Any]], arm: str) -> dict[str, float]:
    """Every metric of an arm on test, averaged over its seeds.

    Args:
        entries: the record's `arms`.
        arm: the arm's name.
    """
    scores = [entry["metrics"]["test"] for entry in entries if entry["arm"] == arm]
    return {name: float(np.mean([found[name] for found in scores])) for name in scores[0]}


def _scores(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the scores of every class, or of every type of entity where rows are tags."""
    if labels.dtype == object:
        return entity_scores(labels, predictions, names)
    count = len(names)
    return class_scores(_wide(labels, count), _wide(predictions, count), names)


def _wide(values: np.ndarray, classes: int) -> np.ndarray:
    return values if values.ndim == 2 else one_hot(values, classes)
