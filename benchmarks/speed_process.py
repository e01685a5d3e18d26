"""Run one contender in a process of its own, and measure its seconds and its memory. Linux only."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

POLL_SECONDS = 0.05
KIB = 1024
INSTALLED = {"PYTHONDONTWRITEBYTECODE": ""}
"""An installed package is compiled once, as the peers' libraries are, whatever is set here."""


class Usage(BaseModel):
    """Hold what a command took: seconds, and MiB at their greatest.

    `train` is the training alone, None where nothing trains; `whole` the command from its start to
    its end; `cpu` the processor's seconds of all its processes; `anonymous` the memory that they
    allocated, sampled and added up; `resident` the resident set of the largest one, with the pages
    of files that the system can take back, and never less than this process has, whose peak a new
    process inherits. None where an earlier version did not measure it.
    """

    train: float | None
    whole: float
    cpu: float
    anonymous: float | None
    resident: float


def run_process(
    command: list[str], environment: dict[str, str]
) -> tuple[Usage, list[tuple[float, str]]]:
    """Run a command to its end.

    Returns:
        What it took, but for `train`, and the lines that it printed, each with its seconds.

    Raises:
        SystemExit: if it fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **INSTALLED, **environment},
        )  # fmt: skip
        memory = MemoryWatch(process.pid)
        memory.start()
        lines = [
            (time.perf_counter() - started, line.rstrip("\n")) for line in process.stdout or ()
        ]
        _, status, used = os.wait4(process.pid, 0)
        whole = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        memory.stop()
        if process.returncode:
            errors.seek(0)
            printed = "\n".join([*(line for _, line in lines), errors.read()])
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{printed}")
    usage = Usage(
        train=None, whole=whole, cpu=used.ru_utime + used.ru_stime,
        anonymous=memory.peak / KIB, resident=used.ru_maxrss / KIB,
    )  # fmt: skip
    return usage, lines


class MemoryWatch(threading.Thread):
    """Sample the anonymous memory of a process and its descendants: the greatest sum, in KiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak = pid, 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until the process has ended."""
        while not self._ended.wait(POLL_SECONDS):
            self.peak = max(self.peak, sum(map(read_anonymous, list_processes(self.pid))))

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self.join()


def list_processes(pid: int) -> Iterator[int]:
    """Yield a process and its descendants, as far as they still run."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in read_file(file).split():
            yield from list_processes(int(child))


def read_anonymous(pid: int) -> int:
    """Return the anonymous resident memory of a process in KiB, 0 for one that has ended."""
    for line in read_file(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0


def read_file(path: Path) -> str:
    """Return a file of /proc, empty where its process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
