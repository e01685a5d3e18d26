"""Normalize texts and class names: form, case, white space and invisible marks do not count."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from hftl.plurals import count_noun

JOINERS = "\u200c\u200d"
"""Invisible, and needed to write Persian and the languages of India."""
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""Soft hyphen, zero-width space, marks and isolates of direction, word joiner, byte order mark."""
UNSEEN_IN_WORDS = re.compile(f"[{JOINERS}\ufe00-\ufe0f]")
"""Joiners and variation selectors, with which Persian, Hindi and emoji are written."""
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""An integer as it is usually written; `str.isdigit` also accepts names that int refuses."""
INTEGRAL_FLOAT = re.compile(r"(-?[0-9]{1,18})\.0+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
"""A number as it is written in much of Europe, with one comma."""
MISSING_VALUES = {"nan", "null", "none", "na", "n/a", "#n/a", "<na>", "nil", "missing", "?", "-"}
"""What tables write where there is no value."""
MAX_STRAY_ROWS = 5
"""Rows of a class with such a name that are taken for forgotten ones; more may be meant."""


def normalize_text(text: str) -> str:
    """Return a text's key for finding copies: NFC, case folded, single spaces, no marks."""
    visible = UNSEEN_IN_WORDS.sub("", INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    # Case folding may separate letters again that NFC had joined.
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
    integral = INTEGRAL_FLOAT.fullmatch(name)
    return str(int(integral[1])) if integral else name


def is_integer_name(name: str) -> bool:
    """Return whether a class name is an integer as it is usually written."""
    return INTEGER.fullmatch(name) is not None


def find_fraction(names: Iterable[str]) -> str | None:
    """Return the first name that is not an integer if all names are numbers, else None.

    Names that read like a missing value say nothing about the others.
    """
    distinct = sorted(name for name in set(names) if not is_missing_value(name))
    if not all(map(NUMBER.fullmatch, distinct)):
        return None
    candidates = [name for name in distinct if not name.lstrip("+-").isdigit()]
    return next((name for name in candidates if not float(name).is_integer()), None)


def is_missing_value(name: str) -> bool:
    """Return whether a class name reads like what tables write where there is no value."""
    return name.casefold() in MISSING_VALUES


def is_stray_value(name: str, count: int) -> bool:
    """Return whether a class of so many rows is hardly one: its name reads like a missing value."""
    return is_missing_value(name) and count <= MAX_STRAY_ROWS


def find_doubtful_names(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each thing that looks wrong about the class names, with what to do.

    Args:
        counts: number of labels of each class.
    """
    names = sorted(counts)
    warnings = _find_similar_names(names)
    missing = list(filter(is_missing_value, names))
    numbers = list(filter(NUMBER.fullmatch, names))
    words = [name for name in names if name not in {*missing, *numbers}]
    if numbers and words:
        warnings.append(
            f"some classes are numbers, such as {numbers[0]!r}, and some are words, such as "
            f"{words[0]!r}; if they mean the same, write them alike"
        )
    if missing:
        warnings.append(
            f"the class {missing[0]!r} ({count_noun(counts[missing[0]], 'label')}) reads like a "
            "missing value; leave such rows out, or give the class a name"
        )
    lone = [name for name in names if counts[name] == 1 and not is_stray_value(name, 1)]
    if lone:
        listed = ", ".join(map(repr, lone[:5])) + (", ..." if len(lone) > 5 else "")
        warnings.append(
            f"{len(lone)} of {len(counts)} classes have one row only, which nothing can measure: "
            f"{listed}; give more examples, or merge them"
        )
    return warnings


def _find_similar_names(names: Iterable[str]) -> list[str]:
    """Return a sentence for each set of names that a reader takes for one."""
    spellings: dict[str, list[str]] = defaultdict(list)
    numbers: dict[float, list[str]] = defaultdict(list)
    for name in names:
        spellings[normalize_text(name)].append(name)
        # A float distinguishes integers of at most 15 digits.
        if NUMBER.fullmatch(name) and len(name) <= 15:
            numbers[float(name)].append(name)
    similar = [
        (group, "differ only in case or in characters that cannot be seen")
        for group in spellings.values()
    ] + [(group, "are the same number") for group in numbers.values()]
    return [
        f"the classes {' and '.join(map(_quote_name, group))} {how}; write them as one"
        for group, how in similar
        if len(group) > 1
    ]


def _quote_name(name: str) -> str:
    """Return a name in quotes, with the characters in it that cannot be seen escaped."""
    return UNSEEN_IN_WORDS.sub(lambda match: f"\\u{ord(match[0]):04x}", repr(name))
