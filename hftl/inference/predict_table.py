"""Predict the rows of a table, and check before any work that an output file can be written."""

import csv
import errno
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftl.data.load import find_text_fault
from hftl.data.rows import RawRow, has_invalid_utf8, normalize_newlines
from hftl.data.tables import READERS, guess_format, read_image_files
from hftl.errors import DataError, RecipeError, suggest_closest
from hftl.inference.predict import Prediction, Predictor, load
from hftl.runtime.run_folder import write_text


def check_output(output: Path | None, suffixes: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Check that a file can be written.

    Args:
        output: the file; None is the screen.
        suffixes: the allowed ones.
        beside: suffixes of further files of the same name that are written too.

    Raises:
        RecipeError: if it cannot.
    """
    if output is None:
        return
    if output.suffix not in suffixes:
        raise RecipeError(
            f"--output {output}: unknown suffix {output.suffix!r}", f"Use {', '.join(suffixes)}"
        )
    if not output.parent.is_dir():
        raise RecipeError(f"--output {output}: there is no folder {output.parent}", "Make it")
    for path in (output, *map(output.with_suffix, beside)):
        _check_writable(path)


def _check_writable(path: Path) -> None:
    why = "is a folder" if path.is_dir() else None
    if path.exists() and not os.access(path, os.W_OK):
        why = "may not be written"
    try:
        # Permissions are not enough: the system may still refuse, as on a read-only disk.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
    if why is not None:
        raise RecipeError(f"--output {path} {why}", "Choose another file")


OUTPUT_SUFFIXES = (".csv", ".jsonl", ".parquet")
LINE_SEPARATORS = "\x85\u2028\u2029"
"""Characters that JSON leaves unescaped, though `str.splitlines` ends a line at them."""


def predict_table(
    model: str, data: Path, output: Path | None, base: str | None = None
) -> str | None:
    """Predict every row of a table.

    A column of the input with the name of an output column becomes `input.<name>`.

    Args:
        model: a run, a published folder, or a hub id.
        data: csv, jsonl, parquet, txt, or a folder of texts or images.
        output: a .csv, .jsonl or .parquet file; None returns CSV text.
        base: the adapter's base, where it is not the one it names.

    Raises:
        DataError: if the table is missing, lacks the text column, or holds a row without text.
        RecipeError: if the output's suffix is unknown, its folder is missing, or the model cannot
            be loaded.
    """
    check_output(output, OUTPUT_SUFFIXES)
    if output is not None and output.resolve() == data.resolve():
        raise RecipeError(f"--output {output} is the input itself", "Choose another file")
    if not data.exists():
        raise DataError(f"{data} does not exist", "Check the path")
    predictor = load(model, base)
    raws, columns = _read_rows(data, predictor)
    folder = data if data.is_dir() else data.parent
    encoded = predictor.encode(
        (_read_input(raw, predictor) for raw in raws), [raw.where for raw in raws], folder
    )
    predictions = map(_flatten_prediction, predictor.predict_encoded(encoded))
    merged = [
        _merge_columns({**columns, **_drop_image_bytes(raw)}, prediction)
        for raw, prediction in zip(raws, predictions, strict=True)
    ]
    try:
        return _write_table(merged, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RecipeError(
            f"--output {output} cannot be written: {error.strerror}", "Choose another file"
        ) from error


def _read_rows(data: Path, predictor: Predictor) -> tuple[list[RawRow], dict[str, None]]:
    """Read the input's rows, and all their columns, the predictor's among them.

    Raises:
        DataError: if there is no row, or no column that the model reads.
    """
    file_format = guess_format(data)
    if data.is_dir() and predictor.modality == "image":
        rows = list(read_image_files(data))
    else:
        rows = list(READERS[file_format](data))
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    required = predictor.columns
    if data.is_dir() or (file_format == "txt" and len(required) == 1):
        # The content of a text file or a folder has no column name of its own.
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
                f"it has {', '.join(has)}",
                f"Name the {predictor.modality} column {column!r}",
            )
    return rows, columns


def _read_input(raw: RawRow, predictor: Predictor) -> Any:
    """Return the predictor's input in a row.

    Raises:
        DataError: naming the row, if it has none that can be read.
    """
    values: list[Any] = [raw.values.get(column) for column in predictor.columns]
    fault = raw.fault
    if any(isinstance(value, str) and has_invalid_utf8(value) for value in raw.values.values()):
        fault = "not valid UTF-8"
    if not fault and predictor.modality == "text":
        faults = (find_text_fault(c, raw.values.get(c), predictor.task) for c in predictor.columns)
        fault = next((why for why in faults if why), None)
    if fault:
        raise DataError(f"{raw.where}: {fault}", "Correct the row")
    return values[0] if len(values) == 1 else tuple(values)


def _drop_image_bytes(raw: RawRow) -> dict[str, object]:
    """Return the row's values without the bytes of images, which are not repeated."""
    return {key: _drop_bytes(value) for key, value in raw.values.items()}


def _drop_bytes(value: object) -> object:
    if isinstance(value, dict) and "bytes" in value:
        return value.get("path")
    return None if isinstance(value, bytes) else value


def _flatten_prediction(prediction: Prediction) -> dict[str, object]:
    """Return the columns label, score and one a class; for a target, label alone.

    A class that is itself called `label` or `score` gets the column `class.<name>`.
    """
    ours: dict[str, object] = {k: value for k, value in prediction.items() if k != "scores"}
    classes = prediction.get("scores", {})
    return {**ours, **{f"class.{k}" if k in ours else k: p for k, p in classes.items()}}


def _merge_columns(values: dict[str, object], prediction: dict[str, object]) -> dict[str, object]:
    inputs = {f"input.{key}" if key in prediction else key: value for key, value in values.items()}
    return inputs | prediction


def _format_cell(value: object) -> object:
    """Return a value as one cell of a CSV table: lists as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def _format_json_line(row: dict[str, object]) -> str:
    """Return a row as one line, also for readers that end a line at U+2028."""
    line = json.dumps(row, ensure_ascii=False)
    for separator in LINE_SEPARATORS:
        line = line.replace(separator, f"\\u{ord(separator):04x}")
    return line + "\n"


def _write_table(rows: list[dict[str, object]], output: Path | None) -> str | None:
    if output is not None and output.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        aside = output.with_name(f".tmp-{output.name}")
        pq.write_table(pa.Table.from_pylist(rows), aside)
        aside.rename(output)
        return None
    if output is not None and output.suffix == ".jsonl":
        text = "".join(_format_json_line(row) for row in rows)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        # csv.writer does not quote a carriage return, and every reader ends a row at it.
        writer.writerow([normalize_newlines(name) for name in rows[0]])
        writer.writerows([_format_cell(row[name]) for name in rows[0]] for row in rows)
        text = buffer.getvalue()
    if output is None:
        return text
    write_text(output, text)
    return None
