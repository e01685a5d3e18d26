"""The labelled table or folder that models are compared on, read as the first was trained.

There is no recipe to change, so what is wrong with it is told in other words than a run's.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.card.plots import plot_compared
from hftl.config.data import Data, Table
from hftl.config.errors import closest
from hftl.config.recipe import Recipe
from hftl.console import table
from hftl.data import labels as answers
from hftl.data import prepare
from hftl.data.image_processing import ImageInputs
from hftl.data.images import warn_narrow
from hftl.data.labels import TagScheme, recognise_tags
from hftl.data.load import BadRows, Reading, Row, load
from hftl.data.normalization import normalise_name
from hftl.data.tables import READERS, SPLIT_NAMES, guess_format
from hftl.errors import DataError, RecipeError
from hftl.inference.find_model import Notes, loading, need_head, published_folder, read_json
from hftl.inference.predict import Predictor, each
from hftl.inference.predict_table import check_output
from hftl.measure import metrics
from hftl.measure.paired_comparison import difference, score, units_of
from hftl.measure.verdict import interval_text
from hftl.models.features import logits
from hftl.runtime import paths
from hftl.runtime.run_folder import write_text

SUFFIXES = ".csv, .tsv, .jsonl, .parquet"
FOLDERS = {"text": "textfolder", "image": "imagefolder"}


@dataclass(frozen=True)
class Items:
    """What the models are scored on; `data` is where pictures are found again."""

    rows: list[Row]
    data: Data


def read_labelled(path: Path, predictor: Predictor, folder: Path) -> Items:
    """A table's rows, read as the model's own recipe reads its columns.

    Args:
        path: a table, or a folder with one folder a class.
        predictor: the model.
        folder: where it lies.

    Raises:
        DataError: if it is not there, or a row cannot be used.
        RunFolderError: if the model's record makes no sense.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist", "Check the path")
    noted = Notes.read(folder).recipe.data
    columns = noted.train.model_dump()
    with loading(folder):
        data = Data(
            task=predictor.task,  # pyright: ignore[reportArgumentType]
            train=Table(path=str(path), **columns),
            max_pixels=noted.max_pixels,
        )
    table = data.train
    if path.is_dir():
        _check_folder(path, predictor.modality)
    else:
        inputs = table.texts if predictor.modality == "text" else [table.image]
        _check_columns(path, [*inputs, *table.labels])
    patch = predictor.inputs.patch if isinstance(predictor.inputs, ImageInputs) else 1
    bad = BadRows(fix="Correct it, or leave it out")
    rows = load(data, "train", bad, Reading(predictor.modality, patch))
    warn_narrow((row.levels for row in rows), path.name)
    return Items(rows, data)


def _check_folder(path: Path, modality: str) -> None:
    """Refuses a folder of the other kind, or one that is no folder of classes."""
    fix = f"Give a folder with one folder of {modality}s a class, or a table"
    classes = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not classes:
        raise DataError(f"{path} has no folders, one a class", fix)
    if all(p.name.lower() in SPLIT_NAMES for p in classes):
        raise DataError(f"the folders of {path} name splits, not classes", "Give one of them")
    if (path / "recipe.yaml").exists() or guess_format(path) != FOLDERS[modality]:
        raise DataError(f"{path} is no folder of labelled {modality}s", fix)


def _check_columns(path: Path, wanted: list[str]) -> None:
    """Refuses a table that lacks what the first model was trained with."""
    name = path.suffix.lower()
    if name not in SUFFIXES.split(", ") and name not in (".json", ".ndjson"):
        raise DataError(f"{path}: the suffix {name!r} is of no labelled table", f"Use {SUFFIXES}")
    first = next(iter(READERS[guess_format(path)](path)), None)
    has = [] if first is None else list(map(str, first.values))
    for column in wanted:
        if first is not None and column not in has:
            raise DataError(
                f"{path.name}: no column {column!r}{closest(column, has).rstrip('?')}; it has "
                f"{', '.join(has)}",
                f"The first model was trained with {', '.join(map(repr, wanted))}: name them so",
            )


# `hftl compare`: several runs or adapters on the same items, their bases loaded once.


OUTPUTS = (".csv", ".png")


def compare(
    models: Sequence[str], data: Path | None, output: Path | None, base: str | None = None
) -> str:
    """Scores every model on the same items, and each against the first.

    Args:
        models: runs, published folders or hub ids.
        data: a labelled table; None takes the test items of the runs.
        base: of every adapter, where it is not the one each names.
        output: a .csv, the plot beside it, or a .png of the plot alone.

    Returns:
        The table as text.

    Raises:
        RecipeError: if a model cannot be loaded, they differ in task or labels, or there is no
            data to score them on.
        DataError: if the table cannot be read, or has a label that no model knows.
        HubError: if a hub id cannot be had.
    """
    check_output(output, OUTPUTS, [".png"])
    folders = [_with_head(model) for model in models]
    shared, unknown = (None, []) if data else _shared_items(models, folders)
    found: dict[int, np.ndarray] = {}
    first: Predictor | None = None
    items: Items | None = None
    scheme: TagScheme | None = None
    for number, predictor in each(folders, base):
        predictor = _normalise_predictor(models[number], predictor)
        if first is None or items is None:
            first = predictor
            items = shared or read_labelled(Path(data or ""), predictor, folders[number])
            items = replace(items, rows=list(map(_normalise_row, items.rows)))
            _check_labels(items, predictor)
            scheme = _tag_scheme(models[number], folders[number], predictor)
        _check_alike(models[number], predictor, first)
        found[number] = _predicted(predictor, items, first.names, scheme)
    assert first is not None and items is not None
    labels = answers.measured([row.label for row in items.rows], first.task, first.names, scheme)
    rows = _rows(models, folders, labels, found, _metric(folders[0], first.task), items)
    if output is not None:
        _write(rows, output)
    warnings = [
        f"\n  warning: what {model} was trained on is not recorded; if these items were part of "
        "it, its score is too good"
        for model in unknown
    ]
    return _shown(rows, len(items.rows)) + "".join(warnings)


def _with_head(model: str) -> Path:
    folder = published_folder(model)
    need_head(folder, model)
    return folder


def _shared_items(models: Sequence[str], folders: Sequence[Path]) -> tuple[Items, list[str]]:
    """Return the test items of the runs among the models, and the models whose data are unknown.

    A model that was fetched or copied is scored on them too: hftl's own tell the data and splits
    they were made with, and those of others may have been trained on them.

    Raises:
        RecipeError: if none is a run, or one was split otherwise.
    """
    places_ = [paths.find(model, "the model") for model in models]
    runs = {
        model: path
        for model, path in zip(models, places_, strict=True)
        if path is not None and (path / "recipe.yaml").exists()
    }
    if not runs:
        raise RecipeError(
            f"{' and '.join(dict.fromkeys(models))}: there are no test items to score them on, "
            "as none is a run on this machine",
            "Give a table: --data TABLE",
        )
    first, run = next(iter(runs.items()))
    expected = _fingerprint(run / "record.json")
    unknown: list[str] = []
    for model, folder in zip(models, folders, strict=True):
        record = runs[model] / "record.json" if model in runs else folder / "hftl.json"
        fingerprint = _fingerprint(record)
        if fingerprint is None:
            unknown.append(model)
        elif fingerprint != expected:
            raise RecipeError(
                f"{model} has other data or splits than {first}", "Give a table: --data TABLE"
            )
    prepared = prepare.read(run / "phases" / "data")
    return Items(prepared.rows["test"], Recipe.load(run / "recipe.yaml").data), unknown


def _fingerprint(record: Path) -> str | None:
    """Return the hash of the data and splits in a record; None where it has none."""
    data = read_json(record).get("data")
    return data.get("fingerprint") if isinstance(data, dict) else None


def _normalise_predictor(model: str, predictor: Predictor) -> Predictor:
    """Return the model with its classes named as those of a table, whoever has published it.

    Raises:
        RecipeError: if two of its classes are one so named.
    """
    names = list(map(normalise_name, predictor.names))
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise RecipeError(
            f"{model} has several classes that differ from {double!r} only in spelling",
            "Train it on labels of one spelling",
        )
    return replace(predictor, names=names)


def _normalise_row(row: Row) -> Row:
    """Return the row of a table or of an older run with its labels named alike."""
    if isinstance(row.label, float):
        return row
    if isinstance(row.label, tuple):
        return replace(row, label=tuple(map(normalise_name, row.label)))
    return replace(row, label=normalise_name(row.label))


def _check_labels(items: Items, predictor: Predictor) -> None:
    for row in items.rows:
        strange = set(answers.names_of(row.label, predictor.task)) - set(predictor.names)
        if strange:
            raise DataError(
                f"{row.where}: the label {min(strange)!r} is none of the model's: "
                f"{', '.join(predictor.names)}",
                "Correct the label, or give other models",
            )


def _check_alike(model: str, predictor: Predictor, first: Predictor) -> None:
    """Refuses what answers another question than the first; the order of labels may differ."""
    facts = [(one.task, one.modality, len(one.columns)) for one in (predictor, first)]
    if facts[0] != facts[1]:
        words = [f"{task} of {kind}s" for task, kind, _ in facts]
        raise RecipeError(
            f"{model} does {words[0]}, and the first {words[1]}", "Compare models of one task"
        )
    if set(predictor.names) != set(first.names):
        raise RecipeError(
            f"{model} has the labels {', '.join(sorted(predictor.names))}, and the first "
            f"{', '.join(sorted(first.names))}",
            "Compare models with the same labels",
        )


def _tag_scheme(model: str, folder: Path, predictor: Predictor) -> TagScheme | None:
    """Return the scheme that a model's folder notes, or that its tags show; None without tags.

    Raises:
        DataError: if the tags are of no scheme.
    """
    if predictor.task != "token-classification":
        return None
    noted = Notes.read(folder).tag_scheme
    return noted or recognise_tags(tuple(predictor.names), f"{model}: ")


def _predicted(
    predictor: Predictor, items: Items, names: list[str], scheme: TagScheme | None
) -> np.ndarray:
    """What metrics compare, in the order of `names`, whatever order the model has them in."""
    inputs = predictor.inputs
    if isinstance(inputs, ImageInputs):
        inputs = replace(inputs, data=items.data, _known={})
    rows = items.rows
    tokens = predictor.task == "token-classification"
    words = [len(row.content) if tokens else 1 for row in rows]
    found = logits(predictor.model, inputs.encode(rows), inputs, predictor.device)
    labels, _ = answers.told(found, predictor.task, predictor.names, words)
    return answers.measured(labels, predictor.task, names, scheme)


def _metric(folder: Path, task: str) -> metrics.Metric:
    """The first model's own metric, where it has recorded one."""
    name = Notes.read(folder).metric or metrics.SELECTION[task]
    return metrics.find(name, task)


def _rows(
    models: Sequence[str], folders: Sequence[Path], labels: np.ndarray,
    found: dict[int, np.ndarray], metric: metrics.Metric, items: Items,
) -> list[dict[str, Any]]:  # fmt: skip
    units = units_of(items.rows)
    return [
        {
            "model": model,
            "metric": metric.name,
            **score(metric, labels, found[number], units),
            "against_first": difference(metric, labels, found[number], found[0], units)
            if number
            else None,
            "parameters": parameters(folders[number]),
        }
        for number, model in enumerate(models)
    ]


def parameters(folder: Path) -> int:
    """Numbers in the folder's weights: the adapter and its head, or the whole model."""
    from safetensors import safe_open

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    return count


def _shown(rows: list[dict[str, Any]], count: int) -> str:
    metric = rows[0]["metric"]
    cells = [("model", f"{metric} [95 %]", "against the first", "parameters")]
    for row in rows:
        low, high = row["ci95"] or (None, None)
        told = f"{row['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
        gain = row["against_first"]
        cells.append((row["model"], told, "" if gain is None else interval_text(gain),
                      f"{row['parameters']:,}"))  # fmt: skip
    return f"{table(cells)}\n  {count:,} items; differences are paired, positive is better"


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    """The figures as CSV, and the plot beside them."""
    plot_compared(rows, output.with_suffix(".png"))
    if output.suffix == ".png":
        return
    buffer = io.StringIO(newline="")
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(output, buffer.getvalue())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    gain = row["against_first"] or {"value": None, "ci95": None}
    low, high = row["ci95"] or (None, None)
    worst, best = gain["ci95"] or (None, None)
    return {
        "model": row["model"], "metric": row["metric"], "value": row["value"], "low": low,
        "high": high, "difference": gain["value"], "difference_low": worst,
        "difference_high": best, "parameters": row["parameters"],
    }  # fmt: skip
