"""`hftl predict` on a table: the input's rows, and what the model says of each."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from hftl.data.files import READERS, not_utf8
from hftl.data.load import guess_format
from hftl.errors import DataError, RecipeError
from hftl.explain import closest
from hftl.predict import load
from hftl.rundir import write_text

OUTPUTS = (".csv", ".jsonl", ".parquet")


def predict_table(
    model: str, data: Path, output: Path | None, base: str | None = None
) -> str | None:
    """Predicts every row of a table.

    A column of the input that has the name of one of ours is kept as `input.<name>`.

    Args:
        model: a run, a published folder, or a hub id.
        data: csv, jsonl, parquet, txt or a folder of texts.
        output: a .csv, .jsonl or .parquet file; None returns CSV text.
        base: the adapter's base, where it is not the one it names.

    Raises:
        DataError: if the table is missing, lacks the text column, or holds a row without text.
        RecipeError: if the output's suffix is unknown, or the model cannot be loaded.
    """
    if output is not None and output.suffix not in OUTPUTS:
        raise RecipeError(
            f"--output {output}: unknown suffix {output.suffix!r}", f"Use {', '.join(OUTPUTS)}"
        )
    if not data.exists():
        raise DataError(f"{data} does not exist", "Check the path")
    rows = list(READERS[guess_format(data)](data))
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    predictor = load(model, base)
    texts = []
    for raw in rows:
        for column in predictor.texts:
            if column not in raw.values:
                has = list(map(str, raw.values))
                raise DataError(
                    f"{data.name}: no column {column!r}{closest(column, has).rstrip('?')}; it has "
                    f"{', '.join(has)}",
                    f"Name the text column {column!r}",
                )
            value = raw.values[column]
            if raw.fault or not isinstance(value, str) or not value.strip() or not_utf8(value):
                raise DataError(f"{raw.where}: {raw.fault or 'no usable text'}", "Correct the row")
        texts.append(tuple(raw.values[column] for column in predictor.texts))
    found = [_columns(told) for told in predictor.predict(texts)]
    merged = [_merge(raw.values, told) for raw, told in zip(rows, found, strict=True)]
    return _write(merged, output)


def _columns(told: dict[str, Any]) -> dict[str, Any]:
    """label, score and one column a class; for a target, label alone."""
    return {k: v for k, v in told.items() if k != "scores"} | told.get("scores", {})


def _merge(values: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    kept = {f"input.{key}" if key in told else key: value for key, value in values.items()}
    return kept | told


def _write(rows: list[dict[str, Any]], output: Path | None) -> str | None:
    if output is not None and output.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        aside = output.with_name(f".tmp-{output.name}")
        pq.write_table(pa.Table.from_pylist(rows), aside)
        aside.rename(output)
        return None
    if output is not None and output.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    if output is None:
        return text
    write_text(output, text)
    return None
