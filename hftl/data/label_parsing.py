"""Check and parse the label of a table's row: a class, a target, several labels, a tag a word."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hftl.data.normalization import DECIMAL_COMMA, find_fraction, normalize_name
from hftl.data.rows import Label
from hftl.errors import DataError

TRUE_VALUES = (1, True, 1.0, "1")
FALSE_VALUES = (0, False, 0.0, "0")


def find_label_fault(
    values: Mapping[str, Any], label: str | list[str], task: str, words: Sequence[str] | None = None
) -> str | None:
    """Return why a row's label cannot be used, if so.

    Args:
        values: the row's cells by column.
        label: the label's column, or several columns of 0 and 1.
        task: the recipe's.
        words: the row's words, for token-classification.
    """
    if isinstance(label, list):
        return next(filter(None, (_find_binary_fault(c, values[c]) for c in label)), None)
    value = values[label]
    if task == "regression":
        return _find_target_fault(value)
    if task == "classification":
        return _find_class_fault(value)
    if not isinstance(value, (list, tuple)):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        return f"the label is {kind}, not a list"
    fault = next(filter(None, map(_find_class_fault, value)), None)
    if fault is None and words is not None and len(value) != len(words):
        return f"{len(value)} labels for {len(words)} words"
    return fault


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
    is_binary = _strip_text(value) in (*TRUE_VALUES, *FALSE_VALUES)
    return None if is_binary else f"{column} is {value!r}, not 0 or 1"


def _find_target_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "the target is empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        text = str(value).strip()
        hint = "; decimals follow a point, as in " + text.replace(",", ".")
        comma = hint if DECIMAL_COMMA.fullmatch(text) else ""
        return f"the target {value!r} is not a number{comma}"
    except OverflowError:
        return "the target is too large"
    return None if math.isfinite(number) else f"the target is {number}"


def parse_label(values: Mapping[str, Any], label: str | list[str], task: str) -> Label:
    """Return a sound row's label: a class name, a target, the names that hold, or a tag a word."""
    if isinstance(label, list):
        return tuple(sorted(c for c in label if _strip_text(values[c]) in TRUE_VALUES))
    value = values[label]
    if task == "regression":
        return float(value)
    if task == "multi-label":
        return tuple(sorted({normalize_name(item) for item in value}))
    if task == "token-classification":
        return tuple(normalize_name(item) for item in value)
    return normalize_name(value)


def get_value_type(value: Any) -> str:
    """Return true/false, number or text."""
    if isinstance(value, bool):
        return "true/false"
    return "number" if isinstance(value, (int, float)) else "text"


def _strip_text(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def refuse_mixed_labels(name: str, types: Mapping[str, str]) -> None:
    """Refuse labels of several types in one column.

    Args:
        name: of the table.
        types: the first row of each type, see `get_value_type`.

    Raises:
        DataError: naming these rows.
    """
    if len(types) > 1:
        places = " and ".join(f"{kind} ({where})" for kind, where in sorted(types.items()))
        raise DataError(f"{name}: labels of mixed types: {places}", "Write them all as one type")


def refuse_fractions(name: str, places: Mapping[str, str]) -> None:
    """Refuse numbers with fractions as classes, whatever type the table has them in.

    Args:
        name: of the table.
        places: the first row of each class.

    Raises:
        DataError: naming the first such row.
    """
    fraction = find_fraction(places)
    if fraction is not None:
        raise DataError(
            f"{places[fraction]}: {name} has numbers with fractions for classes, such as "
            f"{fraction}",
            "For a target set data.task=regression; for classes write them as words",
        )


def list_classes(label: Label) -> tuple[str, ...]:
    """Return the names that a label holds."""
    return label if isinstance(label, tuple) else (str(label),)
