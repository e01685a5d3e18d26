"""`hftl predict` on a table: the input's rows, and what the model says of each."""

import csv
import errno
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftl.data.files import READERS, Raw, not_utf8
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
        RecipeError: if the output's suffix is unknown, its folder is missing, or the model cannot
            be loaded.
    """
    _check_output(output)
    if output is not None and output.resolve() == data.resolve():
        raise RecipeError(f"--output {output} is the input itself", "Choose another file")
    if not data.exists():
        raise DataError(f"{data} does not exist", "Check the path")
    file_format = guess_format(data)
    rows = list(READERS[file_format](data))
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    predictor = load(model, base)
    if file_format == "txt" and len(predictor.texts) == 1:
        # The lines of a text file have no column name of their own.
        rows = [replace(raw, values={predictor.texts[0]: raw.values["text"]}) for raw in rows]
    columns = dict.fromkeys(key for raw in rows for key in raw.values)
    for column in predictor.texts:
        if column not in columns:
            has = list(map(str, columns))
            raise DataError(
                f"{data.name}: no column {column!r}{closest(column, has).rstrip('?')}; it has "
                f"{', '.join(has)}",
                f"Name the text column {column!r}",
            )
    texts = [_texts(raw, predictor.texts) for raw in rows]
    found = [_columns(told) for told in predictor.predict(texts)]
    merged = [_merge(columns | raw.values, told) for raw, told in zip(rows, found, strict=True)]
    try:
        return _write(merged, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RecipeError(
            f"--output {output} cannot be written: {error.strerror}", "Choose another file"
        ) from error


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in OUTPUTS:
        raise RecipeError(
            f"--output {output}: unknown suffix {output.suffix!r}", f"Use {', '.join(OUTPUTS)}"
        )
    if not output.parent.is_dir():
        raise RecipeError(f"--output {output}: there is no folder {output.parent}", "Make it")


def _texts(raw: Raw, wanted: list[str]) -> tuple[str, ...]:
    """The row's texts.

    Raises:
        DataError: naming the row, if it cannot be read or holds no text.
    """
    fault = raw.fault
    if any(isinstance(value, str) and not_utf8(value) for value in raw.values.values()):
        fault = "not valid UTF-8"
    texts: tuple[Any, ...] = tuple(raw.values.get(column) for column in wanted)
    if not fault and not all(isinstance(text, str) and text.strip() for text in texts):
        fault = "no usable text"
    if fault:
        raise DataError(f"{raw.where}: {fault}", "Correct the row")
    return texts


def _columns(told: dict[str, Any]) -> dict[str, Any]:
    """label, score and one column a class; for a target, label alone.

    A class that is itself called `label` or `score` gets the column `class.<name>`.
    """
    ours = {key: value for key, value in told.items() if key != "scores"}
    classes = told.get("scores", {})
    return ours | {f"class.{k}" if k in ours else k: value for k, value in classes.items()}


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
