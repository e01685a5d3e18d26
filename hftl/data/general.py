"""General data as rows: half may serve to keep what the source knew, half only measures."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.data import Data, GeneralTable
from hftl.data.corpus import find_document_fault
from hftl.data.images import ImageInfo, warn_of_narrow_images
from hftl.data.load import (
    BadRows,
    InputSpec,
    Row,
    check_columns,
    inspect_rows,
    read_rows,
    read_table,
    write_rows,
)
from hftl.data.normalization import find_label_fault, normalize_content, normalize_name
from hftl.data.prepare import SPLITS, PreparedData
from hftl.data.splits import hash_row, hash_text
from hftl.data.tables import RawRow
from hftl.errors import DataError
from hftl.runtime.fingerprints import fingerprint, to_json

MAX_TRAIN_ROWS = 2000
"""Rows that may be used, at most."""
MIN_EVAL_ROWS = 11
"""Rows that must be left to measure on: ten neighbours of each are compared."""
MAX_CLASSES, MIN_ROWS_PER_CLASS = 50, 20
"""A control with more values, or fewer rows to each, names documents and no classes."""
HALVES = ("used", "measured")


@dataclass(frozen=True)
class GeneralData:
    """General data without the run's own inputs; no document stands in both halves.

    A row's `label` holds its value of each of `controls`, in their order; its `group` is its
    document, None where every row is one. `classes` are the controls that a probe can be fitted
    to. `facts` is what the record tells; its `fingerprint` tells these rows from others.
    """

    train_rows: list[Row]
    eval_rows: list[Row]
    controls: tuple[str, ...]
    classes: tuple[str, ...]
    facts: dict[str, Any]

    def get_control_values(self, control: str) -> np.ndarray:
        """(measured rows,) strings: what they hold of a control."""
        place = self.controls.index(control)
        return np.array([_get_control_values(row)[place] for row in self.eval_rows])

    def get_control_labels(self, control: str) -> list[str]:
        """What each row that may be used holds of a control."""
        place = self.controls.index(control)
        return [_get_control_values(row)[place] for row in self.train_rows]

    def get_document_ids(self) -> np.ndarray:
        """(measured rows,) int64 ids; rows of one document share theirs."""
        names = [str(i) if row.group is None else row.group for i, row in enumerate(self.eval_rows)]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)


def load_general(data: Data, prepared: PreparedData, reading: InputSpec) -> GeneralData:
    """Reads `data.general`, drops copies, and halves it by the hash of its documents.

    Args:
        data: the recipe's section, tables of the hub at their commits.
        prepared: the run's own rows, whose inputs are taken out.
        reading: what the encoder reads.

    Raises:
        DataError: if the file or a column is missing, a row cannot be used, a control has one
            value only, or too few rows are left to measure on.
    """
    table = data.general
    assert table is not None
    bad = BadRows(skip=data.bad_rows == "skip")
    found = list(_read_general_rows(data, table, bad, reading))
    warn_of_narrow_images((row.levels for row in found), "data.general")
    answer = table.label_columns.index(str(data.train.label)) if data.has_labelled_general else None
    distinct, conflicting = _drop_copies(found, answer)
    own = {normalize_content(row.content) for split in SPLITS for row in prepared.rows[split]}
    # Of a pair each text was seen, too.
    own |= {(text,) for content in own if len(content) == 2 for text in content}
    rows = [row for row in distinct if normalize_content(row.content) not in own]
    classes = _find_class_controls(rows, table.label_columns)
    documents = _find_document_column(rows, data.group, table.label_columns, classes)
    if documents in table.label_columns:
        place = table.label_columns.index(documents)
        rows = [replace(row, group=_get_control_values(row)[place]) for row in rows]
    used, measured = _split_halves(rows, data.seed, table.rows)
    if len(measured) < MIN_EVAL_ROWS:
        raise DataError(
            f"data.general has {len(measured)} rows to measure forgetting on, of {len(found)} "
            f"read, and needs {MIN_EVAL_ROWS}: copies of the run's own rows are dropped, and half may "
            "be used",
            "Give other general data",
        )
    facts = {
        "rows_read": len(found) + bad.count,
        "bad_rows": bad.count,
        "duplicates": len(found) - conflicting - len(distinct),
        "conflicting": conflicting,
        "known": len(distinct) - len(rows),
        "documents": documents,
        "fingerprint": _fingerprint_halves(used, measured),
    }
    return GeneralData(used, measured, tuple(table.label_columns), tuple(classes), facts)


def drop_near_rows(general: GeneralData, near: Callable[[Row], bool]) -> GeneralData:
    """Takes out of what may be used the rows that are nearly one of validation or test: what is
    learnt of them, by their labels above all, is known where it is measured.

    Args:
        general: the rows.
        near: whether a row is.
    """
    used = [row for row in general.train_rows if not near(row)]
    facts = general.facts | {
        "near": len(general.train_rows) - len(used),
        "fingerprint": _fingerprint_halves(used, general.eval_rows),
    }
    return replace(general, train_rows=used, facts=facts)


def check_general_labels(general: GeneralData, control: str, names: list[str]) -> None:
    """Refuses rows that may be used whose label the task has not.

    Args:
        general: the rows.
        control: the column of the task's labels.
        names: the task's classes.

    Raises:
        DataError: naming the first such row.
    """
    for row, label in zip(general.train_rows, general.get_control_labels(control), strict=True):
        if label not in names:
            raise DataError(
                f"{row.where}: data.general has the {control} {label!r}, which train never has",
                "Correct it, or learn nothing from general labels (retain.replay.labelled)",
            )


def write_general(general: GeneralData, folder: Path) -> None:
    """Stores rows and facts."""
    write_rows({"used": general.train_rows, "measured": general.eval_rows}, folder)
    told = {"controls": general.controls, "classes": general.classes, "facts": general.facts}
    (folder / "facts.json").write_text(to_json(told), encoding="utf-8")


def read_general(folder: Path) -> GeneralData:
    """What `write_general` stored."""
    told = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    halves = read_rows(folder, HALVES)
    controls, classes = tuple(told["controls"]), tuple(told["classes"])
    return GeneralData(halves["used"], halves["measured"], controls, classes, told["facts"])


def _read_general_rows(
    data: Data, table: GeneralTable, bad: BadRows, reading: InputSpec
) -> Iterator[Row]:
    """The table's sound rows."""
    name, raws = read_table(table, "general", reading.modality)
    contents = table.text_columns if reading.modality == "text" else [table.image]
    raws = check_columns(name, raws, [*contents, *table.label_columns], "general")
    for raw, seen in inspect_rows(raws, data, "general", reading):
        # Blank lines part the texts of a file, and say nothing of their own.
        if seen is None and all(raw.values[column] == "" for column in table.text_columns):
            continue
        why = (
            seen if isinstance(seen, str) else _find_general_fault(raw, table, data.group, reading)
        )
        if why:
            bad.reject(raw.where, why)
            continue
        label = tuple(normalize_name(raw.values[column]) for column in table.label_columns)
        group = None
        if data.group in raw.values:
            group = str(raw.values[data.group])
        content, size = _extract_general_texts(raw, table, str(data.task)), None
        levels = None
        if isinstance(seen, ImageInfo):
            content, size, levels = (seen.content,), seen.size, seen.levels
        yield Row(content, label, group, raw.index, raw.where, "general", size, levels=levels)


def _find_general_fault(
    raw: RawRow, table: GeneralTable, group: str | None, reading: InputSpec
) -> str | None:
    """What makes a row unusable, if anything."""
    if raw.fault:
        return raw.fault
    faults = [
        find_label_fault(raw.values, column, "classification") for column in table.label_columns
    ]
    if reading.modality == "text":
        faults += [find_document_fault(column, raw.values[column]) for column in table.text_columns]
    if group in raw.values and raw.values[group] in (None, ""):
        faults.append(f"{group} is empty")
    return next((why for why in faults if why), None)


def _extract_general_texts(raw: RawRow, table: GeneralTable, task: str) -> tuple[str, ...]:
    """The row's texts, or for tokens its words."""
    texts = [raw.values[column] for column in table.text_columns if column in raw.values]
    if task == "token-classification":
        return tuple(texts[0].split() if isinstance(texts[0], str) else texts[0])
    return tuple(text if isinstance(text, str) else " ".join(text) for text in texts)


def _drop_copies(rows: list[Row], answer: int | None) -> tuple[list[Row], int]:
    """One row for each input, whatever order they came in, none where they have different labels
    of the task; and how many rows had.

    Args:
        rows: all.
        answer: the place of the task's label among the controls; None where it is none of them.
    """
    copies: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.group or "", row.label, row.index)):
        copies[normalize_content(row.content)].append(row)
    kept, conflicting = [], 0
    for found in copies.values():
        if answer is not None and len({_get_control_values(row)[answer] for row in found}) > 1:
            conflicting += len(found)
        else:
            kept.append(found[0])
    return kept, conflicting


def _fingerprint_halves(used: list[Row], measured: list[Row]) -> str:
    return fingerprint([[hash_row(r).hex() for r in half] for half in (used, measured)])


def _find_class_controls(rows: list[Row], controls: list[str]) -> list[str]:
    """The controls with few enough values, and enough rows to each, for a probe."""
    classes = []
    for place, control in enumerate(controls):
        values = Counter(_get_control_values(row)[place] for row in rows)
        if rows and len(values) < 2:
            raise DataError(
                f"data.general.label: {control!r} has one value only, {min(values)!r}",
                "Name another column, or none",
            )
        if len(values) <= min(MAX_CLASSES, len(rows) / MIN_ROWS_PER_CLASS):
            classes.append(control)
    return classes


def _find_document_column(
    rows: list[Row], group: str | None, controls: list[str], classes: list[str]
) -> str | None:
    """The column that says which rows belong together, see `GeneralTable`."""
    if rows and rows[0].group is not None:
        return group
    return next((control for control in controls if control not in classes), None)


def _split_halves(rows: list[Row], seed: int, most: int) -> tuple[list[Row], list[Row]]:
    """What may be used and what measures: in the order of its hash each document joins the half
    that has fewer rows; of either the first documents that fit are kept."""
    documents: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        documents[row.content if row.group is None else (row.group,)].append(row)
    order = sorted(
        documents, key=lambda name: hash_text("\x1f".join([str(seed), "general", *name]))
    )
    sizes = dict.fromkeys(HALVES, 0)
    kept: dict[str, list[Row]] = {half: [] for half in HALVES}
    for name in order:
        half = "used" if sizes["used"] < sizes["measured"] else "measured"
        sizes[half] += len(documents[name])
        room = MAX_TRAIN_ROWS if half == "used" else most
        if len(kept[half]) + len(documents[name]) <= room:
            kept[half] += documents[name]
    used, measured = (sorted(kept[half], key=hash_row) for half in HALVES)
    return used, measured


def _get_control_values(row: Row) -> tuple[str, ...]:
    assert isinstance(row.label, tuple)
    return row.label
