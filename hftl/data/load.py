"""Tables and folders as rows, every bad row named by file and line."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hftl import places
from hftl.data.cells import kind, label_fault, label_of, text_fault
from hftl.data.files import READERS, Raw, guess_format, not_utf8, read_images, read_texts
from hftl.data.hub import load_hub
from hftl.data.levels import Levels, warn_narrow
from hftl.data.pictures import Seen, look
from hftl.data.spelling import find_fraction
from hftl.errors import DataError
from hftl.explain import closest
from hftl.sections.data import Data, GeneralTable, Table

UNLABELLED = ("unlabeled", "general")
"""Tables without labels: folders are read flat, every file for itself, unless general data name a
label."""
LISTED = 10_000
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
    perceptual: int | None = field(default=None, compare=False)
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
        if self.count <= LISTED:
            self.dropped.append({"where": where, "why": why})


@dataclass(frozen=True)
class Reading:
    """What the encoder reads: `text` or `image`, and the side of a patch in pixels."""

    modality: str = "text"
    patch: int = 1


def load(data: Data, part: str, bad: BadRows, reading: Reading) -> list[Row]:
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
    contents = table.texts if reading.modality == "text" else [table.image]
    needed = [*contents, *table.labels, *([data.group] if data.group else [])]
    found = looked_at(checked(name, raws, needed), data, part, reading)
    for raw, seen in found:
        why = seen if isinstance(seen, str) else _fault(raw, table, task, data.group, reading)
        if why:
            bad.reject(raw.where, why)
            continue
        label = label_of(raw.values, table.label, task)
        if task == "classification":
            kinds.setdefault(kind(raw.values[str(table.label)]), raw.where)
        group = str(raw.values[data.group]) if data.group else None
        content = (seen.content,) if isinstance(seen, Seen) else _texts(raw, table, task)
        row = Row(content, label, group, raw.index, raw.where, part)
        if isinstance(seen, Seen):
            row = replace(row, size=seen.size, perceptual=seen.perceptual, levels=seen.levels)
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
    places_ = {label: row.where for row in reversed(rows) for label in _class_names(row.label)}
    fraction = find_fraction(places_)
    if fraction is not None:
        where = places_[fraction]
        raise DataError(
            f"{where}: {name} has numbers with fractions for classes, such as {fraction}",
            "For a target set data.task=regression; for classes write them as words",
        )


def _class_names(label: Label) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (str(label),)


def load_pictures(data: Data, part: str, bad: BadRows, reading: Reading) -> list[Row]:
    """The pictures of a table that has no labels: `unlabeled`, `general`, or train without a task.

    Raises:
        DataError: if the file or the column is missing, or no picture is left.
    """
    table = getattr(data, part)
    name, raws = read_table(table, part, reading.modality)
    folder = table_folder(table, part)
    rows: list[Row] = []
    levels: list[Levels] = []
    for raw, seen in look(raws, table.image, folder, data.max_pixels, reading.patch):
        if isinstance(seen, Seen):
            rows.append(Row((seen.content,), "", None, raw.index, raw.where, part, seen.size))
            levels.append(seen.levels)
        else:
            bad.reject(raw.where, seen)
    if not rows:
        raise DataError(f"{name} has no {'usable ' if bad.count else ''}pictures", "Check it")
    warn_narrow(levels, f"data.{part}")
    return rows


def read_table(table: Table, part: str, modality: str) -> tuple[str, Iterator[Raw]]:
    """The name to call a table by, and its raw rows.

    Raises:
        DataError: if the file is missing, of an unknown format, or not of what the encoder reads.
    """
    path = places.find(table.path, f"data.{part}.path")
    if table.format == "hub" or (path is None and table.format is None):
        return table.path, load_hub(table, part)
    if path is None or not path.exists():
        raise DataError(f"data.{part}.path: {table.path} does not exist", "Check the path")
    if path.is_dir() and part in UNLABELLED and not _names_controls(table):
        return path.name, (read_images if modality == "image" else read_texts)(path)
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


def _names_controls(table: Table) -> bool:
    return isinstance(table, GeneralTable) and bool(table.labels)


def table_folder(table: Table, part: str) -> Path | None:
    """The folder that paths inside a table are relative to; None for one of the hub."""
    path = places.find(table.path, f"data.{part}.path")
    return None if path is None else path if path.is_dir() else path.parent


def checked(
    name: str, raws: Iterator[Raw], needed: list[str], part: str = "train"
) -> Iterator[Raw]:
    """The raw rows, once the first of them is seen to have the columns.

    Raises:
        DataError: naming the column that is missing; `part` is where the recipe names it.
    """
    for number, raw in enumerate(raws):
        if number == 0:
            _need_columns(name, raw.values, needed, part)
        yield raw


def looked_at(
    raws: Iterator[Raw], data: Data, part: str, reading: Reading
) -> Iterator[tuple[Raw, Seen | str | None]]:
    """Each raw row with its picture's hash and size, or why it has none; None for text."""
    if reading.modality == "text":
        return ((raw, None) for raw in raws)
    table = getattr(data, part)
    folder = table_folder(table, part)
    return look(raws, table.image, folder, data.max_pixels, reading.patch)


def _texts(raw: Raw, table: Table, task: str) -> tuple[str, ...]:
    if task == "token-classification":
        return tuple(raw.values[table.texts[0]])
    return tuple(raw.values[column] for column in table.texts)


def _need_columns(name: str, values: dict[str, Any], needed: list[str], part: str) -> None:
    for column in needed:
        if column not in values:
            has = [str(c) for c in values]
            hint = " (is it separated by ';'?)" if len(has) == 1 and ";" in has[0] else ""
            if column in ("text", "image"):
                hint += f"; source.model reads {column}s"
            raise DataError(
                f"{name}: no column {column!r}{closest(column, has).replace('?', '')}"
                f"; it has {', '.join(has)}{hint}",
                f"Name the columns in data.{part}: {{text: ..., image: ..., label: ...}}",
            )


def _fault(raw: Raw, table: Table, task: str, group: str | None, reading: Reading) -> str | None:
    """What makes a row unusable, if anything."""
    if raw.fault:
        return raw.fault
    if any(isinstance(value, str) and not_utf8(value) for value in raw.values.values()):
        return "not valid UTF-8"
    if reading.modality == "text":
        for column in table.texts:
            why = text_fault(column, raw.values[column], task)
            if why:
                return why
    if group and raw.values[group] in (None, ""):
        return f"{group} is empty"
    words = raw.values[table.texts[0]] if task == "token-classification" else None
    return label_fault(raw.values, table.label, task, words)
