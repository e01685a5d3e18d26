"""Read the labelled items that models are compared on: the test items of runs, or a table.

A table or folder is read as the first model's training table was. There is no recipe to change, so
messages name no key of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from hftl.config.data import Data, Table
from hftl.config.recipe import Recipe
from hftl.data import prepare
from hftl.data.image_inputs import ImageInputs
from hftl.data.images import warn_of_narrow_images
from hftl.data.labels import get_label_names
from hftl.data.load import load_rows
from hftl.data.normalization import normalize_content, normalize_name
from hftl.data.rows import BadRows, InputSpec, Row
from hftl.data.tables import READERS, SPLIT_NAMES, guess_format, list_folders
from hftl.errors import DataError, RecipeError, suggest_closest
from hftl.inference.find_model import wrap_loading_errors
from hftl.inference.predict import Predictor
from hftl.measure.record import Record
from hftl.publish.published_metadata import PublishedMetadata
from hftl.runtime import paths

TABLE_SUFFIXES = [suffix for suffix, name in paths.TABLE_FORMATS.items() if name != "txt"]
FOLDER_FORMATS = {"text": "textfolder", "image": "imagefolder"}


@dataclass(frozen=True)
class LabelledItems:
    """Hold the items that the models are scored on."""

    rows: list[Row]
    data: Data
    """Says where the files of images are."""


def read_labelled_items(path: Path, predictor: Predictor, folder: Path) -> LabelledItems:
    """Read a table's rows as the model's own recipe reads its columns.

    Args:
        path: a table, or a folder with one folder a class.
        predictor: the model.
        folder: the model's.

    Raises:
        DataError: if it is not there, or a row cannot be used.
        RunFolderError: if the model's record makes no sense.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist", "Check the path")
    published = PublishedMetadata.read(folder).recipe.data
    columns = published.train.model_dump()
    with wrap_loading_errors(folder, (ValidationError,)):
        data = Data(
            task=predictor.task,  # pyright: ignore[reportArgumentType]
            train=Table(path=str(path), **columns),
            max_pixels=published.max_pixels,
        )
    table = data.train
    if path.is_dir():
        _check_folder(path, predictor.modality)
    else:
        inputs = table.text_columns if predictor.modality == "text" else [table.image]
        _check_columns(path, [*inputs, *table.label_columns])
    patch = predictor.inputs.patch_size if isinstance(predictor.inputs, ImageInputs) else 1
    bad = BadRows(fix="Correct it, or leave such rows out")
    rows = load_rows(data, "train", bad, InputSpec(predictor.modality, patch))
    warn_of_narrow_images((row.levels for row in rows), path.name)
    return LabelledItems(rows, data)


def _check_folder(path: Path, modality: str) -> None:
    """Refuse a folder of the other modality, or one that is no folder of classes."""
    fix = f"Give a folder with one folder of {modality}s a class, or a table"
    classes = list_folders(path)
    if not classes:
        raise DataError(f"{path} has no folders, one a class", fix)
    if all(p.name.lower() in SPLIT_NAMES for p in classes):
        raise DataError(f"the folders of {path} name splits, not classes", "Give one of them")
    if (path / "recipe.yaml").exists() or guess_format(path) != FOLDER_FORMATS[modality]:
        raise DataError(f"{path} is no folder of labelled {modality}s", fix)


def _check_columns(path: Path, required: list[str]) -> None:
    """Refuse a table without the columns that the first model was trained with."""
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(
            f"{path}: the suffix {suffix!r} is of no labelled table",
            f"Use {', '.join(TABLE_SUFFIXES)}",
        )
    first = next(iter(READERS[guess_format(path)](path)), None)
    has = [] if first is None else list(map(str, first.values))
    for column in required:
        if first is not None and column not in has:
            raise DataError(
                f"{path.name}: no column {column!r}{suggest_closest(column, has).rstrip('?')}; "
                f"it has {', '.join(has)}",
                f"The first model was trained with {', '.join(map(repr, required))}: name them so",
            )


def read_shared_items(
    models: Sequence[str], folders: Sequence[Path]
) -> tuple[LabelledItems, list[str]]:
    """Return the test items of the runs among the models, and the models of unknown data.

    A model that was fetched or copied is scored on them too: hftl records the data and splits that
    it trained on, and other models may have been trained on these very items.

    Raises:
        RecipeError: if none is a run, or one was split otherwise.
    """
    runs = {model: run for model in models if (run := _find_run(model)) is not None}
    if not runs:
        raise RecipeError(
            f"{' and '.join(dict.fromkeys(models))}: there are no test items to score them on, "
            "as none is a run on this machine",
            "Give a table: --data TABLE",
        )
    first, run = next(iter(runs.items()))
    expected = Record.read(run).data
    unknown: list[str] = []
    for model, folder in zip(models, folders, strict=True):
        data = Record.read(runs[model]).data if model in runs else None
        if data is not None and data.task != expected.task:
            raise RecipeError(
                f"{first} is of the task {expected.task} and {model} of {data.task}: their scores "
                "do not compare",
                "Compare models of one task",
            )
        fingerprint = _read_fingerprint(folder) if data is None else data.fingerprint
        if fingerprint is None:
            unknown.append(model)
        elif fingerprint != expected.fingerprint:
            raise RecipeError(
                f"{model} has other data or splits than {first}", "Give a table: --data TABLE"
            )
    prepared = prepare.read_prepared_data(run / "phases" / "data")
    return LabelledItems(prepared.rows["test"], Recipe.load(run / "recipe.yaml").data), unknown


def _find_run(model: str) -> Path | None:
    """Return the run folder that a model names; None for what was published or fetched."""
    path = paths.resolve_published_path(model, "the model")
    return path if path and (path / "recipe.yaml").exists() else None


def count_known_items(models: Sequence[str], items: LabelledItems) -> dict[str, int]:
    """Return how many of the items each run had in train or validation, for runs that had any."""
    contents = [normalize_content(row.content) for row in items.rows]
    counts: dict[str, int] = {}
    for model in dict.fromkeys(models):
        run = _find_run(model)
        if run is None:
            continue
        rows = prepare.read_prepared_data(run / "phases" / "data").rows
        known = {normalize_content(row.content) for row in rows["train"] + rows["validation"]}
        counts[model] = sum(content in known for content in contents)
    return {model: count for model, count in counts.items() if count}


def _read_fingerprint(folder: Path) -> str | None:
    """Return the hash of the data and splits that a published model names; None without one."""
    data = PublishedMetadata.read(folder).data
    return data.fingerprint if data is not None else None


def normalize_labels(items: LabelledItems, predictor: Predictor) -> LabelledItems:
    """Return the items with their labels spelled alike, as a table or an older run may not.

    Raises:
        DataError: if the model does not know a label.
    """
    rows = list(map(_normalize_row, items.rows))
    for row in rows:
        unknown = set(get_label_names(row.label, predictor.task)) - set(predictor.class_names)
        if unknown:
            raise DataError(
                f"{row.where}: the label {min(unknown)!r} is none of the model's: "
                f"{', '.join(predictor.class_names)}",
                "Correct the label, or give other models",
            )
    return replace(items, rows=rows)


def _normalize_row(row: Row) -> Row:
    if isinstance(row.label, float):
        return row
    if isinstance(row.label, tuple):
        return replace(row, label=tuple(map(normalize_name, row.label)))
    return replace(row, label=normalize_name(row.label))
