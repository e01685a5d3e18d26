"""What each task's labels and outputs mean: as targets to learn, and as answers to measure.

A told answer is a `Label`: a class name, a number, a sorted tuple of names, a tuple of tags.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from hftl.data.load import Label, Row
from hftl.data.tags import TagScheme, outside_of, recognise_tags
from hftl.errors import DataError

SMALLEST, LARGEST = 1e-30, 1e30
"""The least spread and the largest size of targets whose weights and squares float32 holds."""
COARSE = 0.1
"""The share of the targets' spread that float32's rounding may be: its error is a third of that."""
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


def check_targets(rows: Sequence[Row]) -> None:
    """Refuse regression targets from which nothing can be learnt, or none in float32.

    Args:
        rows: those of train.

    Raises:
        DataError: if all targets are the same, or float32 cannot tell them apart where they lie.
    """
    targets = np.array([row.label for row in rows], dtype=np.float64)
    if not len(targets):
        return
    far, spread = float(np.abs(targets).max()), float(targets.std())
    if np.ptp(targets) == 0:
        raise DataError(
            f"data.train.label: every target of train is {targets[0]:g}, and there is nothing to "
            "learn",
            "Check data.train.label and the file",
        )
    if not SMALLEST < spread or not far < LARGEST:
        raise DataError(
            f"data.train.label: the targets reach {far:g} with a standard deviation of "
            f"{spread:g}, which float32 cannot hold",
            "Give them in another unit",
        )
    step = float(np.spacing(np.float32(far)))
    if step > COARSE * spread:
        raise DataError(
            f"data.train.label: near {far:g} float32 tells numbers {step:g} apart, and the "
            f"targets' standard deviation is {spread:g}",
            f"Subtract a constant from the targets, for instance {targets.mean():.6g}",
        )
