"""Load the rows of a table: check every cell, name every bad row by file and line."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hftl.config.data import Data, Table
from hftl.data.encodings import BAD_BYTE
from hftl.data.images import inspect_images, warn_of_narrow_images
from hftl.data.label_parsing import (
    find_label_fault,
    get_value_type,
    list_classes,
    parse_label,
    refuse_fractions,
    refuse_mixed_labels,
)
from hftl.data.rows import (
    BadRows,
    ImageInfo,
    InputSpec,
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
    leaked = next((column for column in contents if column in table.label_columns), None)
    if leaked is not None:
        raise DataError(
            f"data.{part}: the column {leaked!r} is both input and label, so that nothing is "
            "learned",
            f"Name other columns in data.{part}: {{text: ..., image: ..., label: ...}}",
        )
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
    raws = check_columns(name, islice(raws, most), [table.image], part)
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
