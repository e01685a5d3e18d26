"""A run, phase by phase: each reads files, writes files, and is skipped where they stand."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hftl.config.recipe import Recipe, arms
from hftl.data import image_processing
from hftl.data import prepare as data_stage
from hftl.data.general import General, load_general, read_general, without_near, write_general
from hftl.data.image_processing import ImageInputs
from hftl.data.prepare import Prepared
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune.context import MEASURED, Workbench, new_bench, pinned, reading_of
from hftl.measure.metrics import Metric, find
from hftl.measure.record import Record
from hftl.models.source import SourceModel, find_source
from hftl.pipeline.adaptation import adapt_all, check_stages, step_warnings
from hftl.pipeline.arms import Run, adaptation_header, announce, check_training, header, run_arms
from hftl.pipeline.cache_keys import data_reads, general_reads, refuse_changed
from hftl.pipeline.corpora import near_measured
from hftl.pipeline.evaluate import finish
from hftl.pipeline.evaluate_adaptation import finish_adapted
from hftl.pipeline.push import Asked, foresee, push_finished
from hftl.pipeline.rehearsal import rehearse
from hftl.pipeline.retention import check_kept, check_labelled, reads_labels
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import fingerprint
from hftl.runtime.hardware import device
from hftl.runtime.progress import show_progress, working

UNTIL = ("adapt", "finetune", "measure", "publish")


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
    if until not in UNTIL:
        raise RecipeError(f"unknown phase {until!r}", f"Use one of {', '.join(UNTIL)}")
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if until == "adapt" and not recipe.stages:
        raise RecipeError("adapt is null: there is nothing to adapt by", "Give adapt: {...}")
    if output is None:
        output = recipe.default_output()
    folder = Path(output)
    quiet()
    this = Run(recipe, folder, say if distributed.is_main() else _silent)
    with ExitStack() as stack:
        stack.enter_context(show_progress(progress))
        distributed.share(lambda: _enter(folder, stack))
        return _phases(this, until, restart)


def _enter(folder: Path, stack: ExitStack) -> None:
    """Makes and locks the run folder; what an earlier failure left there is over."""
    run_folder.make(folder)
    stack.enter_context(run_folder.locked(folder))
    (folder / "error.json").unlink(missing_ok=True)


def _phases(this: Run, until: str, restart: bool) -> Record | None:
    """All phases up to `until`; the main process writes, all of them train."""
    recipe, folder = this.recipe, this.folder

    def begin() -> None:
        if restart:
            _start_over(folder)
        refuse_changed(recipe, folder, this.arms)
        if until == "publish":
            foresee(recipe, this.say)

    distributed.share(begin)
    metric = distributed.first(lambda: _metric(recipe))
    source = distributed.first(lambda: find_source(recipe.source))
    distributed.first(lambda: check_stages(recipe, source))
    distributed.first(lambda: check_training(recipe, device()))
    distributed.first(lambda: check_kept(recipe, source))
    with working("data"):
        bench = distributed.first(lambda: _bench(this, source))
    if until != "adapt":
        bench.general = distributed.first(lambda: _general(this, bench))
        distributed.first(lambda: check_labelled(recipe, bench))
    if metric is not None:
        measured = bench.prepared.measured(bench.prepared.rows["validation"])
        # A metric that cannot take these labels should say so before anything trains.
        metric.score(measured, measured)
    distributed.share(lambda: run_folder.write_text(folder / "recipe.yaml", _recipe_text(recipe)))
    distributed.share(lambda: rehearse(recipe, bench))
    distributed.share(lambda: announce(this, bench))
    benches, steps = adapt_all(this, bench)
    if until == "adapt":
        return None
    run_arms(this, benches)
    if until == "finetune":
        return None
    publish = until == "publish"
    if metric is None:
        distributed.share(lambda: finish_adapted(this, bench, steps, publish))
    else:
        distributed.share(lambda: finish(this, bench, benches, steps, metric, publish))
    if publish and recipe.publish.repo_id is not None:
        distributed.share(lambda: push_finished(folder, Asked(), this.say))
    return Record.read(folder)


def _metric(recipe: Recipe) -> Metric | None:
    """What gains are measured in; None without a task."""
    task = recipe.data.task
    return None if task is None else find(recipe.measure.metric, task)


def preflight(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hftl check`: the header's facts, and what the preflight found; trains and writes nothing."""
    _metric(recipe)
    quiet()
    source = find_source(recipe.source)
    check_stages(recipe, source)
    check_training(recipe, device())
    check_kept(recipe, source)
    reading = reading_of(source, str(recipe.data.task))
    prepared = data_stage.prepare(recipe.data, reading)
    bench = new_bench(recipe, source, prepared)
    wanted = arms(recipe)
    if not wanted:
        return adaptation_header(recipe, bench), {"warnings": step_warnings(recipe, bench)}
    if reads_labels(recipe):
        data = pinned(recipe.data, prepared.facts["hub_revisions"])
        bench.general = load_general(data, prepared, reading)
        check_labelled(recipe, bench)
    rehearse(recipe, bench)
    found = bench.check(recipe.data.max_length, wanted)
    found["warnings"] += step_warnings(recipe, bench)
    jobs = [arm for arm in wanted for _ in recipe.measure.seeds]
    return header(recipe, bench, jobs, len(jobs)), found


def quiet() -> None:
    """Keeps the libraries' own bars and notices off the terminal."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _silent(line: str) -> None:
    """What the other processes say."""


def _start_over(folder: Path) -> None:
    """Removes what a run has written; the recipe stays, it marks the folder as a run's."""
    for name in run_folder.OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif name not in (".lock", "recipe.yaml"):
            path.unlink(missing_ok=True)


def _bench(this: Run, source: SourceModel) -> Workbench:
    """The data phase, and what all arms share."""
    recipe = this.recipe
    folder = this.folder / "phases" / "data"
    reading = reading_of(source, str(recipe.data.task))
    reads = {"recipe": data_reads(recipe), "reading": asdict(reading)}
    stands = run_folder.reads(folder) == reads
    # The other processes take what the main one has found.
    main = distributed.is_main()
    digest = data_stage.files_digest(recipe.data, reading.modality) if main else None
    if stands and digest in (None, data_stage.stored_digest(folder)):
        prepared = data_stage.read(folder)
        bench = new_bench(recipe, source, prepared)
    else:
        prepared = data_stage.prepare(recipe.data, reading)
        if stands:
            _same_data(data_stage.read(folder), prepared, this.folder)
        bench = new_bench(recipe, source, prepared)
        with run_folder.commit(folder, reads) as aside:
            data_stage.write(prepared, aside, str(digest))
    if isinstance(bench.inputs, ImageInputs):
        _pixels(this, bench, bench.inputs)
    return bench


def _general(this: Run, bench: Workbench) -> General | None:
    """The rows of general data; None where the recipe names none or no arm could forget."""
    recipe = this.recipe
    if recipe.data.general is None or not this.arms:
        return None
    folder = this.folder / "phases" / "general-rows"
    inputs = bench.inputs if isinstance(bench.inputs, ImageInputs) else None
    if distributed.is_main():
        data = pinned(recipe.data, bench.prepared.facts["hub_revisions"])
        reads = {
            "recipe": general_reads(recipe),
            "content": data_stage.files_digest(data, bench.prepared.modality, ("general",)),
            "data": bench.prepared.facts["fingerprint"],
            "group": data.group,
            "seed": data.seed,
            "bad_rows": data.bad_rows,
            "processor": inputs and fingerprint(inputs.processor.to_dict()),
        }
        if run_folder.reads(folder) != reads:
            reading = reading_of(bench.source, bench.prepared.task)
            found = load_general(data, bench.prepared, reading)
            with run_folder.commit(folder, reads) as aside:
                if inputs:
                    image_processing.write(inputs, [*found.used, *found.measured], aside)
                    inputs.use(aside)
                write_general(without_near(found, near_measured(bench)), aside)
    if inputs:
        inputs.use(folder)
    return read_general(folder)


def _pixels(this: Run, bench: Workbench, inputs: ImageInputs) -> None:
    """Every picture that an arm will see, resized and cropped once for all arms and processes."""
    rows = [row for seed in this.recipe.measure.seeds for row in bench.train_rows(seed)]
    rows += [row for split in MEASURED for row in bench.prepared.rows[split]]
    if not rows:
        return
    folder = this.folder / "phases" / "pixels"
    reads = image_processing.depends_on(inputs, rows)
    if run_folder.reads(folder) != reads:
        with run_folder.commit(folder, reads) as aside:
            image_processing.write(inputs, rows, aside)
    inputs.use(folder)


def _same_data(before: Prepared, now: Prepared, run: Path) -> None:
    if before.facts["fingerprint"] != now.facts["fingerprint"]:
        old, new = before.facts["rows_read"], now.facts["rows_read"]
        raise RunFolderError(
            f"{run} was made with other data: {old} rows then, {new} now, and not the same ones",
            "Put the data back, choose another --output, or start over with --restart",
        )


def _recipe_text(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.tree(), sort_keys=False, allow_unicode=True)
