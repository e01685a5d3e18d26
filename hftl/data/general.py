"""Load general data as rows: one half may be trained on for retention, the other only measures."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hftl.config.data import Data, GeneralTable
from hftl.data.facts import GeneralFacts
from hftl.data.images import warn_of_narrow_images
from hftl.data.label_parsing import find_label_fault
from hftl.data.load import check_columns, find_document_fault, inspect_rows
from hftl.data.normalization import normalize_content, normalize_name
from hftl.data.prepare import SPLITS, PreparedData
from hftl.data.rows import (
    BadRows,
    ImageInfo,
    InputSpec,
    RawRow,
    Row,
    list_words,
    read_rows,
    write_rows,
)
from hftl.data.splits import hash_row, hash_text
from hftl.data.tables import read_table
from hftl.errors import DataError
from hftl.runtime.paths import resolve_local_path
from hftl.runtime.run_folder import fingerprint, to_json

MAX_TRAIN_ROWS = 2000
MIN_EVAL_ROWS = 11
"""Rows that must be left to measure on: ten neighbours of each are compared."""
MAX_CLASSES, MIN_ROWS_PER_CLASS = 50, 20
"""A control with more values, or fewer rows to each, names documents and not classes."""
HALVES = ("used", "measured")
"""The halves in stored rows: `train_rows` and `eval_rows`."""


@dataclass(frozen=True)
class GeneralData:
    """Hold general data without the run's own inputs; no document is in both halves.

    A row's `label` holds its value of each of `controls`, in their order; its `group` is its
    document, None where every row is one. `classes` are the controls that a probe can be fitted
    to.
    """

    train_rows: list[Row]
    eval_rows: list[Row]
    controls: tuple[str, ...]
    classes: tuple[str, ...]
    facts: GeneralFacts

    def get_control_values(self, control: str) -> np.ndarray:
        """Return the values of a control in the evaluation rows, (rows,) strings."""
        index = self.controls.index(control)
        return np.array([_get_control_values(row)[index] for row in self.eval_rows])

    def get_control_labels(self, control: str) -> list[str]:
        """Return the value of a control in each training row."""
        index = self.controls.index(control)
        return [_get_control_values(row)[index] for row in self.train_rows]

    def get_document_ids(self) -> np.ndarray:
        """Return ids of the evaluation rows, (rows,) int64; rows of one document share theirs."""
        names = [str(i) if row.group is None else row.group for i, row in enumerate(self.eval_rows)]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)


def load_general(data: Data, prepared: PreparedData, spec: InputSpec) -> GeneralData:
    """Read `data.general`, drop copies, and halve it by the hash of its documents.

    Args:
        data: the recipe's section, tables of the Hub at their commits.
        prepared: the run's own rows, whose inputs are removed.
        spec: what the encoder reads.

    Raises:
        DataError: if the file or a column is missing, a row cannot be used, a control has one
            value only, or too few rows are left to measure on.
    """
    table = data.general
    assert table is not None
    bad = BadRows(skip=data.bad_rows == "skip")
    loaded = list(_read_general_rows(data, table, bad, spec))
    warn_of_narrow_images((row.levels for row in loaded), "data.general")
    label = table.label_columns.index(str(data.train.label)) if data.has_labelled_general else None
    distinct, conflicting = _drop_copies(loaded, label)
    rows = _drop_known(distinct, prepared)
    classes = _find_class_controls(rows, table.label_columns)
    documents = _find_document_column(rows, data.group, table.label_columns, classes)
    if documents in table.label_columns:
        index = table.label_columns.index(documents)
        rows = [replace(row, group=_get_control_values(row)[index]) for row in rows]
    train_rows, eval_rows = _split_halves(rows, data.seed, table.rows)
    if len(eval_rows) < MIN_EVAL_ROWS:
        raise DataError(
            f"data.general has {len(eval_rows)} rows to measure forgetting on, of {len(loaded)} "
            f"read, and needs {MIN_EVAL_ROWS}: copies of the run's own rows are dropped, and half "
            "may be used",
            "Give other general data",
        )
    facts = GeneralFacts(
        rows_read=len(loaded) + bad.count,
        bad_rows=bad.count,
        duplicates=len(loaded) - conflicting - len(distinct),
        conflicting=conflicting,
        known=len(distinct) - len(rows),
        near=0,
        documents=documents,
        fingerprint=_fingerprint_halves(train_rows, eval_rows),
    )
    return GeneralData(train_rows, eval_rows, tuple(table.label_columns), tuple(classes), facts)


def _read_general_rows(
    data: Data, table: GeneralTable, bad: BadRows, spec: InputSpec
) -> Iterator[Row]:
    """Yield the table's sound rows."""
    name, raws = read_table(table, "general", spec.modality)
    contents = table.text_columns if spec.modality == "text" else [table.image]
    raws = check_columns(name, raws, [*contents, *table.label_columns], "general")
    for raw, image in inspect_rows(raws, data, "general", spec):
        # Blank lines separate the texts of a file, and are not rows.
        if image is None and all(raw.values[column] == "" for column in table.text_columns):
            continue
        is_bad = isinstance(image, str)
        fault = image if is_bad else _find_general_fault(raw, table, data.group, spec)
        if fault:
            path = resolve_local_path(table.path, "data.general.path")
            bad.reject(raw.where, str(fault), path)
            continue
        label = tuple(normalize_name(raw.values[column]) for column in table.label_columns)
        group = None
        if data.group is not None and data.group in raw.values:
            group = str(raw.values[data.group])
        if isinstance(image, ImageInfo):
            yield Row(
                (image.content,), label, group, raw.index, raw.where, "general", image.size,
                levels=image.levels,
            )  # fmt: skip
        else:
            content = _extract_general_texts(raw, table, str(data.task))
            yield Row(content, label, group, raw.index, raw.where, "general")


def _find_general_fault(
    raw: RawRow, table: GeneralTable, group: str | None, spec: InputSpec
) -> str | None:
    """Return why a row cannot be used, if so."""
    if raw.fault:
        return raw.fault
    faults = [
        find_label_fault(raw.values, column, "classification") for column in table.label_columns
    ]
    if spec.modality == "text":
        faults += [find_document_fault(column, raw.values[column]) for column in table.text_columns]
    if group is not None and group in raw.values and raw.values[group] in (None, ""):
        faults.append(f"{group} is empty")
    return next(filter(None, faults), None)


def _extract_general_texts(raw: RawRow, table: GeneralTable, task: str) -> tuple[str, ...]:
    """Return the row's texts, or for tokens its words."""
    texts = [raw.values[column] for column in table.text_columns if column in raw.values]
    if task == "token-classification":
        return tuple(texts[0].split() if isinstance(texts[0], str) else list_words(texts[0]))
    return tuple(text if isinstance(text, str) else " ".join(list_words(text)) for text in texts)


def _drop_copies(rows: list[Row], label: int | None) -> tuple[list[Row], int]:
    """Return one row for each input, in whatever order they came, and how many rows conflict.

    Args:
        rows: all.
        label: the index of the task's label among the controls; inputs whose rows have different
            labels are dropped. None where the label is not a control.
    """
    copies: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.group or "", row.label, row.index)):
        copies[normalize_content(row.content)].append(row)
    distinct, conflicting = [], 0
    for same in copies.values():
        if label is not None and len({_get_control_values(row)[label] for row in same}) > 1:
            conflicting += len(same)
        else:
            distinct.append(same[0])
    return distinct, conflicting


def _drop_known(rows: list[Row], prepared: PreparedData) -> list[Row]:
    """Return the rows whose content is not an input of the run."""
    known = {normalize_content(row.content) for split in SPLITS for row in prepared.rows[split]}
    # Each text of a pair is known, too.
    known |= {(text,) for content in known if len(content) == 2 for text in content}
    return [row for row in rows if normalize_content(row.content) not in known]


def _find_class_controls(rows: list[Row], controls: list[str]) -> list[str]:
    """Return the controls with few enough values, and enough rows to each, for a probe."""
    classes = []
    for index, control in enumerate(controls):
        values = Counter(_get_control_values(row)[index] for row in rows)
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
    """Return the column that says which rows belong together, see `GeneralTable`."""
    if rows and rows[0].group is not None:
        return group
    return next((control for control in controls if control not in classes), None)


def _split_halves(rows: list[Row], seed: int, max_eval: int) -> tuple[list[Row], list[Row]]:
    """Return training and evaluation rows, at most `MAX_TRAIN_ROWS` and `max_eval`.

    In the order of its hash each document joins the half that has fewer rows; of each half the
    first documents that fit stay.
    """
    documents: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        documents[row.content if row.group is None else (row.group,)].append(row)
    order = sorted(
        documents, key=lambda name: hash_text("\x1f".join([str(seed), "general", *name]))
    )
    limits = dict(zip(HALVES, (MAX_TRAIN_ROWS, max_eval), strict=True))
    sizes = dict.fromkeys(HALVES, 0)
    halves: dict[str, list[Row]] = {half: [] for half in HALVES}
    for name in order:
        half = "used" if sizes["used"] < sizes["measured"] else "measured"
        sizes[half] += len(documents[name])
        if len(halves[half]) + len(documents[name]) <= limits[half]:
            halves[half] += documents[name]
    train_rows, eval_rows = (sorted(halves[half], key=hash_row) for half in HALVES)
    return train_rows, eval_rows


def _fingerprint_halves(train_rows: list[Row], eval_rows: list[Row]) -> str:
    return fingerprint([[hash_row(row).hex() for row in half] for half in (train_rows, eval_rows)])


def _get_control_values(row: Row) -> tuple[str, ...]:
    assert isinstance(row.label, tuple)
    return row.label


def drop_near_rows(general: GeneralData, is_near: Callable[[Row], bool]) -> GeneralData:
    """Drop training rows that are near copies of validation or test.

    What is learned from them, above all from their labels, would be known where it is measured.

    Args:
        general: the rows.
        is_near: whether a row is a near copy.
    """
    train_rows = [row for row in general.train_rows if not is_near(row)]
    changed = {
        "near": len(general.train_rows) - len(train_rows),
        "fingerprint": _fingerprint_halves(train_rows, general.eval_rows),
    }
    facts = general.facts.model_copy(update=changed)
    return replace(general, train_rows=train_rows, facts=facts)


def check_general_labels(general: GeneralData, control: str, names: list[str]) -> None:
    """Refuse training rows whose label is not a class of the task.

    Args:
        general: the rows.
        control: the column of the task's labels.
        names: the task's classes.

    Raises:
        DataError: naming the first such row.
    """
    labels = general.get_control_labels(control)
    for row, label in zip(general.train_rows, labels, strict=True):
        if label not in names:
            raise DataError(
                f"{row.where}: data.general has the {control} {label!r}, which train never has",
                "Correct it, or learn nothing from general labels (retain.replay.labelled)",
            )


def write_general(general: GeneralData, folder: Path) -> None:
    """Store rows and facts."""
    write_rows(dict(zip(HALVES, (general.train_rows, general.eval_rows), strict=True)), folder)
    tree = {
        "controls": general.controls,
        "classes": general.classes,
        "facts": general.facts.to_dict(),
    }
    (folder / "facts.json").write_text(to_json(tree), encoding="utf-8")


def read_general(folder: Path) -> GeneralData:
    """Return what `write_general` stored."""
    tree = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    halves = read_rows(folder, HALVES)
    return GeneralData(
        halves["used"], halves["measured"], tuple(tree["controls"]), tuple(tree["classes"]),
        GeneralFacts.model_validate(tree["facts"]),
    )  # fmt: skip
