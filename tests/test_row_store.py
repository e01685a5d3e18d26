"""Check that arrays of rows are read as they were written, or not at all."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hftl.errors import RunFolderError
from hftl.runtime import row_store
from hftl.runtime.row_store import RowStore, evict_unused

ADDRESS = {"weights": "a"}


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def array_of(number: int) -> np.ndarray:
    return np.full((1 + number % 3, 2), number, np.float32)


def write(store: RowStore, numbers: range) -> None:
    with store.lock(), store.write_part("what") as add:
        for number in numbers:
            add(key_of(number), array_of(number))


def test_rows_are_read_in_any_order_from_several_parts(tmp_path: Path) -> None:
    write(RowStore(tmp_path, ADDRESS), range(5))
    store = RowStore(tmp_path, ADDRESS)
    write(store, range(5, 9))
    order = [7, 2, 2, 0, 8]
    expected = np.concatenate([array_of(number) for number in order])
    for reader in (store, RowStore(tmp_path, ADDRESS)):
        np.testing.assert_array_equal(reader.gather([key_of(n) for n in order]), expected)
        np.testing.assert_array_equal(
            reader.gather([key_of(n) for n in order], slice(1, 2)), expected[:, 1:]
        )
        assert reader.details == "what" and key_of(9) not in reader
    assert key_of(0) not in RowStore(tmp_path, {"weights": "b"})


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing", "manifest"])
@pytest.mark.parametrize("name", ["values.bin", "sizes.npy"])
def test_damage_is_refused(damage: str, name: str, tmp_path: Path) -> None:
    store = RowStore(tmp_path, ADDRESS)
    write(store, range(5))
    path = store.folder / "part-0000" / ("MANIFEST.json" if damage == "manifest" else name)
    content = path.read_bytes()
    if damage == "flipped byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-3])
    with pytest.raises(RunFolderError, match=r"Delete .*part-0000"):
        RowStore(tmp_path, ADDRESS)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_part_that_breaks_off_is_absent(error: BaseException, tmp_path: Path) -> None:
    store = RowStore(tmp_path, ADDRESS)
    with pytest.raises(type(error)), store.lock(), store.write_part() as add:
        add(key_of(0), array_of(0))
        raise error
    assert key_of(0) not in store and key_of(0) not in RowStore(tmp_path, ADDRESS)
    if isinstance(error, OSError):
        assert not list(store.folder.iterdir()), "a full disk is not left fuller"
    write(store, range(2))
    assert key_of(1) in RowStore(tmp_path, ADDRESS)


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from hftl.runtime.row_store import RowStore
store = RowStore(Path(sys.argv[1]), {"weights": "a"})
print("ready", flush=True)
sys.stdin.readline()
with store.lock():
    missing = [n for n in range(40) if n.to_bytes(16, "big") not in store]
    if missing:
        with store.write_part("what") as add:
            for n in missing:
                time.sleep(0.002)
                add(n.to_bytes(16, "big"), np.full((1 + n % 3, 2), n, np.float32))
print(len(missing))
"""


def test_two_processes_write_each_row_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    counts = []
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        counts.append(int(writer.communicate(timeout=60)[0]))
    assert sorted(counts) == [0, 40]
    numbers = range(40)
    np.testing.assert_array_equal(
        RowStore(tmp_path, ADDRESS).gather([key_of(n) for n in numbers]),
        np.concatenate([array_of(n) for n in numbers]),
    )


def test_a_folder_that_is_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [RowStore(tmp_path, {"weights": name}) for name in "abc"]
    for store in stores:
        write(store, range(3))
    monkeypatch.setattr(row_store, "MAX_BYTES", 0)
    with stores[0].lock():
        evict_unused(tmp_path, [stores[2].folder])
    assert [store.folder.exists() for store in stores] == [True, False, True]
    expected = np.concatenate([array_of(0), array_of(1)])
    np.testing.assert_array_equal(stores[1].gather([key_of(0), key_of(1)]), expected)


def test_a_folder_that_others_remove_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "stays"):
        (tmp_path / name / "part-0000").mkdir(parents=True)
    sizes = row_store.list_sizes

    def list_sizes(folder: Path) -> Iterator[int]:
        if folder.name == "gone":
            raise FileNotFoundError(folder)
        return sizes(folder)

    monkeypatch.setattr(row_store, "list_sizes", list_sizes)
    monkeypatch.setattr(row_store, "MAX_BYTES", -1)
    row_store.evict_unused(tmp_path, [])
    assert not (tmp_path / "stays").exists()
