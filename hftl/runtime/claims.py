"""Let processes claim tasks, each done by one of them, through files that all of them see.

A claim is a lock held while the task is done, and a word in the locked file that stays. A process
that dies loses the lock and leaves the word: the others neither wait for the task nor repeat what
may have killed it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout


class ClaimState(StrEnum):
    """Name what has become of a task; the words of the first four stand in its file."""

    FREE = ""
    TAKEN = "taken"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"
    """Its file says that it is taken, and no process holds it any more."""


def create_claims(folder: Path, names: Iterable[str]) -> None:
    """Write a free claim for every task."""
    for name in names:
        _get_path(folder, name).touch()


def read_claim(folder: Path, name: str) -> ClaimState:
    """Return the state of a task; one that another process looks at in this moment is `TAKEN`."""
    lock = _build_lock(folder, name)
    try:
        lock.acquire()
    except Timeout:
        return ClaimState.TAKEN
    try:
        state = _read_word(folder, name)
    finally:
        lock.release()
    return ClaimState.LOST if state is ClaimState.TAKEN else state


@contextmanager
def hold_claim(folder: Path, name: str) -> Iterator[bool]:
    """Claim a task while the block runs, and leave whether it was done or has failed.

    Yields:
        False where the task is not free; the block must then do nothing.
    """
    lock = _build_lock(folder, name)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    with ExitStack() as stack:
        stack.callback(lock.release)
        is_free = _read_word(folder, name) is ClaimState.FREE
        if is_free:
            _write_word(folder, name, ClaimState.TAKEN)
            stack.push(partial(_write_outcome, folder, name))
        yield is_free


def _write_outcome(folder: Path, name: str, error: type[BaseException] | None, *_: object) -> None:
    """Leave that the task was done or has failed; one whose process a signal ends stays taken."""
    if error is None or issubclass(error, Exception):
        _write_word(folder, name, ClaimState.DONE if error is None else ClaimState.FAILED)


def _get_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.claim"


def _build_lock(folder: Path, name: str) -> FileLock:
    # Without preserve_lock_file a file system without flock would get a lock that survives a kill.
    return FileLock(_get_path(folder, name), timeout=0, preserve_lock_file=True)


def _read_word(folder: Path, name: str) -> ClaimState:
    return ClaimState(_get_path(folder, name).read_text(encoding="utf-8"))


def _write_word(folder: Path, name: str, state: ClaimState) -> None:
    # In place: a rename would give the name to a file that nobody holds.
    _get_path(folder, name).write_text(state.value, encoding="utf-8")
