"""Unclosed quotes of comma-separated tables: they join rows into one cell, and every parser agrees.

Only what the joined lines say tells them from a text of several lines: whether they read as rows
of the very table. Where all columns are free text nothing tells them apart, and the cell is read.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from hftl.data.normalization import NUMBER

PROFILED_ROWS = 5000
"""Rows that a column's look is learnt from."""
MAX_CLASS_VALUES = 50
"""Distinct values of a column that still look like classes."""
MAX_SHAPES = 3
"""Distinct shapes, as of dates or identifiers, that a column's values may have to be bound to."""


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """The look of a column's cells: `names` and `shapes` are None where they are too many.

    A column is `prose` if enough rows show no look at all.
    """

    names: frozenset[str] | None
    shapes: frozenset[str] | None
    numeric: bool
    spaced: bool
    empty: bool
    prose: bool

    def fits(self, cell: str) -> bool:
        """Tell if a cell looks like the column's."""
        if not cell:
            return self.empty
        if self.names is not None:
            return cell in self.names
        if self.numeric:
            return NUMBER.fullmatch(cell) is not None
        if self.shapes is not None and _reduce_to_shape(cell) not in self.shapes:
            return False
        return self.spaced or not cell.startswith(" ")

    def proves(self, cell: str) -> bool:
        """Tell if a fitting cell can hardly be prose: the name of a class, and no number."""
        return self.names is not None and bool(cell) and not NUMBER.fullmatch(cell)


def profile_columns(rows: Iterable[list[str]], width: int) -> list[ColumnProfile]:
    """Learn the look of each column from the cells of one line in the table's first rows."""
    sound = list(islice((row for row in rows if len(row) == width), PROFILED_ROWS))
    return [_profile_column([row[i] for row in sound]) for i in range(width)]


def may_hold_rows(row: list[str], width: int) -> bool:
    """Tell if a row has a cell of several lines, one with a comma; cheap, before any profile.

    A line break may still be a carriage return here.
    """
    return any((width == 1 or "," in cell) and ("\n" in cell or "\r" in cell) for cell in row)


def is_all_prose(columns: list[ColumnProfile]) -> bool:
    """Return whether all columns are free text, so that joined rows cannot be told from a text."""
    return len(columns) == 1 or all(column.prose for column in columns)


def find_joined_row(row: list[str], columns: list[ColumnProfile]) -> tuple[int, int] | None:
    """Find what looks like another row inside a cell.

    Args:
        row: the cells of a row, line endings normalised.
        columns: the look of each column.

    Returns:
        The lines at which the cell begins and the other row begins, counted from 0 at the row's
        first; None where there is none.
    """
    if is_all_prose(columns):
        return None
    begins = 0
    for place, cell in enumerate(row):
        lines = cell.split("\n")
        if len(lines) > 1 and len(row) == len(columns):
            other = _find_next_row(lines, place, columns)
        else:
            # Cells that do not match the header cannot be aligned with it, whole lines can.
            inner = range(1, len(lines) - 1)
            other = next((n for n in inner if _match_columns(lines[n].split(","), columns)), None)
        if other is not None:
            return begins, begins + other
        begins += len(lines) - 1
    return None


def _find_next_row(lines: list[str], place: int, columns: list[ColumnProfile]) -> int | None:
    """Return the first line of a cell that looks like a row of its own, if the cell was joined."""
    fitting = list(_match_lines(lines, place, columns))
    proven = next((number for number, _, proof in fitting if proof), None)
    if proven is None and fitting and all(fits for _, fits, _ in fitting):
        proven = fitting[0][0]
    # A first line that reads as a row's end says that the next row begins after it.
    return None if proven is None else max(1, proven)


def _match_lines(
    lines: list[str], place: int, columns: list[ColumnProfile]
) -> Iterator[tuple[int, bool, bool]]:
    """Yield each line that could tell: its number, if it fits the columns, if that is a proof.

    The first line would be a row's end, which may follow a text with commas, and the last one a
    row's beginning; what stands around the cell belongs to the same physical lines.
    """
    last = len(lines) - 1
    for number, line in enumerate(lines):
        pieces = line.split(",")
        if not line.strip():
            continue
        if number == 0:
            beside = columns[place + 1 :]
            enough = len(pieces) > len(beside)
            pieces = pieces[len(pieces) - len(beside) :]
        elif number == last:
            beside = columns[:place]
            enough = len(pieces) == len(beside) + 1
            pieces = pieces[:place]
        else:
            beside, enough = columns, True
        if beside:
            fits = enough and _match_columns(pieces, beside)
            proof = fits and any(map(ColumnProfile.proves, beside, pieces))
            yield number, fits, proof


def _match_columns(pieces: list[str], columns: list[ColumnProfile]) -> bool:
    return len(pieces) == len(columns) and all(map(ColumnProfile.fits, columns, pieces))


def _profile_column(every: list[str]) -> ColumnProfile:
    cells = [cell for cell in every if "\n" not in cell]
    full = [cell for cell in cells if cell]
    names = frozenset(full)
    shapes = frozenset(map(_reduce_to_shape, full))
    numeric = bool(full) and all(map(NUMBER.fullmatch, full))
    few_names = names if len(names) <= MAX_CLASS_VALUES and 2 * len(names) <= len(full) else None
    few_shapes = shapes if len(shapes) <= MAX_SHAPES and len(full) > 2 * MAX_SHAPES else None
    return ColumnProfile(
        names=few_names,
        shapes=few_shapes,
        numeric=numeric,
        prose=len(every) > 2 * MAX_SHAPES and not (few_names or few_shapes or numeric),
        spaced=any(cell.startswith(" ") for cell in full),
        empty=len(full) < len(cells),
    )


def _reduce_to_shape(cell: str) -> str:
    """Return a cell with every run of letters as one, and every run of digits."""
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+", "a", cell))
