"""The data stage: load, drop duplicates, split, and keep the rows by what they say.

The rows of every split are stored, so that later phases and runs read one file and not the
user's; data count by content, wherever they lie and in whatever order.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hftl import places
from hftl.data.duplicates import drop_duplicates
from hftl.data.hub import revision
from hftl.data.load import BadRows, Row, load
from hftl.data.split import content_key, draw_shots, take
from hftl.errors import DataError
from hftl.record import fingerprint, to_json
from hftl.sections import Data, Fraction, Table

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """The rows of each split, in an order of their own content.

    `names` are the classes in the order of their ids, empty for regression. `facts` is what the
    record tells about the data.
    """

    task: str
    names: list[str]
    rows: dict[str, list[Row]]
    facts: dict[str, Any]

    def labels(self, rows: list[Row]) -> np.ndarray:
        """(rows,) class ids as int64, or targets as float64."""
        if self.task == "regression":
            return np.array([row.label for row in rows], dtype=np.float64)
        ids = {name: i for i, name in enumerate(self.names)}
        return np.array([ids[str(row.label)] for row in rows], dtype=np.int64)

    def train(self, shots: int | None, seed: int) -> list[Row]:
        """The rows that an arm of this seed learns from."""
        drawn = draw_shots(self.rows["train"], shots, self.task, seed)
        return sorted(drawn, key=content_key)


def prepare(data: Data) -> Prepared:
    """Loads and splits.

    Raises:
        DataError: see `load`; also for one class, a split left empty, a class train never has, or
            fewer rows than `shots`.
        HubError: if a hub dataset cannot be had.
    """
    task = str(data.task)
    bad = BadRows(skip=data.bad_rows == "skip")
    tables = {s: getattr(data, s) for s in SPLITS if isinstance(getattr(data, s), Table)}
    loaded = {s: load(table, s, task, data.group, bad) for s, table in tables.items()}
    read = sum(map(len, loaded.values()))
    kept, counts = drop_duplicates(loaded)
    rows = _split(kept, data, task)
    if data.shots is not None:
        classes = 1 if task == "regression" else len({row.label for row in rows["train"]})
        size = data.shots * classes
        if len(rows["validation"]) > size:
            rows["validation"], _ = take(rows["validation"], size, task, data.seed, "cut")
    rows = {split: sorted(found, key=content_key) for split, found in rows.items()}
    names = _names(rows, task)
    facts = {
        "task": task,
        "rows_read": read + len(bad.dropped),
        "bad_rows": len(bad.dropped),
        "bad_rows_listed": bad.dropped,
        **counts,
        "splits": {split: len(found) for split, found in rows.items()},
        "labels": names,
        "label_counts": _label_counts(rows, task),
        "fingerprint": fingerprint({s: [content_key(r).hex() for r in rows[s]] for s in SPLITS}),
        "hub_revisions": {
            s: revision(t.path, t.revision) for s, t in tables.items() if _on_hub(t, s)
        },
    }
    prepared = Prepared(task, names, rows, facts)
    draw_shots(rows["train"], data.shots, task, data.seed)
    return prepared


def write(prepared: Prepared, folder: Path, files: str) -> None:
    """Stores the rows and facts; `files` is the digest of the user's own files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = [(split, row) for split in SPLITS for row in prepared.rows[split]]
    columns: dict[str, list[Any]] = {
        "split": [split for split, _ in told],
        "row": [row.index for _, row in told],
        "where": [row.where for _, row in told],
        "texts": [list(row.texts) for _, row in told],
        "label": [row.label for _, row in told],
        "group": [row.group for _, row in told],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    facts = {"facts": prepared.facts, "files": files}
    (folder / "facts.json").write_text(to_json(facts), encoding="utf-8")


def read(folder: Path) -> Prepared:
    """What `write` stored."""
    import pyarrow.parquet as pq

    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["facts"]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for told in pq.read_table(folder / "rows.parquet").to_pylist():
        split = told.pop("split")
        rows[split].append(Row(tuple(told["texts"]), told["label"], told["group"], told["row"],
                               told["where"]))  # fmt: skip
    return Prepared(facts["task"], facts["labels"], rows, facts)


def files_digest(data: Data) -> str:
    """A hash of the bytes of every local file the data section names; hub ids count by name."""
    digest = hashlib.sha256()
    for split in SPLITS:
        table = getattr(data, split)
        if isinstance(table, Fraction):
            continue
        path = places.find(table.path, f"data.{split}.path")
        if path is None or not path.exists():
            digest.update(f"{split} {table.model_dump_json()}".encode())
            continue
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            inside = file.relative_to(path).as_posix()
            digest.update(f"{split} {inside} {file.stat().st_size}".encode())
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def stored_digest(folder: Path) -> str:
    """The `files_digest` that the stored rows were read under."""
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))["files"]


def _on_hub(table: Table, split: str) -> bool:
    return table.format == "hub" or places.find(table.path, f"data.{split}.path") is None


def _split(kept: dict[str, list[Row]], data: Data, task: str) -> dict[str, list[Row]]:
    """Test, then validation, taken from train where they have no table of their own."""
    pool = kept["train"]
    whole = len(pool)
    rows: dict[str, list[Row]] = {}
    for split in ("test", "validation"):
        part = getattr(data, split)
        if isinstance(part, Fraction):
            count = round(part.fraction * whole)
            rows[split], pool = take(pool, count, task, data.seed, split, leave=1)
        else:
            rows[split] = _apart(kept[split], pool, data)
    rows["train"] = pool
    for split, found in rows.items():
        if not found:
            raise DataError(
                f"{split} is left with no rows of {whole} after duplicates are dropped",
                "Give more rows, or other fractions",
            )
    return rows


def _apart(rows: list[Row], pool: list[Row], data: Data) -> list[Row]:
    """A table's rows, checked to share no group with train."""
    if data.group:
        straddling = {row.group for row in rows} & {row.group for row in pool}
        if straddling:
            raise DataError(
                f"the group {min(map(str, straddling))!r} stands in train and in another table",
                "Give each group to one table, or leave data.group out",
            )
    return rows


def _names(rows: dict[str, list[Row]], task: str) -> list[str]:
    """The classes of train, numbers in their order; every other split knows no other class."""
    if task == "regression":
        return []
    known = {str(row.label) for row in rows["train"]}
    if len(known) < 2:
        raise DataError(
            f"train has one class only: {min(known)!r}", "Check data.train.label and the file"
        )
    for split in ("validation", "test"):
        for row in rows[split]:
            if row.label not in known:
                raise DataError(
                    f"{row.where}: {split} has the label {row.label!r}, which train never has",
                    "Correct the label, or give train examples of it",
                )
    number = all(name.lstrip("-").isdigit() for name in known)
    return sorted(known, key=lambda name: (int(name), name) if number else (0, name))


def _label_counts(rows: dict[str, list[Row]], task: str) -> dict[str, dict[str, int]] | None:
    if task == "regression":
        return None
    return {s: dict(sorted(Counter(str(r.label) for r in rows[s]).items())) for s in SPLITS}
