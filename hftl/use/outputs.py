"""The file that a command shall write, looked at before its work and not after."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hftl.errors import RecipeError


def check_output(output: Path | None, suffixes: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Sees that a file can be written.

    Args:
        output: the file; None is the screen.
        suffixes: those that it may have.
        beside: suffixes of further files of its name that are written too.

    Raises:
        RecipeError: if it cannot.
    """
    if output is None:
        return
    if output.suffix not in suffixes:
        raise RecipeError(
            f"--output {output}: unknown suffix {output.suffix!r}", f"Use {', '.join(suffixes)}"
        )
    if not output.parent.is_dir():
        raise RecipeError(f"--output {output}: there is no folder {output.parent}", "Make it")
    for path in (output, *map(output.with_suffix, beside)):
        _check_file(path)


def _check_file(path: Path) -> None:
    why = "is a folder" if path.is_dir() else None
    if path.exists() and not os.access(path, os.W_OK):
        why = "may not be written"
    try:
        # Rights alone do not tell: the system may refuse what they allow.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
    if why is not None:
        raise RecipeError(f"--output {path} {why}", "Choose another file")
