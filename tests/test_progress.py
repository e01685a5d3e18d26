"""Show progress on a terminal: what runs, how far it is; nothing where nobody looks."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hftl.config.recipe import Recipe
from hftl.pipeline.pipeline import run
from hftl.runtime import progress
from hftl.runtime.progress import open_bar, show_activity, show_progress, track

pytestmark = pytest.mark.usefixtures("fast_reload")


@contextmanager
def terminal() -> Iterator[io.StringIO]:
    """Show progress on a terminal whose text is yielded."""
    text = io.StringIO()
    with show_progress(True, Console(file=text, force_terminal=True, width=120)):
        yield text


def test_a_bar_shows_title_and_count() -> None:
    with terminal() as text, show_activity("lora seed 0"):
        assert list(track([1, 2, 3], "features")) == [1, 2, 3]
        with open_bar("training", 10) as advance:
            advance(7, "epoch 1.0/2, loss 0.500")
            progress._display.get().refresh()  # pyright: ignore
    assert "lora seed 0" in text.getvalue()
    assert "epoch 1.0/2, loss 0.500" in text.getvalue() and "7/10" in text.getvalue()


def test_a_bar_that_a_failure_left_open_is_removed() -> None:
    with terminal():
        with pytest.raises(ValueError), show_activity("scratch"):
            bar = open_bar("training", 3)
            bar.__enter__()
            raise ValueError
        assert not progress._display.get().task_ids  # pyright: ignore
        bar.__exit__(None, None, None)


def test_nothing_is_drawn_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress(False), show_activity("lora"):
        assert list(track([1], "features")) == [1]
        assert not progress.print_line("nobody draws")
    assert capfd.readouterr() == ("", "")


def test_a_run_names_arm_seed_epoch_loss_and_every_pass(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    for method in ("add_task", "update"):
        plain = getattr(progress.Progress, method)

        def draw(self: Any, *args: Any, plain: Any = plain, **settings: Any) -> Any:
            titles.append(str(settings.get("description") or args[0]))
            return plain(self, *args, **settings)

        monkeypatch.setattr(progress.Progress, method, draw)
    recipe_tree["measure"] |= {"arms": ["head", "scratch"], "seeds": [3]}
    lines: list[str] = []
    monkeypatch.setattr("hftl.pipeline.pipeline.print_line", lines.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    assert any("] lora seed 3 " in line for line in lines), "a run from Python says so by itself"
    for title in ("lora seed 3", "scratch seed 3", "scratch: rate", "features", "predictions",
                  "evaluation", ", loss "):  # fmt: skip
        assert any(title in shown for shown in titles), title


def test_a_line_goes_above_the_bars() -> None:
    line = "[1/2] head seed 0  " + "x" * 150
    with terminal() as text, show_activity("lora seed 0"):
        assert progress.print_line(line)
    assert line in text.getvalue()
