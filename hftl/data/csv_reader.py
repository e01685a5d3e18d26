"""Read tables of separated values, and refuse unclosed quotes that join rows into one cell.

Every CSV parser accepts an unclosed quote that a later one happens to close. Only the content of
the joined lines shows the error: they read as rows of the same table. Where all columns are free
text nothing distinguishes them from a text of several lines, and the cell is read with a warning.
"""

import csv
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hftl.data.encodings import advise_on_encoding
from hftl.data.file_kinds import refuse_other_format
from hftl.data.normalization import NUMBER
from hftl.data.rows import RawRow, find_encoding_fault, normalize_newlines, open_text
from hftl.errors import DataError, DataWarning, join_names

QUOTED_CELL = re.compile(r'"(?=.*"".)(?:[^"]|"")*"', re.DOTALL)
"""A cell that a writer of CSV has quoted, and hardly anyone else: it holds doubled quotes alone."""
OTHER_SEPARATOR = re.compile(r"[^;\t|]+([;\t|])[^;\t|]+(\1[^;\t|]+)*")
"""A header of one cell that another separator would cut into columns."""
JSON_START = re.compile(r'\s*([\[{]\s*("|$)|\[\s*(\{|\[\s*"))')
"""Begins an object or a list in JSON, on one line or on several, and no header: `[id]` is one."""
TSV_RULE = "in a .tsv a quote is text and every line a row"
PROFILED_ROWS = 5000
"""Rows from which a column's profile is taken."""
MAX_CLASS_VALUES = 50
"""Distinct values of a column that still look like classes."""
MAX_SHAPES = 3
"""Distinct shapes, as of dates or identifiers, that a column's values may be limited to."""


def read_csv(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a table with a header line, see `find_separator`.

    In a .tsv a quote is text and every line is a row, as programs that write them assume.

    Raises:
        DataError: if the table has no header, is not valid CSV, or a cell swallowed other rows.
    """
    refuse_other_format(path)
    separator = find_separator(path)
    if separator == ";":
        message = f"{path.name}: its columns are separated by ';', and are read so"
        # Of this line, so that a table that is read again is named once.
        warnings.warn(message, DataWarning, stacklevel=1)
    with open_text(path) as file:
        reader, first_line = _build_csv_reader(file, separator), 1
        try:
            header = _read_header(path, reader)
            index, first_line = 0, reader.line_num + 1
            joined = JoinedRowCheck(path, len(header), separator)
            for cells in reader:
                if cells:
                    joined.check(cells, first_line, reader.line_num)
                    values = dict(zip(header, [*cells, *[None] * len(header)], strict=False))
                    fault = _find_cell_fault(separator, header, cells, first_line)
                    yield RawRow(values, index, f"{path.name} line {reader.line_num}", fault)
                    index += 1
                first_line = reader.line_num + 1
            if not index:
                shown = join_names(header)
                raise DataError(f"{path.name} has no rows below its header: {shown}", "Add some")
        except csv.Error as error:
            last = reader.line_num
            begins = f"; its row begins at line {first_line}" if first_line < last else ""
            raise DataError(
                f"{path.name} line {last}: not valid CSV: {error}{begins}", "Correct the quotes"
            ) from error


def find_separator(path: Path) -> str:
    """Return what separates the columns: a tab in a .tsv, else a comma, or a semicolon.

    Programs write semicolons where the decimal sign is a comma. They are read where the header is
    one column by commas and several by semicolons; a row of another number of fields is then bad.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    with open_text(path) as file:
        header = next(_build_csv_reader(file, ",", strict=False), [])
        file.seek(0)
        by_semicolon = next(_build_csv_reader(file, ";", strict=False), [])
    is_one = len(header) == 1 and "\t" not in header[0]
    return ";" if is_one and sum(map(bool, by_semicolon)) > 1 else ","


def _build_csv_reader(file: TextIO, separator: str, strict: bool = True) -> Any:
    csv.field_size_limit(2**31 - 1)
    if separator == "\t":
        return csv.reader(file, strict=strict, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file, strict=strict, delimiter=separator)


def _read_header(path: Path, reader: Any) -> list[str]:
    """Return the header; refuse one that is missing, is not text, or names a column twice."""
    header: list[str] = next(reader, [])
    if not any(header):
        raise DataError(f"{path.name} is empty", "Give it a header line and rows")
    fault = find_encoding_fault(*header)
    if fault:
        raise DataError(f"{path.name} line 1: {fault}", advise_on_encoding(path))
    if JSON_START.match(",".join(header)):
        fix = f"Name it {path.stem}.jsonl, one object a line"
        raise DataError(f"{path.name} holds JSON, not a table with a header", fix)
    other = OTHER_SEPARATOR.fullmatch(header[0])
    if len(header) == 1 and other is not None:
        raise _build_separator_error(path, other[1])
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path.name}: two columns are named {twice!r}", "Rename one")
    return header


def _build_separator_error(path: Path, separator: str) -> DataError:
    is_tab, expected = separator == "\t", "tabs" if path.suffix.lower() == ".tsv" else "commas"
    fix = f"Rename it to {path.stem}.tsv" if is_tab else "Save it as .csv with commas, or as .jsonl"
    shown = "tabs" if is_tab else repr(separator)
    return DataError(f"{path.name}: its columns are separated by {shown}, not by {expected}", fix)


def _find_cell_fault(separator: str, header: list[str], cells: list[str], line: int) -> str | None:
    """Return what is wrong with the cells of the row that begins at this line, if anything."""
    is_tsv = separator == "\t"
    if is_tsv and any(map(QUOTED_CELL.fullmatch, cells)):
        return f"a cell is quoted as in a .csv; {TSV_RULE}"
    if len(cells) == len(header):
        return None
    cut = ", cut at ';'" if separator == ";" else ""
    fault = f"{len(cells)} fields where the header has {len(header)}{cut}"
    breaks = sum(normalize_newlines(cell).count("\n") for cell in cells)
    if breaks:
        fault += f", in lines {line} to {line + breaks}"
    return f"{fault}; {TSV_RULE}" if is_tsv and any(c.startswith('"') for c in cells) else fault


class JoinedRowCheck:
    """Refuse rows of a table that swallowed others; warn once where that cannot be decided.

    The columns are profiled only when a row has a cell that could hold other rows.
    """

    def __init__(self, path: Path, width: int, separator: str = ",") -> None:
        self._path, self._width, self._separator = path, width, separator
        self._columns: list[ColumnProfile] | None = None
        self._has_warned = False

    def check(self, cells: list[str], first_line: int, last_line: int) -> None:
        """Check one row. Bad rows may be skipped, but this error stops: many would count as one.

        Raises:
            DataError: naming the line where the quote opens and the line of the other row.
        """
        if not may_hold_rows(cells, self._width, self._separator):
            return
        if self._columns is None:
            self._columns = _profile_table(self._path, self._width, self._separator)
        if is_all_prose(self._columns):
            self._warn(first_line, last_line)
            return
        lines = find_joined_row(normalize_newlines(cells), self._columns, self._separator)
        if lines is not None:
            opens, other = (first_line + line for line in lines)
            raise DataError(
                f"{self._path.name} line {opens}: a quote opens a cell that continues over what "
                f"looks like another row at line {other}",
                "Close the quote, or double it if it is text; where the cell is right, save the "
                "table as .jsonl or .parquet",
            )

    def _warn(self, first_line: int, last_line: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{self._path.name} line {first_line}: one row holds {last_line - first_line + 1} "
            "lines, and others may too; if they were to be rows, a quote is not closed: compare "
            "the number of rows, or save the table as .jsonl",
            DataWarning,
            stacklevel=3,
        )


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """Describe what the cells of a column look like.

    `names` and `shapes` are None where there are too many. A column is `prose` if enough rows show
    no pattern at all.
    """

    names: frozenset[str] | None
    shapes: frozenset[str] | None
    is_numeric: bool
    has_spaces: bool
    has_empty: bool
    is_prose: bool

    def fits(self, cell: str) -> bool:
        """Return whether a cell looks like those of the column."""
        if not cell:
            return self.has_empty
        if self.names is not None:
            return cell in self.names
        if self.is_numeric:
            return NUMBER.fullmatch(cell) is not None
        if self.shapes is not None and _reduce_to_shape(cell) not in self.shapes:
            return False
        return self.has_spaces or not cell.startswith(" ")

    def is_proof(self, cell: str) -> bool:
        """Return whether a fitting cell can hardly be prose: a class name that is no number."""
        return self.names is not None and bool(cell) and not NUMBER.fullmatch(cell)


def _profile_table(path: Path, width: int, separator: str) -> list[ColumnProfile]:
    """Return the profile of each column, from the first sound rows of the table."""
    with open_text(path) as file:
        reader = _build_csv_reader(file, separator, strict=False)
        next(reader, None)
        return profile_columns(map(normalize_newlines, reader), width)


def profile_columns(rows: Iterable[list[str]], width: int) -> list[ColumnProfile]:
    """Return the profile of each column, from the cells of the first rows of this width."""
    sound = list(islice((row for row in rows if len(row) == width), PROFILED_ROWS))
    return [_profile_column([row[i] for row in sound]) for i in range(width)]


def _profile_column(cells: list[str]) -> ColumnProfile:
    single_line = [cell for cell in cells if "\n" not in cell]
    full = [cell for cell in single_line if cell]
    names, shapes = frozenset(full), frozenset(map(_reduce_to_shape, full))
    is_numeric = bool(full) and all(map(NUMBER.fullmatch, full))
    has_few_names = len(names) <= MAX_CLASS_VALUES and 2 * len(names) <= len(full)
    has_few_shapes = len(shapes) <= MAX_SHAPES and len(full) > 2 * MAX_SHAPES
    few_names = names if has_few_names else None
    few_shapes = shapes if has_few_shapes else None
    return ColumnProfile(
        names=few_names,
        shapes=few_shapes,
        is_numeric=is_numeric,
        is_prose=len(cells) > 2 * MAX_SHAPES and not (few_names or few_shapes or is_numeric),
        has_spaces=any(cell.startswith(" ") for cell in full),
        has_empty=len(full) < len(single_line),
    )


def _reduce_to_shape(cell: str) -> str:
    """Return a cell with each run of letters as one letter and each run of digits as one digit."""
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+", "a", cell))


def may_hold_rows(cells: list[str], width: int, separator: str = ",") -> bool:
    """Return whether a cell has several lines and a separator; cheap, before any profile.

    A line break may still be a carriage return here.
    """
    several = (cell for cell in cells if "\n" in cell or "\r" in cell)
    return any(width == 1 or separator in cell for cell in several)


def is_all_prose(columns: list[ColumnProfile]) -> bool:
    """Return whether all columns are free text, so that joined rows cannot be told from a text."""
    return len(columns) == 1 or all(column.is_prose for column in columns)


def find_joined_row(
    cells: list[str], columns: list[ColumnProfile], separator: str = ","
) -> tuple[int, int] | None:
    """Find what looks like another row inside a cell.

    Args:
        cells: those of a row, line endings normalized.
        columns: the profile of each column.
        separator: what separates the cells of a row.

    Returns:
        The lines at which the cell begins and the other row begins, counted from 0 at the row's
        first; None where there is none.
    """
    if is_all_prose(columns):
        return None
    first = 0
    for column, cell in enumerate(cells):
        lines = cell.split("\n")
        if len(lines) > 1 and len(cells) == len(columns):
            other = _find_next_row(lines, column, columns, separator)
        else:
            # Cells that do not match the header cannot be aligned with it, whole lines can.
            inner = range(1, len(lines) - 1)
            other = next((n for n in inner if _fits(lines[n].split(separator), columns)), None)
        if other is not None:
            return first, first + other
        first += len(lines) - 1
    return None


def _find_next_row(
    lines: list[str], column: int, columns: list[ColumnProfile], separator: str
) -> int | None:
    """Return the first line of a cell that looks like a row, if the cell was joined."""
    matches = list(_match_lines(lines, column, columns, separator))
    first = next((number for number, _, is_proof in matches if is_proof), None)
    if first is None and matches and all(fits for _, fits, _ in matches):
        first = matches[0][0]
    # If line 0 reads as the end of a row, the next row begins after it.
    return None if first is None else max(1, first)


def _match_lines(
    lines: list[str], column: int, columns: list[ColumnProfile], separator: str
) -> Iterator[tuple[int, bool, bool]]:
    """Yield each line that can be compared: its number, whether it fits, whether that is a proof.

    The first line would be the end of a row, which may follow a text with separators, and the last
    one the beginning of a row; the cells beside this one belong to the same physical lines.
    """
    for number, line in enumerate(lines):
        pieces = line.split(separator)
        if not line.strip():
            continue
        if number == 0:
            beside = columns[column + 1 :]
            has_enough = len(pieces) > len(beside)
            pieces = pieces[len(pieces) - len(beside) :]
        elif number == len(lines) - 1:
            beside = columns[:column]
            has_enough = len(pieces) == len(beside) + 1
            pieces = pieces[:column]
        else:
            beside, has_enough = columns, True
        if beside:
            fits = has_enough and _fits(pieces, beside)
            yield number, fits, fits and any(map(ColumnProfile.is_proof, beside, pieces))


def _fits(pieces: list[str], columns: list[ColumnProfile]) -> bool:
    return len(pieces) == len(columns) and all(map(ColumnProfile.fits, columns, pieces))
