"""Run a recipe phase by phase: each reads and writes files, and is skipped where it is finished."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from hftl import console
from hftl.analysis.check import warn_of_positions
from hftl.analysis.source_faults import multiply_fast
from hftl.config.recipe import Recipe
from hftl.data import image_inputs
from hftl.data import prepare as data_stage
from hftl.data.general import GeneralData, drop_near_rows, load_general, read_general, write_general
from hftl.data.image_inputs import ImageInputs
from hftl.data.prepare import PreparedData
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import HungProcessError, RecipeError, RunFolderError
from hftl.finetune.build_context import build_context, infer_input_spec, pin_revisions
from hftl.finetune.context import ExperimentContext
from hftl.measure.metrics import Metric, find_metric
from hftl.measure.record import Record
from hftl.models.source import SourceModel, find_source
from hftl.pipeline.adaptation import check_adaptations, run_adaptations
from hftl.pipeline.advice import build_advice
from hftl.pipeline.analyses import make_analyses
from hftl.pipeline.analysis_folder import FEATURES
from hftl.pipeline.arms import run_arms
from hftl.pipeline.baselines import measure_baselines
from hftl.pipeline.cache_keys import build_data_key, build_general_key
from hftl.pipeline.changed_inputs import refuse_changed
from hftl.pipeline.corpora import build_leak_filter
from hftl.pipeline.corpus_checks import check_corpora
from hftl.pipeline.evaluate import evaluate_run
from hftl.pipeline.evaluate_adaptation import evaluate_adaptation
from hftl.pipeline.faults import add_source_faults
from hftl.pipeline.header import announce_run, build_adaptation_header, build_header
from hftl.pipeline.model_checks import (
    check_models,
    list_missing_fp16,
    refuse_missing_fp16,
    validate_upstream_arguments,
)
from hftl.pipeline.push import PushOptions, check_push_access, push_finished_run
from hftl.pipeline.retention import (
    check_recipe_retention,
    check_replay_labels,
)
from hftl.pipeline.run import ArmContexts, Run
from hftl.pipeline.slices import check_slices
from hftl.publish.reload_process import WaitingReload
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import get_device
from hftl.runtime.progress import (
    print_line,
    show_activity,
    show_progress,
    silence_libraries,
)
from hftl.runtime.restart import restore_results, set_results_aside
from hftl.runtime.watchdog import watch_processes
from hftl.train.facts import CheckFacts

PHASES = ("adapt", "finetune", "measure", "publish")


def _show_line(line: str) -> None:
    """Show a line above the bars; nothing where none are drawn."""
    print_line(line)


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    until: str = "publish",
    restart: bool = False,
    say: Callable[[str], None] = _show_line,
    progress: bool | None = None,
    report_hang: Callable[[HungProcessError], object] = print,
    waiting: WaitingReload | None = None,
) -> Record | None:
    """Run a recipe, or what is missing of it.

    Args:
        recipe: a recipe or the path of one.
        output: the run folder; by default `runs/<recipe's folder>-<stem>`.
        until: the last phase: adapt, finetune, measure or publish.
        restart: throw away what stands in the run folder, once nothing is refused any more.
        say: receives each line of progress; by default they are shown above the bars, if any.
        progress: whether to draw progress bars; None: on a terminal.
        report_hang: receives the error before all end where a process of several hangs.
        waiting: a process that waits to check the reload, where one was prepared.

    Returns:
        The record, from the phase `measure` on.

    Raises:
        HftlError: one of its kinds, each with an exit code.
    """
    if until not in PHASES:
        raise RecipeError(f"unknown phase {until!r}", f"Use one of {', '.join(PHASES)}")
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if until == "adapt" and not recipe.stages:
        raise RecipeError("adapt is null: there is nothing to adapt by", "Give adapt: {...}")
    if output is None:
        output = recipe.default_output()
    folder = Path(output)
    silence_libraries()
    on_terminal = sys.stderr.isatty() and distributed.is_main()
    draws = on_terminal if progress is None else progress
    started = Run(recipe, folder, say if distributed.is_main() else _discard_line, waiting)
    with ExitStack() as stack:
        stack.enter_context(show_progress(draws))
        distributed.broadcast_from_main(lambda: _open_run_folder(folder, stack))
        stack.enter_context(watch_processes(folder, report_hang))
        return _run_phases(started, until, restart)


def _open_run_folder(folder: Path, stack: ExitStack) -> None:
    """Create and lock the run folder; restore what a killed restart moved, and drop old errors."""
    run_folder.create_run_folder(folder)
    stack.enter_context(run_folder.lock_run(folder))
    restore_results(folder)
    (folder / "error.json").unlink(missing_ok=True)


def _run_phases(run: Run, until: str, restart: bool) -> Record | None:
    """Run all phases up to `until`; the main process writes, all of them train."""
    recipe, folder = run.recipe, run.folder
    with ExitStack() as stack:
        if restart:
            distributed.broadcast_from_main(lambda: stack.enter_context(set_results_aside(folder)))
        metric, context = _prepare_run(run, until)
    distributed.broadcast_from_main(
        lambda: run_folder.write_text(folder / "recipe.yaml", _dump_recipe(recipe))
    )
    measures = until in ("measure", "publish")
    distributed.broadcast_from_main(lambda: announce_run(run, context, measures))
    if measures:
        distributed.broadcast_from_main(lambda: make_analyses(run, context))
    arm_contexts, steps = run_adaptations(run, context)
    if until == "adapt":
        return None
    run_arms(run, context, arm_contexts)
    if until == "finetune":
        return None
    publish = until == "publish"
    if metric is None:
        distributed.broadcast_from_main(lambda: evaluate_adaptation(run, context, steps, publish))
    else:
        distributed.broadcast_from_main(
            lambda: evaluate_run(run, context, arm_contexts, steps, metric, publish)
        )
    if publish and recipe.publish.repo_id is not None:
        distributed.broadcast_from_main(lambda: push_finished_run(folder, PushOptions(), run.say))
    return Record.read(folder)


def _prepare_run(run: Run, until: str) -> tuple[Metric | None, ExperimentContext]:
    """Check all that can be refused before anything trains, and run the data phase.

    Returns:
        The metric that gains are measured in, None without a task, and the context of all arms.
    """
    recipe, folder = run.recipe, run.folder

    def begin() -> None:
        refuse_changed(recipe, folder, run.arms)
        if until == "publish":
            check_push_access(recipe, run.say)

    distributed.broadcast_from_main(begin)
    metric = distributed.run_main_first(lambda: _find_recipe_metric(recipe))
    source = distributed.run_main_first(lambda: find_source(recipe.source))
    distributed.run_main_first(lambda: check_adaptations(recipe, source))
    distributed.run_main_first(lambda: validate_upstream_arguments(recipe, get_device()))
    distributed.run_main_first(lambda: refuse_missing_fp16(recipe, get_device()))
    distributed.run_main_first(lambda: check_recipe_retention(recipe, source))
    with show_activity("data"):
        # The other processes take what the main one has found.
        is_checked = not distributed.is_main()
        context = distributed.run_main_first(lambda: _load_data(run, source, is_checked))
    context.feature_root, context.seeds = folder / FEATURES, tuple(recipe.measure.seeds)
    if until != "adapt":
        context.general = distributed.run_main_first(
            lambda: _load_general_rows(run, context, is_checked)
        )
        distributed.run_main_first(lambda: check_replay_labels(recipe, context))
    if metric is not None:
        measured = context.prepared.encode_for_metrics(context.prepared.rows["validation"])
        # A metric that cannot take these labels should say so before anything trains.
        metric.score(measured, measured)
        chosen = metric
        distributed.broadcast_from_main(lambda: check_slices(recipe, context, chosen))
    distributed.broadcast_from_main(lambda: check_models(recipe, context))
    return metric, context


def _find_recipe_metric(recipe: Recipe) -> Metric | None:
    """Return the metric that gains are measured in; None without a task."""
    task = recipe.data.task
    return None if task is None else find_metric(recipe.measure.metric, task)


def open_recipe(recipe: Recipe) -> ExperimentContext:
    """Read a recipe's source and data; trains and writes nothing.

    Raises:
        HftlError: for whatever can be refused before a model runs.
    """
    _find_recipe_metric(recipe)
    silence_libraries()
    source = find_source(recipe.source)
    check_adaptations(recipe, source)
    validate_upstream_arguments(recipe, get_device())
    check_recipe_retention(recipe, source)
    spec = infer_input_spec(source, str(recipe.data.task))
    return build_context(recipe, source, data_stage.prepare_data(recipe.data, spec))


def check_recipe(recipe: Recipe, baseline: bool = False) -> tuple[dict[str, str], CheckFacts]:
    """Return the header's facts and those of the preflight; trains and writes nothing.

    Args:
        recipe: what to check.
        baseline: whether to score the baselines that train no encoder, too.
    """
    context, arms = open_recipe(recipe), recipe.arms
    # It may be checked on another machine than the one that is to run it.
    of_device = [f"{fault}; a run here is refused" for fault in
                 list_missing_fp16(recipe, get_device())]  # fmt: skip
    if not arms:
        warnings = [*warn_of_positions(recipe, context.source), *check_corpora(recipe, context)]
        warnings += of_device
        return build_adaptation_header(recipe, context), CheckFacts(warnings=warnings)
    if recipe.data.general is not None:
        data = pin_revisions(recipe.data, context.prepared.facts.hub_revisions)
        spec = infer_input_spec(context.source, context.prepared.task)
        context.general = load_general(data, context.prepared, spec)
        check_replay_labels(recipe, context)
    check_slices(recipe, context, find_metric(recipe.measure.metric, context.prepared.task))
    check_models(recipe, context)
    of_corpora = check_corpora(recipe, context)
    facts = add_source_faults(recipe, context, context.run_preflight(recipe, arms))
    warnings = [*facts.warnings, *of_corpora, *of_device]
    jobs = [(arm, seed) for arm in arms for seed in recipe.measure.seeds]
    facts = facts.model_copy(update={"warnings": warnings})
    with multiply_fast(context):
        if baseline:
            facts = facts.model_copy(update={"baseline": measure_baselines(recipe, context)})
        advice = console.summarize_advice(build_advice(recipe, context, draws=1))
    return build_header(recipe, context, jobs) | advice, facts


def reopen_run(run: Run) -> ArmContexts:
    """Return the context of each arm of a run whose data and adaptations are finished.

    For another process than the one that finished them, which has checked them.
    """
    silence_libraries()
    source = find_source(run.recipe.source)
    context = _load_data(run, source, is_checked=True)
    context.feature_root, context.seeds = run.folder / FEATURES, tuple(run.recipe.measure.seeds)
    context.general = _load_general_rows(run, context, is_checked=True)
    contexts, _ = run_adaptations(run, context)
    return contexts


def _discard_line(line: str) -> None:
    """Discard a line of a process other than the main one."""


def _load_data(run: Run, source: SourceModel, is_checked: bool) -> ExperimentContext:
    """Run the data phase and build the context of all arms.

    Args:
        run: the run.
        source: its source model.
        is_checked: another process has compared the stored rows with the data's files.
    """
    recipe = run.recipe
    folder = run.folder / "phases" / "data"
    reading = infer_input_spec(source, str(recipe.data.task))
    reads = {"recipe": build_data_key(recipe), "reading": asdict(reading)}
    stands = run_folder.read_stage_inputs(folder) == reads
    digest = None if is_checked else data_stage.hash_data_files(recipe.data, reading.modality)
    if stands and digest in (None, data_stage.read_stored_digest(folder)):
        prepared = data_stage.read_prepared_data(folder)
        context = build_context(recipe, source, prepared)
    else:
        prepared = data_stage.prepare_data(recipe.data, reading)
        if stands:
            _check_same_data(data_stage.read_prepared_data(folder), prepared, run.folder)
        context = build_context(recipe, source, prepared)
        with run_folder.commit_stage(folder, reads) as aside:
            data_stage.write_prepared_data(prepared, aside, str(digest))
    if isinstance(context.inputs, ImageInputs):
        _cache_pixels(run, context, context.inputs)
    return context


def _load_general_rows(
    run: Run, context: ExperimentContext, is_checked: bool
) -> GeneralData | None:
    """Return the general rows; None where the recipe names none or no arm could forget.

    Args:
        run: the run.
        context: its rows.
        is_checked: another process has written them.
    """
    recipe = run.recipe
    if recipe.data.general is None or not run.arms:
        return None
    folder = run.folder / "phases" / "general-rows"
    inputs = context.inputs if isinstance(context.inputs, ImageInputs) else None
    if not is_checked:
        data = pin_revisions(recipe.data, context.prepared.facts.hub_revisions)
        reads = {
            "recipe": build_general_key(recipe),
            "content": data_stage.hash_data_files(data, context.prepared.modality, ("general",)),
            "data": context.prepared.facts.fingerprint,
            "processor": inputs and context.preprocessing_hash,
        }
        if run_folder.read_stage_inputs(folder) != reads:
            reading = infer_input_spec(context.source, context.prepared.task)
            general = load_general(data, context.prepared, reading)
            with run_folder.commit_stage(folder, reads) as aside:
                if inputs:
                    image_inputs.write_image_cache(
                        inputs, [*general.train_rows, *general.eval_rows], aside
                    )
                    inputs.load_cache(aside)
                write_general(drop_near_rows(general, build_leak_filter(context)), aside)
    if inputs:
        inputs.load_cache(folder)
    return read_general(folder)


def _cache_pixels(run: Run, context: ExperimentContext, inputs: ImageInputs) -> None:
    """Resize and crop every image that an arm will see, once for all arms and processes."""
    rows = [row for seed in run.recipe.measure.seeds for row in context.select_train_rows(seed)]
    rows += [row for split in MEASURED_SPLITS for row in context.prepared.rows[split]]
    if not rows:
        return
    folder = run.folder / "phases" / "pixels"
    reads = image_inputs.fingerprint_image_cache(inputs, rows)
    if run_folder.read_stage_inputs(folder) != reads:
        with run_folder.commit_stage(folder, reads) as aside:
            image_inputs.write_image_cache(inputs, rows, aside)
    inputs.load_cache(folder)


def _check_same_data(before: PreparedData, now: PreparedData, run: Path) -> None:
    if before.facts.fingerprint != now.facts.fingerprint:
        old, new = before.facts.rows_read, now.facts.rows_read
        raise RunFolderError(
            f"{run} was made with other data: {old} rows then, {new} now, and not the same ones",
            "Put the data back, choose another --output, or start over with --restart",
        )


def _dump_recipe(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
