"""Predict the rows of a table, or a text that is given in its place."""

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hftl.data.encodings import BAD_BYTE, advise_on_encoding
from hftl.errors import DataError, RecipeError
from hftl.inference.arguments import check_predict_arguments, ends_as_file, is_literal_text
from hftl.inference.input_table import (
    InputTable,
    build_text_table,
    find_row_fault,
    get_input,
    read_table,
)
from hftl.inference.load_predictor import load
from hftl.inference.output_table import (
    Columns,
    fit_columns,
    name_columns,
    round_numbers,
    write_table,
)
from hftl.inference.predict import Encoded, Prediction, Predictor
from hftl.inference.prior import correct_predictions
from hftl.inference.published_scores import find_set_quantile

FAULT_COLUMN = "fault"
BAD_ROW_FIX = "Correct it, or give --bad-rows skip: such rows then get no label"
SHARE_DIGITS, TARGET_DIGITS = 6, 7
"""Significant digits in CSV of probabilities, and of targets, which are computed in float32."""


def predict_table(
    model: str, data: str | Path, output: Path | None, base: str | None = None,
    prior: str | None = None, say: Callable[[str], None] = lambda line: None,
    coverage: float | None = None, bad_rows: str | None = None,
) -> str | None:  # fmt: skip
    """Predict every row of a table, or a text that is given in its place.

    A column of the input with the name of an output column becomes `input.<name>`. Cells that the
    output's format has no form for are changed as `fit_columns` says. Where bad rows are skipped,
    they stay in the output without a label, and the column `fault` says why.

    Args:
        model: a run, a published folder, or a hub id.
        data: csv, jsonl, parquet, txt, one picture, or a folder of texts or images; or a text, see
            `is_literal_text`.
        output: a .csv, .jsonl or .parquet file; None returns CSV text.
        base: the adapter's base, where it is not the one it names.
        prior: `auto` or a file, to correct for other shares of classes: `correct_predictions`.
        say: receives a line on what was corrected, on what a coverage rests on, on bad rows, and on
            a text that ends as a file's name does.
        coverage: of the sets of classes, or intervals of numbers, that are predicted too.
        bad_rows: refuse or skip; None is as the model's recipe says.

    Raises:
        DataError: if the text is empty, or if the table is missing, lacks the text column, or holds
            a row that cannot be read and is not skipped, or none that can.
        RecipeError: if the output's suffix is unknown, its folder is missing, the model cannot be
            loaded, or it has no sets of this coverage.
    """
    check_predict_arguments(data, output, prior, coverage)
    is_text = is_literal_text(str(data))
    if is_text and ends_as_file(str(data)):
        say(f"text: {str(data)!r} is no file that is there, and is read as a text itself")
    predictor = load(model, base)
    skips = not is_text and (bad_rows or predictor.bad_rows) == "skip"
    table = (build_text_table(str(data), predictor) if is_text
             else read_table(Path(data), predictor))  # fmt: skip
    if coverage is not None:
        _, basis = find_set_quantile(predictor.conformal, predictor.task, coverage)
        say(f"coverage: {basis}")
    encoded, faults = _encode_rows(table, predictor, skips)
    suffix = ".csv" if output is None else output.suffix
    inputs = fit_columns(table.list_cells(), suffix, table.types)
    results = predictor.predict_encoded(encoded, coverage)
    if prior is not None:
        results, note = correct_predictions(predictor, results, prior)
        say(f"prior: {note}")
    predicted = _list_columns(results, table, faults if skips else None)
    if suffix == ".csv":
        digits = TARGET_DIGITS if predictor.task == "regression" else SHARE_DIGITS
        predicted = {name: round_numbers(cells, digits) for name, cells in predicted.items()}
    names = name_columns(inputs, predicted, "input.")
    merged = {names[name]: column for name, column in inputs.items()}
    text = _write_columns(merged | fit_columns(predicted, suffix, {}), output)
    if faults:
        say(
            f"bad rows: {len(faults)} of {len(table.rows)} without a label, see the column "
            f"{FAULT_COLUMN}; the first: {faults[min(faults)]}"
        )
    return text


def _encode_rows(
    table: InputTable, predictor: Predictor, skips: bool
) -> tuple[list[Encoded], dict[int, str]]:
    """Return what the encoder takes of each row that can be read, and why others cannot, by number.

    Raises:
        DataError: naming the row, if one cannot be read and is not skipped, or if none can.
    """
    faults: dict[int, str] = {}

    def reject(number: int, what: str) -> None:
        if not skips:
            fix = BAD_ROW_FIX
            if BAD_BYTE in what and table.path is not None:
                is_folder = table.path == table.folder
                where = table.rows[number].where
                fix = advise_on_encoding(table.path / where if is_folder else table.path)
            raise DataError(what, fix)
        faults[number] = what

    usable: list[int] = []
    for number, raw in enumerate(table.rows):
        why = find_row_fault(raw, predictor)
        if why is None:
            usable.append(number)
        else:
            reject(number, f"{raw.where}: {why}")
    encoded = predictor.encode(
        (get_input(table.rows[n], predictor) for n in usable),
        [table.rows[n].where for n in usable],
        table.folder, lambda n, what: reject(usable[n], what),
    )  # fmt: skip
    if not encoded:
        raise DataError(f"no row can be read; of the first: {faults[0]}", "Correct them")
    return encoded, faults


def _list_columns(
    results: Sequence[Prediction], table: InputTable, faults: Mapping[int, str] | None
) -> dict[str, list[object]]:
    """Return the predicted columns, with empty cells for bad rows and why they are bad.

    Args:
        results: of the rows that are not bad, in their order.
        table: the input.
        faults: why each bad row is one, by its number; None where none is allowed.
    """
    if table.words is not None:
        (words,) = results
        return {key: list(words[key]) for key in ("label", "score")}  # pyright: ignore
    rows = list(map(_flatten_prediction, results))
    if faults is None:
        return {name: [row[name] for row in rows] for name in rows[0]}
    good = iter(rows)
    blank: dict[str, object] = {name: None for name in rows[0]}
    filled = [blank if n in faults else next(good) for n in range(len(table.rows))]
    columns: dict[str, list[object]] = {name: [row[name] for row in filled] for name in blank}
    free = name_columns([FAULT_COLUMN], blank, "row.")[FAULT_COLUMN]
    columns[free] = [faults.get(n) for n in range(len(filled))]
    return columns


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
