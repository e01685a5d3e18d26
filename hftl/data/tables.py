"""Read tables of every format: files, folders of texts or images, and datasets of the Hub.

A reader is a function from a path to an iterator of `RawRow`, each with the file and line that it
comes from. To read another format, write one such function and name it in `READERS`, in
`Table.format` and, where a suffix implies it, in `paths.TABLE_FORMATS`.
"""

import json
import os
import shlex
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hftl.config.data import Data, GeneralTable, Table
from hftl.data.csv_reader import read_csv
from hftl.data.encodings import SPREADSHEET_ADVICE, describe_other_format, read_start
from hftl.data.file_kinds import refuse_other_format
from hftl.data.rows import RawRow, has_invalid_utf8, open_text
from hftl.errors import DataError, DataWarning, HubError, RecipeError, format_error_line
from hftl.runtime import paths

TABLE_NAMES = ("train", "validation", "test", "unlabeled", "general")
"""The tables of a recipe."""
UNLABELLED_TABLES = ("unlabeled", "general")
"""Tables without labels: folders are read flat, every file for itself, unless general data name a
label."""
IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm".split()
)
"""Suffixes of image files; used only to guess what a folder holds."""
TEXT_SUFFIXES = frozenset((".txt",))
MAX_DEPTH = 100
"""Levels of a JSON line, at most: Python gives up where functions call themselves 1000 times."""
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
JUNK_NAMES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"))
"""What systems leave in folders, in lower case; their other such files are hidden."""
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object a line."""
    refuse_other_format(path)
    with open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        columns = None
        # Bad lines before the first good one wait until its columns are known.
        early: list[RawRow] = []
        for index, (number, line) in enumerate(lines):
            values, fault = _parse_json_object(line)
            raw = RawRow(values, index, f"{path.name} line {number}", fault)
            if columns is None and fault:
                early.append(raw)
                continue
            if columns is None:
                columns = dict.fromkeys(values)
                yield from (replace(bad, values=columns) for bad in early)
            yield replace(raw, values=columns | values)
    if columns is None and early:
        raise DataError(f"{early[0].where}: {early[0].fault}", _advise_on_lines(path))


def _advise_on_lines(path: Path) -> str:
    """Return how a file without an object a line, such as a list of them, becomes one with."""
    lines = path.with_name(f"{path.stem}-lines.jsonl")
    is_list = read_start(path).lstrip()[:1] == b"["
    return "Write one object a line" + (
        f": jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(str(lines))}" if is_list else ""
    )


def _parse_json_object(line: str) -> tuple[dict[str, object], str | None]:
    """Return the object that a line holds, or an empty one and why there is none."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return {}, f"not a JSON object a line ({error})"
    except RecursionError:
        return {}, "its JSON is nested too deep"
    if not isinstance(values, dict):
        return {}, f"not a JSON object but a {type(values).__name__}"
    if any(map(has_invalid_utf8, values)):
        return {}, "a key that is not valid UTF-8"
    return ({}, "its JSON is nested too deep") if _is_too_deep(values) else (values, None)


def _is_too_deep(value: dict[str, object]) -> bool:
    """Return whether a value is nested deeper than functions that call themselves may go."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        values = (v.values() if isinstance(v, dict) else v for v in level)
        level = [item for items in values for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file."""
    import pyarrow.parquet
    from pyarrow.lib import ArrowInvalid

    # Of metadata that are not what they say pyarrow raises OSError without a number of the system.
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        other = describe_other_format(path)
        if other is not None:
            raise DataError(f"{path.name} {other[0]}", other[1]) from error
        message = format_error_line(error)
        raise DataError(f"{path.name}: not valid Parquet: {message}", "Write it again") from error
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path.name}: two columns are named {twice!r}", "Rename one")
    index = 0
    batches = file.iter_batches(4096)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{path.name}: damaged after row {index}: {format_error_line(error)}",
                "Write it again",
            ) from error
        if batch is None:
            return
        for values in rows:
            yield RawRow(values, index, f"{path.name} row {index + 1}")
            index += 1


def read_txt(path: Path) -> Iterator[RawRow]:
    """Yield each line as a row with the column `text`."""
    refuse_other_format(path, is_table=False)
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            yield RawRow({"text": line.rstrip("\r\n")}, number - 1, f"{path.name} line {number}")


def read_textfolder(path: Path) -> Iterator[RawRow]:
    """Yield one row a text file, with columns `text` and `label`; each class is a folder."""
    files = (
        f for c in _list_class_folders(path, TEXT_SUFFIXES) for f in _list_files(c) if f.is_file()
    )
    for index, file in enumerate(files):
        where = file.relative_to(path).as_posix()
        with open_text(file) as opened:
            yield RawRow({"text": opened.read(), "label": where.split("/")[0]}, index, where)


def read_text_files(path: Path) -> Iterator[RawRow]:
    """Yield every file below a folder as one row with the column `text`, but hidden files."""
    for index, file in enumerate(_list_files(path)):
        with open_text(file) as opened:
            yield RawRow({"text": opened.read()}, index, file.relative_to(path).as_posix())


def read_imagefolder(path: Path) -> Iterator[RawRow]:
    """Yield one row a file, with columns `image` (absolute path) and `label`; a class is a folder.

    A file that is not an image stays a row: `decode_image` says why it cannot be read.
    """
    files = (
        file for folder in _list_class_folders(path, IMAGE_SUFFIXES) for file in _list_files(folder)
    )
    for index, file in enumerate(files):
        where = file.relative_to(path).as_posix()
        yield RawRow({"image": file.absolute(), "label": where.split("/")[0]}, index, where)


def read_image_files(path: Path) -> Iterator[RawRow]:
    """Yield every file below a folder as one row with the column `image`, relative to it."""
    for index, file in enumerate(_list_files(path)):
        where = file.relative_to(path).as_posix()
        yield RawRow({"image": where}, index, where)


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "txt": read_txt,
    "textfolder": read_textfolder,
    "imagefolder": read_imagefolder,
}


def has_mostly_images(folder: Path) -> bool:
    """Return whether most files below the folder have an image's suffix."""
    images = [file.suffix.lower() in IMAGE_SUFFIXES for file in _list_files(folder)]
    return 2 * sum(images) > len(images)


def guess_format(path: Path) -> str:
    """Return the format that a file's suffix, or being a folder, implies.

    Raises:
        DataError: if it implies none, the folder is empty, or it is neither file nor folder.
    """
    refuse_device(path)
    if path.is_dir() and not _list_files(path):
        raise DataError(f"{path.name} is an empty folder", "Check the path")
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        raise DataError(
            f"{path.name} is one picture", "Give its folder, or a table that names pictures"
        )
    if path.is_dir():
        return "imagefolder" if has_mostly_images(path) else "textfolder"
    name = paths.TABLE_FORMATS.get(path.suffix.lower())
    if path.suffix.lower() in SPREADSHEETS:
        raise DataError(
            f"{path.name}: the suffix {path.suffix!r} is of a spreadsheet, which is not read",
            SPREADSHEET_ADVICE,
        )
    if name is None:
        raise DataError(
            f"{path.name}: the suffix {path.suffix!r} says no format",
            f"Rename it, or set the table's format to one of {', '.join(READERS)}",
        )
    return name


def refuse_device(path: Path) -> None:
    """Refuse a pipe or a device, whose end may never come, and which is read more than once.

    Raises:
        DataError: naming it.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is neither a file nor a folder", "Save its content as a file")


def _list_class_folders(path: Path, suffixes: Container[str]) -> list[Path]:
    """Return the folders, one a class; warn of files of these suffixes that lie beside them."""
    folders = list_folders(path)
    if not folders:
        raise DataError(f"{path.name} has no folders, one a class", "Check the path")
    names = [folder.name for folder in folders]
    if all(name.lower() in SPLIT_NAMES for name in names):
        raise DataError(
            f"the folders of {path.name} are {' and '.join(names)}, which name splits, not classes",
            f"Give each its own table: data.train={path}/{names[-1]}, data.test=...",
        )
    loose = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes]
    loose = [name for name in loose if not _is_junk(name) and (path / name).is_file()]
    if loose:
        others = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        message = f"{path.name}: not read, as beside the folders of classes: {loose[0]}{others}"
        # Of this line, so that a folder that is read again is named once.
        warnings.warn(message, DataWarning, stacklevel=1)
    return folders


def list_folders(path: Path) -> list[Path]:
    """Return the folders in a folder, in order, without what is hidden or junk."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not _is_junk(p.name))


def _list_files(folder: Path) -> list[Path]:
    """Return every file below the folder, dangling links too, without what is hidden or junk.

    Raises:
        OSError: if a folder cannot be read: its files would be missing.
    """
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise_error):
        folders[:] = [name for name in folders if not _is_junk(name)]
        files += [Path(parent, name) for name in names if not _is_junk(name)]
    return sorted(files)


def _raise_error(error: OSError) -> NoReturn:
    raise error


def _is_junk(name: str) -> bool:
    """Return whether a file or folder is hidden, or one that a system leaves behind."""
    return name.startswith(".") or name.lower() in JUNK_NAMES


def read_table(
    table: Table, part: str, modality: str, columns: Sequence[str] = ()
) -> tuple[str, Iterator[RawRow]]:
    """Return the name of a table for messages, and its raw rows.

    Args:
        table: the recipe's table.
        part: the recipe's name of it.
        modality: what the encoder reads, `text` or `image`.
        columns: whose class ids become names too, as those of labels do, in a Hub dataset.

    Raises:
        DataError: if the file is missing, of an unknown format, or not of what the encoder reads.
        RecipeError: for keys of Hub datasets beside a file or folder.
    """
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    if table.format == "hub" or (path is None and table.format is None):
        return table.path, load_hub_rows(table, part, columns)
    if path is None or not path.exists():
        where, fix = paths.explain_missing_path(table.path)
        raise DataError(f"data.{part}.path: {table.path} {where}", fix)
    refuse_device(path)
    for key in ("name", "split", "revision"):
        if getattr(table, key) is not None:
            raise RecipeError(
                f"data.{part}.{key} is of datasets of the Hub, and {table.path} is on this machine",
                "Remove it",
            )
    has_controls = isinstance(table, GeneralTable) and bool(table.label_columns)
    if path.is_dir() and part in UNLABELLED_TABLES and not has_controls:
        if modality == "text" and has_mostly_images(path):
            raise DataError(
                f"data.{part}.path: {table.path} is a folder of pictures, but source.model reads "
                "texts",
                "Give another source model, or a folder of texts",
            )
        return path.name, (read_image_files if modality == "image" else read_text_files)(path)
    name = table.format or guess_format(path)
    if path.is_dir() != (name in ("textfolder", "imagefolder")):
        kind = "a folder" if path.is_dir() else "a file"
        raise DataError(
            f"data.{part}.path: {table.path} is {kind}, not {name}", "Correct the format"
        )
    if name == {"text": "imagefolder", "image": "textfolder"}[modality]:
        raise DataError(
            f"data.{part}.path: {table.path} is read as {name}, but source.model reads {modality}s",
            f"Give another source model, or correct data.{part}.format",
        )
    return path.name, READERS[name](path)


def get_table_folder(table: Table, part: str) -> Path | None:
    """Return the folder that paths inside a table are relative to; None for one of the Hub."""
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    return None if path is None else path if path.is_dir() else path.parent


def load_hub_rows(table: Table, part: str, columns: Sequence[str] = ()) -> Iterator[RawRow]:
    """Yield the rows of a Hub dataset; class ids become their names, images stay encoded.

    Args:
        table: `path` is the dataset's id, `name` its configuration.
        part: the split where the recipe names none; for tables without labels it is train.
        columns: beside the label's, whose class ids become names.

    Raises:
        HubError: if the dataset is unknown, gated, or the Hub cannot be reached.
    """
    import datasets

    split = table.split or (part if part in ("train", "validation", "test") else "train")
    key = f"data.{part}: "
    commit = resolve_revision(table.path, table.revision, f"data.{part}")
    try:
        dataset: Any = datasets.load_dataset(table.path, table.name, split=split, revision=commit)
    except (OSError, paths.get_http_library().TransportError) as error:
        raise paths.make_hub_load_error(error, table.path, "dataset", key) from error
    except ValueError as error:
        message = format_error_line(error)
        raise HubError(f"{key}{table.path}: {message}", "Check name and split") from error
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            # Images are decoded by hftl, which names the row of a damaged one.
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    class_names = {
        column: names
        for column in (*table.label_columns, *columns)
        if (names := _get_class_names(dataset.features.get(column)))
    }
    for index, values in enumerate(dataset):
        for column, names in class_names.items():
            values[column] = _replace_class_ids(values[column], names)
        yield RawRow(values, index, f"{table.path} {split} row {index + 1}")


def _get_class_names(feature: Any) -> list[str] | None:
    """Return the class names of a column of ids, or of lists of ids."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _replace_class_ids(value: Any, names: list[str]) -> Any:
    """Return ids as class names; an id of no class, such as -1 for a missing label, as None."""
    if isinstance(value, list):
        return [_replace_class_ids(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def resolve_revision(path: str, revision: str | None, key: str) -> str | None:
    """Return the commit at which a Hub dataset is read; offline the given revision.

    Args:
        path: its id.
        revision: a branch, a tag or a commit; None: the main branch.
        key: the recipe's name of the table, for messages.

    Raises:
        HubError: if the Hub cannot be reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return revision
    with paths.translate_hub_errors(path, "dataset", f"{key}: "):
        return _ask_for_commit(path, revision)


@cache
def _ask_for_commit(path: str, revision: str | None) -> str | None:
    """Return the commit of a branch, the same for all splits: a push may come between them."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(path, revision=revision).sha


def resolve_revisions(data: Data) -> dict[str, str | None]:
    """Return the commit of every table of the Hub, by the recipe's name of the table."""
    tables = {part: getattr(data, part) for part in TABLE_NAMES}
    return {
        part: resolve_revision(table.path, table.revision, f"data.{part}")
        for part, table in tables.items()
        if isinstance(table, Table) and _is_on_hub(table, part)
    }


def _is_on_hub(table: Table, part: str) -> bool:
    return (
        table.format == "hub" or paths.resolve_local_path(table.path, f"data.{part}.path") is None
    )
