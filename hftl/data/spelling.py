"""Compare texts and class names whatever their form, case, white space and invisible marks."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
"""Soft hyphen, zero-width space and joiners, direction marks, word joiner, byte order mark."""
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""An integer as it is usually written; `str.isdigit` also accepts names that int refuses."""
WHOLE = re.compile(r"(-?[0-9]{1,18})\.0+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
MISSING = {"nan", "null", "none", "na", "n/a", "#n/a", "<na>", "nil", "missing", "?", "-"}
"""What tables write where there is no value."""


def normalise_text(text: str) -> str:
    """Return a text's key for finding copies: NFC, case folded, white space single, no marks."""
    visible = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    # Folding may part letters again that NFC had joined.
    return unicodedata.normalize("NFC", " ".join(visible.casefold().split()))


def normalise_content(content: Iterable[str]) -> tuple[str, ...]:
    """Return the key of a row's texts or words; a text of marks alone is its own key."""
    return tuple(normalise_text(text) or text for text in content)


def normalise_name(value: object) -> str:
    """Return a label as a class name: `1`, `1.0` and `'1.0'` are one class, as are NFC and NFD."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    visible = INVISIBLE.sub("", unicodedata.normalize("NFC", str(value)))
    name = " ".join(visible.split())
    whole = WHOLE.fullmatch(name)
    return str(int(whole[1])) if whole else name


def is_integer_name(name: str) -> bool:
    """Return whether a class name is an integer as it is usually written."""
    return INTEGER.fullmatch(name) is not None


def find_fraction(names: Iterable[str]) -> str | None:
    """Return the first name that is no whole number where all names are numbers, else None."""
    distinct = sorted(set(names))
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
    for name in sorted(counts):
        spellings[name.casefold()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            written = " and ".join(map(repr, names))
            warnings.append(f"the classes {written} differ only in case; write them as one")
    missing = [name for name in sorted(counts) if name.casefold() in MISSING]
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
