"""Datasets of the hub, pinned to a commit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hftl.config.data import Data, GeneralTable, Table
from hftl.config.errors import suggest_closest
from hftl.data.images import ImageInfo, Levels, inspect_images, warn_of_narrow_images
from hftl.data.normalization import (
    find_fraction,
    find_label_fault,
    find_text_fault,
    get_value_type,
    parse_label,
)
from hftl.data.tables import (
    READERS,
    RawRow,
    guess_format,
    has_invalid_utf8,
    read_image_files,
    read_text_files,
)
from hftl.errors import DataError, HubError, format_error_line
from hftl.runtime import paths

TABLE_NAMES = ("train", "validation", "test", "unlabeled", "general")
"""The tables of a recipe."""


def load_hub_rows(table: Table, part: str) -> Iterator[RawRow]:
    """Rows of a hub dataset; class ids become their names, pictures stay encoded.

    Args:
        table: `path` is the dataset's id, `name` its configuration.
        part: the split where the recipe names none; of tables without labels it is train.

    Raises:
        HubError: if the dataset is unknown, gated, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = table.split or (part if part in ("train", "validation", "test") else "train")
    commit = resolve_revision(table.path, table.revision)
    key = f"data.{part}: "
    try:
        dataset: Any = datasets.load_dataset(table.path, table.name, split=split, revision=commit)
    except (DatasetNotFoundError, OSError, paths.get_http_library().TransportError) as error:
        raise paths.make_hub_load_error(error, table.path, "dataset", key) from error
    except ValueError as error:
        why = format_error_line(error)
        raise HubError(f"{key}{table.path}: {why}", "Check name and split") from error
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    named = {c: n for c in table.label_columns if (n := _get_class_names(dataset.features.get(c)))}
    for index, values in enumerate(dataset):
        for column, names in named.items():
            values[column] = _replace_class_ids(values[column], names)
        yield RawRow(values, index, f"{table.path} {split} row {index + 1}")


def _get_class_names(feature: Any) -> list[str] | None:
    """The class names of a column of ids, or of lists of ids."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _replace_class_ids(value: Any, names: list[str]) -> Any:
    """Ids as their names; an id of no class, as -1 for a missing label, becomes none."""
    if isinstance(value, list):
        return [_replace_class_ids(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


@cache
def resolve_revision(path: str, wanted: str | None) -> str | None:
    """The commit that a hub dataset is read at; offline, where only the cache is read, as asked.

    Raises:
        HubError: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return wanted
    with paths.translate_hub_errors(path, "dataset"):
        return HfApi().dataset_info(path, revision=wanted).sha


def resolve_revisions(data: Data) -> dict[str, str | None]:
    """The commit of every table of the hub."""
    tables = {part: getattr(data, part) for part in TABLE_NAMES}
    return {
        part: resolve_revision(table.path, table.revision)
        for part, table in tables.items()
        if isinstance(table, Table) and _is_on_hub(table, part)
    }


def _is_on_hub(table: Table, split: str) -> bool:
    return (
        table.format == "hub" or paths.resolve_local_path(table.path, f"data.{split}.path") is None
    )


# Tables and folders as rows, every bad row named by file and line.


UNLABELLED_TABLES = ("unlabeled", "general")
"""Tables without labels: folders are read flat, every file for itself, unless general data name a
label."""
MAX_LISTED_ROWS = 10_000
"""Bad rows that are listed, at most; all are counted."""
Label = str | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled example.

    `content` is what it says: its texts, its words, or the hash of its picture. `label` is a class
    name, a number, the names that hold, or a tag for each word. `index` is its place in its table,
    counted from 0, and `table` the recipe's name of that table. `size` is a picture's width and
    height in pixels.
    """

    content: tuple[str, ...]
    label: Label
    group: str | None
    index: int
    where: str
    table: str = "train"
    size: tuple[int, int] | None = None
    perceptual_hash: int | None = field(default=None, compare=False)
    """A picture's hash that survives re-encoding, while the data are prepared."""
    levels: Levels | None = field(default=None, compare=False)
    """The levels that a picture reaches, while the data are prepared."""


@dataclass
class BadRows:
    """Rows that cannot be used: the first stops the run, or all are dropped and listed.

    `fix` is what to do about one that stops it.
    """

    skip: bool = False
    fix: str = "Correct it, or set data.bad_rows=skip"
    count: int = 0
    dropped: list[dict[str, str]] = field(default_factory=list)

    def reject(self, where: str, why: str) -> None:
        """Drops and lists a row.

        Raises:
            DataError: unless bad rows are skipped.
        """
        if not self.skip:
            raise DataError(f"{where}: {why}", self.fix)
        self.count += 1
        if self.count <= MAX_LISTED_ROWS:
            self.dropped.append({"where": where, "why": why})


@dataclass(frozen=True)
class InputSpec:
    """What the encoder reads: `text` or `image`, and the side of a patch in pixels."""

    modality: str = "text"
    patch_size: int = 1


def load_rows(data: Data, part: str, bad: BadRows, reading: InputSpec) -> list[Row]:
    """The rows of one table.

    Args:
        data: the recipe's section.
        part: train, validation or test, which has a table of its own.
        bad: what to do with rows that cannot be used.
        reading: what the encoder reads.

    Raises:
        DataError: if the file or a column is missing, no row is left, or labels are of mixed types.
    """
    table, task = getattr(data, part), str(data.task)
    name, raws = read_table(table, part, reading.modality)
    rows: list[Row] = []
    kinds: dict[str, str] = {}
    contents = table.text_columns if reading.modality == "text" else [table.image]
    needed = [*contents, *table.label_columns, *([data.group] if data.group else [])]
    found = inspect_rows(check_columns(name, raws, needed), data, part, reading)
    for raw, seen in found:
        why = (
            seen
            if isinstance(seen, str)
            else _find_row_fault(raw, table, task, data.group, reading)
        )
        if why:
            bad.reject(raw.where, why)
            continue
        label = parse_label(raw.values, table.label, task)
        if task == "classification":
            kinds.setdefault(get_value_type(raw.values[str(table.label)]), raw.where)
        group = str(raw.values[data.group]) if data.group else None
        content = (
            (seen.content,) if isinstance(seen, ImageInfo) else _extract_texts(raw, table, task)
        )
        row = Row(content, label, group, raw.index, raw.where, part)
        if isinstance(seen, ImageInfo):
            row = replace(row, size=seen.size, perceptual_hash=seen.perceptual_hash, levels=seen.levels)
        rows.append(row)
    if len(kinds) > 1:
        places_ = " and ".join(f"{kind} ({where})" for kind, where in sorted(kinds.items()))
        raise DataError(f"{name}: labels of mixed types: {places_}", "Write them all as one type")
    if not rows:
        raise DataError(f"{name} has no {'usable ' if bad.count else ''}rows", "Check the file")
    if task in ("classification", "multi-label"):
        _refuse_fractions(name, rows)
    return rows


def _refuse_fractions(name: str, rows: list[Row]) -> None:
    """Refuse numbers with fractions as classes, whatever type the table has them in.

    Raises:
        DataError: naming the first such row.
    """
    places_ = {label: row.where for row in reversed(rows) for label in _list_classes(row.label)}
    fraction = find_fraction(places_)
    if fraction is not None:
        where = places_[fraction]
        raise DataError(
            f"{where}: {name} has numbers with fractions for classes, such as {fraction}",
            "For a target set data.task=regression; for classes write them as words",
        )


def _list_classes(label: Label) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (str(label),)


def load_images(data: Data, part: str, bad: BadRows, reading: InputSpec) -> list[Row]:
    """The pictures of a table that has no labels: `unlabeled`, `general`, or train without a task.

    Raises:
        DataError: if the file or the column is missing, or no picture is left.
    """
    table = getattr(data, part)
    name, raws = read_table(table, part, reading.modality)
    folder = get_table_folder(table, part)
    rows: list[Row] = []
    levels: list[Levels] = []
    for raw, seen in inspect_images(raws, table.image, folder, data.max_pixels, reading.patch_size):
        if isinstance(seen, ImageInfo):
            rows.append(Row((seen.content,), "", None, raw.index, raw.where, part, seen.size))
            levels.append(seen.levels)
        else:
            bad.reject(raw.where, seen)
    if not rows:
        raise DataError(f"{name} has no {'usable ' if bad.count else ''}pictures", "Check it")
    warn_of_narrow_images(levels, f"data.{part}")
    return rows


def read_table(table: Table, part: str, modality: str) -> tuple[str, Iterator[RawRow]]:
    """The name to call a table by, and its raw rows.

    Raises:
        DataError: if the file is missing, of an unknown format, or not of what the encoder reads.
    """
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    if table.format == "hub" or (path is None and table.format is None):
        return table.path, load_hub_rows(table, part)
    if path is None or not path.exists():
        raise DataError(f"data.{part}.path: {table.path} does not exist", "Check the path")
    if path.is_dir() and part in UNLABELLED_TABLES and not _has_controls(table):
        return path.name, (read_image_files if modality == "image" else read_text_files)(path)
    name = table.format or guess_format(path)
    if path.is_dir() != (name in ("textfolder", "imagefolder")):
        what = "a folder" if path.is_dir() else "a file"
        raise DataError(
            f"data.{part}.path: {table.path} is {what}, not {name}", "Correct the format"
        )
    wrong = {"text": "imagefolder", "image": "textfolder"}[modality]
    if name == wrong:
        raise DataError(
            f"data.{part}.path: {table.path} is read as {name}, but source.model reads {modality}s",
            f"Give another source model, or correct data.{part}.format",
        )
    return path.name, READERS[name](path)


def _has_controls(table: Table) -> bool:
    return isinstance(table, GeneralTable) and bool(table.label_columns)


def get_table_folder(table: Table, part: str) -> Path | None:
    """The folder that paths inside a table are relative to; None for one of the hub."""
    path = paths.resolve_local_path(table.path, f"data.{part}.path")
    return None if path is None else path if path.is_dir() else path.parent


def check_columns(
    name: str, raws: Iterator[RawRow], needed: list[str], part: str = "train"
) -> Iterator[RawRow]:
    """The raw rows, once the first of them is seen to have the columns.

    Raises:
        DataError: naming the column that is missing; `part` is where the recipe names it.
    """
    for number, raw in enumerate(raws):
        if number == 0:
            _require_columns(name, raw.values, needed, part)
        yield raw


def inspect_rows(
    raws: Iterator[RawRow], data: Data, part: str, reading: InputSpec
) -> Iterator[tuple[RawRow, ImageInfo | str | None]]:
    """Each raw row with its picture's hash and size, or why it has none; None for text."""
    if reading.modality == "text":
        return ((raw, None) for raw in raws)
    table = getattr(data, part)
    folder = get_table_folder(table, part)
    return inspect_images(raws, table.image, folder, data.max_pixels, reading.patch_size)


def _extract_texts(raw: RawRow, table: Table, task: str) -> tuple[str, ...]:
    if task == "token-classification":
        return tuple(raw.values[table.text_columns[0]])
    return tuple(raw.values[column] for column in table.text_columns)


def _require_columns(name: str, values: dict[str, Any], needed: list[str], part: str) -> None:
    for column in needed:
        if column not in values:
            has = [str(c) for c in values]
            hint = " (is it separated by ';'?)" if len(has) == 1 and ";" in has[0] else ""
            if column in ("text", "image"):
                hint += f"; source.model reads {column}s"
            raise DataError(
                f"{name}: no column {column!r}{suggest_closest(column, has).replace('?', '')}"
                f"; it has {', '.join(has)}{hint}",
                f"Name the columns in data.{part}: {{text: ..., image: ..., label: ...}}",
            )


def _find_row_fault(
    raw: RawRow, table: Table, task: str, group: str | None, reading: InputSpec
) -> str | None:
    """What makes a row unusable, if anything."""
    if raw.fault:
        return raw.fault
    if any(isinstance(value, str) and has_invalid_utf8(value) for value in raw.values.values()):
        return "not valid UTF-8"
    if reading.modality == "text":
        for column in table.text_columns:
            why = find_text_fault(column, raw.values[column], task)
            if why:
                return why
    if group and raw.values[group] in (None, ""):
        return f"{group} is empty"
    words = raw.values[table.text_columns[0]] if task == "token-classification" else None
    return find_label_fault(raw.values, table.label, task, words)


# Rows as a file, so that later phases and runs read one file and not the user's.


ROWS_FILE = "rows.parquet"


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
    pq.write_table(pa.table(columns), folder / ROWS_FILE)


def read_rows(folder: Path, parts: Sequence[str]) -> dict[str, list[Row]]:
    """What `write_rows` wrote."""
    import pyarrow.parquet as pq

    rows: dict[str, list[Row]] = {part: [] for part in parts}
    for told in pq.read_table(folder / ROWS_FILE).to_pylist():
        part = told.pop("split")
        label = tuple(told["label"]) if isinstance(told["label"], list) else told["label"]
        size = tuple(told["size"]) if told["size"] else None
        rows[part].append(Row(tuple(told["content"]), label, told["group"], told["row"],
                              told["where"], told["table"], size))  # fmt: skip
    return rows
