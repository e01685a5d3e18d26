"""The labelled table or folder that models are compared on, read as the first was trained.

There is no recipe to change, so what is wrong with it is told in other words than a run's.
"""

from dataclasses import dataclass
from pathlib import Path

from hftl.data.files import READERS, SPLIT_NAMES, guess_format
from hftl.data.levels import warn_narrow
from hftl.data.load import BadRows, Reading, Row, load
from hftl.data.pixels import ImageInputs
from hftl.errors import DataError
from hftl.explain import closest
from hftl.sections.data import Data, Table
from hftl.use.locate import loading
from hftl.use.notes import Notes
from hftl.use.predict import Predictor

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
