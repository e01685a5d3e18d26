"""Rows as a file, so that later phases and runs read one file and not the user's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hftl.data.load import Row

ROWS = "rows.parquet"


def write_rows(parts: Mapping[str, list[Row]], folder: Path) -> None:
    """Writes the rows of each part, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = [(part, row) for part, rows in parts.items() for row in rows]
    columns: dict[str, list[Any]] = {
        "split": [part for part, _ in told],
        "row": [row.index for _, row in told],
        "where": [row.where for _, row in told],
        "content": [list(row.content) for _, row in told],
        "label": [row.label for _, row in told],
        "group": [row.group for _, row in told],
        "table": [row.table for _, row in told],
        "size": [row.size for _, row in told],
    }
    pq.write_table(pa.table(columns), folder / ROWS)


def read_rows(folder: Path, parts: Sequence[str]) -> dict[str, list[Row]]:
    """What `write_rows` wrote."""
    import pyarrow.parquet as pq

    rows: dict[str, list[Row]] = {part: [] for part in parts}
    for told in pq.read_table(folder / ROWS).to_pylist():
        part = told.pop("split")
        label = tuple(told["label"]) if isinstance(told["label"], list) else told["label"]
        size = tuple(told["size"]) if told["size"] else None
        rows[part].append(Row(tuple(told["content"]), label, told["group"], told["row"],
                              told["where"], told["table"], size))  # fmt: skip
    return rows
