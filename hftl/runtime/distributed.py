"""Many processes: who is who, one process's work for all, and the end.

A launcher (`torchrun`, `accelerate launch`) starts the same command several times and says in the
environment which one each is. Imports torch only where there is more than one.
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

T = TypeVar("T")

WAIT_TIMEOUT = timedelta(days=30)
"""How long the others wait for rank 0, whose part may be all but the training."""

_processes: list[tuple[str, int]] = []
"""Host and process number of every rank, once they are connected."""
_failed_together = False
_alone = False
"""Whether rank 0 works for all, while the others wait for it."""


def get_rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes and prints."""
    return get_rank() == 0


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """`compute()`, run by rank 0 alone; every process gets the value, which must pickle.

    Every process must come here; inside another `broadcast_from_main` it is just `compute()`. What `compute`
    raises is raised on all of them; the copies of the other ranks answer True to
    `is_raised_by_main`, so that rank 0 alone reports it.
    """
    global _failed_together
    if get_world_size() == 1 or _alone:
        return compute()
    if is_main():
        return _compute_and_broadcast(compute)
    value, error = _broadcast_object(None)
    _failed_together = error is not None
    if error is not None:
        error.raised_elsewhere = True
        raise error
    return value


def run_main_first(compute: Callable[[], T]) -> T:
    """`compute()` of every process, rank 0's done before the others begin.

    For what rank 0 leaves on the disk and the others then find there. Inside, every process is on
    its own.
    """
    found: list[T] = []
    broadcast_from_main(lambda: found.append(compute()))
    return found[0] if found else _run_alone(compute)


def shard_items(items: list[T]) -> list[T]:
    """This process's part of work that is shared out; `gather_values` brings the parts together."""
    return items if _alone else items[get_rank() :: get_world_size()]


def is_raised_by_main(error: BaseException) -> bool:
    """Whether rank 0 raised this error and reports it."""
    return getattr(error, "raised_elsewhere", False)


def has_shared_failure() -> bool:
    """Whether the last `broadcast_from_main` raised on all."""
    return _failed_together


def gather_values(value: T) -> list[T]:
    """Every process's value, by rank, on every process; the values must pickle.

    Inside `broadcast_from_main` rank 0 is on its own, and its value the only one.
    """
    if get_world_size() == 1 or _alone:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * get_world_size()
    dist.all_gather_object(found, value, group=_create_group())
    return found


def find_lost_ranks(patience: float = 0.0) -> list[int]:
    """The ranks on this host whose process is gone.

    Args:
        patience: seconds to wait for one to be gone, where all seem to be there.
    """
    deadline = time.monotonic() + patience
    while True:
        gone = [r for r, (host, pid) in enumerate(_processes)
                if host == platform.node() and not _is_alive(pid)]  # fmt: skip
        if gone or time.monotonic() >= deadline:
            return gone
        time.sleep(0.05)


def close_process_group() -> None:
    """Ends what the processes have in common; the last call of a program, also after an error.

    Where `broadcast_from_main` raised on all, the others wait here until rank 0 has reported: the launcher kills
    the rest as soon as one process has failed.
    """
    if get_world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if _failed_together:
        dist.barrier(group=_create_group())
    _create_group.cache_clear()
    dist.destroy_process_group()


@functools.cache
def _create_group() -> Any:
    """A group of its own, on the CPU: NCCL ends a process that waits for some minutes."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    # TrainingArguments makes a new state, which finds these processes already connected.
    PartialState(cpu=not torch.cuda.is_available())
    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    found: list[Any] = [None] * get_world_size()
    dist.all_gather_object(found, (platform.node(), os.getpid()), group=group)
    _processes.extend(found)
    return group


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _compute_and_broadcast(compute: Callable[[], T]) -> T:
    """`compute()`; the others, who wait, get its value or the error that goes on from here."""
    global _failed_together
    value, done = None, False
    try:
        value = _run_alone(compute)
        done = True
        return value
    finally:
        error = None if done else sys.exception()
        _failed_together = isinstance(error, Exception)
        if done or isinstance(error, Exception):
            # A signal is no answer: the launcher sends it to the others as well.
            _broadcast_object(
                (value, _make_picklable(error) if isinstance(error, Exception) else None)
            )


def _run_alone(compute: Callable[[], T]) -> T:
    """`compute()`, within which this process waits for no other."""
    global _alone
    _alone = True
    try:
        return compute()
    finally:
        _alone = False


def _broadcast_object(told: tuple[Any, Any] | None) -> tuple[Any, Any]:
    import torch.distributed as dist

    message: list[Any] = [told]
    dist.broadcast_object_list(message, src=0, group=_create_group())
    return message[0]


def _make_picklable(error: Exception) -> Exception:
    """The error, or what it says where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
