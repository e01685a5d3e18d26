"""Readers of local formats: each yields raw rows with the file and line they come from.

Bytes that are not UTF-8 survive as surrogates, so that the row that holds them can be named.
"""

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hftl.data.quotes import (
    ColumnProfile,
    find_joined_row,
    is_all_prose,
    may_hold_rows,
    profile_columns,
)
from hftl.errors import DataError, DataWarning

CSV_QUOTED_CELL = re.compile(r'"(?=.*"".)(?:[^"]|"")*"', re.DOTALL)
"""A cell that a writer of CSV has quoted, and hardly anyone else: it holds doubled quotes alone."""
TSV_RULE = "in a .tsv a quote is text and every line a row"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it, every line ending a line feed.

    `fault` says why it cannot be read, if so.
    """

    values: dict[str, Any]
    index: int
    where: str
    fault: str | None = None

    def __post_init__(self) -> None:
        # Byte-level tokenizers see other tokens where a carriage return stands, and csv readers end
        # a row at one that is not quoted: the same text must not depend on who saved it.
        values = {name: normalize_newlines(value) for name, value in self.values.items()}
        object.__setattr__(self, "values", values)


def read_csv(path: Path) -> Iterator[RawRow]:
    """Rows of a comma-separated table (tabs for .tsv) with a header line.

    In a .tsv a quote is text and every line a row, as those who write them hold it.
    """
    with _open_text(path) as handle:
        reader = _build_csv_reader(path, handle)
        begins = 1
        try:
            header = next(reader, None)
            if header is None or not any(header):
                raise DataError(f"{path.name} is empty", "Give it a header line and rows")
            _check_header(path, header)
            index, begins, columns, warned = 0, reader.line_num + 1, None, False
            for row in reader:
                if row and may_hold_rows(row, len(header)):
                    columns = columns or _profile_table(path, len(header))
                    _refuse_joined_row(path.name, row, columns, begins)
                    if is_all_prose(columns) and not warned:
                        warned = True
                        _warn_of_multiline_row(
                            f"{path.name} line {begins}", reader.line_num - begins + 1
                        )
                if row:
                    where = f"{path.name} line {reader.line_num}"
                    values = dict(zip(header, [*row, *[None] * len(header)], strict=False))
                    yield RawRow(values, index, where, _find_cell_fault(path, header, row, begins))
                    index += 1
                begins = reader.line_num + 1
        except csv.Error as error:
            last = reader.line_num
            from_ = f"; its row begins at line {begins}" if begins < last else ""
            raise DataError(
                f"{path.name} line {last}: not valid CSV: {error}{from_}", "Correct the quotes"
            ) from error


def _build_csv_reader(path: Path, handle: Any, strict: bool = True) -> Any:
    csv.field_size_limit(2**31 - 1)
    if path.suffix.lower() == ".tsv":
        return csv.reader(handle, strict=strict, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(handle, strict=strict)


def _check_header(path: Path, header: list[str]) -> None:
    """Refuse a header that is not text, or that names a column twice."""
    if has_invalid_utf8("".join(header)):
        raise DataError(f"{path.name} line 1: not valid UTF-8", "Save it as UTF-8")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path.name}: two columns are named {twice!r}", "Rename one")


def _find_cell_fault(path: Path, header: list[str], row: list[str], begins: int) -> str | None:
    """Return what is wrong with a row's cells, if anything."""
    tabs = path.suffix.lower() == ".tsv"
    if tabs and any(map(CSV_QUOTED_CELL.fullmatch, row)):
        return f"a cell is quoted as in a .csv; {TSV_RULE}"
    if len(row) == len(header):
        return None
    fault = f"{len(row)} fields where the header has {len(header)}"
    breaks = sum(normalize_newlines(cell).count("\n") for cell in row)
    if breaks:
        fault += f", in lines {begins} to {begins + breaks}"
    return f"{fault}; {TSV_RULE}" if tabs and any(c.startswith('"') for c in row) else fault


def _profile_table(path: Path, width: int) -> list[ColumnProfile]:
    """Learn the look of a table's columns from its first rows, whatever follows them."""
    with _open_text(path) as handle:
        reader = _build_csv_reader(path, handle, strict=False)
        next(reader, None)
        return profile_columns(map(normalize_newlines, reader), width)


def _warn_of_multiline_row(where: str, lines: int) -> None:
    """Warn of a row of several lines in a table whose columns tell no rows from text."""
    warnings.warn(
        f"{where}: one row holds {lines} lines, and others may too; if they were to be rows, a "
        "quote is not closed: compare the number of rows, or save the table as .jsonl",
        DataWarning,
        stacklevel=3,
    )


def _refuse_joined_row(
    name: str, row: list[str], columns: list[ColumnProfile], begins: int
) -> None:
    """Refuse a row whose cell swallowed others, bad rows to be skipped or not: they count as one.

    Raises:
        DataError: naming the line where the quote opens, and where the other row stands.
    """
    lines = find_joined_row(normalize_newlines(row), columns)
    if lines is not None:
        opens, other = (begins + line for line in lines)
        raise DataError(
            f"{name} line {opens}: a quote opens a cell that goes on over what looks like another "
            f"row at line {other}",
            "Close the quote, or double one that is text; where the cell is right, save the table "
            "as .jsonl or .parquet",
        )


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Rows of a file with one JSON object a line."""
    with _open_text(path) as handle:
        lines = ((number, line) for number, line in enumerate(handle, 1) if line.strip())
        columns = None
        early: list[RawRow] = []
        for index, (number, line) in enumerate(lines):
            values, fault = _parse_json_object(line)
            raw = RawRow(values, index, f"{path.name} line {number}", fault)
            if columns is None and fault:
                early.append(raw)
                continue
            if columns is None:
                columns = dict.fromkeys(values)
                yield from (replace(bad, values=columns) for bad in early)
            yield replace(raw, values=columns | values)
    if columns is None and early:
        raise DataError(f"{early[0].where}: {early[0].fault}", "Write one object a line")


def _parse_json_object(line: str) -> tuple[dict[str, Any], str | None]:
    """The object that a line holds, or none and why."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return {}, f"not a JSON object a line ({error})"
    if not isinstance(values, dict):
        return {}, f"not a JSON object but a {type(values).__name__}"
    return values, None


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Rows of a Parquet file."""
    import pyarrow.parquet
    from pyarrow.lib import ArrowInvalid

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{path.name}: not valid Parquet: {error}", "Write it again") from error
    index = 0
    for batch in file.iter_batches(4096):
        for values in batch.to_pylist():
            yield RawRow(values, index, f"{path.name} row {index + 1}")
            index += 1


def read_txt(path: Path) -> Iterator[RawRow]:
    """One text a line, in a column `text`."""
    with _open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            yield RawRow({"text": line.rstrip("\r\n")}, number - 1, f"{path.name} line {number}")


def read_textfolder(path: Path) -> Iterator[RawRow]:
    """One folder a class, one text a file; columns `text` and `label`."""
    files = (f for c in _list_class_folders(path) for f in sorted(c.rglob("*")) if f.is_file())
    for index, file in enumerate(files):
        if file.name.startswith("."):
            continue
        where = file.relative_to(path).as_posix()
        label = where.split("/")[0]
        with _open_text(file) as handle:
            yield RawRow({"text": handle.read(), "label": label}, index, where)


def read_text_files(path: Path) -> Iterator[RawRow]:
    """Every file below a folder as one text, in a column `text`; hidden files are left out."""
    for index, file in enumerate(_list_files(path)):
        with _open_text(file) as handle:
            yield RawRow({"text": handle.read()}, index, file.relative_to(path).as_posix())


def read_imagefolder(path: Path) -> Iterator[RawRow]:
    """One folder a class; columns `image`, the absolute path, and `label`.

    A file that is no image stays a row: `decode` says why it cannot be read.
    """
    files = (file for folder in _list_class_folders(path) for file in _list_files(folder))
    for index, file in enumerate(files):
        where = file.relative_to(path).as_posix()
        yield RawRow({"image": file.absolute(), "label": where.split("/")[0]}, index, where)


def read_image_files(path: Path) -> Iterator[RawRow]:
    """Every file below a folder, to predict for; column `image`, the path inside the folder."""
    for index, file in enumerate(_list_files(path)):
        where = file.relative_to(path).as_posix()
        yield RawRow({"image": where}, index, where)


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "txt": read_txt,
    "textfolder": read_textfolder,
    "imagefolder": read_imagefolder,
}

IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm".split()
)
"""What names of images end in; only for guessing what a folder holds."""


SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")


def has_mostly_images(folder: Path) -> bool:
    """Whether most files below the folder have an image's suffix."""
    images = [file.suffix.lower() in IMAGE_SUFFIXES for file in _list_files(folder)]
    return 2 * sum(images) > len(images)


def guess_format(path: Path) -> str:
    """The format that a file's suffix, or being a folder, says.

    Raises:
        DataError: if it says none, or the folder is empty.
    """
    if path.is_dir() and not _list_files(path):
        raise DataError(f"{path.name} is an empty folder", "Check the path")
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        raise DataError(
            f"{path.name} is one picture", "Give its folder, or a table that names pictures"
        )
    if path.is_dir():
        return "imagefolder" if has_mostly_images(path) else "textfolder"
    name = {".json": "jsonl", ".ndjson": "jsonl", ".tsv": "csv"}.get(
        path.suffix.lower(), path.suffix.lower().removeprefix(".")
    )
    if name not in READERS:
        raise DataError(
            f"{path.name}: the suffix {path.suffix!r} says no format",
            f"Rename it, or set the table's format to one of {', '.join(READERS)}",
        )
    return name


def normalize_newlines(value: Any) -> Any:
    """Return a text, or a list of them, with CRLF and CR turned into line feeds."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    # Long lists of numbers, such as embeddings, are left alone: they would take most of the time.
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, list, tuple)):
        texts = [normalize_newlines(item) for item in value]
        return texts if isinstance(value, list) else tuple(texts)
    return value


def has_invalid_utf8(text: str) -> bool:
    """Whether the text holds bytes that were not UTF-8, or half a character of UTF-16."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _list_class_folders(path: Path) -> list[Path]:
    """The folders, one a class."""
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"{path.name} has no folders, one a class", "Check the path")
    names = [folder.name for folder in classes]
    if all(name.lower() in SPLIT_NAMES for name in names):
        raise DataError(
            f"the folders of {path.name} are {' and '.join(names)}, which name splits, not classes",
            f"Give each its own table: data.train={path}/{names[-1]}, data.test=...",
        )
    return classes


def _list_files(folder: Path) -> list[Path]:
    """Every file below the folder, dangling links too, without what is hidden."""
    found = (file for file in folder.rglob("*") if not file.is_dir())
    inside = ((file, file.relative_to(folder).parts) for file in found)
    return sorted(file for file, parts in inside if not any(p.startswith(".") for p in parts))


def _open_text(path: Path) -> Any:
    with open(path, "rb") as handle:
        start = handle.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path.name} is UTF-16", "Save it as UTF-8")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
