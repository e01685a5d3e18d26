"""Load the rows of a table: check every cell, name every bad row by file and line."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hftl.config.data import Data, Table
from hftl.data.encodings import BAD_BYTE
from hftl.data.images import inspect_images, warn_of_narrow_images
from hftl.data.normalization import DECIMAL_COMMA, find_fraction, normalize_name
from hftl.data.rows import (
    BadRows,
    ImageInfo,
    InputSpec,
    Label,
    Levels,
    RawRow,
    Row,
    find_encoding_fault,
    find_reading_fault,
    list_words,
)
from hftl.data.tables import get_table_folder, read_table
from hftl.errors import DataError, join_names, suggest_closest
from hftl.runtime import paths

TRUE_VALUES = (1, True, 1.0, "1")
FALSE_VALUES = (0, False, 0.0, "0")
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters but for tab, line feed, form feed and carriage return; and the replacement
for bytes that could not be decoded."""
MAX_CONTROL_SHARE = 0.1
"""A larger share of such characters is not text."""


def load_rows(data: Data, part: str, bad: BadRows, spec: InputSpec) -> list[Row]:
    """Return the rows of a labelled table.

    Args:
        data: the recipe's section.
        part: train, validation or test, which is a table and not a fraction.
        bad: what to do with rows that cannot be used.
        spec: what the encoder reads.

    Raises:
        DataError: if the file or a column is missing, a row cannot be used and is not to be
            skipped, no row is left, or labels are of mixed types.
    """
    table, task = getattr(data, part), str(data.task)
    name, raws = read_table(table, part, spec.modality)
    contents = table.text_columns if spec.modality == "text" else [table.image]
    if spec.modality == "image" and data.reads_text_beside:
        contents = [table.image, *table.text_columns]
    columns = [*contents, *table.label_columns, *([data.group] if data.group else [])]
    rows: list[Row] = []
    types: dict[str, str] = {}
    before = len(bad.dropped)
    for raw, image in inspect_rows(check_columns(name, raws, columns, part), data, part, spec):
        fault = image if isinstance(image, str) else find_row_fault(raw, table, data, spec)
        if fault:
            bad.note(raw.where, fault)
            continue
        if task == "classification":
            types.setdefault(get_value_type(raw.values[str(table.label)]), raw.where)
        rows.append(_build_row(raw, image if isinstance(image, ImageInfo) else None, data, part))
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    bad.refuse(path)
    refuse_mixed_labels(name, types)
    if not rows:
        raise _build_empty_error(name, bad, before, path)
    if task in ("classification", "multi-label"):
        refuse_fractions(
            name, {c: row.where for row in reversed(rows) for c in list_classes(row.label)}
        )
    return rows


def _build_empty_error(name: str, bad: BadRows, before: int, path: Path | None) -> DataError:
    """Return the error of a table without a sound row, naming the first of those dropped here."""
    if len(bad.dropped) == before:
        return DataError(f"{name} has no rows", "Check the file")
    first = bad.dropped[before]
    fix = bad.choose_fix(path) if BAD_BYTE in first.why else "Check the file"
    return DataError(f"{name} has no usable rows; {first.where}: {first.why}", fix)


def _build_row(raw: RawRow, image: ImageInfo | None, data: Data, part: str) -> Row:
    table: Table = getattr(data, part)
    label = parse_label(raw.values, table.label, str(data.task))
    group = str(raw.values[data.group]) if data.group else None
    if image is not None:
        beside = table.text_columns if data.reads_text_beside else []
        content = (image.content, *(str(raw.values[column]) for column in beside))
        return Row(
            content, label, group, raw.index, raw.where, part, image.size,
            image.perceptual_hash, image.thumbnail, image.levels,
        )  # fmt: skip
    if data.task == "token-classification":
        content = tuple(list_words(raw.values[table.text_columns[0]]))
    else:
        content = tuple(str(raw.values[column]) for column in table.text_columns)
    return Row(content, label, group, raw.index, raw.where, part)


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


def load_images(
    data: Data, part: str, bad: BadRows, spec: InputSpec, most: int | None = None
) -> list[Row]:
    """Return the images of a table without labels: `unlabeled`, `general`, or train without a task.

    Args:
        data: the recipe's section.
        part: the recipe's name of the table.
        bad: what to do with rows that cannot be used.
        spec: what the encoder reads.
        most: the first rows that are read; None: all.

    Raises:
        DataError: if the file or the column is missing, or no image is left.
    """
    table = getattr(data, part)
    name, raws = read_table(table, part, spec.modality)
    folder = get_table_folder(table, part)
    rows: list[Row] = []
    levels: list[Levels] = []
    raws = islice(raws, most)
    for raw, image in inspect_images(raws, table.image, folder, data.max_pixels, spec.patch_size):
        if isinstance(image, ImageInfo):
            rows.append(Row((image.content,), "", None, raw.index, raw.where, part, image.size))
            levels.append(image.levels)
        else:
            bad.note(raw.where, image)
    bad.refuse(paths.resolve_local_path(table.path, f"data.{part}.path"))
    if not rows:
        kind = "usable pictures" if bad.count else "pictures"
        raise DataError(f"data.{part}: {name} has no {kind}", "Check the folder or table")
    warn_of_narrow_images(levels, f"data.{part}")
    return rows


def read_documents(data: Data, part: str, bad: BadRows) -> Iterator[str]:
    """Stream the texts of one table; labels are not read.

    Two text columns give two documents a row, a list of words is joined by spaces, and a folder
    given for `unlabeled` or `general` holds one document a file, at any depth.

    Args:
        data: the recipe's section.
        part: `unlabeled`, `general` or `train`, which is a table.
        bad: what to do with a row that is empty, not text, or binary.

    Raises:
        DataError: if the file or a column is missing, or no document is left.
    """
    table: Table = getattr(data, part)
    name, raws = read_table(table, part, "text")
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    has_documents, bad_before = False, bad.count
    for raw in check_columns(name, raws, table.text_columns, part):
        # Blank lines separate the texts of a file, and are not documents.
        if raw.fault is None and all(raw.values[column] == "" for column in table.text_columns):
            continue
        faults = (find_document_fault(column, raw.values[column]) for column in table.text_columns)
        fault = raw.fault or next(filter(None, faults), None)
        if fault:
            bad.reject(raw.where, fault, path)
            continue
        has_documents = True
        yield from (_join_words(raw.values[column]) for column in table.text_columns)
    if not has_documents:
        kind = "usable documents" if bad.count > bad_before else "documents"
        raise DataError(f"data.{part}: {name} has no {kind}", "Check the file")


def check_columns(
    name: str, raws: Iterator[RawRow], columns: Sequence[str], part: str
) -> Iterator[RawRow]:
    """Yield the raw rows, after checking that the first one has the columns.

    Args:
        name: what messages call the table.
        raws: its rows.
        columns: those that are needed.
        part: the recipe's name of the table.

    Raises:
        DataError: naming the column that is missing.
    """
    for number, raw in enumerate(raws):
        if number == 0:
            _require_columns(name, list(map(str, raw.values)), columns, part)
        yield raw


def _require_columns(name: str, header: list[str], columns: Sequence[str], part: str) -> None:
    for column in columns:
        if column not in header:
            hint = f"; source.model reads {column}s" if column in ("text", "image") else ""
            raise DataError(
                f"{name}: no column {column!r}{suggest_closest(column, header).replace('?', '')}"
                f"; it has {join_names(header)}{hint}",
                f"Name the columns in data.{part}: {{text: ..., image: ..., label: ...}}",
            )


def inspect_rows(
    raws: Iterator[RawRow], data: Data, part: str, spec: InputSpec
) -> Iterator[tuple[RawRow, ImageInfo | str | None]]:
    """Yield each raw row with a description of its image, or why it has none; None for text."""
    if spec.modality == "text":
        return ((raw, None) for raw in raws)
    table = getattr(data, part)
    folder = get_table_folder(table, part)
    return inspect_images(raws, table.image, folder, data.max_pixels, spec.patch_size)


def find_row_fault(raw: RawRow, table: Table, data: Data, spec: InputSpec) -> str | None:
    """Return why a row cannot be used, if so; its image is not looked at."""
    task, group = str(data.task), data.group
    fault = find_reading_fault(raw)
    if fault:
        return fault
    if spec.modality == "text" or data.reads_text_beside:
        faults = (
            find_text_fault(column, raw.values[column], task)
            or _find_nul_fault(column, raw.values[column])
            for column in table.text_columns
        )
        fault = next(filter(None, faults), None)
        if fault:
            return fault
    if group and raw.values[group] in (None, ""):
        return f"{group} is empty"
    words = None
    if task == "token-classification":
        words = list_words(raw.values[table.text_columns[0]])
    return find_label_fault(raw.values, table.label, task, words)


def find_text_fault(column: str, value: Any, task: str) -> str | None:
    """Return why a cell is not a text (for token-classification a list of words), if so."""
    if task == "token-classification":
        return _find_words_fault(column, value)
    if not isinstance(value, str):
        return f"{column} is {'empty' if value is None else type(value).__name__}, not text"
    return None if value.strip() else f"{column} is empty"


def _find_nul_fault(column: str, value: Any) -> str | None:
    words = value if isinstance(value, (list, tuple)) else [value]
    return f"{column} is binary, not text" if any("\0" in word for word in words) else None


def _find_words_fault(column: str, value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        return f"{column} is {kind}, not a list of words"
    if not value:
        return f"{column} is an empty list"
    bad = [word for word in value if not (isinstance(word, str) and word.strip())]
    return f"{column} holds {bad[0]!r}, which is no word" if bad else None


def find_document_fault(column: str, value: Any) -> str | None:
    """Return why a cell is neither a text nor a list of words, if so."""
    is_words = isinstance(value, (list, tuple))
    fault = find_text_fault(column, value, "token-classification" if is_words else "")
    if fault:
        return fault
    text = _join_words(value)
    if text.isascii() and text.isprintable():
        return None
    undecodable = find_encoding_fault(text)
    if undecodable:
        return undecodable
    if "\0" in text or len(CONTROL_CHARACTERS.findall(text)) > MAX_CONTROL_SHARE * len(text):
        return f"{column} is binary, not text"
    return None


def _join_words(value: object) -> str:
    return value if isinstance(value, str) else " ".join(list_words(value))


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
