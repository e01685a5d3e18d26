"""What each task's labels and outputs mean: as targets to learn, and as answers to measure.

A told answer is a `Label`: a class name, a number, a sorted tuple of names, a tuple of tags.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from hftl.data.load import Label
from hftl.data.tags import TagScheme, outside_of, recognise_tags

HOLDS = 0.5
"""A multi-label class is predicted above this probability."""


def names_of(label: Label, task: str) -> tuple[str, ...]:
    """The class names that a label speaks of; none for regression."""
    if task == "regression":
        return ()
    return label if isinstance(label, tuple) else (str(label),)


def targets(labels: Sequence[Label], task: str, names: Sequence[str]) -> np.ndarray:
    """What is learnt.

    Returns:
        classification: (rows,) int64 class ids; regression: (rows,) float64; multi-label:
        (rows, classes) float64 of 0 and 1; token-classification: (words,) int64, row after row.
    """
    ids = {name: i for i, name in enumerate(names)}
    if task == "regression":
        return np.array(labels, dtype=np.float64)
    if task == "multi-label":
        found = np.zeros((len(labels), len(names)))
        for row, label in enumerate(labels):
            found[row, [ids[name] for name in names_of(label, task)]] = 1
        return found
    return np.array([ids[n] for label in labels for n in names_of(label, task)], dtype=np.int64)


def measured(
    labels: Sequence[Label], task: str, names: Sequence[str], scheme: TagScheme | None = None
) -> np.ndarray:
    """Return what metrics compare.

    That is `targets`; for tokens one entry a row, a tuple of tags in the form that seqeval reads,
    whatever scheme they are written in.

    Args:
        labels: those of the rows, or predictions.
        task: the recipe's.
        names: the classes in the order of their ids.
        scheme: of the tags; None: recognised from the names.

    Raises:
        DataError: if the tags are of no scheme.
    """
    if task != "token-classification":
        return targets(labels, task, names)
    scheme = scheme or recognise_tags(tuple(names))
    rows = np.empty(len(labels), dtype=object)
    for number, label in enumerate(labels):
        rows[number] = scheme.standardise(names_of(label, task))
    return rows


def told(
    logits: np.ndarray, task: str, names: list[str], words: Sequence[int]
) -> tuple[list[Label], list[Any]]:
    """The answers that logits give, and their scores.

    Args:
        logits: (rows, outputs), for tokens (words, outputs), row after row; a word that was cut
            off has NaN throughout and is told to be outside.
        task: the recipe's.
        names: the classes in the order of their ids.
        words: how many words each row has, for tokens.

    Returns:
        A label a row; and its scores: probabilities by class, a target's value, or for tokens the
        probabilities of each word, None for one that was cut off.
    """
    wide = logits.astype(np.float64)
    if task == "regression":
        return wide[:, 0].tolist(), wide.tolist()
    if task == "multi-label":
        scores = expit(wide)
        return [tuple(n for n, p in zip(names, row, strict=True) if p > HOLDS)
                for row in scores], scores.tolist()  # fmt: skip
    scores = _softmax(wide)
    if task == "classification":
        return [names[i] for i in scores.argmax(1)], scores.tolist()
    outside = names.index(outside_of(names) or names[0])
    cut = np.isnan(scores[:, 0])
    best = np.where(cut, outside, np.nan_to_num(scores).argmax(1))
    known = [None if gone else word for gone, word in zip(cut, scores.tolist(), strict=True)]
    ends = np.cumsum(words)
    labels: list[Label] = [tuple(names[i] for i in row) for row in np.split(best, ends[:-1])]
    return labels, [known[end - count : end] for end, count in zip(ends, words, strict=True)]


def _softmax(wide: np.ndarray) -> np.ndarray:
    shifted = np.exp(wide - wide.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
