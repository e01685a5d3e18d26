"""Show progress on a terminal: the work at hand, steps done and the time left.

There is one display a command. Long work names itself (`show_activity`, `track`, `open_bar`);
without a display these do nothing.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")
BarUpdate = Callable[..., None]
"""Takes the number of steps done by now and, if it changed, the text in front of the bar."""

_display: ContextVar[Progress | None] = ContextVar("display", default=None)


def silence_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the terminal."""
    import transformers

    silence_hub()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft reads it of every model.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # datasets reads it when it is imported, which predictions never need.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def silence_hub() -> None:
    """Keep the progress bars and notices of downloads off the terminal."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()


@contextmanager
def show_progress(enabled: bool, console: Console | None = None) -> Iterator[None]:
    """Draw progress while the block runs.

    Args:
        enabled: whether to draw: in the main process, on a terminal.
        console: where to draw; by default standard error, so that a redirected output stays clean.
    """
    if not enabled:
        yield
        return
    screen = console or Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _CountColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        redirect_stdout=False,
    ) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


def print_line(line: str) -> bool:
    """Print a line above the bars; return False, printing nothing, where none are drawn."""
    display = _display.get()
    if display is None:
        return False
    display.console.print(Text(line), soft_wrap=True)
    return True


@contextmanager
def show_activity(title: str) -> Iterator[None]:
    """Show work of unknown length while the block runs, such as one arm and seed."""
    with open_bar(title, None):
        yield


@contextmanager
def open_bar(title: str, total: int | None) -> Iterator[BarUpdate]:
    """Show one bar while the block runs, below those that are open already.

    Args:
        title: the text in front of it.
        total: the number of steps; None where it is not known.

    Yields:
        A function that moves the bar to a number of steps and may change its title.
    """
    display = _display.get()
    if display is None:
        yield _skip_update
        return
    bar = display.add_task(title, total=total)

    def advance(done: int, title: str | None = None) -> None:
        display.update(bar, completed=done, description=title)

    try:
        yield advance
    finally:
        # A training that failed leaves its inner bars open: they are removed as well.
        for other in [task for task in display.task_ids if task >= bar]:
            display.remove_task(other)


def track(items: Sequence[Item], title: str) -> Iterator[Item]:
    """Yield the items, and show how many of them are done."""
    with open_bar(title, len(items)) as advance:
        for number, item in enumerate(items):
            yield item
            advance(number + 1)


class _CountColumn(MofNCompleteColumn):
    """Show steps done and in all; nothing for work of unknown length that counts no steps."""

    def render(self, task: Task) -> Text:
        """Return the text of one bar."""
        return Text() if task.total is None and not task.completed else super().render(task)


def _skip_update(done: int, title: str | None = None) -> None:
    """Advance nothing: there is no display."""
