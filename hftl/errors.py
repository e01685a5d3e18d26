"""Define the errors of hftl, each with the exit code that scripts rely on.

A message says what was expected, what came and where; `fix` says what to do about it.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable

ELLIPSIS = "..."


class HftlError(Exception):
    """Report a failure that hftl foresees; the base of all its errors.

    Args:
        what: what was expected, what came, and in which file, row or key.
        fix: what the user should do next.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        # A user's key or name may hold line breaks; a message is one line.
        self.what = _strip_full_stop(" ".join(what.splitlines()))
        self.fix = _strip_full_stop(fix)
        stop = "" if self.what.endswith(("?", ELLIPSIS)) else "."
        super().__init__(f"{self.what}{stop} {self.fix}" if fix else self.what)


def _strip_full_stop(text: str) -> str:
    """Return a sentence without its full stop; an ellipsis at its end is a part of it."""
    return text if text.endswith(ELLIPSIS) else text.removesuffix(".")


MAX_LISTED, MAX_LETTERS = 12, 60
"""Names of a list, and characters of each, that are shown."""


def join_names(names: Iterable[str]) -> str:
    """Return names as a list in words, and of many how many more there are."""
    shown = [n if len(n) <= MAX_LETTERS else f"{n[: MAX_LETTERS - 3]}..." for n in names]
    more = f" and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(shown[:MAX_LISTED]) + more


def rename_key(error: HftlError, key: str, option: str) -> HftlError:
    """Return an error that names the option of the command line in place of a recipe's key."""
    return type(error)(error.what.replace(key, option, 1), error.fix)


class RecipeError(HftlError, ValueError):
    """Refuse a recipe or arguments that cannot be carried out."""

    exit_code = 2


class DataError(HftlError, ValueError):
    """Refuse data that cannot be used as they are."""

    exit_code = 3


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of the system where a disk, a quota or the limit of a file's size is used up."""
DISK_FULL_MESSAGES = re.compile(
    "|".join(
        [*map(os.strerror, DISK_FULL_ERRNOS), "PytorchStreamWriter failed writing",
         r"inline_container\.cc.*unexpected pos", r"\d+ requested and \d+ written"]
    )
)  # fmt: skip
"""Parts of messages of safetensors, tokenizers, torch and numpy, which lose the system's number."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether the system refused to write for lack of space."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL_ERRNOS
    return DISK_FULL_MESSAGES.search(str(error)) is not None


OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""Parts of the plain RuntimeErrors in which torch says so: on the CPU, on MPS, and where a library
of CUDA asks for memory by itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    is_plain = isinstance(error, RuntimeError)
    return is_plain and any(part in str(error) for part in OUT_OF_MEMORY_MESSAGES)


class DataWarning(UserWarning):
    """Warn of data that can be used, but hardly as they were meant."""


class RunFolderError(HftlError):
    """Refuse a run folder that is locked, damaged, or belongs to another recipe."""

    exit_code = 4


class LockedError(RunFolderError):
    """Refuse a run folder that another process holds."""


class HubError(HftlError):
    """Report that the hub did not answer, or refused."""

    exit_code = 5


class NumericError(HftlError, ArithmeticError):
    """Report that a loss or a score is not a finite number."""

    exit_code = 6


class ResourceError(HftlError):
    """Report that memory or disk ran out."""

    exit_code = 7


class HoldError(HftlError):
    """Refuse to publish where the verdict is `hold`."""

    exit_code = 9


class HungProcessError(HftlError):
    """Report that a process of the run does nothing, and the others wait for it."""

    exit_code = 8

    def __init__(self, ranks: list[int], seconds: float) -> None:
        noun = "process" if len(ranks) == 1 else "processes"
        subject = f"{noun} {', '.join(map(str, ranks))}" if ranks else "a process"
        super().__init__(
            f"{subject} of the run did nothing for {seconds:g} s while the others waited",
            "Look at the stacks in log.txt, then run the same command again; "
            "HFTL_WATCHDOG_SECONDS sets the limit",
        )


class LostProcessError(HftlError):
    """Report that another process of the run has ended."""

    exit_code = 8

    def __init__(self, ranks: list[int]) -> None:
        noun = "process" if len(ranks) == 1 else "processes"
        subject = f"{noun} {', '.join(map(str, ranks))}" if ranks else "another process"
        super().__init__(
            f"{subject} of the run ended without a word",
            "Look for a memory limit or a failed device, then run the same command again",
        )


MAX_MESSAGE = 300
"""Characters of a library's message that are shown; some list every class that they know."""


def format_error_line(error: BaseException | str) -> str:
    """Return a library's message as one line: the first, and what follows where it ends in `:`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 1
    while count < len(lines) and lines[count - 1].endswith(":"):
        count += 1
    line = " ".join(lines[:count]).rstrip(" :") or type(error).__name__
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."


def suggest_closest(name: str, options: list[str], prefix: str = "") -> str:
    """Return `; did you mean 'x'?` where an option is close, else an empty text."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""
