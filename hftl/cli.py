"""The command line: parses arguments, says what happened, and turns errors into exit codes.

Heavy imports stand inside the commands, so that help and a misspelt key answer at once.
"""

import errno
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hftl import __version__
from hftl.errors import HftlError, HoldError, LockedError, RecipeError, ResourceError
from hftl.recipe import Recipe
from hftl.record import to_json

app = typer.Typer(
    name="hftl",
    help="Transfer learning with the evidence of what it was worth.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="changes to the recipe, values are YAML"),
]
Output = Annotated[
    Path | None, typer.Option(help="the run folder; default runs/<recipe's folder>-<stem>")
]
Restart = Annotated[bool, typer.Option("--restart", help="throw away what the run folder holds")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks on the screen")] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe: all phases, or what is missing of them."""
    _run(recipe, overrides, output, restart, "publish")


@app.command()
def finetune(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe up to its trained arms."""
    _run(recipe, overrides, output, restart, "finetune")


@app.command()
def measure(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe up to its record and verdict."""
    _run(recipe, overrides, output, restart, "measure")


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Look at recipe, data and source model; trains nothing."""
    loaded = Recipe.load(recipe, overrides)
    from hftl import show
    from hftl.pipeline import preflight

    header, found = preflight(loaded)
    say(show.header(header))
    say(
        f"  tokens: median {found['median_tokens']}, {found['truncated']:.1%} of texts cut, "
        f"{found['unknown_tokens']:.1%} unknown"
    )
    for warning in found["warnings"]:
        say(f"  warning: {warning}")
    say("ready" if not found["warnings"] else "ready, with the warnings above")


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="TABLE_OR_FOLDER", help="your labelled data")],
    source: Annotated[str, typer.Option(help="hub id, folder or package: of the source model")],
    output: Annotated[Path | None, typer.Option(help="the recipe to write")] = None,
) -> None:
    """Look at your data and write a commented recipe."""
    from hftl.init import write_recipe

    path, guessed = write_recipe(data, source, output)
    for line in guessed:
        say(f"  {line}")
    say(f"wrote {path}\nnext:\n  hftl check {path}\n  hftl run {path}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER")],
    data: Annotated[Path, typer.Argument(metavar="INPUT", help="csv, jsonl, parquet or txt")],
    output: Annotated[Path | None, typer.Option(help="a file; default: CSV on the screen")] = None,
    base: Annotated[str | None, typer.Option(help="the adapter's base, if elsewhere")] = None,
) -> None:
    """Predict a table's rows: they come back with label, score and a column for each class."""
    from hftl.pipeline import quiet
    from hftl.tables import predict_table

    quiet()
    text = predict_table(model, data, output, base)
    if text is not None:
        sys.stdout.write(text)
    else:
        say(f"wrote {output}")


@app.command()
def card(run: RunFolder) -> None:
    """Write card and report again from a run's record."""
    from hftl.finish import rewrite_card

    rewrite_card(run)
    say(f"card     {run}/publish/README.md\nreport   {run}/report.html")


@app.command()
def publish(
    run: RunFolder,
    repo_id: Annotated[str | None, typer.Option(help="where to push")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """List what would be pushed (--dry-run); the push itself is not built yet."""
    if not dry_run or repo_id is not None:
        raise RecipeError("the push is not built yet", f"See `hftl publish {run} --dry-run`")
    from hftl.publish.listing import dry_run as listed

    found = listed(run)
    for name, size in found.files:
        say(f"  {size:>12,}  {name}")
    say(f"verdict: {found.decision}")
    if found.decision != "publish":
        raise HoldError(
            f"the verdict is hold: {'; '.join(found.reasons)}", "Nothing would be pushed"
        )
    if found.base is None:
        raise RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema."""
    say(to_json(Recipe.model_json_schema()).rstrip())


def say(line: str) -> None:
    """Prints a line for the user."""
    typer.echo(line)


def _run(
    recipe: Path, overrides: list[str] | None, output: Path | None, restart: bool, until: str
) -> None:
    loaded = Recipe.load(recipe, overrides)
    folder = output or loaded.default_output()
    _STATE["run"] = folder
    _STATE["again"] = " ".join(["hftl", *map(_quoted, sys.argv[1:])])
    from hftl import pipeline

    pipeline.run(
        loaded, folder, until=until, restart=restart, say=say, progress=sys.stderr.isatty()
    )
    (folder / "error.json").unlink(missing_ok=True)


INTERRUPTED = (130, 143)
"""128 + SIGINT, which typer answers by itself, and 128 + SIGTERM."""
_STATE: dict[str, Any] = {"run": None, "again": "hftl"}
"""What the error handler needs of the command in work: its run folder and its own words."""


def main() -> NoReturn:
    """The entry point: runs a command and exits with its code."""
    debug = "--debug" in sys.argv
    if debug:
        # Wherever it stands on the line, it belongs to hftl and not to the command.
        sys.argv = [sys.argv[0], "--debug", *[a for a in sys.argv[1:] if a != "--debug"]]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False) or 0
    except HftlError as error:
        code = _fail(error.exit_code, error, str(error), debug)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Exception as error:  # noqa: BLE001 (the top of the program)
        code = _other(error, debug)
    if code in INTERRUPTED:
        typer.echo(f"hftl: stopped; to go on: {_STATE['again']}", err=True)
        _leave(code, "interrupted", "stopped by a signal")
    sys.stdout.flush()
    sys.exit(code)


def _other(error: Exception, debug: bool) -> int:
    """Errors that are not ours: usage, disk, memory, and bugs."""
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return _fail(2, error, f"{error.format_message()}. See hftl --help", debug)  # pyright: ignore
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found = ResourceError(f"the disk is full: {error.filename or ''}", "Free some space")
        return _fail(7, error, str(found), debug)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        found = ResourceError(
            "memory ran out", "Lower finetune.training.per_device_train_batch_size"
        )
        return _fail(7, error, str(found), debug)
    what = f"a bug in hftl: {type(error).__name__}: {error}".splitlines()[0]
    return _fail(1, error, f"{what}. Please report it with log.txt, or run with --debug", debug)


def _fail(code: int, error: BaseException, message: str, debug: bool) -> int:
    one_line = " ".join(message.encode(errors="backslashreplace").decode().split())
    typer.echo(f"hftl: error: {one_line}", err=True)
    if debug:
        traceback.print_exception(error)
    return _leave(code, type(error).__name__, one_line, error)


def _leave(code: int, kind: str, message: str, error: BaseException | None = None) -> int:
    """Leaves the code and the traceback in the run folder, where there is one."""
    folder = _STATE["run"]
    if folder is None or not (folder / ".lock").exists() or isinstance(error, LockedError):
        return code
    told = {"exit_code": code, "error": kind, "message": message}
    try:
        (folder / "error.json").write_text(to_json(told), encoding="utf-8")
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{kind}: {message}\n")
            if error is not None:
                log.write("".join(traceback.format_exception(error)))
    except OSError as full:
        typer.echo(f"hftl: the error could not be kept in {folder}: {full.strerror}", err=True)
    return code


def _terminated(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " {}[]*;$") else word


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
