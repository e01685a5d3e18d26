"""End a run in which one of several processes does nothing, and the others wait for it.

Every process reports its progress in a training by `beat`, before it waits for others. A thread
of each writes the number of beats to a file in the run folder. Where none came for too long, the
processes write their stacks to log.txt, one names those that are behind, and all end.
"""

import faulthandler
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hftl.errors import HungProcessError, RecipeError
from hftl.runtime import distributed
from hftl.runtime.run_folder import BEATS_FOLDER

VARIABLE = "HFTL_WATCHDOG_SECONDS"
DEFAULT_SECONDS = 600.0
REPORT_SECONDS = 1.0
"""Seconds between the reports of two processes: the first of them suffices."""


def read_limit() -> float:
    """Return the seconds after which a process counts as hung; 0: never.

    Raises:
        RecipeError: if the environment holds no such number.
    """
    text = os.environ.get(VARIABLE, "") or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RecipeError(f"{VARIABLE}={text}: expected seconds, or 0", "Correct or unset it")
    return seconds


class Watchdog:
    """Watch the beats of this process, and those of the others in the files that they write.

    Args:
        folder: of the run.
        limit: seconds without a beat.
        report: receives the error; it prints and stores it.
    """

    def __init__(
        self, folder: Path, limit: float, report: Callable[[HungProcessError], object]
    ) -> None:
        self._folder = folder
        self._limit = limit
        self._beats_file = folder / BEATS_FOLDER / str(distributed.get_rank())
        self._report = report
        self._beats = 0
        self._last = time.monotonic()
        self.is_armed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._beats_file.parent.mkdir(exist_ok=True)
        self._beats_file.touch()
        self._write_beats()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Report progress."""
        self._beats += 1
        self._last = time.monotonic()

    def expect_beats(self, expected: bool) -> None:
        """Count the time without a beat from now on, or no longer."""
        self.is_armed = expected
        self.beat()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 5)):
            self._write_beats()
            if self.is_armed and time.monotonic() - self._last > self._limit:
                self._end_run()

    def _end_run(self) -> None:
        """Write this process's stack, let one process report, and exit."""
        rank, error_file = distributed.get_rank(), self._folder / "error.json"
        with open(self._folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"process {rank} waits, or does nothing; its stacks:\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
        # The files of all are written by then; rank 0 reports first, unless it is what hangs.
        time.sleep(REPORT_SECONDS * (1 + rank))
        if not error_file.exists():
            self._report(HungProcessError(self._find_slowest(), self._limit))
        time.sleep(REPORT_SECONDS * max(0, distributed.get_world_size() - rank))
        os._exit(HungProcessError.exit_code)

    def _write_beats(self) -> None:
        # Of one length, in place: the others never read a part of a number.
        with open(self._beats_file, "r+b") as file:
            file.write(b"%020d" % self._beats)

    def _find_slowest(self) -> list[int]:
        """Return the ranks that are behind the others; none where all are equally far."""
        folder, ranks = self._folder / BEATS_FOLDER, range(distributed.get_world_size())
        beats = [int((folder / str(rank)).read_text() or 0) for rank in ranks]
        return [rank for rank, count in enumerate(beats) if count == min(beats) < max(beats)]


_current: list[Watchdog] = []
"""The one of this process, while a run of several is watched."""


@contextmanager
def watch_processes(folder: Path, report: Callable[[HungProcessError], object]) -> Iterator[None]:
    """Watch the processes of a run during the block, where there are several. Collective.

    What they report by is removed at the end, but after an error, when others may go on for a
    while; then it is when the run folder is locked again.

    Args:
        folder: of the run, which exists on every process.
        report: receives the error, once for all processes.
    """
    limit = read_limit()
    if distributed.get_world_size() == 1 or not limit:
        yield
        return
    watchdog = Watchdog(folder, limit, report)
    watchdog.start()
    _current.append(watchdog)
    try:
        yield
    finally:
        _current.pop()
        watchdog.stop()
    # The threads of all have ended then, so that none writes any more.
    distributed.gather_values(None)
    if distributed.is_main():
        shutil.rmtree(folder / BEATS_FOLDER)


def beat() -> None:
    """Report that this process goes on; nothing where it is not watched."""
    for watchdog in _current:
        watchdog.beat()


@contextmanager
def expect_beats() -> Iterator[None]:
    """Count the time without a beat during the block, in which all processes train."""
    for watchdog in _current:
        watchdog.expect_beats(True)
    try:
        yield
    finally:
        for watchdog in _current:
            watchdog.expect_beats(False)


@contextmanager
def suspend_watch() -> Iterator[None]:
    """Count no time during the block, in which rank 0 computes and the others wait for it."""
    armed = [watchdog for watchdog in _current if watchdog.is_armed]
    for watchdog in armed:
        watchdog.expect_beats(False)
    try:
        yield
    finally:
        for watchdog in armed:
            watchdog.expect_beats(True)
