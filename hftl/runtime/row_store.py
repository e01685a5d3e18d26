"""Store an array for each of many rows on the disk, by content, and read it where it lies.

A folder holds the arrays of one address: all that they depend on beside the row. Each pass adds
parts, which are complete or absent. Commands, arms and processes that need the same rows share
them. Files are mapped into memory, so that what is read often stays in the system's cache.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from filelock import FileLock, Timeout
from pydantic import JsonValue

from hftl.runtime.run_folder import commit_stage, fingerprint, read_stage_inputs, to_json

MAX_BYTES = 8 << 30
"""Bytes that the arrays of all addresses take; the longest unused go first."""
KEY_BYTES = 16
VALUES, KEYS, SIZES, DETAILS = "values.bin", "keys.npy", "sizes.npy", "details.json"

AddRow = Callable[[bytes, np.ndarray], None]
"""Take the key of a row, 16 bytes, and its array, (any number, ...), which is written at once."""


class _WrittenRows:
    """Write rows to a file one by one, and what they were to others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._keys: list[bytes] = []
        self._sizes: list[int] = []
        self._kinds: set[tuple[str, tuple[int, ...]]] = set()

    def add(self, key: bytes, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values).data)
        self._keys.append(key)
        self._sizes.append(len(values))
        self._kinds.add((values.dtype.str, values.shape[1:]))

    def describe(self, folder: Path, details: JsonValue) -> None:
        ((dtype, shape),) = self._kinds
        np.save(folder / KEYS, np.frombuffer(b"".join(self._keys), np.uint8))
        np.save(folder / SIZES, np.array(self._sizes))
        described = {"dtype": dtype, "shape": list(shape), "details": details}
        (folder / DETAILS).write_text(to_json(described), encoding="utf-8")


class RowStore:
    """Read and write the arrays of one address.

    Args:
        root: where the folders of all addresses are.
        address: all that the arrays depend on beside the row's content.

    Raises:
        RunFolderError: if a stored part is not what was written.
    """

    def __init__(self, root: Path, address: Mapping[str, JsonValue]) -> None:
        self.root = root
        self.address = dict(address)
        self.folder = root / fingerprint(self.address)[:16]
        self.details: JsonValue = None
        """What the last part says of its arrays, such as the meaning of columns."""
        self._parts: dict[str, np.ndarray] = {}
        self._places: dict[bytes, tuple[np.ndarray, int, int]] = {}
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __deepcopy__(self, memo: object) -> Self:
        # A copy of a model that reads from here reads the same files.
        return self

    def refresh(self) -> None:
        """Read the parts that have been written since, by this process or another."""
        for part in sorted(self.folder.glob("part-*")):
            if part.name not in self._parts:
                self._open_part(part)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let nobody else write this address while the block runs; what others wrote is read."""
        self.root.mkdir(parents=True, exist_ok=True)
        with _build_lock(self.folder):
            self.refresh()
            yield

    @contextmanager
    def write_part(self, details: JsonValue = None) -> Iterator[AddRow]:
        """Yield a function that adds rows to a new part, which is there once the block has ended.

        To be called under `lock`. No more than one row is held in memory.
        """
        part = self.folder / f"part-{len(self._parts):04d}"
        with commit_stage(part, self.address) as aside:
            with open(aside / VALUES, "wb") as file:
                rows = _WrittenRows(file)
                yield rows.add
            rows.describe(aside, details)
        self._open_part(part)

    def gather(self, keys: Sequence[bytes], columns: slice = slice(None)) -> np.ndarray:
        """Return the arrays of rows, one behind the other.

        Args:
            keys: of the rows.
            columns: of the second axis, of arrays that have one.
        """
        places = [self._places[key] for key in keys]
        first = next(iter(self._parts.values()))
        shape = first[:0, columns].shape[1:] if first.ndim > 1 else ()
        total = sum(stop - start for _, start, stop in places)
        gathered = np.empty((total, *shape), first.dtype)
        end = 0
        for part, start, stop in places:
            begin, end = end, end + stop - start
            values = part[start:stop]
            gathered[begin:end] = values[:, columns] if part.ndim > 1 else values
        return gathered

    def count(self, key: bytes) -> int:
        """Return the length of a row's array."""
        _, start, stop = self._places[key]
        return stop - start

    def _open_part(self, part: Path) -> None:
        read_stage_inputs(part)
        self.folder.touch()
        described = json.loads((part / DETAILS).read_text("utf-8"))
        self.details = described["details"]
        keys = np.load(part / KEYS).reshape(-1, KEY_BYTES)
        ends = np.cumsum(np.load(part / SIZES)).tolist()
        shape = (ends[-1], *described["shape"])
        # A plain view: a slice of a memmap costs more than to copy what it shows.
        values = np.asarray(np.memmap(part / VALUES, described["dtype"], "r", shape=shape))
        self._parts[part.name] = values
        for key, begin, end in zip(keys, [0, *ends[:-1]], ends, strict=True):
            self._places[key.tobytes()] = (values, begin, end)


def evict_unused(root: Path, current: Collection[Path]) -> None:
    """Remove the folders that were used longest ago, but no current one, until all fit.

    A folder that another process writes stays, too; one that it reads stays readable for it.
    """
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for folder in root.iterdir():
        # Others rename parts and remove folders while this one looks.
        with suppress(FileNotFoundError):
            if folder.is_dir():
                used[folder] = folder.stat().st_mtime
                sizes[folder] = sum(list_sizes(folder))
    for folder in sorted(sizes, key=lambda folder: used[folder]):
        if sum(sizes.values()) <= MAX_BYTES:
            return
        if folder in current:
            continue
        try:
            with _build_lock(folder).acquire(timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            continue
        del sizes[folder]


def list_sizes(folder: Path) -> Iterator[int]:
    """Yield the bytes of every file of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.stat().st_size


def _build_lock(folder: Path) -> FileLock:
    return FileLock(folder.with_suffix(".lock"), preserve_lock_file=True)
