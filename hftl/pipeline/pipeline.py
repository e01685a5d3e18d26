"""A run, phase by phase: each reads files, writes files, and is skipped where they stand."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hftl.config.recipe import Recipe
from hftl.data import image_inputs
from hftl.data import prepare as data_stage
from hftl.data.general import GeneralData, drop_near_rows, load_general, read_general, write_general
from hftl.data.image_inputs import ImageInputs
from hftl.data.prepare import PreparedData
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune.context import (
    MEASURED_SPLITS,
    ExperimentContext,
    build_context,
    build_input_spec,
    pin_revisions,
)
from hftl.measure.metrics import Metric, find_metric
from hftl.measure.record import CheckFacts, Record
from hftl.models.source import SourceModel, find_source
from hftl.pipeline.adaptation import check_adaptations, run_adaptations, warn_of_few_steps
from hftl.pipeline.arms import (
    Run,
    announce_run,
    build_adaptation_header,
    build_header,
    run_arms,
    validate_upstream_arguments,
)
from hftl.pipeline.cache_keys import build_data_key, build_general_key, refuse_changed
from hftl.pipeline.corpora import build_leak_test
from hftl.pipeline.evaluate import evaluate_run
from hftl.pipeline.evaluate_adaptation import evaluate_adaptation
from hftl.pipeline.push import PushOptions, check_push_access, push_finished_run
from hftl.pipeline.rehearsal import check_models
from hftl.pipeline.retention import (
    check_recipe_retention,
    check_replay_labels,
    reads_general_labels,
)
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import fingerprint
from hftl.runtime.hardware import get_device
from hftl.runtime.progress import show_activity, show_progress

PHASES = ("adapt", "finetune", "measure", "publish")


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    until: str = "publish",
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Record | None:
    """Runs a recipe, or what is missing of it.

    Args:
        recipe: a recipe or the path of one.
        output: the run folder; by default `runs/<recipe's folder>-<stem>`.
        until: the last phase: adapt, finetune, measure or publish.
        restart: throw away what stands in the run folder first.
        say: receives each line of progress.
        progress: whether to draw progress bars.

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
    this = Run(recipe, folder, say if distributed.is_main() else _discard_line)
    with ExitStack() as stack:
        stack.enter_context(show_progress(progress))
        distributed.broadcast_from_main(lambda: _open_run_folder(folder, stack))
        return _run_phases(this, until, restart)


def _open_run_folder(folder: Path, stack: ExitStack) -> None:
    """Makes and locks the run folder; what an earlier failure left there is over."""
    run_folder.create_run_folder(folder)
    stack.enter_context(run_folder.lock_run(folder))
    (folder / "error.json").unlink(missing_ok=True)


def _run_phases(this: Run, until: str, restart: bool) -> Record | None:
    """All phases up to `until`; the main process writes, all of them train."""
    recipe, folder = this.recipe, this.folder

    def begin() -> None:
        if restart:
            _clear_run_folder(folder)
        refuse_changed(recipe, folder, this.arms)
        if until == "publish":
            check_push_access(recipe, this.say)

    distributed.broadcast_from_main(begin)
    metric = distributed.run_main_first(lambda: _find_recipe_metric(recipe))
    source = distributed.run_main_first(lambda: find_source(recipe.source))
    distributed.run_main_first(lambda: check_adaptations(recipe, source))
    distributed.run_main_first(lambda: validate_upstream_arguments(recipe, get_device()))
    distributed.run_main_first(lambda: check_recipe_retention(recipe, source))
    with show_activity("data"):
        bench = distributed.run_main_first(lambda: _load_data(this, source))
    if until != "adapt":
        bench.general = distributed.run_main_first(lambda: _load_general_rows(this, bench))
        distributed.run_main_first(lambda: check_replay_labels(recipe, bench))
    if metric is not None:
        measured = bench.prepared.encode_for_metrics(bench.prepared.rows["validation"])
        # A metric that cannot take these labels should say so before anything trains.
        metric.score(measured, measured)
    distributed.broadcast_from_main(
        lambda: run_folder.write_text(folder / "recipe.yaml", _dump_recipe(recipe))
    )
    distributed.broadcast_from_main(lambda: check_models(recipe, bench))
    distributed.broadcast_from_main(lambda: announce_run(this, bench))
    benches, steps = run_adaptations(this, bench)
    if until == "adapt":
        return None
    run_arms(this, benches)
    if until == "finetune":
        return None
    publish = until == "publish"
    if metric is None:
        distributed.broadcast_from_main(lambda: evaluate_adaptation(this, bench, steps, publish))
    else:
        distributed.broadcast_from_main(
            lambda: evaluate_run(this, bench, benches, steps, metric, publish)
        )
    if publish and recipe.publish.repo_id is not None:
        distributed.broadcast_from_main(lambda: push_finished_run(folder, PushOptions(), this.say))
    return Record.read(folder)


def _find_recipe_metric(recipe: Recipe) -> Metric | None:
    """What gains are measured in; None without a task."""
    task = recipe.data.task
    return None if task is None else find_metric(recipe.measure.metric, task)


def check_recipe(recipe: Recipe) -> tuple[dict[str, Any], CheckFacts]:
    """Return the header's facts and those of the preflight; trains and writes nothing."""
    _find_recipe_metric(recipe)
    silence_libraries()
    source = find_source(recipe.source)
    check_adaptations(recipe, source)
    validate_upstream_arguments(recipe, get_device())
    check_recipe_retention(recipe, source)
    reading = build_input_spec(source, str(recipe.data.task))
    prepared = data_stage.prepare_data(recipe.data, reading)
    bench = build_context(recipe, source, prepared)
    wanted = recipe.arms
    if not wanted:
        warnings = warn_of_few_steps(recipe, bench)
        return build_adaptation_header(recipe, bench), CheckFacts(warnings=warnings)
    if reads_general_labels(recipe):
        data = pin_revisions(recipe.data, prepared.facts.hub_revisions)
        bench.general = load_general(data, prepared, reading)
        check_replay_labels(recipe, bench)
    check_models(recipe, bench)
    found = bench.run_preflight(recipe.data.max_length, wanted)
    found["warnings"] += warn_of_few_steps(recipe, bench)
    jobs = [arm for arm in wanted for _ in recipe.measure.seeds]
    return build_header(recipe, bench, jobs, len(jobs)), CheckFacts.model_validate(found)


def silence_libraries() -> None:
    """Keeps the libraries' own bars and notices off the terminal."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _discard_line(line: str) -> None:
    """What the other processes say."""


def _clear_run_folder(folder: Path) -> None:
    """Removes what a run has written; the recipe stays, it marks the folder as a run's."""
    for name in run_folder.RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif name not in (".lock", "recipe.yaml"):
            path.unlink(missing_ok=True)


def _load_data(this: Run, source: SourceModel) -> ExperimentContext:
    """The data phase, and what all arms share."""
    recipe = this.recipe
    folder = this.folder / "phases" / "data"
    reading = build_input_spec(source, str(recipe.data.task))
    reads = {"recipe": build_data_key(recipe), "reading": asdict(reading)}
    stands = run_folder.read_stage_inputs(folder) == reads
    # The other processes take what the main one has found.
    main = distributed.is_main()
    digest = data_stage.hash_data_files(recipe.data, reading.modality) if main else None
    if stands and digest in (None, data_stage.read_stored_digest(folder)):
        prepared = data_stage.read_prepared_data(folder)
        bench = build_context(recipe, source, prepared)
    else:
        prepared = data_stage.prepare_data(recipe.data, reading)
        if stands:
            _check_same_data(data_stage.read_prepared_data(folder), prepared, this.folder)
        bench = build_context(recipe, source, prepared)
        with run_folder.commit_stage(folder, reads) as aside:
            data_stage.write_prepared_data(prepared, aside, str(digest))
    if isinstance(bench.inputs, ImageInputs):
        _cache_pixels(this, bench, bench.inputs)
    return bench


def _load_general_rows(this: Run, bench: ExperimentContext) -> GeneralData | None:
    """The rows of general data; None where the recipe names none or no arm could forget."""
    recipe = this.recipe
    if recipe.data.general is None or not this.arms:
        return None
    folder = this.folder / "phases" / "general-rows"
    inputs = bench.inputs if isinstance(bench.inputs, ImageInputs) else None
    if distributed.is_main():
        data = pin_revisions(recipe.data, bench.prepared.facts.hub_revisions)
        reads = {
            "recipe": build_general_key(recipe),
            "content": data_stage.hash_data_files(data, bench.prepared.modality, ("general",)),
            "data": bench.prepared.facts.fingerprint,
            "processor": inputs and fingerprint(inputs.processor.to_dict()),
        }
        if run_folder.read_stage_inputs(folder) != reads:
            reading = build_input_spec(bench.source, bench.prepared.task)
            found = load_general(data, bench.prepared, reading)
            with run_folder.commit_stage(folder, reads) as aside:
                if inputs:
                    image_inputs.write_image_cache(
                        inputs, [*found.train_rows, *found.eval_rows], aside
                    )
                    inputs.load_cache(aside)
                write_general(drop_near_rows(found, build_leak_test(bench)), aside)
    if inputs:
        inputs.load_cache(folder)
    return read_general(folder)


def _cache_pixels(this: Run, bench: ExperimentContext, inputs: ImageInputs) -> None:
    """Every picture that an arm will see, resized and cropped once for all arms and processes."""
    rows = [row for seed in this.recipe.measure.seeds for row in bench.select_train_rows(seed)]
    rows += [row for split in MEASURED_SPLITS for row in bench.prepared.rows[split]]
    if not rows:
        return
    folder = this.folder / "phases" / "pixels"
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
