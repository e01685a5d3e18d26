"""Cut the test rows into slices by further columns of their table.

The prepared rows hold none of these columns: they are read from the table again when a run is
measured, by the place of each row, so that a new slice re-runs nothing but the measuring.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hftl.config.data import Data, Table
from hftl.data.facts import Modality, SliceKind
from hftl.data.rows import Row
from hftl.data.tables import read_table
from hftl.errors import DataError, suggest_closest
from hftl.plurals import count_noun
from hftl.runtime import paths

MIN_VALUE_ROWS = 10
"""Values of fewer test rows are pooled: of so few a score says nothing."""
MAX_VALUES = 30
"""The most frequent values of a column that are slices of their own; the others are pooled."""
MAX_NUMBERS = 10
"""Distinct numbers up to which each is a value; more are cut at quantiles."""
QUANTILES = 4


@dataclass(frozen=True)
class RowSlice:
    """Hold the positions of the test rows in one slice, (k,) int64 ascending."""

    value: str
    kind: SliceKind
    rows: np.ndarray


@dataclass(frozen=True)
class SlicedColumn:
    """Hold the slices of one column, which share no row and have all of them.

    `pooled_values` counts the values in the slice of rare ones; `cuts` are where numbers are cut,
    each the greatest of its slice.
    """

    name: str
    slices: list[RowSlice]
    pooled_values: int = 0
    cuts: tuple[float, ...] = ()


def read_slice_columns(
    data: Data, rows: Sequence[Row], modality: Modality, columns: Sequence[str]
) -> list[SlicedColumn]:
    """Read columns of the test rows' table, and cut each into slices.

    Args:
        data: the recipe's section, its Hub tables at the commits that the rows come from.
        rows: the test rows; they are those of one table.
        modality: what the encoder reads.
        columns: their names.

    Raises:
        DataError: if the table lacks a column, or a column makes no slices.
    """
    table: Table = getattr(data, rows[0].table)
    path = paths.resolve_local_path(table.path, f"data.{rows[0].table}.path")
    if path is not None and path.is_dir():
        raise DataError(
            f"measure.slices: {path.name} is a folder of files, which has no column {columns[0]!r}",
            "Give a table (csv, jsonl, parquet) that names the files and has this column",
        )
    name, raws = read_table(table, rows[0].table, modality, columns)
    positions = {row.index: position for position, row in enumerate(rows)}
    cells: dict[str, list[object]] = {column: [None] * len(rows) for column in columns}
    header: dict[str, None] = {}
    for raw in raws:
        # A key that the first line of a jsonl lacks may stand in a later one.
        header |= dict.fromkeys(map(str, raw.values))
        position = positions.get(raw.index)
        if position is not None:
            for column in columns:
                cells[column][position] = raw.values.get(column)
    _require_columns(name, list(header), columns)
    return [cut_column(column, cells[column]) for column in columns]


def list_columns(table: Table, part: str, modality: Modality) -> list[str]:
    """Return the columns of a table; none of a folder of files."""
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    if path is not None and path.is_dir():
        return []
    _, raws = read_table(table, part, modality)
    return list(map(str, dict.fromkeys(key for raw in raws for key in raw.values)))


def read_cells(
    table: Table, part: str, modality: Modality, rows: Sequence[Row], columns: Sequence[str]
) -> dict[str, list[object]]:
    """Return the cells of rows by column, in the rows' order."""
    positions = {row.index: position for position, row in enumerate(rows)}
    cells: dict[str, list[object]] = {column: [None] * len(rows) for column in columns}
    _, raws = read_table(table, part, modality, columns)
    for raw in raws:
        position = positions.get(raw.index)
        if position is not None:
            for column in columns:
                cells[column][position] = raw.values.get(column)
    return cells


def _require_columns(name: str, header: list[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in header:
            raise DataError(
                f"measure.slices: {name}, which the test rows come from, has no column "
                f"{column!r}{suggest_closest(column, header).replace('?', '')}; it has "
                f"{', '.join(header)}",
                "Correct the name, or leave it out",
            )


def cut_column(column: str, cells: Sequence[object]) -> SlicedColumn:
    """Cut a column into slices: its values, or quantiles of many numbers; rows without a value.

    Args:
        column: its name.
        cells: one a test row.

    Raises:
        DataError: if cells are lists or objects, nearly every row has a value of its own, or all
            rows are in one slice.
    """
    _refuse_nested(column, cells)
    is_missing = np.array([_is_missing(cell) for cell in cells])
    present = np.flatnonzero(~is_missing)
    filled = [cells[i] for i in present.tolist()]
    numbers = _parse_numbers(filled)
    if numbers is not None and len(np.unique(numbers)) > MAX_NUMBERS:
        sliced = _cut_numbers(column, numbers, present)
    else:
        values = [str(cell).strip() for cell in filled]
        if numbers is not None:
            values = list(map(_format_number, numbers))
        sliced = _group_values(column, values, present)
    if is_missing.any():
        sliced.slices.append(RowSlice("missing", "missing", np.flatnonzero(is_missing)))
    if len(sliced.slices) < 2:
        raise DataError(
            f"measure.slices: the column {column!r} makes one slice of all {len(cells)} test rows, "
            "and there is nothing to compare",
            "Leave it out, or name another column",
        )
    return sliced


def _refuse_nested(column: str, cells: Sequence[object]) -> None:
    nested = next((cell for cell in cells if isinstance(cell, (list, tuple, dict, bytes))), None)
    if nested is not None:
        raise DataError(
            f"measure.slices: the column {column!r} holds a {type(nested).__name__} in a row, "
            "expected a text or a number",
            "Name another column",
        )


def _is_missing(cell: object) -> bool:
    """Return whether a cell is empty: null, blank text or NaN."""
    is_nan = isinstance(cell, float) and math.isnan(cell)
    return cell is None or is_nan or (isinstance(cell, str) and not cell.strip())


def _parse_numbers(cells: Sequence[object]) -> np.ndarray | None:
    """Return cells as numbers, (rows,) float64; None if one is no finite number, or there is none.

    A csv has numbers as texts.
    """
    if any(isinstance(cell, bool) for cell in cells):
        return None
    try:
        numbers = np.array([float(str(cell)) for cell in cells])
    except ValueError:
        return None
    return numbers if len(numbers) and np.isfinite(numbers).all() else None


def _cut_numbers(column: str, numbers: np.ndarray, positions: np.ndarray) -> SlicedColumn:
    """Cut numbers at their quartiles, at fewer quantiles where rows are few."""
    parts = max(1, min(QUANTILES, len(numbers) // MIN_VALUE_ROWS))
    shares = np.arange(1, parts) / parts
    quantiles = np.quantile(numbers, shares, method="inverted_cdf")
    # Where the greatest number is so frequent that it is a quantile, it is cut off from the others.
    below = numbers[numbers < numbers.max()].max()
    cuts = np.unique(np.minimum(quantiles, below))
    ends = [*map(_format_number, cuts)]
    names = [f"<= {ends[0]}"] if ends else ["all"]
    names += [f"> {low}, <= {high}" for low, high in zip(ends, ends[1:], strict=False)]
    names += [f"> {ends[-1]}"] if ends else []
    place = np.searchsorted(cuts, numbers, side="left")
    slices = [
        RowSlice(name, "range", positions[place == number]) for number, name in enumerate(names)
    ]
    return SlicedColumn(column, slices, cuts=tuple(map(float, cuts)))


def _format_number(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else f"{number:.6g}"


def _group_values(column: str, values: list[str], positions: np.ndarray) -> SlicedColumn:
    """Return a slice a value, the most frequent first, and one of all values that are rare."""
    counts = Counter(values)
    by_count = sorted(counts, key=lambda value: (-counts[value], value))
    frequent = [value for value in by_count if counts[value] >= MIN_VALUE_ROWS][:MAX_VALUES]
    if counts and not frequent:
        few = len(values) < 2 * MIN_VALUE_ROWS
        raise DataError(
            f"measure.slices: the column {column!r} has {count_noun(len(counts), 'value')} in "
            f"{len(values)} test rows, and no value has the {MIN_VALUE_ROWS} rows of a slice",
            "Give more test rows, or leave it out" if few else
            "Name a column with fewer values, such as a category of these",
        )  # fmt: skip
    array = np.array(values, dtype=object)
    slices = [RowSlice(value, "value", positions[array == value]) for value in frequent]
    pooled = len(counts) - len(frequent)
    if pooled:
        is_rare = ~np.isin(array.astype(str), frequent)
        slices.append(RowSlice("rare", "rare", positions[is_rare]))
    return SlicedColumn(column, slices, pooled_values=pooled)
