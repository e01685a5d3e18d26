"""What can go wrong, each with the exit code a script may rely on.

A message says what was expected, what came and where; `fix` says what to do about it.
"""


class HftlError(Exception):
    """Base of every error hftl raises on purpose.

    Args:
        what: what was expected, what came, and in which file, row or key.
        fix: what the user should do next.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what.rstrip(".")
        self.fix = fix.rstrip(".")
        stop = "" if self.what.endswith("?") else "."
        super().__init__(f"{self.what}{stop} {self.fix}" if fix else self.what)


class RecipeError(HftlError, ValueError):
    """The recipe or the arguments ask for something that cannot be done."""

    exit_code = 2


class DataError(HftlError, ValueError):
    """The data cannot be used as they are."""

    exit_code = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on the CPU torch says so in a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


class DataWarning(UserWarning):
    """The data can be used, but hardly as they were meant."""


class RunFolderError(HftlError):
    """The run folder is locked, damaged, or belongs to another recipe."""

    exit_code = 4


class LockedError(RunFolderError):
    """Another process holds the run folder."""


class HubError(HftlError):
    """The hub did not answer, or does not know or admit us."""

    exit_code = 5


class NumericError(HftlError, ArithmeticError):
    """A loss or a score stopped being a finite number."""

    exit_code = 6


class ResourceError(HftlError):
    """Memory or disk ran out."""

    exit_code = 7


class HoldError(HftlError):
    """Publication was asked for and the verdict is `hold`."""

    exit_code = 9


class LostProcessError(HftlError):
    """A process of the run is gone."""

    exit_code = 8

    def __init__(self, ranks: list[int]) -> None:
        many = "process" if len(ranks) == 1 else "processes"
        who = f"{many} {', '.join(map(str, ranks))}" if ranks else "another process"
        super().__init__(
            f"{who} of the run ended without a word",
            "Look for a memory limit or a failed device, then run the same command again",
        )


def format_error_line(error: BaseException | str) -> str:
    """Return a library's message as one line: the first, and what follows where it ends in `:`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    taken = 1
    while taken < len(lines) and lines[taken - 1].endswith(":"):
        taken += 1
    return " ".join(lines[:taken]).rstrip(" :") or type(error).__name__
