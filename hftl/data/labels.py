"""Encode labels as targets, decode logits into labels, and read tagging schemes of entities.

A predicted or stored answer is a `Label`: a class name, a target, the sorted names that hold, or a
tuple of tags. Tags may follow any scheme (BIO, BIOES, BILOU, IO and the like).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from hftl.data.facts import TagScheme
from hftl.data.rows import Label, Row
from hftl.errors import DataError, RecipeError, suggest_closest

SCHEME_MARKERS = {
    "BIO": "BI", "IOE": "IE", "BIOES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BMEWO": "BMEW",
}  # fmt: skip
"""The markers of each scheme, the simplest scheme first."""
SEQEVAL_MARKERS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
"""Each marker in the form that seqeval reads."""
STANDALONE_MARKERS = frozenset("BISUW")
"""Markers that may occur without others: an end needs a beginning or an inside."""
PREFIX_MARKER = re.compile(r"([BIESLUMW])([-_:.|])(.+)", re.IGNORECASE | re.DOTALL)
SUFFIX_MARKER = re.compile(r"(.+)([-_:.|])([BIESLUMW])", re.IGNORECASE | re.DOTALL)
NUMERIC_TAG = re.compile(r"[+-]?\d+|LABEL_\d+")
"""Tags that are ids; the second form is transformers' for a class without a name."""
MIN_TARGET_SPREAD, MAX_TARGET_SIZE = 1e-30, 1e30
"""The least spread and the largest size of targets whose weights and squares float32 holds."""
MAX_ROUNDING_SHARE = 0.1
"""The share of the targets' spread that float32's rounding may be: its error is a third of that."""
MULTI_LABEL_THRESHOLD = 0.5
"""A multi-label class is predicted above this probability."""

TagParts = tuple[str, str, bool]
"""A marker, an entity type, and whether it is written in the usual form, upper case and a dash."""


def find_outside_tag(names: Sequence[str]) -> str | None:
    """Return the tag of words that belong to no entity: `O`, or where there is none `o`."""
    return next((name for name in ("O", "o") if name in names), None)


@lru_cache(maxsize=64)
def recognize_tag_scheme(names: tuple[str, ...], where: str = "") -> TagScheme:
    """Recognize the scheme of a task's tags.

    Markers are read where every tag but `O` has one, before or after its type, and one scheme has
    them all. Tags without markers are bare names (IO), and so are names that only look marked, such
    as `B-cell` beside `DNA`.

    Args:
        names: all the tags, as train has them.
        where: prefix of an error's message.

    Raises:
        DataError: if a tag is an id, or if some tags have markers and others have none.
    """
    _refuse_numeric_tags(names, where)
    tags = [name for name in names if name.upper() != "O"]
    standard = {name: "O" for name in names if name.upper() == "O"}
    outside = find_outside_tag(names)
    for split in (_split_prefix, _split_suffix):
        parts = {tag: part for tag in tags if (part := split(tag)) is not None}
        scheme = _match_scheme(parts)
        if scheme is not None and len(parts) == len(tags):
            marked = {
                tag: f"{SEQEVAL_MARKERS[marker]}-{kind}" for tag, (marker, kind, _) in parts.items()
            }
            return TagScheme(name=scheme, outside=outside, standard=standard | marked)
        if _has_marked_type(parts):
            _refuse_mixed_markers(parts, tags, where)
    if {"B", "I"} <= set(tags) <= set(SEQEVAL_MARKERS):
        # One type of entity, without a name.
        forms = {tag: SEQEVAL_MARKERS[tag] for tag in tags}
        return TagScheme(name="BIO", outside=outside, standard=standard | forms)
    forms = {tag: f"I-{tag}" for tag in tags}
    return TagScheme(name="IO", outside=outside, standard=standard | forms)


def _split_prefix(tag: str) -> TagParts | None:
    match = PREFIX_MARKER.fullmatch(tag)
    return match and (match[1].upper(), match[3], match[1].isupper() and match[2] == "-")


def _split_suffix(tag: str) -> TagParts | None:
    match = SUFFIX_MARKER.fullmatch(tag)
    return match and (match[3].upper(), match[1], match[3].isupper() and match[2] == "-")


def _refuse_numeric_tags(names: Sequence[str], where: str) -> None:
    """Refuse tags that are ids: they do not say what begins an entity, is inside or outside.

    Raises:
        DataError: naming them.
    """
    ids = [name for name in names if NUMERIC_TAG.fullmatch(name)]
    if ids:
        more = ", ..." if len(ids) > 3 else ""
        raise DataError(
            f"{where}tags are ids ({', '.join(ids[:3])}{more}), and nothing says which entity each "
            "stands for",
            "Write the tags' names in their place, for instance B-PER, I-PER and O",
        )


def _match_scheme(parts: Mapping[str, TagParts]) -> str | None:
    """Return the simplest scheme that has all markers; None where no scheme has them."""
    markers = {marker for marker, _, _ in parts.values()}
    is_usual = all(form for _, _, form in parts.values())
    if not markers & STANDALONE_MARKERS or not (is_usual or _has_marked_type(parts)):
        return None
    if markers & set("EL") and not markers & set("BI"):
        return None
    return next((n for n, letters in SCHEME_MARKERS.items() if markers <= set(letters)), None)


def _has_marked_type(parts: Mapping[str, TagParts]) -> bool:
    """Return whether a type has two markers, one of them B or I: ordinary names never look so."""
    markers = defaultdict(set)
    for marker, kind, _ in parts.values():
        markers[kind].add(marker)
    return any(len(marked) > 1 and marked & set("BI") for marked in markers.values())


def _refuse_mixed_markers(parts: Mapping[str, TagParts], tags: Sequence[str], where: str) -> None:
    """Refuse markers of several schemes, or tags with markers beside tags without.

    Raises:
        DataError: naming a tag of each.
    """
    bare = [tag for tag in tags if tag not in parts]
    if bare:
        fault = f"some tags have a marker ({min(parts)}), and others have none ({min(bare)})"
    else:
        markers = sorted({marker for marker, _, _ in parts.values()})
        fault = f"the tags have the markers {', '.join(markers)}, which no one scheme has"
    raise DataError(
        f"{where}{fault}",
        f"Write all tags in one scheme: {', '.join(SCHEME_MARKERS)}, or names without markers",
    )


def check_label_keys(given: Iterable[str], names: Sequence[str], key: str) -> None:
    """Refuse words for a label that no row has.

    Args:
        given: the labels that words are given for.
        names: the task's classes.
        key: of the recipe, for the message.

    Raises:
        RecipeError: naming the first such label.
    """
    for label in given:
        if label not in names:
            raise RecipeError(
                f"{key}: no row has the label {label!r}" + suggest_closest(label, list(names)),
                f"The labels are {', '.join(names)}",
            )


def get_label_names(label: Label, task: str) -> tuple[str, ...]:
    """Return the class names that a label contains; none for regression."""
    if task == "regression":
        return ()
    return label if isinstance(label, tuple) else (str(label),)


def encode_targets(labels: Sequence[Label], task: str, names: Sequence[str]) -> np.ndarray:
    """Return the training targets of labels.

    Returns:
        classification: (rows,) int64 class ids; regression: (rows,) float64; multi-label:
        (rows, classes) float64 of 0 and 1; token-classification: (words,) int64, row after row.
    """
    ids = {name: i for i, name in enumerate(names)}
    if task == "regression":
        return np.array(labels, dtype=np.float64)
    if task == "multi-label":
        targets = np.zeros((len(labels), len(names)))
        for row, label in enumerate(labels):
            targets[row, [ids[name] for name in get_label_names(label, task)]] = 1
        return targets
    class_ids = [ids[name] for label in labels for name in get_label_names(label, task)]
    return np.array(class_ids, dtype=np.int64)


def encode_for_metrics(
    labels: Sequence[Label], task: str, names: Sequence[str], scheme: TagScheme | None = None
) -> np.ndarray:
    """Return labels or predictions in the form that metrics compare.

    That is `encode_targets`; for tokens one entry a row, a tuple of tags in the form that seqeval
    reads, whatever scheme they are written in.

    Args:
        labels: those of the rows, or predictions.
        task: the recipe's.
        names: the classes in the order of their ids.
        scheme: of the tags; None to recognize it from the names.

    Raises:
        DataError: if the tags are of no scheme.
    """
    if task != "token-classification":
        return encode_targets(labels, task, names)
    scheme = scheme or recognize_tag_scheme(tuple(names))
    rows = np.empty(len(labels), dtype=object)
    for number, label in enumerate(labels):
        rows[number] = scheme.standardize(get_label_names(label, task))
    return rows


def decode_logits(
    logits: np.ndarray, task: str, names: list[str], words: Sequence[int],
    thresholds: np.ndarray | None = None,
) -> tuple[list[Label], list[Any]]:  # fmt: skip
    """Return the predicted labels of logits, and their scores.

    Args:
        logits: (rows, outputs), for tokens (words, outputs), row after row; a word that was cut
            off has NaN throughout and is predicted to be outside.
        task: the recipe's.
        names: the classes in the order of their ids.
        words: how many words each row has, for tokens.
        thresholds: (classes,) above which a multi-label class is predicted; None: .5.

    Returns:
        A label a row; and its scores: probabilities by class, a target's value, or for tokens the
        probabilities of each word, None for one that was cut off.
    """
    logits = logits.astype(np.float64)
    if task == "regression":
        return logits[:, 0].tolist(), logits.tolist()
    if task == "multi-label":
        scores = expit(logits)
        labels: list[Label] = [
            tuple(name for name, holds in zip(names, row, strict=True) if holds)
            for row in scores > (MULTI_LABEL_THRESHOLD if thresholds is None else thresholds)
        ]
        return labels, scores.tolist()
    scores = softmax(logits, axis=1)
    if task == "classification":
        return [names[i] for i in scores.argmax(1)], scores.tolist()
    return _decode_words(scores, names, words)


def _decode_words(
    scores: np.ndarray, names: list[str], words: Sequence[int]
) -> tuple[list[Label], list[Any]]:
    """Return a tuple of tags a row and the scores of each word, for scores (words, outputs)."""
    outside = names.index(find_outside_tag(names) or names[0])
    is_cut = np.isnan(scores[:, 0])
    best = np.where(is_cut, outside, np.nan_to_num(scores).argmax(1))
    by_word = [None if cut else word for cut, word in zip(is_cut, scores.tolist(), strict=True)]
    ends = np.cumsum(words)
    labels: list[Label] = [tuple(names[i] for i in row) for row in np.split(best, ends[:-1])]
    return labels, [by_word[end - count : end] for end, count in zip(ends, words, strict=True)]


def check_targets(rows: Sequence[Row]) -> None:
    """Refuse regression targets that cannot be learned, at all or in float32.

    Args:
        rows: the training rows.

    Raises:
        DataError: if all targets are the same, or float32 cannot distinguish them.
    """
    targets = np.array([row.label for row in rows], dtype=np.float64)
    if not len(targets):
        return
    largest, spread = float(np.abs(targets).max()), float(targets.std())
    if np.ptp(targets) == 0:
        raise DataError(
            f"data.train.label: every target of train is {targets[0]:g}, and there is nothing to "
            "learn",
            "Check data.train.label and the file",
        )
    if not MIN_TARGET_SPREAD < spread or not largest < MAX_TARGET_SIZE:
        raise DataError(
            f"data.train.label: the targets reach {largest:g} with a standard deviation of "
            f"{spread:g}, which float32 cannot hold",
            "Give them in another unit",
        )
    step = float(np.spacing(np.float32(largest)))
    if step > MAX_ROUNDING_SHARE * spread:
        raise DataError(
            f"data.train.label: near {largest:g} float32 tells numbers {step:g} apart, and the "
            f"targets' standard deviation is {spread:g}",
            f"Subtract a constant from the targets, for instance {targets.mean():.6g}",
        )
