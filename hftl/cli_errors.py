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

REPORT_WAIT_SECONDS = 5.0
"""Seconds in which processes that fail together are seen to."""
LOST_CONNECTION_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "heartbeat",
)
"""What torch says when a process it talks to is gone, perhaps on another machine."""
PERMISSION_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system answers where a file may not be written."""
SIGNAL_EXIT_CODES = (130, 143)
"""128 + SIGINT, which typer answers by itself, and 128 + SIGTERM."""


@dataclass
class CurrentCommand:
    """The command in work: its run folder, if it has one, and its own words."""

    run: Path | None = None
    resume_command: str = "hftl"


CURRENT_COMMAND = CurrentCommand()


def report_interruption(code: int) -> int:
    """Says how to go on; where a launcher ended us because another process is gone, says that."""
    if not distributed.is_main() or _has_failure_file():
        return code
    gone = distributed.find_lost_ranks()
    if gone and code != SIGNAL_EXIT_CODES[0]:
        return report_failure(8, LostProcessError(gone), str(LostProcessError(gone)), debug=False)
    typer.echo(
        secrets.mask_secrets(f"hftl: stopped; to go on: {CURRENT_COMMAND.resume_command}"), err=True
    )
    return _write_failure(code, "interrupted", "stopped by a signal")


def report_unexpected_error(error: Exception, debug: bool) -> int:
    """Errors that are not ours: usage, disk, memory, and bugs."""
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        said = str(error.format_message()).rstrip(".")  # pyright: ignore
        return report_failure(2, error, f"{said}. See hftl --help", debug)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found = ResourceError(f"the disk is full: {error.filename or ''}", "Free some space")
        return report_failure(7, error, str(found), debug)
    found = _convert_file_error(error)
    if found is not None:
        return report_failure(found.exit_code, error, str(found), debug)
    if is_out_of_memory(error):
        found = ResourceError(
            "memory ran out", "Lower finetune.training.per_device_train_batch_size"
        )
        return report_failure(7, error, str(found), debug)
    if distributed.get_world_size() > 1:
        gone = distributed.find_lost_ranks(REPORT_WAIT_SECONDS)
        if gone or any(word in str(error) for word in LOST_CONNECTION_MESSAGES):
            return report_failure(8, error, str(LostProcessError(gone)), debug)
    what = f"a bug in hftl: {type(error).__name__}: {error}".splitlines()[0]
    return report_failure(
        1, error, f"{what}. Please report it with log.txt, or run with --debug", debug
    )


def _convert_file_error(error: Exception) -> RecipeError | None:
    """A file that the system does not let be written, or read, or whose folder is not there."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    nowhere = error.errno == errno.ENOENT and not Path(error.filename).parent.is_dir()
    if error.errno not in PERMISSION_ERRNOS and not nowhere:
        return None
    return RecipeError(f"{error.filename}: {error.strerror}", "Check the path and who may use it")


def report_failure(code: int, error: BaseException, message: str, debug: bool) -> int:
    """Tells of an error, once for all processes, and returns its code."""
    if distributed.is_raised_by_main(error) or _wait_for_main_report():
        return code
    told = secrets.mask_secrets(message.encode(errors="backslashreplace").decode())
    one_line = " ".join(told.split())
    who = "" if distributed.is_main() else f"process {distributed.get_rank()}: "
    typer.echo(f"hftl: error: {who}{one_line}", err=True)
    if debug:
        typer.echo(secrets.mask_secrets("".join(traceback.format_exception(error))), err=True)
    return _write_failure(code, type(error).__name__, one_line, error)


def _wait_for_main_report() -> bool:
    """Whether rank 0 tells of a failure within moments; then the others need not repeat it."""
    deadline = time.monotonic() + REPORT_WAIT_SECONDS
    while not distributed.is_main() and time.monotonic() < deadline:
        if _has_failure_file():
            return True
        time.sleep(0.1)
    return False


def _has_failure_file() -> bool:
    """Whether another process of this run has left its failure already; the first is the cause."""
    return (
        distributed.get_world_size() > 1
        and CURRENT_COMMAND.run is not None
        and (CURRENT_COMMAND.run / "error.json").exists()
    )


def _write_failure(code: int, kind: str, message: str, error: BaseException | None = None) -> int:
    """Leaves the code and the traceback in the run folder, where there is one."""
    folder = CURRENT_COMMAND.run
    if folder is None or not (folder / ".lock").exists() or isinstance(error, LockedError):
        return code
    told: dict[str, Any] = {"exit_code": code, "error": kind, "message": message}
    if _has_failure_file():
        return code
    if distributed.get_world_size() > 1:
        told["process"] = distributed.get_rank()
    try:
        (folder / "error.json").write_text(to_json(told), encoding="utf-8")
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{kind}: {message}\n")
            if error is not None:
                log.write(secrets.mask_secrets("".join(traceback.format_exception(error))))
    except OSError as full:
        typer.echo(f"hftl: the error could not be kept in {folder}: {full.strerror}", err=True)
    return code
