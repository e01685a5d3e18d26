"""Share work and results among the processes of a run.

A launcher (`torchrun`, `accelerate launch`) starts the same command several times and gives each
process its rank in the environment. `broadcast_from_main`, `run_main_first` and `gather_values` are
collective: every process must call them, so only stage functions do. torch is imported only where
there is more than one process.
"""

import functools
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from hftl.errors import RecipeError

T = TypeVar("T")

WAIT_TIMEOUT = timedelta(days=30)
"""How long the others wait for rank 0, which may do everything but the training."""

_processes: list[tuple[str, int]] = []
"""Host and process id of every rank, once they are connected."""
_raised_on_all = False
_main_only = False
"""True while this process does the work of `broadcast_from_main`, and must wait for no other."""


def check_launch_variables() -> None:
    """Refuse what no launcher would set, and take this process for the only one then.

    Raises:
        RecipeError: naming the variable.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    why = None
    if not world.isdecimal() or int(world) < 1:
        why = f"the variable WORLD_SIZE={world} is no number of processes"
    elif not rank.isdecimal():
        why = f"the variable RANK={rank} is no number of a process"
    elif int(rank) >= int(world):
        why = f"the variable RANK={rank} is not below the number of processes, WORLD_SIZE={world}"
    if why is not None:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        raise RecipeError(why, "Unset both RANK and WORLD_SIZE, or start a launcher")


def get_rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes and prints."""
    return get_rank() == 0


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Return `compute()` of rank 0 on every process; the value must pickle. Collective.

    Inside another `broadcast_from_main` it is just `compute()`. An error is raised on every
    process; `is_raised_by_main` is True of the copies on the other ranks, so that rank 0 alone
    reports it.
    """
    global _raised_on_all
    if get_world_size() == 1 or _main_only:
        return compute()
    if is_main():
        return _compute_and_broadcast(compute)
    value, error = _broadcast_object(None)
    _raised_on_all = error is not None
    if error is not None:
        error.raised_elsewhere = True
        raise error
    return value


def run_main_first(compute: Callable[[], T]) -> T:
    """Return `compute()` of this process; rank 0 finishes before the others begin. Collective.

    For files that rank 0 writes and the others read. `compute` itself must call no collective.
    """
    values: list[T] = []
    broadcast_from_main(lambda: values.append(compute()))
    return values[0] if values else _run_alone(compute)


def shard_items(items: list[T]) -> list[T]:
    """Return this process's share of the items; `gather_values` joins the results."""
    return items if _main_only else items[get_rank() :: get_world_size()]


def is_raised_by_main(error: BaseException) -> bool:
    """Return whether rank 0 raised this error and reports it."""
    return getattr(error, "raised_elsewhere", False)


def has_shared_failure() -> bool:
    """Return whether the last `broadcast_from_main` raised on every process."""
    return _raised_on_all


def gather_values(value: T) -> list[T]:
    """Return every process's value, by rank, on every process. Collective.

    Values must pickle. Inside `broadcast_from_main` only rank 0 runs, and its value is the only
    one.
    """
    if get_world_size() == 1 or _main_only:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value, group=_create_group())
    return values


def reduce_max(value: float) -> float:
    """Return the greatest value of all processes, without waiting for accelerators. Collective."""
    if get_world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([value])
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_create_group())
    return tensor.item()


def find_lost_ranks(patience: float = 0.0) -> list[int]:
    """Return the ranks on this host whose process has ended.

    Args:
        patience: seconds to wait for one to end, while all are alive.
    """
    deadline = time.monotonic() + patience
    while True:
        gone = [r for r, (host, pid) in enumerate(_processes)
                if host == platform.node() and not _is_alive(pid)]  # fmt: skip
        if gone or time.monotonic() >= deadline:
            return gone
        time.sleep(0.05)


def close_process_group() -> None:
    """Leave the process group; the last call of a program, also after an error.

    After an error on every process the others wait here until rank 0 has reported it: the launcher
    kills the rest as soon as one process has failed.
    """
    if get_world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if _raised_on_all:
        dist.barrier(group=_create_group())
    _create_group.cache_clear()
    dist.destroy_process_group()


@functools.cache
def _create_group() -> Any:
    """Connect the processes in a gloo group on the CPU.

    accelerate's `gather_object` and `broadcast_object_list` use the default group, NCCL's
    on GPUs: its watchdog ends a process that waits for minutes, as others do while rank 0 works.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    # TrainingArguments creates a new PartialState, which then finds these processes connected.
    PartialState(cpu=not torch.cuda.is_available())
    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    members: list[Any] = [None] * get_world_size()
    dist.all_gather_object(members, (platform.node(), os.getpid()), group=group)
    _processes.extend(members)
    return group


def _is_alive(pid: int) -> bool:
    """Return whether a process of this host exists; signal 0 is delivered to nobody."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _compute_and_broadcast(compute: Callable[[], T]) -> T:
    """Return `compute()`, and send its value or its error to the others, who wait."""
    global _raised_on_all
    value, done = None, False
    try:
        value = _run_alone(compute)
        done = True
        return value
    finally:
        error = None if done else sys.exception()
        _raised_on_all = isinstance(error, Exception)
        if done or isinstance(error, Exception):
            # A signal is not sent on: the launcher sends it to the others as well.
            _broadcast_object(
                (value, make_picklable(error) if isinstance(error, Exception) else None)
            )


def _run_alone(compute: Callable[[], T]) -> T:
    """Return `compute()`, while collectives of this process wait for no other."""
    global _main_only
    _main_only = True
    try:
        return compute()
    finally:
        _main_only = False


def _broadcast_object(answer: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """Return rank 0's value and error; the other ranks pass None."""
    import torch.distributed as dist

    message: list[Any] = [answer]
    dist.broadcast_object_list(message, src=0, group=_create_group())
    return message[0]


def make_picklable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its message where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError):
        # `dumps`: PickleError or AttributeError for a class that cannot be imported, TypeError for
        # a value such as a lock. `loads`: TypeError for an `__init__` of other arguments.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
