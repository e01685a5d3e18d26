"""Refuse arguments that no work can serve, before anything heavy is imported."""

import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hftl.data.tables import IMAGE_SUFFIXES, SPREADSHEETS
from hftl.errors import DataError, RecipeError
from hftl.runtime.paths import TABLE_FORMATS

PREDICTION_SUFFIXES = (".csv", ".jsonl", ".parquet")
COMPARISON_SUFFIXES = (".csv", ".png")
PLOT_SUFFIXES = (".png",)
"""Of what is written beside a comparison."""
FILE_SUFFIXES = {*TABLE_FORMATS, *SPREADSHEETS, *IMAGE_SUFFIXES}
"""Endings by which the name of a file that is not there differs from a text."""


def check_predict_arguments(
    data: str | Path, output: Path | None, prior: str | None, coverage: float | None
) -> None:
    """Check what `predict` is asked for, as far as no model is needed for that.

    Args:
        data: the table, the folder or the text.
        output: the file; None is the screen.
        prior: `auto`, a file, or none.
        coverage: of sets, or none.

    Raises:
        RecipeError: if the output cannot be written or is the input, or if arguments exclude each
            other.
        DataError: if there is no input.
    """
    check_output(output, PREDICTION_SUFFIXES)
    if coverage is not None and prior is not None:
        raise RecipeError(
            "--coverage: sets cover inputs with validation's shares of classes, and --prior gives "
            "others",
            "Give one of them",
        )
    if not str(data).strip():
        raise DataError("the text is empty", "Give a text, or the path of a table or a folder")
    if not is_literal_text(str(data)):
        _check_input(Path(data), output)


def is_literal_text(data: str) -> bool:
    """Return whether an input is a text itself: no path, no file's name, and more than one word.

    A name in a folder that exists is a path, misspelt or not. So is one that ends as tables and
    pictures do, if it is short or nearly that of a file; `amazon.com` and `phone.Works` end a text.
    """
    words, (folder, name) = data.split(), os.path.split(data)
    if len(words) < 2 or os.path.exists(data):
        return False
    if folder.strip("/") and name[:1].strip() and os.path.exists(folder):
        return False
    if not ends_as_file(data):
        return True
    # A sentence may end in a file's name, and a file's name may be of several words.
    return len(words) > 2 and not folder and not difflib.get_close_matches(name, os.listdir())


def ends_as_file(data: str) -> bool:
    """Return whether an input's last word ends as the names of tables and pictures do."""
    return Path(data.split()[-1]).suffix.lower() in FILE_SUFFIXES


def _check_input(data: Path, output: Path | None) -> None:
    """Refuse an input that is not there, or that the output would overwrite."""
    if output is not None and output.resolve() == data.resolve():
        raise RecipeError(f"--output {output} is the input itself", "Choose another file")
    if not data.exists():
        raise DataError(
            f"{data} does not exist",
            "Check the path; a text itself is more than one word, in quotes, or a line of a .txt",
        )


def check_output(output: Path | None, suffixes: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Check that a file can be written.

    Args:
        output: the file; None is the screen.
        suffixes: the allowed ones.
        beside: suffixes of further files of the same name that are written too.

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
        _check_writable(path)


def _check_writable(path: Path) -> None:
    why = "is a folder" if path.is_dir() else None
    if path.exists() and not os.access(path, os.W_OK):
        why = "may not be written"
    try:
        # Permissions are not enough: the system may still refuse, as on a read-only disk.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
    if why is not None:
        raise RecipeError(f"--output {path} {why}", "Choose another file")
