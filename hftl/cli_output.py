"""Print lines and warnings for the user, and progress on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from hftl.errors import DataWarning
from hftl.runtime import distributed
from hftl.runtime.imports import freeze_imports


def say(line: str) -> None:
    """Print a line for the user, above the progress where some is drawn on the same terminal."""
    if "hftl.runtime.progress" in sys.modules and sys.stdout.isatty():
        from hftl.runtime.progress import print_line

        if print_line(line):
            return
    typer.echo(line)


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Show a warning about the user's data, not those of libraries for their programmers."""
    if issubclass(category, DataWarning) and distributed.is_main():
        line = f"  warning: {message}"
        if "hftl.runtime.progress" in sys.modules:
            from hftl.runtime.progress import print_line

            if print_line(line):
                return
        typer.echo(line, err=True)


def is_interactive() -> bool:
    """Return whether a user watches this process on a terminal."""
    return sys.stderr.isatty() and distributed.is_main()


@contextmanager
def run_quietly() -> Iterator[None]:
    """Silence the libraries while a command works, and show progress on a terminal.

    What the command needs is imported before.
    """
    from hftl.runtime.progress import show_progress, silence_libraries

    silence_libraries()
    freeze_imports()
    with show_progress(is_interactive()):
        yield
