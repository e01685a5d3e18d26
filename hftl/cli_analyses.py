"""Run the commands that answer a question before anything is trained, or by trainings of their own.

Each prints a table, and writes `RUN/analysis/<name>.json` and a picture. What computes it is
imported inside the command, as in `cli.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hftl.cli_options import Output, Overrides, RecipePath, check_run_folder, name_run
from hftl.cli_output import run_quietly, say
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError

if TYPE_CHECKING:
    from hftl.finetune.context import ExperimentContext

app = typer.Typer(rich_markup_mode=None)
MostRows = Annotated[int, typer.Option(min=20, help="training rows that are read, at most")]
Winner = Annotated[Path | None, typer.Option(help="write the winner as a recipe")]


@contextmanager
def open_analysis(
    recipe: Path, overrides: list[str] | None, output: Path | None
) -> Iterator[tuple[Recipe, "ExperimentContext", Path]]:
    """Yield a recipe, its source and rows, and the run folder, which one process writes to."""
    loaded = Recipe.load(recipe, overrides)
    folder = name_run(loaded, output)
    from hftl.pipeline.pipeline import open_recipe

    with run_quietly():
        yield loaded, open_recipe(loaded), folder


@app.command()
def probe(
    recipe: RecipePath, overrides: Overrides = None, output: Output = None, rows: MostRows = 2000
) -> None:
    """Probe every layer and pooling of the source. Linearly and by neighbours."""
    with open_analysis(recipe, overrides, output) as opened:
        from hftl.pipeline.analyses import run_probe

        text = run_probe(*opened, rows)
    say(text)


@app.command()
def curve(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    sizes: Annotated[str, typer.Option(metavar="N,N,...", help="labels a class")] = "",
    arms: Annotated[str, typer.Option(help="arms of the recipe, or these")] = "head,classical",
    draws: Annotated[int, typer.Option(min=2, help="draws of labels")] = 5,
    rows: MostRows = 2000,
) -> None:
    """Measure scores by labels a class, beside the baselines."""
    counts = _parse_sizes(sizes)
    names = tuple(dict.fromkeys(name.strip() for name in arms.split(",") if name.strip()))
    with open_analysis(recipe, overrides, output) as opened:
        from hftl.pipeline.analyses import CurveOptions, run_curve

        options = CurveOptions(counts, draws, names or CurveOptions().arms, rows)
        text = run_curve(*opened, options)
    say(text)


@app.command()
def distance(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: Annotated[
        list[str] | None, typer.Option(help="another table, read as train's; may be repeated")
    ] = None,
    output: Output = None,
    rows: MostRows = 500,
) -> None:
    """Measure how far train, test and other data lie from each other."""
    with open_analysis(recipe, _name_analysis(overrides, "distance"), output) as opened:
        from hftl.pipeline.analyses import run_distance

        text = run_distance(*opened, to or [], rows)
    say(text)


@app.command()
def shift(
    recipe: RecipePath, overrides: Overrides = None, output: Output = None, rows: MostRows = 1000
) -> None:
    """Say whether test has other classes or inputs than train. Unlabelled rows too."""
    with open_analysis(recipe, _name_analysis(overrides, "shift"), output) as opened:
        from hftl.pipeline.analyses import run_shift

        text = run_shift(*opened, rows)
    say(text)


@app.command()
def advise(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="a recipe file; with --history a run folder")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="changes to the recipe; or more runs"),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="count how often the advice of runs was right")
    ] = False,
    output: Output = None,
) -> None:
    """Advise a strategy, and forecast what each would score."""
    if history:
        runs = [check_run_folder(Path(run)) for run in (recipe, *(rest or []))]
        from hftl.pipeline.advise import summarize_history

        say(summarize_history(runs))
        return
    loaded = Recipe.load(recipe, rest)
    from hftl.pipeline.advise import advise_recipe
    from hftl.pipeline.pipeline import open_recipe

    with run_quietly():
        text = advise_recipe(loaded, open_recipe(loaded), output or loaded.default_output())
    say(text)


@app.command()
def rank(
    recipe: RecipePath,
    overrides: Overrides = None,
    source: Annotated[
        list[str] | None, typer.Option(help="another source model; may be repeated")
    ] = None,
    output: Output = None,
    rows: MostRows = 1000,
    write: Winner = None,
) -> None:
    """Rank source models for your data before any training."""
    loaded = Recipe.load(recipe, overrides)
    _check_write_target(write)
    folder = name_run(loaded, output)
    from hftl.pipeline import analyses

    with run_quietly():
        facts, text = analyses.run_rank(loaded, folder, source or [], rows)
    say(text)
    if write is not None:
        analyses.write_winner(recipe, overrides or [], facts, write)
        say(f"wrote {write}")


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    rates: Annotated[str, typer.Option(metavar="RATE,...", help="default: around yours")] = "",
    decays: Annotated[str, typer.Option(metavar="DECAY,...", help="by block, below 1")] = "",
    seeds: Annotated[int, typer.Option(min=2, help="fresh seeds that measure the gain")] = 3,
    write: Winner = None,
) -> None:
    """Search learning rates by layer, and measure what that gains."""
    _check_write_target(write)
    learning_rates = _parse_numbers("--rates", rates, None)
    factors = _parse_numbers("--decays", decays, 1.0)
    with open_analysis(recipe, overrides, output) as opened:
        from hftl.pipeline import sweep as search

        options = search.SweepOptions(learning_rates, factors, seeds)
        facts, text = search.run_sweep(*opened, options)
    say(text)
    if write is not None:
        search.write_rates(recipe, overrides or [], facts, write)
        say(f"wrote {write}")


def _name_analysis(overrides: list[str] | None, name: str) -> list[str]:
    """Return the overrides of a command that reads data.unlabeled, whatever else does."""
    return [*(overrides or []), f"measure.analyses=[{name}]"]


def _parse_sizes(text: str) -> tuple[int, ...]:
    """Return the numbers of `--sizes`.

    Raises:
        RecipeError: if it is no list of numbers.
    """
    parts = [part.strip() for part in text.split(",") if part]
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--sizes {text} is no list of numbers", "Give such as 5,10,20")
    return tuple(map(int, parts))


def _parse_numbers(option: str, text: str, below: float | None) -> tuple[float, ...]:
    """Return the numbers of an option, which are above 0.

    Raises:
        RecipeError: naming the option.
    """
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0.0,)
    if not all(0 < number < (below or float("inf")) for number in numbers):
        limit = "" if below is None else f" and below {below:g}"
        raise RecipeError(f"{option} {text}: expected numbers above 0{limit}", "Correct it")
    return tuple(dict.fromkeys(numbers))


def _check_write_target(write: Path | None) -> None:
    """Refuse to write a recipe over a file or into no folder, before anything runs.

    Raises:
        RecipeError: naming it.
    """
    if write is not None and write.exists():
        raise RecipeError(f"{write} exists", "Choose another name for --write")
    if write is not None and not write.parent.is_dir():
        raise RecipeError(f"--write {write}: there is no folder {write.parent}", "Make it")
