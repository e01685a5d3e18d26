"""What one row's cells must hold for each task, and what they mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hftl.data.spelling import normalise_name

ON = (1, True, 1.0, "1")
OFF = (0, False, 0.0, "0")


def text_fault(column: str, value: Any, task: str) -> str | None:
    """What makes a cell no text (for token-classification no list of words), if anything."""
    if task == "token-classification":
        return _words_fault(column, value)
    if not isinstance(value, str):
        return f"{column} is {'empty' if value is None else type(value).__name__}, not text"
    return None if value.strip() else f"{column} is empty"


def label_fault(
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
            (why for column in label if (why := _switch_fault(column, values[column]))), None
        )
    value = values[label]
    if task == "regression":
        return _target_fault(value)
    if task == "classification":
        return _class_fault(value)
    if not isinstance(value, (list, tuple)):
        what = "empty" if value is None else f"a {type(value).__name__}"
        return f"the label is {what}, not a list"
    bad = next((why for item in value if (why := _class_fault(item))), None)
    if bad is None and words is not None and len(value) != len(words):
        return f"{len(value)} labels for {len(words)} words"
    return bad


def label_of(
    values: Mapping[str, Any], label: str | list[str], task: str
) -> str | float | tuple[str, ...]:
    """A sound row's label: a class name, a number, the names that hold, or a tag for each word."""
    if isinstance(label, list):
        return tuple(sorted(column for column in label if _bare(values[column]) in ON))
    value = values[label]
    if task == "regression":
        return float(value)
    if task == "multi-label":
        return tuple(sorted({normalise_name(item) for item in value}))
    if task == "token-classification":
        return tuple(normalise_name(item) for item in value)
    return normalise_name(value)


def kind(value: Any) -> str:
    """true/false, number or text."""
    if isinstance(value, bool):
        return "true/false"
    return "number" if isinstance(value, (int, float)) else "text"


def _words_fault(column: str, value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        what = "empty" if value is None else f"a {type(value).__name__}"
        return f"{column} is {what}, not a list of words"
    if not value:
        return f"{column} is an empty list"
    bad = [word for word in value if not (isinstance(word, str) and word.strip())]
    return f"{column} holds {bad[0]!r}, which is no word" if bad else None


def _class_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not normalise_name(value)):
        return "the label is empty"
    if isinstance(value, float) and math.isnan(value):
        return "the label is missing (nan)"
    if isinstance(value, float) and not value.is_integer():
        return f"the label {value} is no class; numbers are of the task regression"
    if not isinstance(value, (str, int, float)):
        return f"the label is a {type(value).__name__}"
    return None


def _switch_fault(column: str, value: Any) -> str | None:
    return None if _bare(value) in (*ON, *OFF) else f"{column} is {value!r}, not 0 or 1"


def _bare(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _target_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "the target is empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"the target {value!r} is not a number"
    return None if math.isfinite(number) else f"the target is {number}"
