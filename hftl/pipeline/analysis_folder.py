"""Open a run folder for an analysis, and write its figures and plot."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hftl.config.recipe import Recipe
from hftl.data.facts import RecordPart
from hftl.errors import RecipeError
from hftl.runtime import run_folder
from hftl.runtime.run_folder import to_json

Facts = TypeVar("Facts", bound=RecordPart)
FEATURES = Path("phases") / "features"


@contextmanager
def open_run(folder: Path) -> Iterator[Path]:
    """Create and lock a run folder; yield where the features of its rows are stored."""
    run_folder.create_run_folder(folder)
    with run_folder.lock_run(folder):
        yield folder / FEATURES


def write_analysis(
    folder: Path, name: str, facts: Facts, plot: Callable[[Facts, Path], None]
) -> str:
    """Write an analysis and its plot; return a line that names the files."""
    target = folder / "analysis"
    target.mkdir(exist_ok=True)
    plot(facts, target / f"{name}.png")
    run_folder.write_text(target / f"{name}.json", to_json(facts.to_dict()))
    return f"wrote {target / name}.json, plot {name}.png"


def check_task(recipe: Recipe) -> None:
    """Refuse a recipe without labels.

    Raises:
        RecipeError: naming the key.
    """
    if recipe.data.task is None:
        raise RecipeError("data.task is null: this analysis reads labels", "Give data.task")
