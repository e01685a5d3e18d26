"""Predict the rows of a table, or a text that is given in its place."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hftl.data.encodings import BAD_BYTE, advise_on_encoding
from hftl.data.load import find_text_fault
from hftl.data.rows import RawRow, find_reading_fault
from hftl.data.tables import READERS, guess_format, read_image_files
from hftl.errors import DataError, RecipeError, suggest_closest
from hftl.inference.arguments import check_predict_arguments, is_literal_text
from hftl.inference.load_predictor import load
from hftl.inference.output_table import (
    Columns,
    fit_columns,
    name_columns,
    read_column_types,
    write_table,
)
from hftl.inference.predict import Prediction, Predictor
from hftl.inference.prior import correct_predictions
from hftl.inference.published_scores import find_set_quantile


def predict_table(
    model: str, data: str | Path, output: Path | None, base: str | None = None,
    prior: str | None = None, say: Callable[[str], None] = lambda line: None,
    coverage: float | None = None,
) -> str | None:  # fmt: skip
    """Predict every row of a table, or a text that is given in its place.

    A column of the input with the name of an output column becomes `input.<name>`. Cells that the
    output's format has no form for are changed as `fit_columns` says.

    Args:
        model: a run, a published folder, or a hub id.
        data: csv, jsonl, parquet, txt, or a folder of texts or images; or a text, see
            `is_literal_text`.
        output: a .csv, .jsonl or .parquet file; None returns CSV text.
        base: the adapter's base, where it is not the one it names.
        prior: `auto` or a file, to correct for other shares of classes: `correct_predictions`.
        say: receives a line on what was corrected, and on what a coverage rests on.
        coverage: of the sets of classes, or intervals of numbers, that are predicted too.

    Raises:
        DataError: if the text is empty, or if the table is missing, lacks the text column, or holds
            a row without text.
        RecipeError: if the output's suffix is unknown, its folder is missing, the model cannot be
            loaded, or it has no sets of this coverage.
    """
    check_predict_arguments(data, output, prior, coverage)
    is_text = is_literal_text(str(data))
    predictor = load(model, base)
    table = (
        _build_text_table(str(data), predictor) if is_text else _read_table(Path(data), predictor)
    )
    if coverage is not None:
        _, basis = find_set_quantile(predictor.conformal, predictor.task, coverage)
        say(f"coverage: {basis}")
    encoded = predictor.encode(
        (_read_input(raw, predictor, table) for raw in table.rows),
        [raw.where for raw in table.rows], table.folder,
    )  # fmt: skip
    suffix = ".csv" if output is None else output.suffix
    cells = {column: _list_cells(table.rows, column) for column in table.columns}
    inputs = fit_columns(cells, suffix, table.types)
    results = predictor.predict_encoded(encoded, coverage)
    if prior is not None:
        results, note = correct_predictions(predictor, results, prior)
        say(f"prior: {note}")
    predictions = list(map(_flatten_prediction, results))
    predicted = {name: [row[name] for row in predictions] for name in predictions[0]}
    names = name_columns(inputs, predicted, "input.")
    merged = {names[name]: column for name, column in inputs.items()}
    return _write_columns(merged | fit_columns(predicted, suffix, {}), output)


def _write_columns(columns: Columns, output: Path | None) -> str | None:
    """Write the output, or return it as CSV text.

    Raises:
        RecipeError: if the file cannot be written for another reason than a full disk.
    """
    try:
        return write_table(columns, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RecipeError(
            f"--output {output} cannot be written: {error.strerror}", "Choose another file"
        ) from error


@dataclass(frozen=True)
class _InputTable:
    """Hold the rows that are predicted, the names of their columns, and the columns' types.

    `folder` is what paths of images are relative to, and `path` what was read; None of a text.
    """

    rows: list[RawRow]
    columns: list[str]
    folder: Path | None
    types: Columns
    path: Path | None = None


def _build_text_table(text: str, predictor: Predictor) -> _InputTable:
    """Return a text as the only row of a table.

    Raises:
        DataError: if the model reads anything but one text.
    """
    reads = "pictures" if predictor.modality == "image" else " and ".join(predictor.columns)
    if predictor.task == "token-classification":
        reads = "lists of words"
    elif predictor.modality == "text" and len(predictor.columns) == 1:
        row = RawRow({predictor.columns[0]: text}, 0, "the text")
        return _InputTable([row], predictor.columns, None, {})
    raise DataError(
        f"there is no file or folder {text!r}, and the model reads no single text but {reads}",
        "Give a table or a folder",
    )


def _read_table(data: Path, predictor: Predictor) -> _InputTable:
    """Read the input's rows, and name all their columns, the predictor's among them.

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
    folder = data if data.is_dir() else data.parent
    return _InputTable(rows, list(columns), folder, read_column_types(data), data)


def _read_input(raw: RawRow, predictor: Predictor, table: _InputTable) -> Any:
    """Return the predictor's input in a row.

    Raises:
        DataError: naming the row, if it has none that can be read.
    """
    values: list[Any] = [raw.values.get(column) for column in predictor.columns]
    fault = find_reading_fault(raw)
    if not fault and predictor.modality == "text":
        faults = (find_text_fault(c, raw.values.get(c), predictor.task) for c in predictor.columns)
        fault = next((why for why in faults if why), None)
    if fault:
        fix = "Correct the row"
        if BAD_BYTE in fault and table.path is not None:
            is_folder = table.path == table.folder
            fix = advise_on_encoding(table.path / raw.where if is_folder else table.path)
        raise DataError(f"{raw.where}: {fault}", fix)
    return values[0] if len(values) == 1 else tuple(values)


def _list_cells(rows: Sequence[RawRow], column: str) -> list[object]:
    """Return a column's cells without the bytes of images, which are not repeated."""
    return [_drop_bytes(raw.values.get(column)) for raw in rows]


def _drop_bytes(value: object) -> object:
    if isinstance(value, dict):
        is_image = isinstance(value.get("bytes"), bytes) or value.keys() == {"bytes", "path"}
        return value.get("path") if is_image else {k: _drop_bytes(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = map(_drop_bytes, value)
        return list(items) if isinstance(value, list) else tuple(items)
    return None if isinstance(value, bytes) else value


def _flatten_prediction(prediction: Prediction) -> dict[str, object]:
    """Return the columns label, score and one a class; for a target, label alone. Sets are in the
    column `set`, intervals in `low` and `high`.

    A class that is itself called `label` or `score` gets the column `class.<name>`.
    """
    ours: dict[str, object] = {
        k: value for k, value in prediction.items() if k not in ("scores", "interval")
    }
    if "interval" in prediction:
        ours["low"], ours["high"] = prediction["interval"]
    classes = prediction.get("scores", {})
    names = name_columns(classes, ours, "class.")
    return {**ours, **{names[name]: share for name, share in classes.items()}}
