"""Analyze errors from the files of an arm, and show them in the report."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import confusion_matrix
from support.records import make_record, render, render_page

from hftl.card.plots import plot_ladder
from hftl.card.report import build_examples, make_thumbnail, split_context
from hftl.data.prepare import PreparedData
from hftl.data.rows import Label, Row
from hftl.measure.error_analysis import (
    ClassScore,
    ErrorAnalysis,
    analyze_errors,
    rank_by_confidence,
)
from hftl.measure.facts import CalibrationSection
from hftl.measure.record import Record

TEXTS = ["a", "b", "c", "d"]
NO_FACTS: Any = {}


def stored(
    folder: Path, task: str, names: list[str], labels: list[Label], said: list[Any],
    scores: list[Any], contents: list[tuple[str, ...]] | None = None,
) -> ErrorAnalysis:  # fmt: skip
    """Analyze predictions on test, stored with others on validation that must not count."""
    contents = contents or [(text,) for text in TEXTS]
    rows = [
        Row(content, label, None, i, f"t.csv line {i + 2}")
        for i, (content, label) in enumerate(zip(contents, labels, strict=True))
    ]
    prepared = PreparedData(task, "text", names, {"test": rows}, NO_FACTS)
    table = {
        "split": ["validation", *["test"] * len(rows)], "row": [0, *range(len(rows))],
        "label": [said[0], *labels], "prediction": [said[0], *said], "scores": [scores[0], *scores],
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "predictions.parquet")
    return analyze_errors(prepared, folder)


def test_errors_of_words_name_the_word_and_leave_out_what_was_cut(tmp_path: Path) -> None:
    errors = stored(
        tmp_path, "token-classification", ["O", "X"],
        [("O", "X", "X"), ("X",)], [("X", "X", "O"), ("O",)],
        [[[0.4, 0.6], [0.1, 0.9], None], [[0.7, 0.3]]], [("the", "big", "end"), ("one",)],
    )  # fmt: skip
    assert errors.wrong == 3 and errors.answers == 4
    assert [
        (m.content[m.word or 0], m.label, m.prediction, m.confidence) for m in errors.mistakes
    ] == [("one", "X", "O", 0.7), ("the", "O", "X", 0.6)]


def test_errors_of_names_are_names_said_or_missed(tmp_path: Path) -> None:
    errors = stored(
        tmp_path, "multi-label", ["x", "y"], [("x",), ("x", "y")], [("x", "y"), ("y",)],
        [[0.9, 0.6], [0.1, 0.8]], [("a",), ("b",)],
    )  # fmt: skip
    assert [(m.label, m.prediction, round(m.confidence, 6)) for m in errors.mistakes] == [
        ("x", "not x", 0.9), ("not y", "y", 0.6)
    ]  # fmt: skip
    assert errors.confusion is None and [row.rows for row in errors.classes] == [2, 1]


def test_errors_of_names_are_those_at_the_published_thresholds(tmp_path: Path) -> None:
    rows = [Row((text,), ("x",), None, i, f"t.csv line {i + 2}") for i, text in enumerate("ab")]
    prepared = PreparedData("multi-label", "text", ["x", "y"], {"test": rows}, NO_FACTS)
    logits = torch.tensor([[-0.5, 1.0], [-1.5, -1.0]])
    save_file({"test": logits}, tmp_path / "logits.safetensors")
    errors = analyze_errors(prepared, tmp_path, np.array([0.3, 0.8]))
    (missed,) = errors.mistakes
    assert (missed.content, missed.label, missed.prediction) == (("b",), "x", "not x")
    assert missed.confidence == pytest.approx(1 - torch.sigmoid(logits[1, 0]).item())
    assert errors.wrong == 1 and errors.answers == 4 and errors.classes[0].recall == 0.5


def test_errors_of_targets_are_the_furthest_off_with_all_digits(tmp_path: Path) -> None:
    errors = stored(
        tmp_path, "regression", [], [1234567.0, 2.0, 3.0], [1234501.0, 0.0, 3.25],
        [[1234501.0], [0.0], [3.25]], [("a",), ("b",), ("c",)],
    )  # fmt: skip
    assert [(m.label, m.prediction, m.confidence) for m in errors.mistakes] == [
        ("1234567", "1234501", 66.0), ("2", "0", 2.0), ("3", "3.25", 0.25)
    ]  # fmt: skip
    assert errors.classes == []


def stored_classes(folder: Path, contents: list[tuple[str, ...]] | None = None) -> ErrorAnalysis:
    labels, predictions = ["negative", "positive"] * 2, ["negative"] * 2 + ["positive", "negative"]
    scores = [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.95, 0.05]]
    names = ["negative", "positive"]
    return stored(folder, "classification", names, labels, predictions, scores, contents)  # pyright: ignore


def test_errors_of_classes_come_with_the_surest_first(tmp_path: Path) -> None:
    errors = stored_classes(tmp_path)
    assert errors.wrong == 3 and errors.answers == 4 and errors.confusion is not None
    np.testing.assert_array_equal(errors.confusion, confusion_matrix(list("npnp"), list("nnpn")))
    assert [
        (m.content, m.label, m.prediction, m.confidence, m.location) for m in errors.mistakes
    ] == [
        (("d",), "positive", "negative", 0.95, "t.csv line 5"),
        (("c",), "negative", "positive", 0.8, "t.csv line 4"),
        (("b",), "positive", "negative", 0.7, "t.csv line 3"),
    ]


def test_probabilities_of_mistakes_are_those_after_calibration(tmp_path: Path) -> None:
    stored_classes(tmp_path)
    logits = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    save_file({"test": logits}, tmp_path / "logits.safetensors")
    rows = [
        Row((text,), label, None, i, f"t.csv line {i + 2}")
        for i, (text, label) in enumerate(zip(TEXTS, ["negative", "positive"] * 2, strict=True))
    ]
    names = ["negative", "positive"]
    prepared = PreparedData("classification", "text", names, {"test": rows}, NO_FACTS)
    score = {"value": 0.1, "ci95": None}
    scores: dict[str, Any] = {"ece": score, "brier": score}
    calibration = CalibrationSection.model_validate(
        {"temperature": 2.0, "bins": 2, "before": scores, "after": scores}
    )
    errors = analyze_errors(prepared, tmp_path, None, calibration)
    expected = torch.sigmoid(torch.tensor([4.0, 2.0, 1.0]) / 2).tolist()
    assert [m.confidence for m in errors.mistakes] == pytest.approx(expected)
    assert [m.prediction for m in errors.mistakes] == ["negative", "positive", "negative"]


def test_probabilities_of_missed_labels_are_by_their_curves(tmp_path: Path) -> None:
    rows = [Row((text,), ("x",), None, i, f"t.csv line {i + 2}") for i, text in enumerate("ab")]
    prepared = PreparedData("multi-label", "text", ["x", "y"], {"test": rows}, NO_FACTS)
    save_file({"test": torch.tensor([[2.0, -1.0], [-2.0, 1.0]])}, tmp_path / "logits.safetensors")
    score = {"value": 0.1, "ci95": None}
    scores: dict[str, Any] = {"ece": score, "brier": score}
    curves = {
        "x": {"method": "platt", "slope": 0.5, "intercept": -1.0},
        "y": {"method": "isotonic", "logits": [-1.0, 3.0], "probabilities": [0.2, 0.6]},
    }
    calibration = CalibrationSection.model_validate(
        {"temperature": None, "labels": curves, "bins": 2, "before": scores, "after": scores}
    )
    errors = analyze_errors(prepared, tmp_path, np.array([0.5, 0.5]), calibration)
    expected = {"not x": 1 - torch.sigmoid(torch.tensor(-2.0)).item(), "y": 0.4}
    assert {m.prediction: m.confidence for m in errors.mistakes} == pytest.approx(expected)


def test_the_surest_come_in_the_order_of_equals_and_at_most_20() -> None:
    assert rank_by_confidence(np.array([0.5, 0.9, 0.5, 0.9]), 3) == [1, 3, 0]
    assert rank_by_confidence(np.array([])) == [] and len(rank_by_confidence(np.ones(50))) == 20


def test_words_are_shown_in_their_context() -> None:
    words = tuple(f"w{i}" for i in range(30))
    before, word, after = split_context(words, 20)
    assert before.split() == list(words[12:20]) and word == "w20"
    assert after.split() == list(words[21:29]) and split_context(words, 0)[0] == ""


def test_thumbnail_is_small_and_the_same_picture() -> None:
    pixels = np.zeros((3, 224, 224), dtype=np.uint8)
    pixels[0] = 200
    image = Image.open(io.BytesIO(make_thumbnail(pixels)))
    assert image.size == (96, 96) and image.getpixel((50, 50)) == (200, 0, 0)


def test_pictures_of_examples_are_written_beside_the_card(tmp_path: Path) -> None:
    scores = [[0.9, 0.1]] * 4
    errors = stored(tmp_path, "classification", ["n", "p"], ["p"] * 4, ["n"] * 4, scores)
    pixels = np.full((3, 40, 40), 7, dtype=np.uint8)
    examples = build_examples(
        errors.mistakes, {text: pixels for text in TEXTS}.__getitem__, tmp_path
    )
    assert [example.picture for example in examples] == [
        f"assets/mistake-{i:02d}.png" for i in (1, 2, 3, 4)
    ]
    assert all((tmp_path / str(e.picture)).stat().st_size < 5000 for e in examples)
    assert build_examples(errors.mistakes, None, tmp_path)[0].texts == ["a"]


def test_report_shows_errors_and_the_card_does_not(tmp_path: Path) -> None:
    record = make_record()
    plot_ladder(Record.parse(record), tmp_path / "assets" / "ladder.png")
    errors = stored_classes(tmp_path, [(f"a secret text {i}",) for i in range(4)])
    card = render(record)
    report = render_page(record, tmp_path, errors)
    assert "a secret text" not in card and report.count("a secret text") == 3
    for words in ("3 of 4 rows are wrong", "Its 3 surest mistakes", "seed 2", "0.950", "line 5"):
        assert words in report
    assert "What is taken for what" in report
    assert "stays on this machine" in report
    pixels = np.zeros((3, 32, 32), dtype=np.uint8)
    seen = render_page(record, tmp_path, errors, lambda name: pixels)
    assert seen.count('class="picture"') == 3 and "a secret text" not in seen
    assert "Where it is wrong" not in render_page(record, tmp_path)


@pytest.mark.parametrize("many", [3, 60])
def test_a_great_confusion_matrix_is_left_out(many: int, tmp_path: Path) -> None:
    record = make_record()
    plot_ladder(Record.parse(record), tmp_path / "assets" / "ladder.png")
    classes = [ClassScore(f"c{i}", 0.5, 0.5, 0.5, 1) for i in range(many)]
    errors = ErrorAnalysis(classes, np.eye(many, dtype=np.int64), [], 0, many)
    report = render_page(record, tmp_path, errors)
    assert ("What is taken for what" in report) == (many == 3) and f"c{many - 1}" in report
