"""Parse arguments, run the commands and turn errors into exit codes.

A command is one function here and one module that does its work. That module is imported inside
the function, so that help and a misspelt key are answered before torch is imported.
"""

import io
import os
import shlex
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hftl import __version__, cli_analyses, cli_errors
from hftl.cli_options import Output, Overrides, RecipePath, Restart, RunFolder
from hftl.cli_output import is_interactive, run_quietly, say, show_warning
from hftl.config.recipe import Recipe
from hftl.doctor.load_process import prepare_loads
from hftl.errors import HftlError, RecipeError
from hftl.inference.arguments import (
    COMPARISON_SUFFIXES,
    PLOT_SUFFIXES,
    check_output,
    check_predict_arguments,
)
from hftl.publish.reload_process import prepare_reload
from hftl.runtime import distributed, interruption
from hftl.runtime.imports import freeze_imports, pause_collections
from hftl.runtime.run_folder import to_json

app = typer.Typer(
    name="hftl",
    help="Transfer learning with the evidence of what it was worth.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_analyses.app)


class SourceField(StrEnum):
    """Name the fields that source models are pretrained on."""

    GENERAL = "general"
    MEDICAL = "medical"
    MICROSCOPY = "microscopy"
    SATELLITE = "satellite"
    SCIENCE = "science"
    LAW = "law"
    CODE = "code"


class SourceModality(StrEnum):
    """Name what source models read."""

    TEXT = "text"
    IMAGE = "image"
    MULTIMODAL = "multimodal"


class BadRowsChoice(StrEnum):
    """Name what is done about rows that cannot be read."""

    REFUSE = "refuse"
    SKIP = "skip"


class SchemaKind(StrEnum):
    """Name the files whose JSON schema is printed."""

    RECIPE = "recipe"
    RECORD = "record"


@app.callback(invoke_without_command=True)
def _show_version_or_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks on the screen")] = False,
) -> None:
    """Print the version or, without a command, the help."""
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
    _run_until(recipe, overrides, output, restart, "publish")


@app.command()
def adapt(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe up to its adapted encoder."""
    _run_until(recipe, overrides, output, restart, "adapt")


@app.command()
def finetune(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe up to its trained arms."""
    _run_until(recipe, overrides, output, restart, "finetune")


@app.command()
def measure(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    restart: Restart = False,
) -> None:
    """Run a recipe up to its record and verdict."""
    _run_until(recipe, overrides, output, restart, "measure")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="score what trains no encoder, on validation")
    ] = False,
) -> None:
    """Find faults in recipe, data and source model. Trains nothing."""
    loaded = Recipe.load(recipe, overrides)
    from hftl import console
    from hftl.pipeline.pipeline import check_recipe

    with run_quietly():
        header, facts = check_recipe(loaded, baseline)
    say(console.format_check(header, facts, has_task=loaded.data.task is not None))


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="TABLE_OR_FOLDER", help="your labelled data")],
    source: Annotated[
        str | None, typer.Option(help="required: hub id, folder or package: of the source model")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the recipe to write")] = None,
) -> None:
    """Look at your data and write a commented recipe."""
    if source is None or not source.strip():
        raise RecipeError(
            "--source is missing: the pretrained model to start from",
            "Give a hub id (hftl sources lists some), a folder, or package:NAME/FOLDER",
        )
    from hftl.init import write_recipe

    path, guessed = write_recipe(data, source, output)
    for line in guessed:
        say(f"  {line}")
    say(f"wrote {path}\nnext:\n  hftl check {path}\n  hftl run {path}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER")],
    data: Annotated[
        str, typer.Argument(metavar="INPUT", help="a table, folder or picture, or a text itself")
    ],
    output: Annotated[Path | None, typer.Option(help="a file; default: CSV on the screen")] = None,
    base: Annotated[str | None, typer.Option(help="the adapter's base, if elsewhere")] = None,
    prior: Annotated[
        str | None,
        typer.Option(metavar="auto|FILE", help="correct for other shares of classes than before"),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help=".9: also sets that hold the label for 90 % of inputs"),
    ] = None,
    bad_rows: Annotated[
        BadRowsChoice | None,
        typer.Option(help="skip: keep rows that cannot be read, unlabelled; default: as trained"),
    ] = None,
) -> None:
    """Predict label and scores of a table's rows, or of one text."""
    check_predict_arguments(data, output, prior, coverage)
    if output is None and getattr(sys.stdout, "name", "") == os.devnull:
        raise RecipeError("the screen is closed, where predictions are shown", "Give --output FILE")
    from hftl.inference.predict_table import predict_table

    with run_quietly():
        text = predict_table(
            model, data, output, base, prior, lambda line: typer.echo(line, err=True), coverage,
            bad_rows,
        )  # fmt: skip
    if text is not None:
        # Bytes, so that a redirected table is UTF-8, as tables are read, wherever it is written.
        typer.echo(text.encode("utf-8"), nl=False)
    else:
        say(f"wrote {output}")


@app.command()
def verdict(run: RunFolder) -> None:
    """Judge a run again from its record alone. Exits 0 to publish and 9 to hold."""
    from hftl.measure.record import Record
    from hftl.measure.verdict import judge_record

    judged = judge_record(Record.read(run))
    say("\n".join([f"verdict: {judged.decision}", *(f"  {reason}" for reason in judged.reasons)]))
    raise typer.Exit(0 if judged.decision == "publish" else 9)


@app.command()
def card(run: RunFolder) -> None:
    """Write card and report again from a run's record."""
    from hftl.pipeline import evaluate_adaptation
    from hftl.pipeline.publish_folder import rewrite_card

    if evaluate_adaptation.is_adaptation_only_run(run):
        evaluate_adaptation.rewrite_adaptation_card(run)
    else:
        rewrite_card(run)
    say(f"card     {run}/publish/README.md\nreport   {run}/report.html")


@app.command()
def publish(
    run: RunFolder,
    repo_id: Annotated[str | None, typer.Option(help="where to push, as owner/name")] = None,
    public: Annotated[bool, typer.Option("--public", help="for all to see")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go")] = False,
    request: Annotated[bool, typer.Option("--pr", help="open a pull request instead")] = False,
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="push although the verdict is hold")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="the license, such as apache-2.0; wins over the recipe")
    ] = None,
) -> None:
    """Push a finished run to a model hub, in one commit."""
    from hftl.pipeline import dry_run as preview
    from hftl.pipeline import push

    options = push.PushOptions(repo_id, public, request, force, license)
    if dry_run:
        preview.dry_run_push(run, options, say)
    else:
        cli_errors.CURRENT_COMMAND.run = run
        push.publish_run(run, options, say)


@app.command()
def doctor(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="folder, run or hub id")],
    base: Annotated[str | None, typer.Option(help="its base, if it is not the one named")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="mend what is safe to mend")] = False,
) -> None:
    """Examine any adapter, running none of it; exits 4 on defects."""
    from hftl.doctor.adapter_folder import open_adapter_folder
    from hftl.runtime.progress import silence_hub

    silence_hub()
    folder = open_adapter_folder(adapter)
    # It imports its libraries while this process imports the same.
    with prepare_loads(folder.may_load) as process:
        from hftl.doctor.report import run_doctor

        with run_quietly():
            raise typer.Exit(run_doctor(folder, base, fix, say, process))


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_ADAPTER")],
    data: Annotated[Path | None, typer.Option(help="labelled; default: the runs' test")] = None,
    output: Annotated[Path | None, typer.Option(help=".csv, its plot beside it; or .png")] = None,
    base: Annotated[str | None, typer.Option(help="the adapters' base, if elsewhere")] = None,
) -> None:
    """Score several models on the same items, against the first."""
    check_output(output, COMPARISON_SUFFIXES, PLOT_SUFFIXES)
    from hftl.inference.compare import compare_models

    with run_quietly():
        table = compare_models(models, data, output, base)
    say(table)
    if output is not None:
        say(f"wrote {output}, plot {output.with_suffix('.png')}")


@app.command()
def sources(
    field: Annotated[SourceField | None, typer.Option(help="what it was pretrained on")] = None,
    modality: Annotated[SourceModality | None, typer.Option(help="what it reads")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List well-known source models, and whether hftl loads them."""
    from hftl import sources as known

    selected = known.select_sources(field, modality)
    say((known.dump_sources if as_json else known.format_sources)(selected).rstrip())


@app.command()
def schema(
    kind: Annotated[
        SchemaKind, typer.Argument(help="of a recipe, or of record.json")
    ] = SchemaKind.RECIPE,
) -> None:
    """Print the JSON schema of a recipe or of a record."""
    from hftl.measure.record import Record

    model = Record if kind is SchemaKind.RECORD else Recipe
    say(to_json(model.model_json_schema()).rstrip())


def _run_until(
    recipe: Path, overrides: list[str] | None, output: Path | None, restart: bool, until: str
) -> None:
    """Run a recipe up to a phase, in its run folder."""
    loaded = distributed.broadcast_from_main(lambda: Recipe.load(recipe, overrides))
    folder = output or loaded.default_output()
    cli_errors.CURRENT_COMMAND.run = folder
    cli_errors.CURRENT_COMMAND.resume_command = shlex.join(["hftl", *sys.argv[1:]])
    packages = until in ("measure", "publish") and bool(loaded.arms) and distributed.is_main()
    is_packaged = (folder / "phases" / "package").exists() and not restart
    # It imports its libraries while this process imports the same, which is work for one core.
    with prepare_reload(packages and not is_packaged) as waiting:
        from hftl.pipeline import pipeline

        freeze_imports()
        pipeline.run(
            loaded, folder, until=until, restart=restart, say=say, progress=is_interactive(),
            report_hang=cli_errors.report_hang, waiting=waiting,
        )  # fmt: skip


def main() -> NoReturn:
    """Run a command and exit with its code: the entry point."""
    debug = "--debug" in sys.argv
    _replace_closed_streams()
    if debug:
        # Typer takes an option of the program only before the name of the command.
        sys.argv = [sys.argv[0], "--debug", *[a for a in sys.argv[1:] if a != "--debug"]]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal has no letters for is no reason to fail after the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = show_warning
    interruption.exit_on_notices()
    pause_collections()
    try:
        distributed.check_launch_variables()
        _refuse_empty_argument()
        code = app(standalone_mode=False) or 0
    except HftlError as error:
        interruption.ignore_notices()
        code = cli_errors.report_failure(error.exit_code, error, str(error), debug)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Exception as error:  # noqa: BLE001 (the top of the program)
        # A launcher ends the other processes now, and must not cut the report of the cause short.
        interruption.ignore_notices()
        code = cli_errors.report_unexpected_error(error, debug)
    if code in cli_errors.SIGNAL_EXIT_CODES:
        code = cli_errors.report_interruption(code)
    sys.stdout.flush()
    if code == 0 or distributed.has_shared_failure():
        distributed.close_process_group()
    freeze_imports()
    sys.exit(code)


def _refuse_empty_argument() -> None:
    """Refuse an empty argument, which as a path would be the current folder."""
    if "" in sys.argv[1:]:
        before = Path(sys.argv[sys.argv.index("", 1) - 1]).name
        raise RecipeError(
            f"the argument after {before} is empty", "Is a variable of the shell not set?"
        )


def _replace_closed_streams() -> None:
    """Discard what is printed where the caller has closed the stream, which Python has as None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (to the end)


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
