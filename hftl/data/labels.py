"""Tagging schemes: how the tags of words mark entities (BIO, BIOES, BILOU, IO and their like)."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import expit

from hftl.data.load import Label, Row
from hftl.errors import DataError

SCHEME_MARKERS = {
    "BIO": "BI", "IOE": "IE", "BIOES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BMEWO": "BMEW",
}  # fmt: skip
"""The markers of each scheme, the simplest scheme first."""
SEQEVAL_MARKERS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
"""Each marker as seqeval knows it."""
STANDALONE_MARKERS = frozenset("BISUW")
"""Markers that can be all a corpus has: an end needs a beginning or an inside."""
PREFIX_MARKER = re.compile(r"([BIESLUMW])([-_:.|])(.+)", re.IGNORECASE | re.DOTALL)
SUFFIX_MARKER = re.compile(r"(.+)([-_:.|])([BIESLUMW])", re.IGNORECASE | re.DOTALL)
NUMERIC_TAG = re.compile(r"[+-]?\d+|LABEL_\d+")
"""Tags that are ids; the second form is transformers' for a class without a name."""


@dataclass(frozen=True)
class TagScheme:
    """Say how the tags of a task mark entities.

    `name` is one of `SCHEME_MARKERS`, or IO, where a run of words with one tag is one entity. `outside`
    is the tag of words that belong to no entity, None where there is none. `standard` has each tag
    in the form that seqeval reads, `B-PER` or `O`.
    """

    name: str
    outside: str | None
    standard: Mapping[str, str]

    def standardize(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Return a row's tags in the form that seqeval reads."""
        return tuple(self.standard[tag] for tag in tags)

    @property
    def types(self) -> list[str]:
        """The types of entities, sorted."""
        return sorted({get_entity_type(tag) for tag in self.standard.values()} - {""})


def get_entity_type(tag: str) -> str:
    """Return the entity type of a tag that seqeval reads: `PER` of `B-PER`, `_` of `B`; empty for
    `O`."""
    return "" if tag == "O" else tag[2:] or "_"


def find_outside_tag(names: Sequence[str]) -> str | None:
    """Return the tag of words that belong to no entity: `O`, or where there is none `o`."""
    return next((name for name in ("O", "o") if name in names), None)


@lru_cache(maxsize=64)
def recognize_tag_scheme(names: tuple[str, ...], where: str = "") -> TagScheme:
    """Recognise the scheme of a task's tags.

    Markers are read where every tag but `O` has one, before or after its type, and one scheme has
    them all. Tags without markers are bare names (IO); so are names that only look like marked
    ones, as `B-cell` beside `DNA`.

    Args:
        names: all the tags, as train has them.
        where: what stands before the message of an error.

    Raises:
        DataError: if a tag is an id, or if some tags have markers and others have none.
    """
    _refuse_numeric_tags(names, where)
    tags = [name for name in names if name.upper() != "O"]
    standard = {name: "O" for name in names if name.upper() == "O"}
    for split in (_split_prefix, _split_suffix):
        parts = {tag: part for tag in tags if (part := split(tag)) is not None}
        scheme = _match_scheme(parts)
        if scheme is not None and len(parts) == len(tags):
            marked = {
                tag: f"{SEQEVAL_MARKERS[marker]}-{kind}" for tag, (marker, kind, _) in parts.items()
            }
            return TagScheme(scheme, find_outside_tag(names), standard | marked)
        if _has_marked_type(parts):
            _refuse_mixed_markers(parts, tags, where)
    if {"B", "I"} <= set(tags) <= set(SEQEVAL_MARKERS):
        # One kind of entity, without a name.
        return TagScheme(
            "BIO", find_outside_tag(names), standard | {tag: SEQEVAL_MARKERS[tag] for tag in tags}
        )
    return TagScheme("IO", find_outside_tag(names), standard | {tag: f"I-{tag}" for tag in tags})


TagParts = tuple[str, str, bool]
"""A marker, an entity type, and whether it is written in the usual form, upper case and a dash."""


def _split_prefix(tag: str) -> TagParts | None:
    match = PREFIX_MARKER.fullmatch(tag)
    return match and (match[1].upper(), match[3], match[1].isupper() and match[2] == "-")


def _split_suffix(tag: str) -> TagParts | None:
    match = SUFFIX_MARKER.fullmatch(tag)
    return match and (match[3].upper(), match[1], match[3].isupper() and match[2] == "-")


def _refuse_numeric_tags(names: Sequence[str], where: str) -> None:
    """Raise for tags that are ids: whether one begins an entity, is inside or outside is not said.

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
    """The simplest scheme that has all markers; None where the tags are no scheme's."""
    markers = {marker for marker, _, _ in parts.values()}
    usual = all(form for _, _, form in parts.values())
    if not markers & STANDALONE_MARKERS or not (usual or _has_marked_type(parts)):
        return None
    if markers & set("EL") and not markers & set("BI"):
        return None
    return next((name for name, has in SCHEME_MARKERS.items() if markers <= set(has)), None)


def _has_marked_type(parts: Mapping[str, TagParts]) -> bool:
    """Return whether a type has two markers, the first or inner of an entity among them: no name
    only looks like that."""
    markers = defaultdict(set)
    for marker, kind, _ in parts.values():
        markers[kind].add(marker)
    return any(len(marked) > 1 and marked & set("BI") for marked in markers.values())


def _refuse_mixed_markers(parts: Mapping[str, TagParts], tags: Sequence[str], where: str) -> None:
    """Raise for markers of several schemes, or tags with markers beside tags without.

    Raises:
        DataError: naming a tag of each.
    """
    bare = [tag for tag in tags if tag not in parts]
    if bare:
        what = f"some tags have a marker ({min(parts)}), and others have none ({min(bare)})"
    else:
        markers = sorted({marker for marker, _, _ in parts.values()})
        what = f"the tags have the markers {', '.join(markers)}, which no one scheme has"
    raise DataError(
        f"{where}{what}",
        f"Write all tags in one scheme: {', '.join(SCHEME_MARKERS)}, or names without markers",
    )


# What each task's labels and outputs mean: as targets to learn, and as answers to measure.
#
# A told answer is a `Label`: a class name, a number, a sorted tuple of names, a tuple of tags.


MIN_TARGET_SPREAD, MAX_TARGET_SIZE = 1e-30, 1e30
"""The least spread and the largest size of targets whose weights and squares float32 holds."""
MAX_ROUNDING_SHARE = 0.1
"""The share of the targets' spread that float32's rounding may be: its error is a third of that."""
MULTI_LABEL_THRESHOLD = 0.5
"""A multi-label class is predicted above this probability."""


def get_label_names(label: Label, task: str) -> tuple[str, ...]:
    """The class names that a label speaks of; none for regression."""
    if task == "regression":
        return ()
    return label if isinstance(label, tuple) else (str(label),)


def encode_targets(labels: Sequence[Label], task: str, names: Sequence[str]) -> np.ndarray:
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
            found[row, [ids[name] for name in get_label_names(label, task)]] = 1
        return found
    return np.array(
        [ids[n] for label in labels for n in get_label_names(label, task)], dtype=np.int64
    )


def encode_for_metrics(
    labels: Sequence[Label], task: str, names: Sequence[str], scheme: TagScheme | None = None
) -> np.ndarray:
    """Return what metrics compare.

    That is `encode_targets`; for tokens one entry a row, a tuple of tags in the form that seqeval reads,
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
        return encode_targets(labels, task, names)
    scheme = scheme or recognize_tag_scheme(tuple(names))
    rows = np.empty(len(labels), dtype=object)
    for number, label in enumerate(labels):
        rows[number] = scheme.standardize(get_label_names(label, task))
    return rows


def decode_logits(
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
        return [tuple(n for n, p in zip(names, row, strict=True) if p > MULTI_LABEL_THRESHOLD)
                for row in scores], scores.tolist()  # fmt: skip
    scores = _softmax(wide)
    if task == "classification":
        return [names[i] for i in scores.argmax(1)], scores.tolist()
    outside = names.index(find_outside_tag(names) or names[0])
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
    if not MIN_TARGET_SPREAD < spread or not far < MAX_TARGET_SIZE:
        raise DataError(
            f"data.train.label: the targets reach {far:g} with a standard deviation of "
            f"{spread:g}, which float32 cannot hold",
            "Give them in another unit",
        )
    step = float(np.spacing(np.float32(far)))
    if step > MAX_ROUNDING_SHARE * spread:
        raise DataError(
            f"data.train.label: near {far:g} float32 tells numbers {step:g} apart, and the "
            f"targets' standard deviation is {spread:g}",
            f"Subtract a constant from the targets, for instance {targets.mean():.6g}",
        )
