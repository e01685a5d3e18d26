"""What a failed command leaves: one line on stderr, an exit code, and both in the run folder.

Launchers replace the codes of the processes they start, so error.json is where a script looks.
"""

import errno
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hftl.config import secrets
from hftl.errors import LockedError, LostProcessError, RecipeError, ResourceError, is_out_of_memory
from hftl.runtime import distributed
from hftl.runtime.fingerprints import to_json

PATIENCE = 5.0
"""Seconds in which processes that fail together are seen to."""
CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "NCCL", "heartbeat")
"""What torch says when a process it talks to is gone, perhaps on another machine."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system answers where a file may not be written."""
INTERRUPTED = (130, 143)
"""128 + SIGINT, which typer answers by itself, and 128 + SIGTERM."""


@dataclass
class Command:
    """The command in work: its run folder, if it has one, and its own words."""

    run: Path | None = None
    again: str = "hftl"


COMMAND = Command()


def interrupted(code: int) -> int:
    """Says how to go on; where a launcher ended us because another process is gone, says that."""
    if not distributed.is_main() or _told():
        return code
    gone = distributed.lost()
    if gone and code != INTERRUPTED[0]:
        return fail(8, LostProcessError(gone), str(LostProcessError(gone)), debug=False)
    typer.echo(secrets.masked(f"hftl: stopped; to go on: {COMMAND.again}"), err=True)
    return _leave(code, "interrupted", "stopped by a signal")


def other(error: Exception, debug: bool) -> int:
    """Errors that are not ours: usage, disk, memory, and bugs."""
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        said = str(error.format_message()).rstrip(".")  # pyright: ignore
        return fail(2, error, f"{said}. See hftl --help", debug)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found = ResourceError(f"the disk is full: {error.filename or ''}", "Free some space")
        return fail(7, error, str(found), debug)
    found = _unwritable(error)
    if found is not None:
        return fail(found.exit_code, error, str(found), debug)
    if is_out_of_memory(error):
        found = ResourceError(
            "memory ran out", "Lower finetune.training.per_device_train_batch_size"
        )
        return fail(7, error, str(found), debug)
    if distributed.size() > 1:
        gone = distributed.lost(PATIENCE)
        if gone or any(word in str(error) for word in CUT_OFF):
            return fail(8, error, str(LostProcessError(gone)), debug)
    what = f"a bug in hftl: {type(error).__name__}: {error}".splitlines()[0]
    return fail(1, error, f"{what}. Please report it with log.txt, or run with --debug", debug)


def _unwritable(error: Exception) -> RecipeError | None:
    """A file that the system does not let be written, or read, or whose folder is not there."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    nowhere = error.errno == errno.ENOENT and not Path(error.filename).parent.is_dir()
    if error.errno not in FORBIDDEN and not nowhere:
        return None
    return RecipeError(f"{error.filename}: {error.strerror}", "Check the path and who may use it")


def fail(code: int, error: BaseException, message: str, debug: bool) -> int:
    """Tells of an error, once for all processes, and returns its code."""
    if distributed.raised_elsewhere(error) or _main_reports():
        return code
    told = secrets.masked(message.encode(errors="backslashreplace").decode())
    one_line = " ".join(told.split())
    who = "" if distributed.is_main() else f"process {distributed.rank()}: "
    typer.echo(f"hftl: error: {who}{one_line}", err=True)
    if debug:
        typer.echo(secrets.masked("".join(traceback.format_exception(error))), err=True)
    return _leave(code, type(error).__name__, one_line, error)


def _main_reports() -> bool:
    """Whether rank 0 tells of a failure within moments; then the others need not repeat it."""
    deadline = time.monotonic() + PATIENCE
    while not distributed.is_main() and time.monotonic() < deadline:
        if _told():
            return True
        time.sleep(0.1)
    return False


def _told() -> bool:
    """Whether another process of this run has left its failure already; the first is the cause."""
    return (
        distributed.size() > 1 and COMMAND.run is not None and (COMMAND.run / "error.json").exists()
    )


def _leave(code: int, kind: str, message: str, error: BaseException | None = None) -> int:
    """Leaves the code and the traceback in the run folder, where there is one."""
    folder = COMMAND.run
    if folder is None or not (folder / ".lock").exists() or isinstance(error, LockedError):
        return code
    told: dict[str, Any] = {"exit_code": code, "error": kind, "message": message}
    if _told():
        return code
    if distributed.size() > 1:
        told["process"] = distributed.rank()
    try:
        (folder / "error.json").write_text(to_json(told), encoding="utf-8")
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{kind}: {message}\n")
            if error is not None:
                log.write(secrets.masked("".join(traceback.format_exception(error))))
    except OSError as full:
        typer.echo(f"hftl: the error could not be kept in {folder}: {full.strerror}", err=True)
    return code
