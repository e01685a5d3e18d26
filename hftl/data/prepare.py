"""The data stage: load, drop duplicates, split, and keep the rows by what they say.

The rows of every split are stored, so that later phases and runs read one file and not the
user's; data count by content, wherever they lie and in whatever order.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.data import Data, Fraction, Table
from hftl.data import labels
from hftl.data.duplicates import CopyCounts, count_near_images, drop_duplicates
from hftl.data.images import count_narrow_images
from hftl.data.labels import check_targets, get_label_names, recognize_tag_scheme
from hftl.data.load import (
    BadRows,
    InputSpec,
    Row,
    get_table_folder,
    load_rows,
    read_rows,
    read_table,
    resolve_revisions,
    write_rows,
)
from hftl.data.normalization import is_integer_name
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS, draw_shots, hash_row, take_stratified
from hftl.errors import DataError
from hftl.runtime import paths as places
from hftl.runtime.fingerprints import fingerprint, to_json

SPLITS = ("train", "validation", "test")
UNTYPED_SUFFIXES = (".csv", ".tsv")
"""Suffixes of tables whose cells have no type: what looks like an integer is one."""


@dataclass(frozen=True)
class PreparedData:
    """The rows of each split, in an order of their own content.

    `names` are the classes in the order of their ids, empty for regression. `modality` is what the
    encoder reads. `facts` is what the record tells about the data.
    """

    task: str
    modality: str
    names: list[str]
    rows: dict[str, list[Row]]
    facts: dict[str, Any]

    def encode_targets(self, rows: list[Row]) -> np.ndarray:
        """What the rows teach, see `answers.targets`."""
        return labels.encode_targets([row.label for row in rows], self.task, self.names)

    def encode_for_metrics(self, rows: list[Row]) -> np.ndarray:
        """What metrics compare predictions with, see `answers.measured`."""
        return labels.encode_for_metrics([row.label for row in rows], self.task, self.names)

    def count_words(self, rows: list[Row]) -> list[int]:
        """How many outputs each row has: its words for tokens, else one."""
        tokens = self.task == "token-classification"
        return [len(row.content) if tokens else 1 for row in rows]

    def draw_train_rows(self, shots: int | None, seed: int) -> list[Row]:
        """The rows that an arm of this seed learns from."""
        drawn = draw_shots(self.rows["train"], shots, self.task, seed)
        return sorted(drawn, key=hash_row)


def prepare_data(data: Data, reading: InputSpec = InputSpec()) -> PreparedData:  # noqa: B008 (immutable)
    """Loads and splits, as the encoder that reads them needs it.

    Raises:
        DataError: see `load`; also for one class, a split left empty, a class train never has, or
            fewer rows than `shots`.
        HubError: if a hub dataset cannot be had.
    """
    if data.task is None:
        return _prepare_without_task(data, reading)
    task = data.task
    bad = BadRows(skip=data.bad_rows == "skip")
    tables = {s: getattr(data, s) for s in SPLITS if isinstance(getattr(data, s), Table)}
    loaded = {s: load_rows(data, s, bad, reading) for s in tables}
    read = sum(map(len, loaded.values()))
    narrow = count_narrow_images(row.levels for part in loaded.values() for row in part)
    kept, counts = drop_duplicates(loaded)
    if counts.conflicting and not kept["train"]:
        raise DataError(
            f"every input of train has two different labels, there or in another table "
            f"({counts.conflicting} rows)",
            f"Correct the {'targets' if task == 'regression' else 'labels'}{suggest_multi_label(task)}",
        )
    rows = _split_rows(kept, data, task, counts)
    if data.shots is not None:
        known = {name for row in rows["train"] for name in get_label_names(row.label, task)}
        size = data.shots * (1 if task in TASKS_WITHOUT_CLASS_SHOTS else len(known))
        if len(rows["validation"]) > size:
            rows["validation"], _ = take_stratified(
                rows["validation"], size, task, data.seed, "cut"
            )
    rows = {split: sorted(found, key=hash_row) for split, found in rows.items()}
    names = _list_class_names(rows, task)
    _check_label_columns(data.train, names)
    facts = {
        "task": task,
        "modality": reading.modality,
        "rows_read": read + bad.count,
        "bad_rows": bad.count,
        "bad_rows_listed": bad.dropped,
        **asdict(counts),
        "near_pictures": count_near_images(rows),
        "narrow_pictures": None if narrow is None else asdict(narrow),
        "splits": {split: len(found) for split, found in rows.items()},
        "labels": names,
        "label_type": _find_label_type(data, reading, names),
        "label_counts": _count_labels(rows, task),
        "fingerprint": fingerprint({s: [_identify_row(r) for r in rows[s]] for s in SPLITS}),
        "hub_revisions": resolve_revisions(data),
    }
    if task == "token-classification":
        facts["tag_scheme"] = asdict(recognize_tag_scheme(tuple(names), "data.train.label: "))
    prepared = PreparedData(task, reading.modality, names, rows, facts)
    draw_shots(rows["train"], data.shots, task, data.seed)
    return prepared


def _prepare_without_task(data: Data, reading: InputSpec) -> PreparedData:
    """What there is without a task: no labelled row."""
    empty = dict.fromkeys(SPLITS, 0)
    facts = {
        "task": None, "modality": reading.modality, "rows_read": 0, "bad_rows": 0,
        "bad_rows_listed": [], **asdict(CopyCounts(0, 0, 0, 0, 0)), "near_pictures": 0,
        "narrow_pictures": None,
        "splits": empty, "labels": [], "label_type": "text", "label_counts": None,
        "fingerprint": fingerprint({}),
        "hub_revisions": resolve_revisions(data),
    }  # fmt: skip
    return PreparedData("", reading.modality, [], {split: [] for split in SPLITS}, facts)


def write_prepared_data(prepared: PreparedData, folder: Path, files: str) -> None:
    """Stores the rows and facts; `files` is the digest of the user's own files."""
    write_rows({split: prepared.rows[split] for split in SPLITS}, folder)
    facts = {"facts": prepared.facts, "files": files}
    (folder / "facts.json").write_text(to_json(facts), encoding="utf-8")


def read_prepared_data(folder: Path) -> PreparedData:
    """What `write_prepared_data` stored."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["facts"]
    rows = read_rows(folder, SPLITS)
    return PreparedData(facts["task"] or "", facts["modality"], facts["labels"], rows, facts)


def hash_data_files(data: Data, modality: str = "text", parts: Sequence[str] = SPLITS) -> str:
    """A hash of the bytes of every local file of these tables; hub ids count by name."""
    digest = hashlib.sha256()
    for split in parts:
        table = getattr(data, split)
        if isinstance(table, Fraction):
            continue
        path = places.resolve_local_path(table.path, f"data.{split}.path")
        if path is None or not path.exists():
            digest.update(f"{split} {table.model_dump_json()}".encode())
            continue
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_file() and modality == "image":
            files += _find_named_images(table, split)
        for file in files:
            inside = os.path.relpath(file, path)
            digest.update(f"{split} {inside} {file.stat().st_size}".encode())
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _find_named_images(table: Table, split: str) -> list[Path]:
    """The picture files that a table names and that are there; none where it holds them itself."""
    folder = get_table_folder(table, split) or Path()
    _, raws = read_table(table, split, "image")
    named = (raw.values.get(table.image) for raw in raws)
    first = next(named, None)
    if not isinstance(first, str):
        return []
    paths = [folder / name for name in (first, *named) if isinstance(name, str)]
    # What is no path at all, too long or with a NUL, is named as a bad row later.
    return [path for path in paths if os.path.isfile(path)]


def read_stored_digest(folder: Path) -> str:
    """The `hash_data_files` that the stored rows were read under."""
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))["files"]


def suggest_multi_label(task: str) -> str:
    """Return what to do where an input rightly has several labels; nothing for other tasks."""
    one = task == "classification"
    return "; where several hold at once, set data.task=multi-label" if one else ""


def _split_rows(
    kept: dict[str, list[Row]], data: Data, task: str, counts: CopyCounts
) -> dict[str, list[Row]]:
    """Test, then validation, taken from train where they have no table of their own."""
    pool = kept["train"]
    whole = len(pool)
    rows: dict[str, list[Row]] = {}
    for split in ("test", "validation"):
        part = getattr(data, split)
        if isinstance(part, Fraction):
            count = round(part.fraction * whole)
            taken, pool = take_stratified(pool, count, task, data.seed, split, leave=1)
            rows[split], pool = _return_unknown_labels(taken, pool, task)
        else:
            rows[split] = _check_groups(kept[split], pool, data)
    rows["train"] = pool
    for split, found in rows.items():
        if not found:
            raise DataError(
                f"{split} is left with no rows; train has {whole} after {_describe_dropped(counts)}",
                "Correct the labels, or give more rows"
                if counts.conflicting
                else "Give more rows, or other fractions",
            )
    return rows


def _describe_dropped(counts: CopyCounts) -> str:
    """Say what was dropped, contradictions apart from copies."""
    words = f"{counts.duplicates} duplicates"
    if counts.leaked:
        words += f" ({counts.leaked} of a row in another table)"
    if counts.conflicting:
        words += f" and {counts.conflicting} rows with contradictory labels"
    return f"{words} were dropped"


def _return_unknown_labels(
    taken: list[Row], pool: list[Row], task: str
) -> tuple[list[Row], list[Row]]:
    """Rows with several names each may take all of a rare one: such a row goes back to train, and
    its group with it."""
    if task not in ("multi-label", "token-classification"):
        return taken, pool
    known = {name for row in pool for name in get_label_names(row.label, task)}
    strange = [row for row in taken if not known.issuperset(get_label_names(row.label, task))]
    whole = {row.group for row in strange} - {None}
    kept, back = [], []
    lone = {row.content for row in strange}
    for row in taken:
        (back if row.group in whole or row.content in lone else kept).append(row)
    return kept, pool + back


def _check_groups(rows: list[Row], pool: list[Row], data: Data) -> list[Row]:
    """A table's rows, checked to share no group with train."""
    if data.group:
        straddling = {row.group for row in rows} & {row.group for row in pool}
        if straddling:
            raise DataError(
                f"the group {min(map(str, straddling))!r} stands in train and in another table",
                "Give each group to one table, or leave data.group out",
            )
    return rows


def _list_class_names(rows: dict[str, list[Row]], task: str) -> list[str]:
    """The classes of train, numbers in their order; every other split knows no other class."""
    if task == "regression":
        check_targets(rows["train"])
        return []
    known = {name for row in rows["train"] for name in get_label_names(row.label, task)}
    if len(known) < 2:
        only = f"one class only: {min(known)!r}" if known else "no label at all"
        raise DataError(f"train has {only}", "Check data.train.label and the file")
    for split in ("validation", "test"):
        for row in rows[split]:
            strange = set(get_label_names(row.label, task)) - known
            if strange:
                raise DataError(
                    f"{row.where}: {split} has the label {min(strange)!r}, which train never has",
                    "Correct the label, or give train examples of it",
                )
    number = all(map(is_integer_name, known))
    return sorted(known, key=lambda name: (int(name), name) if number else (0, name))


def _identify_row(row: Row) -> str:
    """Return what tells a row from all others, its target too."""
    target = f" {row.label!r}" if isinstance(row.label, float) else ""
    return hash_row(row).hex() + target


def _find_label_type(data: Data, reading: InputSpec, names: list[str]) -> str:
    """Return integer, boolean or text: the type that the class names have in train's table."""
    column = data.train.label
    if isinstance(column, list) or not names:
        return "text"
    _, raws = read_table(data.train, "train", reading.modality)
    values = (raw.values.get(column) for raw in raws)
    first = next((value for value in values if value not in (None, "", [])), None)
    if isinstance(first, (list, tuple)):
        first = first[0]
    if isinstance(first, bool):
        return "boolean" if set(names) <= {"True", "False"} else "text"
    untyped = str(data.train.path).lower().endswith(UNTYPED_SUFFIXES) or data.train.format in (
        "csv",
        "tsv",
    )
    numeric = isinstance(first, (int, float)) or untyped
    return "integer" if numeric and all(map(is_integer_name, names)) else "text"


def _check_label_columns(train: Table, names: list[str]) -> None:
    """Columns of 0 and 1 are all meant to be learnt."""
    never = (
        [c for c in train.label_columns if c not in names] if isinstance(train.label, list) else []
    )
    if never:
        raise DataError(
            f"the label column {never[0]!r} is never 1 in train",
            "Leave it out of data.train.label, or give examples of it",
        )


def _count_labels(rows: dict[str, list[Row]], task: str) -> dict[str, dict[str, int]] | None:
    if task == "regression":
        return None
    return {
        s: dict(
            sorted(Counter(n for row in rows[s] for n in get_label_names(row.label, task)).items())
        )
        for s in SPLITS
    }
