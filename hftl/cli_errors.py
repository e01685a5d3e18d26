"""Report a failed command: one line on stderr, an exit code, and both in the run folder.

Launchers replace the codes of the processes they start, so error.json is where a script looks.
"""

import errno
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hftl.config import secrets
from hftl.errors import (
    HungProcessError,
    LockedError,
    LostProcessError,
    RecipeError,
    ResourceError,
    format_error_line,
    is_disk_full,
    is_out_of_memory,
)
from hftl.runtime import distributed
from hftl.runtime.run_folder import to_json, write_text

REPORT_WAIT_SECONDS = 5.0
"""Seconds within which processes that fail together have all failed."""
LOST_CONNECTION_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "heartbeat",
)
"""Parts of torch's messages when another process is gone, perhaps on another machine."""
LIMIT_ERRNOS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Error numbers of the system where it starts no process, or opens no file, for lack of them."""
PERMISSION_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of the system where a file may not be written."""
SIGNAL_EXIT_CODES = (130, 143)
"""128 + SIGINT, which typer answers by itself, and 128 + SIGTERM."""


@dataclass
class CurrentCommand:
    """Hold the run folder of the command at work, and the line that continues it."""

    run: Path | None = None
    resume_command: str = "hftl"


CURRENT_COMMAND = CurrentCommand()


def report_interruption(code: int) -> int:
    """Print how to continue, or that the launcher stopped this process because another is gone.

    A process that a signal has reached alone ends last, once that stands in the run folder: the
    others would otherwise take it for lost.
    """
    if _has_failure_file() or _wait_for_main_report():
        return code
    gone = distributed.find_lost_ranks()
    if gone and code != SIGNAL_EXIT_CODES[0]:
        return report_failure(8, LostProcessError(gone), str(LostProcessError(gone)), debug=False)
    typer.echo(
        secrets.mask_secrets(f"hftl: stopped; to go on: {CURRENT_COMMAND.resume_command}"), err=True
    )
    return _write_failure(code, "interrupted", "stopped by a signal")


def report_hang(error: HungProcessError) -> int:
    """Report that a process hangs, from a thread of one that waits for it."""
    typer.echo(f"hftl: error: {error}", err=True)
    return _write_failure(error.exit_code, type(error).__name__, str(error))


def report_unexpected_error(error: Exception, debug: bool) -> int:
    """Report an error that hftl did not raise: usage, disk, memory, or a bug."""
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return report_failure(2, error, _format_usage_error(error), debug)
    if is_disk_full(error):
        return report_failure(7, error, str(_build_disk_error(error)), debug)
    file_error = _convert_file_error(error)
    if file_error is not None:
        return report_failure(file_error.exit_code, error, str(file_error), debug)
    if isinstance(error, OSError) and error.errno in LIMIT_ERRNOS:
        return report_failure(7, error, str(_build_limit_error(error)), debug)
    if is_out_of_memory(error):
        resource_error = ResourceError(
            f"memory ran out: {format_error_line(error)}",
            "Lower data.max_length or data.image_size, or use a smaller source; what was finished "
            "stays, and the same command goes on",
        )
        return report_failure(7, error, str(resource_error), debug)
    if distributed.get_world_size() > 1:
        gone = distributed.find_lost_ranks(REPORT_WAIT_SECONDS)
        if gone or any(word in str(error) for word in LOST_CONNECTION_MESSAGES):
            return report_failure(8, error, str(LostProcessError(gone)), debug)
    what = f"a bug in hftl: {type(error).__name__}: {error}".splitlines()[0]
    return report_failure(
        1, error, f"{what}. Please report it with log.txt, or run with --debug", debug
    )


def _format_usage_error(error: Any) -> str:
    """Return what typer says of the arguments, and whose help to read."""
    usage = str(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = f" {context.info_name}" if context is not None and context.parent else ""
    hint = ""
    if any(word[:1] == "-" and len(word.split()) > 1 for word in sys.argv[1:]):
        hint = " A text that begins with - stands after --: hftl predict RUN -- '-5 degrees'."
    return f"{usage}{'' if usage.endswith('?') else '.'}{hint} See hftl{command} --help"


def _build_disk_error(error: Exception) -> ResourceError:
    """Return the error for a full disk, with the free space where the command writes."""
    name = getattr(error, "filename", None)
    folders = [Path(name).parent if isinstance(name, str) else CURRENT_COMMAND.run or Path.cwd()]
    folders = dict.fromkeys([*folders, Path(tempfile.gettempdir())])
    free = [
        f"{shutil.disk_usage(folder).free / 2**20:.0f} MB free in {folder}"
        for folder in folders
        if folder.is_dir()
    ]
    return ResourceError(
        f"the disk is full, or a quota: {format_error_line(error)}; {', '.join(free)}",
        "Free some space; what was finished stays, and the same command goes on",
    )


def _build_limit_error(error: OSError) -> ResourceError:
    return ResourceError(
        f"the system gives no more processes, memory or open files: {format_error_line(error)}",
        "Look at `ulimit -a` and at the free memory; what was finished stays, and the same command "
        "goes on",
    )


def _convert_file_error(error: Exception) -> RecipeError | None:
    """Return the error for a file that may not be opened, or whose folder or program is missing."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    is_folder_missing = error.errno == errno.ENOENT and not Path(error.filename).parent.is_dir()
    # Processes of their own are started with this interpreter, whose environment may be gone.
    is_expected = is_folder_missing or error.filename == sys.executable
    if error.errno == errno.ENAMETOOLONG:
        return RecipeError(f"{error.strerror}: {error.filename[:40]}...", "Choose another")
    if error.errno not in PERMISSION_ERRNOS and not is_expected:
        return None
    return RecipeError(f"{error.filename}: {error.strerror}", "Check the path and who may use it")


def report_failure(code: int, error: BaseException, message: str, debug: bool) -> int:
    """Print an error, once for all processes, and return its exit code."""
    if distributed.is_raised_by_main(error) or _wait_for_main_report():
        return code
    message = secrets.mask_secrets(message.encode(errors="backslashreplace").decode())
    one_line = " ".join(message.split())
    sender = "" if distributed.is_main() else f"process {distributed.get_rank()}: "
    typer.echo(f"hftl: error: {sender}{one_line}", err=True)
    if debug:
        typer.echo(secrets.mask_secrets("".join(traceback.format_exception(error))), err=True)
    return _write_failure(code, type(error).__name__, one_line, error)


def _wait_for_main_report() -> bool:
    """Return whether rank 0 reports a failure within moments, so that others need not repeat it."""
    deadline = time.monotonic() + REPORT_WAIT_SECONDS
    while not distributed.is_main() and time.monotonic() < deadline:
        if _has_failure_file():
            return True
        time.sleep(0.1)
    return False


def _has_failure_file() -> bool:
    """Return whether another process of this run has failed before; the first is the cause."""
    return (
        distributed.get_world_size() > 1
        and CURRENT_COMMAND.run is not None
        and (CURRENT_COMMAND.run / "error.json").exists()
    )


def _write_failure(code: int, kind: str, message: str, error: BaseException | None = None) -> int:
    """Write exit code and traceback to the run folder, where there is one, and return the code."""
    folder = CURRENT_COMMAND.run
    # os.path takes a name that is too long for one of no file, too.
    if folder is None or not os.path.exists(folder / ".lock") or isinstance(error, LockedError):
        return code
    report: dict[str, Any] = {"exit_code": code, "error": kind, "message": message}
    if _has_failure_file():
        return code
    if distributed.get_world_size() > 1:
        report["process"] = distributed.get_rank()
    try:
        write_text(folder / "error.json", to_json(report))
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{kind}: {message}\n")
            if error is not None:
                log.write(secrets.mask_secrets("".join(traceback.format_exception(error))))
    except OSError as full:
        # A folder that may not be written was the error itself.
        if isinstance(error, PermissionError) and isinstance(full, PermissionError):
            return code
        typer.echo(f"hftl: the error could not be kept in {folder}: {full.strerror}", err=True)
    return code
