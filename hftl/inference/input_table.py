"""Read the rows that `hftl predict` is given: a table, a folder, one picture, or a text itself."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hftl.data.load import find_text_fault
from hftl.data.rows import SURROGATES, RawRow, find_reading_fault
from hftl.data.tables import (
    IMAGE_SUFFIXES,
    READERS,
    guess_format,
    list_folders,
    read_image_files,
    read_text_files,
)
from hftl.errors import DataError, join_names, suggest_closest
from hftl.inference.output_table import Columns, read_column_types
from hftl.inference.predict import Predictor

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class InputTable:
    """Hold the rows that are predicted, the names of their columns, and the columns' types.

    `folder` is what paths of images are relative to, and `path` what was read; None of a text.
    `words` are those of a text that was given
    itself and is tagged word by word; each gets a row of the output.
    """

    rows: list[RawRow]
    columns: list[str]
    folder: Path | None
    types: Columns
    path: Path | None = None
    words: list[str] | None = None

    def list_cells(self) -> dict[str, list[object]]:
        """Return the cells of each column of the output that are not predicted.

        The bytes of images are not repeated, and what is no UTF-8 is replaced.
        """
        if self.words is not None:
            return {"word": list(self.words)}
        return {
            column: [_clean_cell(raw.values.get(column)) for raw in self.rows]
            for column in self.columns
        }


def build_text_table(text: str, predictor: Predictor) -> InputTable:
    """Return a text as the only row of a table; for a model that tags words it is split at spaces.

    Raises:
        DataError: if the model reads anything but one text.
    """
    text = _decode_argument(text)
    reads = "pictures" if predictor.modality == "image" else " and ".join(predictor.columns)
    if predictor.modality == "text" and len(predictor.columns) == 1:
        words = text.split() if predictor.task == "token-classification" else None
        row = RawRow({predictor.columns[0]: words or text}, 0, "the text")
        return InputTable([row], predictor.columns, None, {}, words=words)
    raise DataError(
        f"there is no file or folder {text!r}, and the model reads no single text but {reads}",
        "Give a table or a folder",
    )


def _decode_argument(text: str) -> str:
    """Return a text of the command line as UTF-8, where the locale's encoding has no such letters.

    Python then has each of their bytes as a surrogate.
    """
    try:
        return os.fsencode(text).decode("utf-8") if SURROGATES.search(text) else text
    except UnicodeError:
        return text


def read_table(data: Path, predictor: Predictor) -> InputTable:
    """Read the input's rows, and name all their columns, the predictor's among them.

    Raises:
        DataError: if there is no row, or no column that the model reads.
    """
    rows = list(_iterate_rows(data, predictor))
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    required = predictor.columns
    is_picture = _is_picture(data, predictor)
    if data.is_dir() or is_picture or (data.suffix.lower() == ".txt" and len(required) == 1):
        # The content of a text file, a picture or a folder has no column name of its own.
        own = next(column for column in ("image", "text") if column in rows[0].values)
        if data.is_dir() and own != predictor.modality:
            raise DataError(
                f"{data.name} holds {own}s, but the model reads {predictor.modality}s",
                "Give another folder",
            )
        rows = [replace(raw, values={required[0]: raw.values[own]}) for raw in rows]
    columns = dict.fromkeys(key for raw in rows for key in raw.values)
    for column in required:
        if column not in columns:
            has = list(map(str, columns))
            raise DataError(
                f"{data.name}: no column {column!r}{suggest_closest(column, has).rstrip('?')}; "
                f"it has {join_names(has)}",
                f"Name the {predictor.modality} column {column!r}",
            )
    folder = data if data.is_dir() else data.parent
    types = {} if is_picture else read_column_types(data)
    return InputTable(rows, list(columns), folder, types, data)


def _is_picture(data: Path, predictor: Predictor) -> bool:
    """Return whether the input is one picture, for a model that reads pictures."""
    is_image = data.is_file() and data.suffix.lower() in IMAGE_SUFFIXES
    return is_image and predictor.modality == "image"


def _iterate_rows(data: Path, predictor: Predictor) -> Iterator[RawRow]:
    if _is_picture(data, predictor):
        return iter([RawRow({"image": data.name}, 0, data.name)])
    file_format = guess_format(data)
    if data.is_dir() and predictor.modality == "image":
        return read_image_files(data)
    if file_format == "textfolder" and not list_folders(data):
        return read_text_files(data)
    return READERS[file_format](data)


def find_row_fault(raw: RawRow, predictor: Predictor) -> str | None:
    """Return why a row has no text that can be read, if so; pictures show that when decoded."""
    fault = find_reading_fault(raw)
    if fault or predictor.modality != "text":
        return fault
    faults = (find_text_fault(c, raw.values.get(c), predictor.task) for c in predictor.columns)
    return next((why for why in faults if why), None)


def get_input(raw: RawRow, predictor: Predictor) -> Any:
    """Return the predictor's input in a row: the cell of its column, or a tuple of them."""
    values = [raw.values.get(column) for column in predictor.columns]
    return values[0] if len(values) == 1 else tuple(values)


def _clean_cell(value: object) -> object:
    if isinstance(value, str):
        return SURROGATES.sub(REPLACEMENT, value)
    if isinstance(value, dict):
        is_image = isinstance(value.get("bytes"), bytes) or value.keys() == {"bytes", "path"}
        if is_image:
            return _clean_cell(value.get("path"))
        return {_clean_cell(key): _clean_cell(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = map(_clean_cell, value)
        return list(items) if isinstance(value, list) else tuple(items)
    return None if isinstance(value, bytes) else value
