"""Check what a row's cells must hold, task by task."""

from typing import Any

import pytest

from hftl.data.load import find_label_fault, find_text_fault, parse_label


@pytest.mark.parametrize(
    ("value", "task", "why"),
    [
        ("a text", "classification", None),
        ("  ", "classification", "text is empty"),
        (None, "classification", "text is empty, not text"),
        (3, "classification", "text is int, not text"),
        (["a", "b"], "token-classification", None),
        ([], "token-classification", "text is an empty list"),
        ("a b", "token-classification", "text is a str, not a list of words"),
        (None, "token-classification", "text is empty, not a list of words"),
        (["a", " "], "token-classification", "text holds ' ', which is no word"),
        (["a", None], "token-classification", "text holds None, which is no word"),
    ],
)
def test_texts_and_words(value: Any, task: str, why: str | None) -> None:
    assert find_text_fault("text", value, task) == why


@pytest.mark.parametrize(
    ("value", "task", "why"),
    [
        (["a", "b"], "multi-label", None),
        ([], "multi-label", None),
        ([1, 2], "multi-label", None),
        ("a", "multi-label", "the label is a str, not a list"),
        (None, "multi-label", "the label is empty, not a list"),
        (["a", ""], "multi-label", "the label is empty"),
        (["a", 1.5], "multi-label", "the label 1.5 is no class"),
        (["O", "B-X"], "token-classification", None),
        (["O"], "token-classification", "1 labels for 2 words"),
        (["O", "O", "O"], "token-classification", "3 labels for 2 words"),
        (["O", None], "token-classification", "the label is empty"),
        ("O O", "token-classification", "the label is a str, not a list"),
    ],
)
def test_lists_of_labels(value: Any, task: str, why: str | None) -> None:
    words = ["two", "words"] if task == "token-classification" else None
    fault = find_label_fault({"y": value}, "y", task, words)
    assert fault == why or (why and fault and fault.startswith(why))


@pytest.mark.parametrize(("on", "off"), [(1, 0), (True, False), (1.0, 0.0), ("1", "0"), (" 1 ", 0)])
def test_columns_of_zero_and_one_are_labels(on: Any, off: Any) -> None:
    cells = {"b": on, "a": on, "c": off}
    assert find_label_fault(cells, ["b", "a", "c"], "multi-label") is None
    assert parse_label(cells, ["b", "a", "c"], "multi-label") == ("a", "b")
    for bad in (2, "yes", None, "", 0.5):
        why = find_label_fault({"a": on, "b": bad}, ["a", "b"], "multi-label")
        assert why is not None and why.startswith("b is ") and why.endswith("not 0 or 1")


@pytest.mark.parametrize(
    ("value", "task", "label"),
    [
        (["b", "a", "b"], "multi-label", ("a", "b")),
        ([2, 1.0], "multi-label", ("1", "2")),
        (["B-X", "O"], "token-classification", ("B-X", "O")),
        ([3, 0], "token-classification", ("3", "0")),
        ("2.5", "regression", 2.5),
        (" a ", "classification", "a"),
    ],
)
def test_labels_are_parsed_by_task(value: Any, task: str, label: Any) -> None:
    assert parse_label({"y": value}, "y", task) == label
