"""Compare texts and class names whatever their form, case, white space and invisible marks."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

JOINERS = "\u200c\u200d"
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""Soft hyphen, zero-width space, marks and isolates of direction, word joiner, byte order mark."""
UNSEEN_IN_WORDS = re.compile(f"[{JOINERS}\ufe00-\ufe0f]")
"""Joiners and variants of a character, which Persian, Hindi and emoji are written with."""
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""An integer as it is usually written; `str.isdigit` also accepts names that int refuses."""
INTEGRAL_FLOAT = re.compile(r"(-?[0-9]{1,18})\.0+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
MISSING_VALUES = {"nan", "null", "none", "na", "n/a", "#n/a", "<na>", "nil", "missing", "?", "-"}
"""What tables write where there is no value."""


def normalize_text(text: str) -> str:
    """Return a text's key for finding copies: NFC, case folded, white space single, no marks."""
    visible = UNSEEN_IN_WORDS.sub("", INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    # Folding may part letters again that NFC had joined.
    return unicodedata.normalize("NFC", " ".join(visible.casefold().split()))


def normalize_content(content: Iterable[str]) -> tuple[str, ...]:
    """Return the key of a row's texts or words; a text of marks alone is its own key."""
    return tuple(normalize_text(text) or text for text in content)


def normalize_name(value: object) -> str:
    """Return a label as a class name: `1`, `1.0` and `'1.0'` are one class, as are NFC and NFD.

    Joiners inside a name stay, since the name is published and means another without them.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    visible = INVISIBLE.sub("", unicodedata.normalize("NFC", str(value)))
    name = " ".join(visible.split()).strip(f"{JOINERS} ")
    whole = INTEGRAL_FLOAT.fullmatch(name)
    return str(int(whole[1])) if whole else name


def is_integer_name(name: str) -> bool:
    """Return whether a class name is an integer as it is usually written."""
    return INTEGER.fullmatch(name) is not None


def find_fraction(names: Iterable[str]) -> str | None:
    """Return the first name that is no whole number where all names are numbers, else None.

    Names that read like a missing value say nothing about the others.
    """
    distinct = sorted(name for name in set(names) if name.casefold() not in MISSING_VALUES)
    if not all(map(NUMBER.fullmatch, distinct)):
        return None
    written = [name for name in distinct if not name.lstrip("+-").isdigit()]
    return next((name for name in written if not float(name).is_integer()), None)


def find_doubtful_names(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for what looks wrong about the class names, with what to do.

    Args:
        counts: labels of each class.
    """
    warnings = []
    spellings: dict[str, list[str]] = defaultdict(list)
    numbers: dict[float, list[str]] = defaultdict(list)
    for name in sorted(counts):
        spellings[normalize_text(name)].append(name)
        # A float tells integers of at most 15 digits apart.
        if NUMBER.fullmatch(name) and len(name) <= 15:
            numbers[float(name)].append(name)
    for alike, how in (
        (spellings, "differ only in case or in characters that cannot be seen"),
        (numbers, "are the same number"),
    ):
        for names in alike.values():
            if len(names) > 1:
                written = " and ".join(map(_show_name, names))
                warnings.append(f"the classes {written} {how}; write them as one")
    missing = [name for name in sorted(counts) if name.casefold() in MISSING_VALUES]
    if missing:
        warnings.append(
            f"the class {missing[0]!r} ({counts[missing[0]]} labels) reads like a missing value; "
            "leave such rows out, or give the class a name"
        )
    lone = [name for name in sorted(counts) if counts[name] == 1]
    if lone:
        which = ", ".join(map(repr, lone[:5])) + (", ..." if len(lone) > 5 else "")
        warnings.append(
            f"{len(lone)} of {len(counts)} classes have one row only, which nothing can measure: "
            f"{which}; give more examples, or merge them"
        )
    return warnings


def _show_name(name: str) -> str:
    """Return a name in quotes, the characters in it that cannot be seen spelt out."""
    return UNSEEN_IN_WORDS.sub(lambda match: f"\\u{ord(match[0]):04x}", repr(name))


# What one row's cells must hold for each task, and what they mean.


TRUE_VALUES = (1, True, 1.0, "1")
FALSE_VALUES = (0, False, 0.0, "0")


def find_text_fault(column: str, value: Any, task: str) -> str | None:
    """What makes a cell no text (for token-classification no list of words), if anything."""
    if task == "token-classification":
        return _find_words_fault(column, value)
    if not isinstance(value, str):
        return f"{column} is {'empty' if value is None else type(value).__name__}, not text"
    return None if value.strip() else f"{column} is empty"


def find_label_fault(
    values: Mapping[str, Any], label: str | list[str], task: str, words: Sequence[str] | None = None
) -> str | None:
    """What makes a row's label unusable, if anything.

    Args:
        values: the row's cells by column.
        label: the label's column, or several of 0 and 1.
        task: the recipe's.
        words: the row's words, for token-classification.
    """
    if isinstance(label, list):
        return next(
            (why for column in label if (why := _find_binary_fault(column, values[column]))), None
        )
    value = values[label]
    if task == "regression":
        return _find_target_fault(value)
    if task == "classification":
        return _find_class_fault(value)
    if not isinstance(value, (list, tuple)):
        what = "empty" if value is None else f"a {type(value).__name__}"
        return f"the label is {what}, not a list"
    bad = next((why for item in value if (why := _find_class_fault(item))), None)
    if bad is None and words is not None and len(value) != len(words):
        return f"{len(value)} labels for {len(words)} words"
    return bad


def parse_label(
    values: Mapping[str, Any], label: str | list[str], task: str
) -> str | float | tuple[str, ...]:
    """A sound row's label: a class name, a number, the names that hold, or a tag for each word."""
    if isinstance(label, list):
        return tuple(
            sorted(column for column in label if _strip_text(values[column]) in TRUE_VALUES)
        )
    value = values[label]
    if task == "regression":
        return float(value)
    if task == "multi-label":
        return tuple(sorted({normalize_name(item) for item in value}))
    if task == "token-classification":
        return tuple(normalize_name(item) for item in value)
    return normalize_name(value)


def get_value_type(value: Any) -> str:
    """true/false, number or text."""
    if isinstance(value, bool):
        return "true/false"
    return "number" if isinstance(value, (int, float)) else "text"


def _find_words_fault(column: str, value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        what = "empty" if value is None else f"a {type(value).__name__}"
        return f"{column} is {what}, not a list of words"
    if not value:
        return f"{column} is an empty list"
    bad = [word for word in value if not (isinstance(word, str) and word.strip())]
    return f"{column} holds {bad[0]!r}, which is no word" if bad else None


def _find_class_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not normalize_name(value)):
        return "the label is empty"
    if isinstance(value, float) and math.isnan(value):
        return "the label is missing (nan)"
    if isinstance(value, float) and not value.is_integer():
        return f"the label {value} is no class; numbers are of the task regression"
    if not isinstance(value, (str, int, float)):
        return f"the label is a {type(value).__name__}"
    return None


def _find_binary_fault(column: str, value: Any) -> str | None:
    return (
        None
        if _strip_text(value) in (*TRUE_VALUES, *FALSE_VALUES)
        else f"{column} is {value!r}, not 0 or 1"
    )


def _strip_text(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _find_target_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "the target is empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"the target {value!r} is not a number"
    return None if math.isfinite(number) else f"the target is {number}"
