"""Analyse errors: scores of each class, what it is confused with, and the worst mistakes.

The mistakes are for the report, which stays on the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from hftl.data.labels import decode_logits, encode_for_metrics, recognize_tag_scheme
from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.finetune.arm_files import PREDICTIONS, read_logits
from hftl.measure.facts import CalibrationSection
from hftl.measure.gain import SplitPredictions
from hftl.measure.label_calibration import compute_probabilities
from hftl.measure.metrics import extract_entities
from hftl.measure.record import ClassGain, ClassGains

MAX_SAMPLES = 4
MAX_SAMPLE_CHARACTERS = 200
"""A longer text is not shown as a sample."""
MAX_MISTAKES = 20


@dataclass(frozen=True)
class ClassScore:
    """Hold the scores of one class, or of one type of entity; `rows` in which it holds."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


def compute_class_scores(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> list[ClassScore]:
    """Return precision, recall and F1 of every class; 0 where it is never predicted or never holds.

    By hand, as scikit-learn takes indicators of a single name for two classes.

    Args:
        labels: (rows, classes) of 0 and 1.
        predictions: the same.
        names: of the classes, in their order.
    """
    correct = (labels * predictions).sum(0)
    predicted, actual = predictions.sum(0), labels.sum(0)
    return [
        ClassScore(
            label=name,
            precision=float(correct[i] / predicted[i]) if predicted[i] else 0.0,
            recall=float(correct[i] / actual[i]) if actual[i] else 0.0,
            f1=float(2 * correct[i] / (predicted[i] + actual[i]))
            if predicted[i] + actual[i]
            else 0.0,
            rows=int(actual[i]),
        )
        for i, name in enumerate(names)
    ]


def compute_entity_scores(
    labels: np.ndarray, predictions: np.ndarray, types: Sequence[str]
) -> list[ClassScore]:
    """Return precision, recall and F1 of every type of entity, see `compute_class_scores`.

    Args:
        labels: (rows,) tuples of tags, see `data.labels.encode_for_metrics`.
        predictions: the same.
        types: of entities, in their order.
    """
    columns = {name: i for i, name in enumerate(types)}
    pairs = [
        (extract_entities(tags), extract_entities(guesses))
        for tags, guesses in zip(labels, predictions, strict=True)
    ]
    # Each entity that is true or predicted is a row, of its own type.
    spans = [(span, *pair) for pair in pairs for span in sorted(pair[0] | pair[1])]
    actual, predicted = np.zeros((2, len(spans), len(types)), dtype=np.int64)
    for row, (span, true, guessed) in enumerate(spans):
        actual[row, columns[span[0]]] = span in true
        predicted[row, columns[span[0]]] = span in guessed
    return compute_class_scores(actual, predicted, types)


def count_confusions(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return (classes, classes) counts: a row the true class, a column the predicted one.

    Args:
        labels: (rows,) class ids.
        predictions: the same.
        classes: how many there are.
    """
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, predictions, labels=np.arange(classes))


def encode_one_hot(ids: np.ndarray, classes: int) -> np.ndarray:
    """Return (rows, classes) of 0 and 1 from (rows,) class ids."""
    return np.eye(classes, dtype=np.int64)[ids]


def compute_class_gains(
    test: SplitPredictions, own: str, baseline: str | None, names: Sequence[str]
) -> ClassGains | None:
    """Return F1 of every class under the own arm and under its baseline, means over seeds.

    Args:
        test: predictions on the test items, class ids or 0 and 1 by class.
        own: the own arm.
        baseline: the arm it is compared with; None where there is none.
        names: of the classes, or of the types of entities; none where the task has neither.
    """
    if baseline is None or not names:
        return None

    def mean_f1(arm: str) -> np.ndarray:
        scores = [_score_classes(test.labels, seed, names) for seed in test.predictions[arm]]
        return np.mean([[row.f1 for row in by_class] for by_class in scores], axis=0)

    counts = [row.rows for row in _score_classes(test.labels, test.labels, names)]
    rows = [
        ClassGain(label=name, own=float(f1), baseline=float(other), rows=int(count))
        for name, f1, other, count in zip(
            names, mean_f1(own), mean_f1(baseline), counts, strict=True
        )
    ]
    return ClassGains(baseline=baseline, rows=rows)


def _score_classes(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> list[ClassScore]:
    """Return the scores of every class, or of every type of entity where rows are tags."""
    if labels.dtype == object:
        return compute_entity_scores(labels, predictions, names)
    count = len(names)
    return compute_class_scores(
        _as_indicators(labels, count), _as_indicators(predictions, count), names
    )


def _as_indicators(values: np.ndarray, classes: int) -> np.ndarray:
    return values if values.ndim == 2 else encode_one_hot(values, classes)


# The published model's mistakes on the test rows.


@dataclass(frozen=True)
class Mistake:
    """Describe one wrong answer.

    `content` are texts, words, or the hash of an image; `word` is the position of the word that was
    tagged wrong. `confidence` is the probability of the prediction, calibrated where the run is,
    for a target how far off it is.
    """

    content: tuple[str, ...]
    label: str
    prediction: str
    confidence: float
    location: str
    word: int | None = None


@dataclass(frozen=True)
class ErrorAnalysis:
    """Hold the scores of classes and entities, the confusion matrix or None, and the mistakes.

    `wrong` counts the wrong ones of `answers`, which are rows, words, or names a row.
    """

    classes: list[ClassScore]
    confusion: np.ndarray | None
    mistakes: list[Mistake]
    wrong: int
    answers: int
    entities: list[ClassScore] = field(default_factory=list)


def analyze_errors(
    prepared: PreparedData, folder: Path, thresholds: np.ndarray | None = None,
    calibration: CalibrationSection | None = None,
) -> ErrorAnalysis:  # fmt: skip
    """Return the errors of one arm and seed on the test rows.

    Args:
        prepared: the rows.
        folder: the arm's, with its predictions and logits.
        thresholds: (classes,) at which the published weights decide labels; None: .5, as the
            stored predictions.
        calibration: of the published weights, that `predict` gives probabilities by; None: those
            of the softmax or sigmoid.
    """
    import pyarrow.parquet as pq

    if thresholds is None:
        table = pq.read_table(folder / PREDICTIONS, filters=[("split", "=", "test")])
        predictions, scores = (table[name].to_pylist() for name in ("prediction", "scores"))
    else:
        predictions, scores = decode_logits(
            read_logits(folder, "test"), prepared.task, prepared.names, [], thresholds
        )
    if calibration is not None and calibration.after is not None:
        scores = _calibrate(read_logits(folder, "test"), prepared.names, calibration)
    analyze = {
        "classification": _analyze_classification,
        "multi-label": _analyze_multi_label,
        "token-classification": _analyze_tagging,
        "regression": _analyze_regression,
    }[prepared.task]
    return analyze(prepared, prepared.rows["test"], predictions, scores)


def _calibrate(
    logits: np.ndarray, names: Sequence[str], calibration: CalibrationSection
) -> list[list[float]]:
    """Return the probabilities of rows by the curves of labels, or at the temperature."""
    if calibration.labels is not None:
        curves = [calibration.labels[name] for name in names]
        return compute_probabilities(logits, curves).tolist()
    temperature = calibration.temperature or 1.0
    return softmax(logits.astype(np.float64) / temperature, axis=1).tolist()


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
    for row, probabilities in zip(prepared.rows["test"], scores, strict=True):
        short = len(row.content) == 1 and len(row.content[0]) <= MAX_SAMPLE_CHARACTERS
        if short and len(samples) < MAX_SAMPLES:
            by_class = dict(zip(prepared.names, probabilities, strict=True))
            samples.setdefault(str(row.label), (row.content[0], str(row.label), by_class))
    return list(samples.values())


def rank_by_confidence(confidence: np.ndarray, most: int = MAX_MISTAKES) -> list[int]:
    """Return the positions of the greatest values, the greatest first, equals in their order."""
    return np.argsort(-confidence, kind="stable")[:most].tolist()


def _analyze_classification(
    prepared: PreparedData, rows: list[Row], predictions: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    ids = {name: i for i, name in enumerate(prepared.names)}
    labels = np.array([ids[str(row.label)] for row in rows])
    predicted = np.array([ids[name] for name in predictions])
    mistakes = [
        Mistake(row.content, str(row.label), name, max(score), row.where)
        for row, name, score in zip(rows, predictions, scores, strict=True)
        if row.label != name
    ]
    return _summarize_errors(prepared, labels, predicted, mistakes, len(rows))


def _analyze_tagging(
    prepared: PreparedData, rows: list[Row], predictions: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    ids = {name: i for i, name in enumerate(prepared.names)}
    labels: list[int] = []
    predicted: list[int] = []
    mistakes: list[Mistake] = []
    for row, tags, probabilities in zip(rows, predictions, scores, strict=True):
        for word, (tag, name) in enumerate(zip(_row_labels(row), tags, strict=True)):
            labels.append(ids[tag])
            predicted.append(ids[name])
            # A word that was cut off has no scores: the model never saw it.
            if tag != name and probabilities[word] is not None:
                confidence = max(probabilities[word])
                mistakes.append(Mistake(row.content, tag, name, confidence, row.where, word))
    errors = _summarize_errors(
        prepared, np.array(labels), np.array(predicted), mistakes, len(labels)
    )
    encoded = encode_for_metrics(
        [tuple(tags) for tags in predictions], prepared.task, prepared.names
    )
    types = recognize_tag_scheme(tuple(prepared.names)).types
    entities = compute_entity_scores(prepared.encode_for_metrics(rows), encoded, types)
    return replace(errors, entities=entities)


def _analyze_multi_label(
    prepared: PreparedData, rows: list[Row], predictions: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    names = prepared.names
    labels = np.array([[name in _row_labels(row) for name in names] for row in rows], dtype=int)
    predicted = np.array([[name in row for name in names] for row in predictions], dtype=int)
    mistakes: list[Mistake] = []
    for number, column in zip(*np.nonzero(labels != predicted), strict=True):
        name, row = names[column], rows[number]
        probability = float(scores[number][column])
        missed = bool(labels[number, column])
        true, said = (name, f"not {name}") if missed else (f"not {name}", name)
        confidence = 1 - probability if missed else probability
        mistakes.append(Mistake(row.content, true, said, confidence, row.where))
    classes = compute_class_scores(labels, predicted, names)
    return ErrorAnalysis(classes, None, _select_mistakes(mistakes), len(mistakes), labels.size)


def _analyze_regression(
    prepared: PreparedData, rows: list[Row], predictions: list[Any], scores: list[Any]
) -> ErrorAnalysis:
    mistakes = [
        Mistake(row.content, f"{row.label:.9g}", f"{value:.7g}", abs(value - float(row.label)),
                row.where)
        for row, value in zip(rows, predictions, strict=True)
        if isinstance(row.label, float)
    ]  # fmt: skip
    return ErrorAnalysis([], None, _select_mistakes(mistakes), len(mistakes), len(rows))


def _summarize_errors(
    prepared: PreparedData, labels: np.ndarray, predicted: np.ndarray, mistakes: list[Mistake],
    answers: int,
) -> ErrorAnalysis:  # fmt: skip
    classes = len(prepared.names)
    scores = compute_class_scores(
        encode_one_hot(labels, classes), encode_one_hot(predicted, classes), prepared.names
    )
    confusion = count_confusions(labels, predicted, classes)
    wrong = int((labels != predicted).sum())
    return ErrorAnalysis(scores, confusion, _select_mistakes(mistakes), wrong, answers)


def _select_mistakes(mistakes: list[Mistake]) -> list[Mistake]:
    confidence = np.array([mistake.confidence for mistake in mistakes])
    return [mistakes[i] for i in rank_by_confidence(confidence)]


def _row_labels(row: Row) -> tuple[str, ...]:
    """Return the names of a row that has several."""
    return row.label if isinstance(row.label, tuple) else (str(row.label),)
