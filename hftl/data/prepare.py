"""Prepare the data of a run: load, drop duplicates, split, and store the rows by content.

The rows of every split are stored, so that later stages and runs read one file and not the user's.
The same content is the same data, wherever the files are and in whatever order.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hftl.config.data import Data, Fraction, Table
from hftl.data.duplicates import count_near_images, drop_duplicates
from hftl.data.facts import CopyCounts, LabelType, Modality, PreparedFacts
from hftl.data.images import count_narrow_images
from hftl.data.labels import (
    check_targets,
    decode_logits,
    encode_for_metrics,
    encode_targets,
    get_label_names,
    recognize_tag_scheme,
)
from hftl.data.load import load_rows
from hftl.data.near_copies import NearPair, find_near_copies
from hftl.data.normalization import is_integer_name
from hftl.data.rows import BadRows, InputSpec, Row, read_rows, write_rows
from hftl.data.splits import (
    TASKS_WITHOUT_CLASS_SHOTS,
    draw_shots,
    hash_row,
    take_stratified,
)
from hftl.data.tables import get_table_folder, read_table, resolve_revisions
from hftl.errors import DataError
from hftl.plurals import choose_verb, count_noun
from hftl.runtime import paths
from hftl.runtime.run_folder import fingerprint, to_json

SPLITS = ("train", "validation", "test")
UNTYPED_SUFFIXES = (".csv", ".tsv")
"""Suffixes of tables whose cells have no type: what looks like an integer is one."""


@dataclass(frozen=True)
class PreparedData:
    """Hold the rows of each split, in an order of their own content.

    `names` are the classes in the order of their ids, empty for regression. `modality` is what the
    encoder reads.
    """

    task: str
    modality: Modality
    names: list[str]
    rows: dict[str, list[Row]]
    facts: PreparedFacts

    @cached_property
    def near_copies(self) -> list[NearPair]:
        """Return the pairs of rows that are nearly the same, see `find_near_copies`."""
        return find_near_copies(self.rows)

    def encode_targets(self, rows: list[Row]) -> np.ndarray:
        """Return the training targets of rows, see `labels.encode_targets`."""
        return encode_targets([row.label for row in rows], self.task, self.names)

    def encode_for_metrics(self, rows: list[Row]) -> np.ndarray:
        """Return the labels of rows in the form that metrics compare."""
        return encode_for_metrics([row.label for row in rows], self.task, self.names)

    def decode_for_metrics(self, rows: list[Row], logits: np.ndarray) -> np.ndarray:
        """Return the predictions that logits of rows stand for, in the same form."""
        labels, _ = decode_logits(logits, self.task, self.names, self.count_words(rows))
        return encode_for_metrics(labels, self.task, self.names)

    def count_words(self, rows: list[Row]) -> list[int]:
        """Return how many outputs each row has: its words for tokens, else one."""
        is_tokens = self.task == "token-classification"
        return [len(row.content) if is_tokens else 1 for row in rows]

    def draw_train_rows(self, shots: int | None, seed: int) -> list[Row]:
        """Return the training rows of an arm of this seed."""
        drawn = draw_shots(self.rows["train"], shots, self.task, seed)
        return sorted(drawn, key=hash_row)


def prepare_data(data: Data, spec: InputSpec = InputSpec()) -> PreparedData:  # noqa: B008 (immutable)
    """Load and split the data for the encoder that reads them.

    Raises:
        DataError: see `load_rows`; also for one class, a split left empty, a class that train does
            not have, or fewer rows than `shots`.
        HubError: if a Hub dataset cannot be read.
    """
    if data.task is None:
        return _prepare_without_task(data, spec)
    task = data.task
    bad = BadRows(skip=data.bad_rows == "skip")
    tables = [split for split in SPLITS if isinstance(getattr(data, split), Table)]
    loaded = {split: load_rows(data, split, bad, spec) for split in tables}
    narrow = count_narrow_images(row.levels for rows in loaded.values() for row in rows)
    distinct, counts = drop_duplicates(loaded)
    if counts.conflicting and not distinct["train"]:
        raise DataError(
            f"every input of train has two different labels, there or in another table "
            f"({counts.conflicting} rows)",
            f"Correct the {'targets' if task == 'regression' else 'labels'}"
            f"{suggest_multi_label(task)}",
        )
    rows = _split_rows(distinct, data, task, counts)
    if data.shots is not None:
        rows["validation"] = _cut_validation(rows, data.shots, task, data.seed)
    rows = {split: sorted(members, key=hash_row) for split, members in rows.items()}
    names = _list_class_names(rows, task)
    _check_label_columns(data.train, names)
    facts = PreparedFacts(
        task=task,
        modality=spec.modality,
        rows_read=sum(map(len, loaded.values())) + bad.count,
        bad_rows=bad.count,
        bad_rows_listed=bad.dropped,
        **dict(counts),
        near_pictures=count_near_images(rows),
        narrow_pictures=narrow,
        splits={split: len(members) for split, members in rows.items()},
        labels=names,
        label_type=_find_label_type(data, spec, names),
        label_counts=_count_labels(rows, task),
        fingerprint=fingerprint({s: [_identify_row(r) for r in rows[s]] for s in SPLITS}),
        hub_revisions=resolve_revisions(data),
    )
    if task == "token-classification":
        scheme = recognize_tag_scheme(tuple(names), "data.train.label: ")
        facts = facts.model_copy(update={"tag_scheme": scheme})
    draw_shots(rows["train"], data.shots, task, data.seed)
    return PreparedData(task, spec.modality, names, rows, facts)


def _prepare_without_task(data: Data, spec: InputSpec) -> PreparedData:
    """Return the data of a recipe that only adapts: no labelled row."""
    counts = CopyCounts(duplicates=0, conflicting=0, leaked=0)
    facts = PreparedFacts(
        task=None, modality=spec.modality, rows_read=0, bad_rows=0, bad_rows_listed=[],
        **dict(counts), near_pictures=0, narrow_pictures=None, splits=dict.fromkeys(SPLITS, 0),
        labels=[], label_type="text", label_counts=None, fingerprint=fingerprint({}),
        hub_revisions=resolve_revisions(data),
    )  # fmt: skip
    return PreparedData("", spec.modality, [], {split: [] for split in SPLITS}, facts)


def write_prepared_data(prepared: PreparedData, folder: Path, digest: str) -> None:
    """Store rows and facts, with the `hash_data_files` that they were read under."""
    write_rows({split: prepared.rows[split] for split in SPLITS}, folder)
    tree = {"facts": prepared.facts.to_dict(), "files": digest}
    (folder / "facts.json").write_text(to_json(tree), encoding="utf-8")


def read_prepared_data(folder: Path) -> PreparedData:
    """Return what `write_prepared_data` stored."""
    tree = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    facts = PreparedFacts.model_validate(tree["facts"])
    rows = read_rows(folder, SPLITS)
    return PreparedData(facts.task or "", facts.modality, facts.labels, rows, facts)


def read_stored_digest(folder: Path) -> str:
    """Return the `hash_data_files` that the stored rows were read under."""
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))["files"]


def hash_data_files(data: Data, modality: str = "text", parts: Sequence[str] = SPLITS) -> str:
    """Return a hash of these tables: how each is read, and the bytes of every local file of it.

    A table of the Hub counts by its id, a local one wherever it is.
    """
    digest = hashlib.sha256()
    for part in parts:
        table = getattr(data, part)
        if isinstance(table, Fraction):
            continue
        path = paths.resolve_local_path(table.path, f"data.{part}.path")
        if path is None or not path.exists():
            digest.update(f"{part} {table.model_dump_json()}".encode())
            continue
        digest.update(f"{part} {table.model_dump_json(exclude={'path'})}".encode())
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_file() and modality == "image":
            files += _find_named_images(table, part)
        for file in files:
            relative = os.path.relpath(file, path)
            digest.update(f"{part} {relative} {file.stat().st_size}".encode())
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _find_named_images(table: Table, part: str) -> list[Path]:
    """Return the image files that a table names and that exist; none if it holds the images."""
    folder = get_table_folder(table, part) or Path()
    _, raws = read_table(table, part, "image")
    cells = (raw.values.get(table.image) for raw in raws)
    first = next(cells, None)
    if not isinstance(first, str):
        return []
    files = [folder / name for name in (first, *cells) if isinstance(name, str)]
    # A cell that is no path at all, too long or with a NUL, is named as a bad row later.
    return [file for file in files if os.path.isfile(file)]


def suggest_multi_label(task: str) -> str:
    """Return what to do where an input rightly has several labels; nothing for other tasks."""
    if task != "classification":
        return ""
    return "; where several hold at once, set data.task=multi-label"


def _split_rows(
    distinct: dict[str, list[Row]], data: Data, task: str, counts: CopyCounts
) -> dict[str, list[Row]]:
    """Take test, then validation, from train where they have no table of their own."""
    pool = distinct["train"]
    total = len(pool)
    rows: dict[str, list[Row]] = {}
    for split in ("test", "validation"):
        part = getattr(data, split)
        if isinstance(part, Fraction):
            count = round(part.fraction * total)
            taken, pool = take_stratified(pool, count, task, data.seed, split, leave=1)
            rows[split], pool = _return_unknown_labels(taken, pool, task)
        else:
            rows[split] = _check_groups(distinct[split], pool, data)
    rows["train"] = pool
    for split, members in rows.items():
        if not members:
            raise _build_empty_split_error(split, distinct["train"], data, counts)
    return rows


def _build_empty_split_error(
    split: str, rows: list[Row], data: Data, counts: CopyCounts
) -> DataError:
    """Return the error of a split without rows, with the cause where it is known.

    Args:
        split: its name.
        rows: those of train before any split.
        data: the recipe's section.
        counts: of what was dropped.
    """
    given = [f"data.{name}" for name in SPLITS if isinstance(getattr(data, name), Table)]
    if not rows and counts.leaked and not counts.conflicting:
        return DataError(
            f"every row of data.train stands in {' or '.join(given[1:])}, too, and was dropped",
            "Give each row to one table",
        )
    what = f"{split} is left with no rows; train has {len(rows)} after {_describe_dropped(counts)}"
    if counts.conflicting:
        return DataError(what, "Correct the labels, or give more rows")
    groups = {row.group for row in rows}
    if rows and None not in groups and len(groups) < 1 + len(SPLITS) - len(given):
        return DataError(
            f"{what}, and these are {count_noun(len(groups), 'group')} by data.group "
            f"({data.group}), which no two splits share",
            "Name a column of more groups, or leave data.group out",
        )
    names = [row.label for row in rows]
    if data.task == "classification" and len(rows) > 2 and len(set(names)) == len(rows):
        return DataError(
            f"{what}, and no two of them have one label, as {names[0]!r} and {names[1]!r}, so that "
            "train needs all",
            "Check data.train.label: it reads like an identifier or a text",
        )
    return DataError(what, "Give more rows, or other fractions")


def _cut_validation(rows: dict[str, list[Row]], shots: int, task: str, seed: int) -> list[Row]:
    """Return validation, cut to the size of the training draw: a few-shot user has no more."""
    names = {name for row in rows["train"] for name in get_label_names(row.label, task)}
    size = shots * (1 if task in TASKS_WITHOUT_CLASS_SHOTS else len(names))
    if len(rows["validation"]) <= size:
        return rows["validation"]
    return take_stratified(rows["validation"], size, task, seed, "cut")[0]


def _describe_dropped(counts: CopyCounts) -> str:
    """Return what was dropped in words, contradictions apart from copies."""
    words = count_noun(counts.duplicates, "duplicate")
    if counts.leaked:
        words += f" ({counts.leaked} of a row in another table)"
    if counts.conflicting:
        words += f" and {count_noun(counts.conflicting, 'row')} with contradictory labels"
    return f"{words} {choose_verb(counts.duplicates + counts.conflicting, 'was')} dropped"


def _return_unknown_labels(
    taken: list[Row], pool: list[Row], task: str
) -> tuple[list[Row], list[Row]]:
    """Return rows with a name that only they have to train, with their groups.

    Rows with several names each may otherwise take all rows of a rare name from train.
    """
    if task not in ("multi-label", "token-classification"):
        return taken, pool
    known = {name for row in pool for name in get_label_names(row.label, task)}
    unknown = [row for row in taken if not known.issuperset(get_label_names(row.label, task))]
    groups = {row.group for row in unknown} - {None}
    contents = {row.content for row in unknown}
    remaining, returned = [], []
    for row in taken:
        goes_back = row.group in groups or row.content in contents
        (returned if goes_back else remaining).append(row)
    return remaining, pool + returned


def _check_groups(rows: list[Row], pool: list[Row], data: Data) -> list[Row]:
    """Return a table's rows, after checking that they share no group with train."""
    if data.group:
        shared = {row.group for row in rows} & {row.group for row in pool}
        if shared:
            raise DataError(
                f"the group {min(map(str, shared))!r} stands in train and in another table",
                "Give each group to one table, or leave data.group out",
            )
    return rows


def _list_class_names(rows: dict[str, list[Row]], task: str) -> list[str]:
    """Return the classes of train, numbers in numeric order; check those of the other splits."""
    if task == "regression":
        check_targets(rows["train"])
        return []
    known = {name for row in rows["train"] for name in get_label_names(row.label, task)}
    if len(known) < 2:
        only = f"one class only: {min(known)!r}" if known else "no label at all"
        raise DataError(f"train has {only}", "Check data.train.label and the file")
    for split in ("validation", "test"):
        for row in rows[split]:
            unknown = set(get_label_names(row.label, task)) - known
            if unknown:
                raise DataError(
                    f"{row.where}: {split} has the label {min(unknown)!r}, which train never has",
                    "Correct the label, or give train examples of it",
                )
    is_numeric = all(map(is_integer_name, known))
    return sorted(known, key=lambda name: (int(name), name) if is_numeric else (0, name))


def _identify_row(row: Row) -> str:
    """Return a string that distinguishes a row from all others, its target too."""
    target = f" {row.label!r}" if isinstance(row.label, float) else ""
    return hash_row(row).hex() + target


def _find_label_type(data: Data, spec: InputSpec, names: list[str]) -> LabelType:
    """Return integer, boolean or text: the type that the class names have in train's table."""
    column = data.train.label
    if isinstance(column, list) or not names:
        return "text"
    _, raws = read_table(data.train, "train", spec.modality)
    values = (raw.values.get(column) for raw in raws)
    first = next((value for value in values if value not in (None, "", [])), None)
    if isinstance(first, (list, tuple)):
        first = first[0]
    if isinstance(first, bool):
        return "boolean" if set(names) <= {"True", "False"} else "text"
    suffixed = str(data.train.path).lower().endswith(UNTYPED_SUFFIXES)
    is_untyped = suffixed or data.train.format in ("csv", "tsv")
    is_numeric = isinstance(first, (int, float)) or is_untyped
    return "integer" if is_numeric and all(map(is_integer_name, names)) else "text"


def _check_label_columns(train: Table, names: list[str]) -> None:
    """Refuse a column of 0 and 1 that is always 0: it cannot be learned."""
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
