"""Make columns fit the format of an output file, and write them: CSV, JSON lines or Parquet.

The columns of a user may hold what a format has no form for. They are made to fit before the model
predicts, so that nothing is left to fail when the predictions are there.
"""

import csv
import datetime
import io
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hftl.data.rows import iterate_leaves, normalize_newlines
from hftl.data.tables import guess_format
from hftl.errors import DataWarning
from hftl.runtime.run_folder import write_bytes

LINE_SEPARATORS = "\x85\u2028\u2029"
"""Characters that JSON leaves unescaped, though `str.splitlines` ends a line at them."""

Columns = dict[str, Any]
"""The cells of a table by column: a list, for Parquet an Arrow array."""


def name_columns(names: Iterable[str], taken: Iterable[str], prefix: str) -> dict[str, str]:
    """Return a name in the output for each column, distinct from the others and from `taken`.

    A column whose name is taken gets the prefix, as often as it needs. All other columns have
    their name first, so that of `label` and `input.label` only the former changes.

    Args:
        names: of the columns.
        taken: names that are not free.
        prefix: such as `input.`.
    """
    normalized = {name: normalize_newlines(name) for name in names}
    used, chosen = set(taken), {}
    for name in sorted(normalized, key=lambda name: normalized[name] in used):
        free = normalized[name]
        while free in used:
            free = prefix + free
        used.add(free)
        chosen[name] = free
    return {name: chosen[name] for name in normalized}


def fit_columns(columns: Mapping[str, Sequence[object]], suffix: str, types: Columns) -> Columns:
    """Return the columns as a format can hold them; warn of one that loses something.

    Args:
        columns: their cells, all valid UTF-8.
        suffix: of the output.
        types: the Arrow type of a column, where the input names one.
    """
    if suffix == ".parquet":
        return {
            name: _build_arrow_column(name, cells, types.get(name))
            for name, cells in columns.items()
        }
    for name, cells in columns.items():
        nested = cells if suffix == ".jsonl" else [c for c in cells if not isinstance(c, float)]
        if any(_is_not_finite(leaf) for leaf in iterate_leaves(nested)):
            _warn(f"column {name!r}: JSON has no NaN and no Infinity, null is written", ".parquet")
    fit_cell = to_json_value if suffix == ".jsonl" else format_text
    return {name: list(map(fit_cell, cells)) for name, cells in columns.items()}


def read_column_types(data: Path) -> Columns:
    """Return the Arrow type of each column of a Parquet file; of no column for other formats."""
    import pyarrow.parquet as pq

    if guess_format(data) != "parquet":
        return {}
    schema = pq.read_schema(data)
    return dict(zip(schema.names, schema.types, strict=True))


def _build_arrow_column(name: str, cells: Sequence[object], arrow_type: Any) -> Any:
    """Return cells as an Arrow array that Parquet can store, as text where no type fits them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The type of the input no longer fits where the bytes of images were dropped.
    for kind in dict.fromkeys([arrow_type, None]):
        try:
            column, sink = pa.array(cells, kind), pa.BufferOutputStream()
            # Arrow has types that Parquet cannot store, such as a struct without fields, and
            # writes lists nested so deep that it raises OSError when it opens them.
            pq.write_table(pa.table({name: column}), sink)
            pq.read_schema(pa.BufferReader(sink.getvalue()))
            return column
        except (pa.ArrowException, OverflowError, OSError):
            continue
    _warn(f"column {name!r}: no Parquet type holds all its cells, text is written", ".jsonl")
    return pa.array([format_text(cell) for cell in cells], pa.string())


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _warn(what: str, suffix: str) -> None:
    warnings.warn(f"{what}; a {suffix} holds them as they are", DataWarning, stacklevel=4)


def to_json_value(value: object) -> object:
    """Return a cell as JSON can hold it: times in ISO 8601, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    is_time = isinstance(value, (datetime.date, datetime.time))
    return value.isoformat() if is_time else str(value)


def format_text(value: object) -> str | None:
    """Return a cell as text, lists and objects as JSON; None stays."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(to_json_value(value), ensure_ascii=False, allow_nan=False)
    return str(value)


def round_numbers(value: Any, digits: int) -> Any:
    """Return a float, or those in lists, with so many significant digits; all else unchanged."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return [round_numbers(item, digits) for item in value] if isinstance(value, list) else value


def _format_json_line(row: dict[str, object]) -> str:
    """Return a row as one line, also for readers that end a line at U+2028."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    for separator in LINE_SEPARATORS:
        line = line.replace(separator, f"\\u{ord(separator):04x}")
    return line + "\n"


def write_table(columns: Columns, output: Path | None) -> str | None:
    """Write columns that fit the output, whole or not at all; without an output return CSV."""
    if output is not None and output.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(output, sink.getvalue().to_pybytes())
        return None
    rows = zip(*columns.values(), strict=True)
    if output is not None and output.suffix == ".jsonl":
        text = "".join(_format_json_line(dict(zip(columns, row, strict=True))) for row in rows)
    else:
        buffer = io.StringIO(newline="")
        # csv.writer quotes no carriage return, and every reader ends a row at it: `RawRow` and
        # `name_columns` have left none.
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        text = buffer.getvalue()
    if output is None:
        return text
    write_bytes(output, text.encode("utf-8"))
    return None
