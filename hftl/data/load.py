"""Tables and folders as rows, every bad row named by file and line."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hftl import places
from hftl.data.files import READERS, Raw, not_utf8
from hftl.data.hub import load_hub
from hftl.errors import DataError
from hftl.explain import closest
from hftl.sections import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled example. `index` is its place in its file, counted from 0."""

    texts: tuple[str, ...]
    label: str | float
    group: str | None
    index: int
    where: str


@dataclass
class BadRows:
    """Rows that cannot be used: the first stops the run, or all are dropped and listed."""

    skip: bool = False
    dropped: list[dict[str, str]] = field(default_factory=list)

    def reject(self, where: str, why: str) -> None:
        """Drops and lists a row.

        Raises:
            DataError: unless bad rows are skipped.
        """
        if not self.skip:
            raise DataError(f"{where}: {why}", "Correct it, or set data.bad_rows=skip")
        self.dropped.append({"where": where, "why": why})


def load(table: Table, part: str, task: str, group: str | None, bad: BadRows) -> list[Row]:
    """The rows of one table.

    Args:
        table: the dataset's section of the recipe.
        part: train, validation or test; the default split of a Hub dataset.
        task: classification (labels become strings) or regression (floats).
        group: the column whose rows stay together, if any.
        bad: what to do with rows that cannot be used.

    Raises:
        DataError: if the file or a column is missing, no row is left, or labels are of mixed types.
    """
    name, raws = read_table(table, part)
    needed = [*table.texts, str(table.label), *([group] if group else [])]
    rows: list[Row] = []
    kinds: dict[str, str] = {}
    seen = False
    for raw in raws:
        if not seen:
            _need_columns(name, raw.values, needed)
            seen = True
        why = _fault(raw, table, task, group)
        if why:
            bad.reject(raw.where, why)
            continue
        value = raw.values[str(table.label)]
        kinds.setdefault(_kind(value), raw.where)
        rows.append(
            Row(
                tuple(raw.values[column] for column in table.texts),
                float(value) if task == "regression" else class_name(value),
                str(raw.values[group]) if group else None,
                raw.index,
                raw.where,
            )
        )
    if task == "classification" and len(kinds) > 1:
        places_ = " and ".join(f"{kind} ({where})" for kind, where in sorted(kinds.items()))
        raise DataError(f"{name}: labels of mixed types: {places_}", "Write them all as one type")
    if not rows:
        raise DataError(f"{name} has no {'usable ' if seen else ''}rows", "Check the file")
    return rows


def read_table(table: Table, part: str) -> tuple[str, Iterator[Raw]]:
    """The name to call a table by, and its raw rows.

    Raises:
        DataError: if the file is missing or of an unknown format.
    """
    path = places.find(table.path, f"data.{part}.path")
    if table.format == "hub" or (path is None and table.format is None):
        return table.path, load_hub(table, part)
    if path is None or not path.exists():
        raise DataError(f"data.{part}.path: {table.path} does not exist", "Check the path")
    name = table.format or guess_format(path)
    if path.is_dir() != (name == "textfolder"):
        what = "a folder" if path.is_dir() else "a file"
        raise DataError(
            f"data.{part}.path: {table.path} is {what}, not {name}", "Correct the format"
        )
    return path.name, READERS[name](path)


def guess_format(path: Path) -> str:
    """The format that a file's suffix, or being a folder, says.

    Raises:
        DataError: if it says none.
    """
    if path.is_dir():
        return "textfolder"
    name = {".json": "jsonl", ".ndjson": "jsonl", ".tsv": "csv"}.get(
        path.suffix.lower(), path.suffix.lower().removeprefix(".")
    )
    if name not in READERS:
        raise DataError(
            f"{path.name}: the suffix {path.suffix!r} says no format",
            f"Set data.train.format to one of {', '.join(READERS)}",
        )
    return name


def class_name(value: Any) -> str:
    """A label as a class name: `1`, `1.0` and `'1'` are one class."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _need_columns(name: str, values: dict[str, Any], needed: list[str]) -> None:
    for column in needed:
        if column not in values:
            has = [str(c) for c in values]
            hint = " (is it separated by ';'?)" if len(has) == 1 and ";" in has[0] else ""
            raise DataError(
                f"{name}: no column {column!r}{closest(column, has).replace('?', '')}"
                f"; it has {', '.join(has)}{hint}",
                "Name the columns in data.train: {text: ..., label: ...}",
            )


def _fault(raw: Raw, table: Table, task: str, group: str | None) -> str | None:
    """What makes a row unusable, if anything."""
    if raw.fault:
        return raw.fault
    if any(isinstance(value, str) and not_utf8(value) for value in raw.values.values()):
        return "not valid UTF-8"
    for column in table.texts:
        text = raw.values[column]
        if not isinstance(text, str):
            return f"{column} is {'empty' if text is None else type(text).__name__}, not text"
        if not text.strip():
            return f"{column} is empty"
    if group and raw.values[group] in (None, ""):
        return f"{group} is empty"
    value = raw.values[str(table.label)]
    return _regression_fault(value) if task == "regression" else _class_fault(value)


def _class_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "the label is empty"
    if isinstance(value, float) and not value.is_integer():
        return f"the label {value} is no class; for numbers set data.task=regression"
    if not isinstance(value, (str, int, float)):
        return f"the label is a {type(value).__name__}"
    return None


def _regression_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "the target is empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"the target {value!r} is not a number"
    return None if math.isfinite(number) else f"the target is {number}"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    return "number" if isinstance(value, (int, float)) else "text"
