"""Define the arguments that several commands take, and find the run folder that they name."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hftl import cli_errors
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.runtime import distributed, paths

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="changes to the recipe, values are YAML"),
]
Output = Annotated[
    Path | None, typer.Option(help="the run folder; default runs/<recipe's folder>-<stem>")
]
Restart = Annotated[bool, typer.Option("--restart", help="throw away what the run folder holds")]


def check_run_folder(run: Path) -> Path:
    """Refuse a folder that is not there, before anything heavy is imported."""
    if not run.is_dir():
        raise RecipeError(
            paths.describe_no_folder(run, "run folder"), "Give the folder that `hftl run` wrote"
        )
    return run


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run folder", callback=check_run_folder)
]


def name_run(recipe: Recipe, output: Path | None) -> Path:
    """Return the run folder of a command of one process, which an error is reported to as well.

    Raises:
        RecipeError: on many processes, each of which would lock the folder and do the same.
    """
    if distributed.get_world_size() > 1:
        raise RecipeError(
            f"{sys.argv[1]} runs in one process, and {distributed.get_world_size()} were launched",
            f"Run `hftl {sys.argv[1]}` without a launcher",
        )
    folder = output or recipe.default_output()
    cli_errors.CURRENT_COMMAND.run = folder
    return folder
