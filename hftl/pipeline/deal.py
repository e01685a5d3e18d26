"""Deal trainings out to processes that train one arm and seed each, and follow what they report.

A worker (`pipeline/arm_worker.py`) is a process of its own, without a launcher's variables: in it
an arm trains exactly as in a run of one process. A run of one process starts several; each process
of a launcher starts one for its device, and waits. Workers take the tasks of a common plan by
claims in the run folder and write the finished arms themselves.
"""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hftl import console
from hftl.errors import LostProcessError
from hftl.pipeline.deal_files import (
    Event,
    get_event_file,
    read_error,
    write_event,
    write_plan,
)
from hftl.pipeline.run import ArmContexts, Run
from hftl.pipeline.schedule import Placement, Task
from hftl.runtime import distributed
from hftl.runtime.claims import create_claims
from hftl.runtime.progress import BarUpdate, open_bar
from hftl.runtime.run_folder import DEAL_FOLDER
from hftl.runtime.workers import build_environment, start_workers

WORKER_MODULE = "hftl.pipeline.arm_worker"
POLL_SECONDS = 0.1
LOG_LINES = 40
"""Last lines of a worker that ended without a word, for log.txt."""


@dataclass
class WorkerFailure:
    """Hold why a worker failed: its error, or None of one that ended without a word."""

    number: int
    error: Exception | None
    log: str = ""


@dataclass
class _Display:
    """Show what all workers report, in the order in which it is read."""

    run: Run
    folder: Path
    workers: int
    done: int
    total: int
    tasks: int
    _offsets: dict[int, int] = field(default_factory=dict)
    _running: dict[int, str] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    _finished: int = 0

    @property
    def is_complete(self) -> bool:
        """Return True once every worker has ended and all of its reports are shown."""
        return len(self._ended) == self.workers

    def refresh(self, advance: BarUpdate) -> None:
        """Show what is new."""
        for number in range(self.workers):
            for event in self._read_new(number):
                self._show(number, event)
        advance(self._finished, ", ".join(self._running.values()) or "arms")

    def _read_new(self, number: int) -> list[Event]:
        with open(get_event_file(self.folder, number), "rb") as handle:
            handle.seek(self._offsets.get(number, 0))
            text = handle.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[number] = self._offsets.get(number, 0) + len(whole)
        return [Event.model_validate_json(line) for line in whole.splitlines()]

    def _show(self, number: int, event: Event) -> None:
        if event.kind == "begin":
            self._running[number] = event.text
        elif event.kind == "end":
            self._ended.add(number)
            self._running.pop(number, None)
        elif event.kind == "done":
            self._finished += 1
            self._running.pop(number, None)
        elif event.arm is not None:
            self.done += 1
            count, metric = f"{self.done}/{self.total}", self.run.recipe.measure.metric
            self.run.say(console.format_arm_line(event.arm, metric, count, event.seconds))
            if event.text:
                self.run.say(f"    {event.text}")
        else:
            self.run.say(event.text)


def deal_tasks(
    run: Run, arm_contexts: ArmContexts, tasks: Sequence[Task], placement: Placement, done: int,
    total: int,
) -> None:  # fmt: skip
    """Run the tasks on workers. Collective.

    Where a worker dies the others do what does not wait for its task; after an error in an arm
    the tasks that run are finished, and no other is begun.

    Args:
        run: the run.
        arm_contexts: the context of each arm.
        tasks: in the order in which they are taken.
        placement: how many workers, and where.
        done: arms x seeds that are finished already.
        total: arms x seeds of the run.

    Raises:
        HftlError: the first error of a worker.
        LostProcessError: if one ended without a word.
    """
    folder = run.folder / DEAL_FOLDER
    workers = min(placement.processes, len(tasks)) if placement.local else placement.processes
    distributed.broadcast_from_main(
        lambda: _write_plan(run, arm_contexts, tasks, folder, placement, workers)
    )
    numbers = list(range(workers)) if placement.local else [distributed.get_rank()]
    display = _Display(run, folder, workers, done, total, len(tasks))
    failures = _run_workers(display, numbers, placement)
    gathered = [failure for part in distributed.gather_values(failures) for failure in part]
    distributed.broadcast_from_main(lambda: _finish(folder, gathered))


def _write_plan(
    run: Run, arm_contexts: ArmContexts, tasks: Sequence[Task], folder: Path,
    placement: Placement, workers: int,
) -> None:  # fmt: skip
    """Write what workers read, an unclaimed task each, and an empty report for every worker."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    arms = {task.arm for task in tasks}
    features = {name: arm_contexts[name].dump_features() for name in sorted(arms)}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    write_plan(folder, run.recipe, tasks, features, workers if placement.local else here)
    create_claims(folder, [task.name for task in tasks])
    for number in range(workers):
        get_event_file(folder, number).touch()


def _run_workers(
    display: _Display, numbers: Sequence[int], placement: Placement
) -> list[WorkerFailure]:
    """Run this process's workers to their end, the main process shows what all of them report."""
    folder = display.folder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    environments = [
        build_environment(os.environ, _choose_device(number, placement), placement.threads)
        for number in numbers
    ]
    outputs = [folder / f"output-{number}.txt" for number in numbers]
    words = [[str(display.run.folder), str(number)] for number in numbers]
    failures: list[WorkerFailure] = []
    with ExitStack() as stack:
        advance = stack.enter_context(open_bar("arms", display.tasks))
        processes = stack.enter_context(start_workers(WORKER_MODULE, words, environments, outputs))
        running = dict(zip(numbers, processes, strict=True))
        while running or (distributed.is_main() and not display.is_complete):
            for number, process in list(running.items()):
                if process.poll() is not None:
                    running.pop(number)
                    failures += _read_failure(folder, number, process.returncode)
                    write_event(folder, number, Event(kind="end"))
            if distributed.is_main():
                display.refresh(advance)
            time.sleep(POLL_SECONDS)
    return failures


def _choose_device(number: int, placement: Placement) -> int | None:
    """Return the accelerator of a worker; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return number if placement.local else int(os.environ.get("LOCAL_RANK", "0"))


def _read_failure(folder: Path, number: int, code: int) -> list[WorkerFailure]:
    """Return why a worker failed; nothing of one that did not."""
    if code == 0:
        return []
    output = (folder / f"output-{number}.txt").read_text(encoding="utf-8", errors="replace")
    log = f"exit code {code}\n" + "\n".join(output.splitlines()[-LOG_LINES:])
    return [WorkerFailure(number, read_error(folder, number), log)]


def _finish(folder: Path, failures: Sequence[WorkerFailure]) -> None:
    """Remove what the workers shared, and raise the first error."""
    shutil.rmtree(folder)
    for failure in failures:
        if failure.error is not None:
            raise failure.error
    if failures:
        lost = LostProcessError([failure.number for failure in failures])
        for failure in failures:
            lost.add_note(f"process {failure.number}: {failure.log}")
        raise lost
