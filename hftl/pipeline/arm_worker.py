"""Train arms and seeds of a run in a process of its own, as one of several that share them.

`python -c "from hftl.pipeline.arm_worker import main; main()" RUN NUMBER`, started by
`pipeline/deal.py`, which holds the run folder's lock.
"""

import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from hftl.errors import DataWarning
from hftl.finetune.context import ExperimentContext
from hftl.pipeline.arms import Job, run_job, search_scratch_rate, try_scratch_rate
from hftl.pipeline.cache_keys import build_arm_inputs
from hftl.pipeline.deal_files import Event, read_features, read_plan, write_error, write_event
from hftl.pipeline.kl_weight import choose_kl_weight
from hftl.pipeline.pipeline import reopen_run
from hftl.pipeline.run import ArmContexts, Run
from hftl.pipeline.schedule import Task
from hftl.runtime.claims import ClaimState, hold_claim, read_claim
from hftl.runtime.imports import freeze_imports
from hftl.runtime.run_folder import DEAL_FOLDER
from hftl.runtime.workers import follow_parent
from hftl.train.facts import ArmFile

POLL_SECONDS = 0.2


def main() -> None:
    """Take tasks until none is left, and leave an error for the process that waits."""
    follow_parent()
    freeze_imports()
    run_path, number = Path(sys.argv[1]), int(sys.argv[2])
    folder = run_path / DEAL_FOLDER
    sys.excepthook = partial(_leave_error, folder, number)
    _work(run_path, folder, number)


def _leave_error(
    folder: Path, number: int, kind: type[BaseException], error: BaseException,
    trace: TracebackType | None,
) -> None:  # fmt: skip
    """Print the error that ends this process, and leave it for the one that waits."""
    traceback.print_exception(kind, error, trace)
    write_error(folder, number, error)


def _work(run_path: Path, folder: Path, number: int) -> None:
    """Read the plan and the run, then take tasks."""
    plan = read_plan(folder)
    with warnings.catch_warnings():
        # The process that waits has shown them.
        warnings.simplefilter("ignore", DataWarning)
        contexts = reopen_run(Run(plan.recipe, run_path, lambda line: None))
    for name, features in read_features(folder, plan).items():
        contexts[name].restore_features(features)
    report = partial(write_event, folder, number)
    run = Run(plan.recipe, run_path, lambda line: report(Event(kind="line", text=line)))
    warnings.showwarning = partial(_report_warning, run)
    while (task := _wait_for_task(folder, plan.tasks)) is not None:
        with hold_claim(folder, task.name) as is_claimed:
            if is_claimed:
                report(Event(kind="begin", text=task.title))
                _do_task(run, contexts, task, partial(_report_arm, folder, number), plan.sharers)
                report(Event(kind="done", text=task.title))


def _report_warning(run: Run, message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, DataWarning):
        run.say(f"  warning: {message}")


def _report_arm(folder: Path, number: int, arm: ArmFile, seconds: float, note: str) -> None:
    write_event(folder, number, Event(kind="arm", arm=arm, seconds=seconds, text=note))


def _wait_for_task(folder: Path, tasks: Sequence[Task]) -> Task | None:
    """Return the first task that may begin; None once no task will, or one has failed."""
    while True:
        states = {task.name: read_claim(folder, task.name) for task in tasks}
        if ClaimState.FAILED in states.values():
            return None
        for task in tasks:
            is_ready = all(states[name] is ClaimState.DONE for name in task.after)
            if states[task.name] is ClaimState.FREE and is_ready:
                return task
        waits = [task for task in tasks if states[task.name] is ClaimState.FREE]
        if not waits or ClaimState.TAKEN not in states.values():
            # All is done, or what is left waits for a process that was lost.
            return None
        time.sleep(POLL_SECONDS)


def _do_task(run: Run, contexts: ArmContexts, task: Task, report_arm: Any, sharers: int) -> None:
    """Do one task, as a run of one process does it."""
    context = contexts[task.arm]
    job = _build_job(run, context, task)
    if task.kind == "train":
        run_job(run, context, job, report_arm, sharers)
    elif task.kind == "rate":
        try_scratch_rate(run, context, job, task.rate, sharers)
    elif task.kind == "search":
        search_scratch_rate(run, context, job, sharers)
    else:
        choose_kl_weight(run, context, job.arm, job.reads)


def _build_job(run: Run, context: ExperimentContext, task: Task) -> Job:
    arm = next(arm for arm in run.arms if arm.name == task.arm)
    return Job(arm, task.seed, build_arm_inputs(run.recipe, context, arm))
