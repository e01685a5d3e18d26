"""Fill the disk at every write: one line, exit 7, what was there stays, nothing half is left."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hftl import cli_errors
from hftl.errors import is_disk_full
from hftl.measure.record import Record
from hftl.runtime import run_folder

TENSOR = torch.zeros(1 << 16)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 10**6),
    "safetensors": lambda path: save_file({"a": TENSOR}, path),
    "torch": lambda path: torch.save({"a": TENSOR}, path),
    "numpy": lambda path: np.save(path, np.zeros(1 << 16)),
    "arrow": lambda path: pq.write_table(pa.table({"a": list(range(10**5))}), path),
    "tokenizers": lambda path: Tokenizer(WordLevel({str(n): n for n in range(10**4)})).save(
        str(path)
    ),
}  # fmt: skip


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, which a file system that is full does as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("library", WRITERS)
def test_full_disk_is_recognised_in_the_error_of_every_library(
    library: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught, limited_files(4096):  # noqa: PT011, B017
        WRITERS[library](tmp_path / "file")
    assert is_disk_full(caught.value), repr(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_line_says_where_and_how_much_is_free(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_errors, "CURRENT_COMMAND", cli_errors.CurrentCommand(tmp_path))
    error = OSError(number, os.strerror(number))
    assert cli_errors.report_unexpected_error(error, debug=False) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert f"MB free in {tmp_path}" in line and "Free some space" in line
    assert os.strerror(number) in line and len(line) < 400


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, turn: int) -> None:
    """Let the call of this number, from 0, find no space."""
    function, calls = getattr(owner, name), iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == turn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("owner", "name", "turns"), [
    (os, "fsync", 4), (Path, "rename", 3), (Path, "mkdir", 1),
])  # fmt: skip
def test_stage_is_the_old_or_the_new_one_wherever_space_ends(
    owner: Any, name: str, turns: int, tmp_path: Path
) -> None:
    folder = tmp_path / "arms" / "full-seed0"

    def write(text: str) -> None:
        with run_folder.commit_stage(folder, {"recipe": {}}) as aside:
            (aside / "a.txt").write_text(text)
            (aside / "b.txt").write_text(text)

    write("old")
    for turn in range(turns):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, owner, name, turn)
            with pytest.raises(OSError, match="No space"):
                write(f"new {turn}")
        texts = {path.read_text() for path in folder.glob("*.txt")}
        # The last flush is of the parent folder, after the rename.
        expected = f"new {turn}" if name == "fsync" and turn == turns - 1 else "old"
        assert texts == {expected}
        assert run_folder.read_stage_inputs(folder) == {"recipe": {}}
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    write("new")
    assert (folder / "a.txt").read_text() == "new"


def test_file_written_through_memory_takes_its_space_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pixels.npy"
    array = np.lib.format.open_memmap(path, "w+", dtype=np.uint8, shape=(1 << 20,))
    run_folder.reserve_space(path)
    assert path.stat().st_blocks * 512 >= 1 << 20 and array.shape == (1 << 20,)
    fail_at(monkeypatch, os, "posix_fallocate", 0)
    with pytest.raises(OSError, match="No space"):
        run_folder.reserve_space(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 16 kB in memory, which the test may enlarge."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def check_stages(run: Path) -> int:
    """Check every stage of a run folder, and return how many there are."""
    stages = [path.parent for path in run.glob("*/*/MANIFEST.json")]
    for stage in stages:
        assert run_folder.read_stage_inputs(stage) is not None
    assert not list(run.glob("phases/.tmp-*")) and not list(run.glob("arms/.tmp-*"))
    return len(stages)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_reload")
def test_run_on_a_disk_that_is_full_at_every_phase_ends_as_on_a_large_one(
    hftl: Any, recipe_tree: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    """Enlarge the disk by a quarter after each failure: the same command goes on to the end."""
    recipe_tree["measure"]["seeds"] = [0]
    recipe_tree["measure"]["arms"] = ["head", "full"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    assert hftl("run", path, "--output", tmp_path / "large").code == 0
    size, codes, stages = 16.0, [], []
    while not codes or codes[-1]:
        outcome = hftl("run", path, "--output", small_disk / "run")
        codes.append(outcome.code)
        if not outcome.code:
            break
        assert outcome.code == 7, outcome.err
        lines = [line for line in outcome.err.splitlines() if "could not be kept" not in line]
        assert len(lines) == 1 and "Free some space" in lines[0], outcome.err
        stages.append(check_stages(small_disk / "run"))
        size *= 1.25
        remount = f"remount,size={size:.0f}k"
        subprocess.run(["mount", "-o", remount, str(small_disk)], check=True)
        assert size < 10**6
    print(f"full {len(codes) - 1} times, with {stages} stages finished")
    assert stages == sorted(stages) and len(set(stages)) > 4
    records = [Record.read(run) for run in (tmp_path / "large", small_disk / "run")]
    assert records[0].hash == records[1].hash
