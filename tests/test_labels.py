"""Encode labels as targets, and decode logits to labels, for every task."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from hftl.data.labels import decode_logits, encode_for_metrics, encode_targets, get_label_names

NAMES = ["a", "b", "c"]
LABELS = {
    "classification": ["b", "a", "c", "b"],
    "regression": [1.5, -2.0, 0.0],
    "multi-label": [("a", "c"), (), ("b",), ("a", "b", "c")],
    "token-classification": [("a", "b"), ("c",), ("b", "b", "a")],
}


def sure(task: str) -> np.ndarray:
    """Return logits that are sure of the labels."""
    targets_ = encode_targets(LABELS[task], task, NAMES)
    if task == "regression":
        return targets_[:, None]
    return 20 * targets_ - 10 if task == "multi-label" else 20 * np.eye(3)[targets_]


def words(task: str) -> list[int]:
    return [len(label) if task == "token-classification" else 1 for label in LABELS[task]]  # pyright: ignore


@pytest.mark.parametrize("task", LABELS)
def test_sure_logits_decode_to_the_labels(task: str) -> None:
    labels, scores = decode_logits(sure(task), task, NAMES, words(task))
    assert labels == LABELS[task]
    assert len(scores) == len(labels)
    first, second = (encode_for_metrics(labels, task, NAMES) for labels in (labels, LABELS[task]))
    assert np.array_equal(first, second) and len(first) == len(labels)


def test_targets_by_hand() -> None:
    assert encode_targets(LABELS["classification"], "classification", NAMES).tolist() == [
        1,
        0,
        2,
        1,
    ]
    assert encode_targets(LABELS["multi-label"], "multi-label", NAMES).tolist() == [
        [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1],
    ]  # fmt: skip
    flat = encode_targets(LABELS["token-classification"], "token-classification", NAMES)
    assert flat.tolist() == [0, 1, 2, 1, 1, 0] and flat.dtype == np.int64


def test_scores_are_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    _, one = decode_logits(logits, "classification", NAMES, [1] * 5)
    _, several = decode_logits(logits, "multi-label", NAMES, [1] * 5)
    _, each = decode_logits(logits, "token-classification", NAMES, [2, 3])
    np.testing.assert_allclose(one, softmax(logits.astype(float), axis=1))
    np.testing.assert_allclose(several, expit(logits.astype(float)))
    assert [len(row) for row in each] == [2, 3]
    np.testing.assert_allclose(np.concatenate(each), one)


@pytest.mark.parametrize(("names", "outside"), [(["B-X", "I-X", "O"], "O"), (["x", "y", "z"], "x")])
def test_word_that_was_cut_off_is_outside(names: list[str], outside: str) -> None:
    logits = np.array([[0, 9, 0], [np.nan] * 3, [9, 0, 0]], dtype=np.float32)
    labels, scores = decode_logits(logits, "token-classification", names, [2, 1])
    assert labels == [(names[1], outside), (names[0],)]
    assert scores[0][1] is None and sum(scores[0][0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("label", "task", "names"),
    [
        ("a", "classification", ("a",)),
        (1.5, "regression", ()),
        (("a", "b"), "multi-label", ("a", "b")),
    ],
)
def test_names_that_a_label_speaks_of(label: object, task: str, names: tuple[str, ...]) -> None:
    assert get_label_names(label, task) == names  # pyright: ignore
