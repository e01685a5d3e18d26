"""Copy the folder of a run as it is before each change of a file: what a kill there would leave.

A process that is killed leaves the files as they are. One run therefore shows what is left by a
kill before any of its writes, flushes, renames and removals; equal folders are kept once.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftl.train import step_checkpoint

CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
"""Events of Python's that change folders, and which argument of each is the folder of a name."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STEPS_BETWEEN = 4
"""Of checkpoints while states are recorded, so that each recording has the same states."""
INDEX = "index.jsonl"

Files = dict[str, tuple[int, ...]]
"""Size, time and number of each file by its path; of a folder nothing."""


class Recorder:
    """Copy a run folder before each change, and list the changes; in the process of the run.

    Args:
        run: the folder.
        states: gets a folder for each state of it, and the list.
    """

    def __init__(self, run: Path, states: Path) -> None:
        self.run, self.states = run, states
        self.files: Files | None = None
        self.count = 0
        self._is_busy = False
        self._process = 0

    def start(self) -> None:
        """Record from now on."""
        self.states.mkdir()
        self._process = os.getpid()
        os.fsync = self._wrap(os.fsync, "flush", _find_path)
        step_checkpoint.save_file = self._wrap(
            step_checkpoint.save_file, "write", lambda _, path: str(path)
        )
        step_checkpoint.Rhythm.is_due = property(_count_steps)  # pyright: ignore
        sys.addaudithook(self._hear)

    def _wrap(
        self, function: Callable[..., Any], event: str, find_path: Callable[..., str]
    ) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.record(event, find_path(*args))
            return function(*args)

        return call

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        # The check of a reload runs in a fork, which inherits what hears of changes.
        if self._is_busy or os.getpid() != self._process or not self.run.exists():
            return
        if event in CHANGES:
            path, folder = os.fsdecode(args[0]), args[CHANGES[event]]
            whole = path if folder == -1 else f"{_find_path(folder)}/{path}"
            self.record(event.removeprefix("os."), whole)
        elif event == "open" and args[2] & WRITING and not isinstance(args[0], int):
            self.record("open", os.fsdecode(args[0]))

    def record(self, event: str, path: str) -> None:
        """Add a change to the list, and the state before it unless the last one was the same."""
        if self._is_busy or not path.startswith(f"{self.run}/") or path == f"{self.run}/log.txt":
            return
        self._is_busy = True
        files = read_files(self.run)
        if files != self.files:
            self._copy(files)
        with open(self.states / INDEX, "a", encoding="utf-8") as handle:
            handle.write(json.dumps([self.count - 1, event, path]) + "\n")
        self._is_busy = False

    def _copy(self, files: Files) -> None:
        """Copy the folder; what has not changed is the same file as in the state before."""
        place, before = self.states / str(self.count), self.states / str(self.count - 1)
        place.mkdir()
        for name, facts in files.items():
            if not facts:
                (place / name).mkdir()
            elif self.files is not None and self.files.get(name) == facts:
                os.link(before / name, place / name)
            else:
                shutil.copy2(self.run / name, place / name)
        self.files = files
        self.count += 1


def read_files(folder: Path) -> Files:
    """Return what a folder holds."""
    files: Files = {}
    for parent, folders, names in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        files |= {str(inside / name): () for name in sorted(folders)}
        for name in sorted(names):
            facts = os.stat(Path(parent, name))
            files[str(inside / name)] = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
    return files


def read_states(states: Path) -> list[tuple[str, str]]:
    """Return the first change after each state: what it is, and of which file."""
    first: dict[int, tuple[str, str]] = {}
    for line in (states / INDEX).read_text(encoding="utf-8").splitlines():
        number, event, path = json.loads(line)
        first.setdefault(number, (event, path))
    return [first[number] for number in sorted(first)]


def count_changes(states: Path) -> int:
    """Return how many changes were recorded."""
    return len((states / INDEX).read_text(encoding="utf-8").splitlines())


def _find_path(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def _count_steps(rhythm: Any) -> bool:
    rhythm.steps = getattr(rhythm, "steps", 0) + 1
    return rhythm.steps % STEPS_BETWEEN == 0
