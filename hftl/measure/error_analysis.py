"""Scores class by class: how well each is told apart, with what it is confused, against whom."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.data import labels
from hftl.data.labels import recognize_tag_scheme
from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.finetune.arm_files import PREDICTIONS
from hftl.measure.gain import SplitPredictions
from hftl.measure.metrics import extract_entities


def compute_class_scores(
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


def compute_entity_scores(
    labels: np.ndarray, predictions: np.ndarray, types: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of every type of entity, as of `compute_class_scores`.

    Args:
        labels: (rows,) tuples of tags, see `answers.measured`.
        predictions: the same.
        types: of entities, in their order.

    Returns:
        `{label, precision, recall, f1, rows}` a type, `rows` the number of its entities.
    """
    places = {name: i for i, name in enumerate(types)}
    pairs = [(extract_entities(one), extract_entities(other))
             for one, other in zip(labels, predictions, strict=True)]  # fmt: skip
    # Each entity that is held or predicted is a row, of its own type.
    spans = [(span, *pair) for pair in pairs for span in sorted(pair[0] | pair[1])]
    held, predicted = np.zeros((2, len(spans), len(types)), dtype=np.int64)
    for row, (span, true, guess) in enumerate(spans):
        held[row, places[span[0]]] = span in true
        predicted[row, places[span[0]]] = span in guess
    return compute_class_scores(held, predicted, types)


def count_confusions(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: a row what is true, a column what was predicted.

    Args:
        labels: (rows,) class ids.
        predictions: the same.
        classes: how many there are.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def encode_one_hot(ids: np.ndarray, classes: int) -> np.ndarray:
    """(rows, classes) of 0 and 1 from (rows,) class ids."""
    return np.eye(classes, dtype=np.int64)[ids]


def compute_class_gains(
    told: SplitPredictions, own: str, baseline: str | None, names: Sequence[str]
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
        found = [_score_classes(told.labels, seed, names) for seed in told.predictions[arm]]
        return np.mean([[row["f1"] for row in scores] for scores in found], axis=0)

    held = [row["rows"] for row in _score_classes(told.labels, told.labels, names)]
    rows = [
        {"label": name, "own": float(mine), "baseline": float(other), "rows": int(count)}
        for name, mine, other, count in zip(
            names, mean_f1(own), mean_f1(baseline), held, strict=True
        )
    ]
    return {"baseline": baseline, "rows": rows}


def average_metrics(entries: Sequence[dict[str, Any]], arm: str) -> dict[str, float]:
    """Every metric of an arm on test, averaged over its seeds.

    Args:
        entries: the record's `arms`.
        arm: the arm's name.
    """
    scores = [entry["metrics"]["test"] for entry in entries if entry["arm"] == arm]
    return {name: float(np.mean([found[name] for found in scores])) for name in scores[0]}


def _score_classes(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the scores of every class, or of every type of entity where rows are tags."""
    if labels.dtype == object:
        return compute_entity_scores(labels, predictions, names)
    count = len(names)
    return compute_class_scores(
        _as_indicators(labels, count), _as_indicators(predictions, count), names
    )


def _as_indicators(values: np.ndarray, classes: int) -> np.ndarray:
    return values if values.ndim == 2 else encode_one_hot(values, classes)


# The published model's errors on the test rows: for the report, which stays on the machine.


MAX_SAMPLES = 4
MAX_SAMPLE_CHARACTERS = 200
"""Characters of a text that is shown whole."""
MAX_MISTAKES = 20
"""Mistakes that are shown."""


@dataclass(frozen=True)
class Mistake:
    """One wrong answer: what was read, what is true, what was said and how surely.

    `content` are texts, words, or the hash of a picture; for words `word` is the place of the one
    that was tagged wrong. `surety` is the probability of what was said, for a target how far off
    it is.
    """

    content: tuple[str, ...]
    label: str
    prediction: str
    confidence: float
    location: str
    word: int | None = None


@dataclass(frozen=True)
class ErrorAnalysis:
    """`classes` as of `compute_class_scores`, `counts` as of `count_confusions` or None, and the mistakes.

    `entities` are as of `compute_entity_scores`, none but for words.
    """

    classes: list[dict[str, Any]]
    counts: np.ndarray | None
    mistakes: list[Mistake]
    wrong: int
    answers: int
    entities: list[dict[str, Any]] = field(default_factory=list)


def analyze_errors(prepared: PreparedData, folder: Path) -> ErrorAnalysis:
    """The errors of one arm and seed on the test rows.

    Args:
        prepared: the rows.
        folder: the arm's, with its predictions.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(folder / PREDICTIONS, filters=[("split", "=", "test")]).to_pydict()
    rows = prepared.rows["test"]
    said, scores = table["prediction"], table["scores"]
    examine = {
        "classification": _analyze_classification,
        "multi-label": _analyze_multi_label,
        "token-classification": _analyze_tagging,
        "regression": _analyze_regression,
    }[prepared.task]
    return examine(prepared, rows, said, scores)


def collect_sample_outputs(
    prepared: PreparedData, folder: Path
) -> list[tuple[str, str, dict[str, float]]]:
    """Return test texts with their label and every class's probability, one row a class.

    The first of each class in the split's own order, whether it is right or wrong, so that nothing
    is chosen by the model's answers. Only single texts of one class have them.

    Args:
        prepared: the rows.
        folder: the arm's, with its predictions.
    """
    import pyarrow.parquet as pq

    if prepared.task != "classification" or prepared.modality != "text":
        return []
    filters = [("split", "=", "test")]
    scores = pq.read_table(folder / PREDICTIONS, filters=filters)["scores"].to_pylist()
    samples: dict[str, tuple[str, str, dict[str, float]]] = {}
    for row, chances in zip(prepared.rows["test"], scores, strict=True):
        short = len(row.content) == 1 and len(row.content[0]) <= MAX_SAMPLE_CHARACTERS
        if short and len(samples) < MAX_SAMPLES:
            named = dict(zip(prepared.names, chances, strict=True))
            samples.setdefault(str(row.label), (row.content[0], str(row.label), named))
    return list(samples.values())


def rank_by_confidence(surety: np.ndarray, most: int = MAX_MISTAKES) -> list[int]:
    """The places of the greatest values, the greatest first, equals in their order."""
    return np.argsort(-surety, kind="stable")[:most].tolist()


def _analyze_classification(
    prepared: PreparedData, rows: list[Row], said: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    ids = {name: i for i, name in enumerate(prepared.names)}
    true = np.array([ids[str(row.label)] for row in rows])
    told = np.array([ids[name] for name in said])
    found = [
        Mistake(row.content, str(row.label), name, max(score), row.where)
        for row, name, score in zip(rows, said, scores, strict=True)
        if row.label != name
    ]
    return _summarize_errors(prepared, true, told, found, len(rows))


def _analyze_tagging(
    prepared: PreparedData, rows: list[Row], said: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    ids = {name: i for i, name in enumerate(prepared.names)}
    true, told, found = [], [], []
    for row, tags, surety in zip(rows, said, scores, strict=True):
        for word, (tag, name) in enumerate(zip(_row_labels(row), tags, strict=True)):
            true.append(ids[tag])
            told.append(ids[name])
            # A word that was cut off was never looked at.
            if tag != name and surety[word] is not None:
                found.append(Mistake(row.content, tag, name, max(surety[word]), row.where, word))
    errors = _summarize_errors(prepared, np.array(true), np.array(told), found, len(true))
    predictions = labels.encode_for_metrics(
        [tuple(tags) for tags in said], prepared.task, prepared.names
    )
    types = recognize_tag_scheme(tuple(prepared.names)).types
    return replace(
        errors,
        entities=compute_entity_scores(prepared.encode_for_metrics(rows), predictions, types),
    )


def _analyze_multi_label(
    prepared: PreparedData, rows: list[Row], said: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    held = np.array(
        [[name in _row_labels(row) for name in prepared.names] for row in rows], dtype=int
    )
    told = np.array([[name in names for name in prepared.names] for names in said], dtype=int)
    found = []
    for number, column in zip(*np.nonzero(held != told), strict=True):
        name, row = prepared.names[column], rows[number]
        chance = float(scores[number][column])
        words = (name, f"not {name}") if held[number, column] else (f"not {name}", name)
        surety = 1 - chance if held[number, column] else chance
        found.append(Mistake(row.content, *words, surety, row.where))
    classes = compute_class_scores(held, told, prepared.names)
    return ErrorAnalysis(classes, None, _select_mistakes(found), len(found), held.size)


def _analyze_regression(
    prepared: PreparedData, rows: list[Row], said: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    found = [
        Mistake(row.content, f"{row.label:.9g}", f"{value:.7g}", abs(value - float(row.label)),
                row.where)
        for row, value in zip(rows, said, strict=True)
        if isinstance(row.label, float)
    ]  # fmt: skip
    return ErrorAnalysis([], None, _select_mistakes(found), len(found), len(rows))


def _summarize_errors(
    prepared: PreparedData, true: np.ndarray, told: np.ndarray, found: list[Mistake], answers: int
) -> ErrorAnalysis:
    classes = len(prepared.names)
    scores = compute_class_scores(
        encode_one_hot(true, classes), encode_one_hot(told, classes), prepared.names
    )
    counts = count_confusions(true, told, classes)
    return ErrorAnalysis(
        scores, counts, _select_mistakes(found), int((true != told).sum()), answers
    )


def _select_mistakes(found: list[Mistake]) -> list[Mistake]:
    return [
        found[i] for i in rank_by_confidence(np.array([mistake.confidence for mistake in found]))
    ]


def _row_labels(row: Row) -> tuple[str, ...]:
    """The names of a row that has several."""
    return row.label if isinstance(row.label, tuple) else (str(row.label),)
