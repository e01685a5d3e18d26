"""Run the arms phase: every arm and seed that is missing, the quick ones first."""

import shutil
from dataclasses import dataclass

from hftl import console
from hftl.card.sections import describe_scratch_search
from hftl.config.recipe import Arm, Recipe
from hftl.data.facts import PreparedFacts
from hftl.finetune import arm as training
from hftl.finetune import arm_files, baselines
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.context import ExperimentContext
from hftl.finetune.estimate import estimate_seconds
from hftl.finetune.gradual import GradualCheckpoint
from hftl.finetune.strategies import STRATEGIES
from hftl.models.lora import build_lora_config
from hftl.pipeline.cache_keys import build_arm_inputs, is_arm_finished
from hftl.pipeline.regularizer_stages import prepare_retention
from hftl.pipeline.run import ArmContexts, Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import count_devices, get_dtype_name, measure_energy
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.arguments import build_finetune_arguments, build_training_arguments


@dataclass(frozen=True)
class Job:
    """Name one arm and seed to run, and what its folder will depend on."""

    arm: Arm
    seed: int
    reads: StageInputs


def validate_upstream_arguments(recipe: Recipe, device: str) -> None:
    """Construct the `TrainingArguments` and `LoraConfig` of every arm and adaptation.

    Args:
        recipe: its arms and adaptations.
        device: cuda, mps or cpu.

    Raises:
        RecipeError: naming the section, if transformers or peft refuses it.
    """
    for arm in recipe.arms:
        if not arm.spec.is_solved:
            task = str(recipe.data.task)
            build_finetune_arguments(arm.finetune.training, task, "unused", 0, device)
        if arm.spec.trains_adapter:
            build_lora_config(arm.finetune.lora, "finetune.lora")
    for stage in recipe.all_stages:
        build_training_arguments("adapt", stage.training, {}, "unused", 0, device)
        if stage.method != "full":
            build_lora_config(stage.lora, "adapt.lora")


def run_arms(run: Run, arm_contexts: ArmContexts) -> None:
    """Run every arm and seed that is missing, the quick ones first."""
    jobs = distributed.broadcast_from_main(lambda: _list_missing_jobs(run, arm_contexts))
    distributed.broadcast_from_main(lambda: _remove_finished_checkpoints(run, jobs))
    total = len(run.arms) * len(run.recipe.measure.seeds)
    if jobs and len(jobs) < total:
        run.say(f"  {total - len(jobs)} of {total} arms x seeds stand already")
    for done, job in enumerate(jobs, total - len(jobs) + 1):
        with show_activity(f"[{done}/{total}] {job.arm.name} seed {job.seed}"):
            _run_job(run, arm_contexts[job.arm.name], job, f"{done}/{total}")


def _remove_finished_checkpoints(run: Run, jobs: list[Job]) -> None:
    """Remove the checkpoints of arms that are finished."""
    missing = [(job.arm.name, job.seed) for job in jobs]
    for arm in run.arms:
        for seed in run.recipe.measure.seeds:
            if (arm.name, seed) not in missing:
                shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)


def _run_job(run: Run, context: ExperimentContext, job: Job, count: str) -> None:
    """Train on all processes, or solve on the main one, and write the arm's folder."""
    if job.arm.spec.is_solved:
        distributed.broadcast_from_main(
            lambda: _commit_arm(run, context, job, _run_arm(run, context, job), count)
        )
        return
    with measure_energy() as energy:
        outcome = _run_arm(run, context, job)
    outcome.timings |= energy
    distributed.broadcast_from_main(lambda: _commit_arm(run, context, job, outcome, count))


def _commit_arm(
    run: Run, context: ExperimentContext, job: Job, outcome: ArmOutput, count: str
) -> None:
    arm, seed = job.arm, job.seed
    folder = run.arm_folder(arm.name, seed)
    with run_folder.commit_stage(folder, job.reads) as aside:
        arm_files.write_arm(aside, context.prepared, outcome, arm.name, arm.strategy, seed)
    shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)
    metrics_file = arm_files.read_metrics_file(folder)
    run.say(console.format_arm_line(metrics_file, run.recipe.measure.metric, count))


def _list_missing_jobs(run: Run, arm_contexts: ArmContexts) -> list[Job]:
    """Return every arm and seed that is not finished, with all that it depends on."""
    return [
        Job(arm, seed, reads)
        for arm in sorted(run.arms, key=lambda arm: list(STRATEGIES).index(arm.strategy))
        for reads in [build_arm_inputs(run.recipe, arm_contexts[arm.name], arm)]
        for seed in run.recipe.measure.seeds
        if not is_arm_finished(run.folder, run.arm_folder(arm.name, seed), reads)
    ]


def announce_run(run: Run, context: ExperimentContext) -> None:
    """Report the header and the preflight's warnings, where anything is left to run."""
    missing = [
        arm
        for arm in run.arms
        for seed in run.recipe.measure.seeds
        for read in [run_folder.read_stage_inputs(run.arm_folder(arm.name, seed))]
        if read is None
        or read.get("recipe") != build_arm_inputs(run.recipe, context, arm).get("recipe")
    ]
    if not run.arms:
        run.say(console.format_header(build_adaptation_header(run.recipe, context)))
    if not missing:
        return
    run.say(console.format_header(build_header(run.recipe, context, missing, len(missing))))
    for warning in context.run_preflight(run.recipe, run.arms).warnings:
        run.say(f"  warning: {warning}")


def _run_arm(run: Run, context: ExperimentContext, job: Job) -> ArmOutput:
    arm, seed = job.arm, job.seed
    if arm.spec.is_solved:
        return baselines.solve_arm(context, arm, seed)
    if arm.spec.schedule == "rate_search":
        rate = _search_scratch_rate(run, context, job)
        return baselines.train_scratch(
            context, arm.finetune, run.recipe.measure.scratch, rate, seed
        )
    regularizers = prepare_retention(
        context, arm, seed, run.recipe.measure.seeds, run.folder, job.reads, run.say
    )
    state = GradualCheckpoint(
        run.checkpoints(arm.name, seed), {**job.reads, "processes": distributed.get_world_size()}
    )
    return training.train_arm(context, arm.finetune, seed, regularizers, state)


def _search_scratch_rate(run: Run, context: ExperimentContext, job: Job) -> float:
    """Return the learning rate of scratch, searched once on the first seed."""
    folder = run.folder / "phases" / "search"
    stored = distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(folder) or {})
    if {**stored, "asked": job.reads.get("asked")} != job.reads:
        search = baselines.search_rate(
            context, job.arm.finetune, run.recipe.measure.scratch, run.recipe.measure.seeds[0]
        )

        def keep() -> None:
            with run_folder.commit_stage(folder, job.reads) as aside:
                run_folder.write_text(aside / "search.json", to_json(search.to_dict()))

        distributed.broadcast_from_main(keep)
        run.say(f"  scratch: {describe_scratch_search(search)}")
    return run.read_scratch_search().learning_rate


def build_header(
    recipe: Recipe, context: ExperimentContext, arms: list[Arm], jobs: int
) -> dict[str, str]:
    """Return what a run is about to do, by name: source, device, rows, labels, arms and time."""
    facts = context.prepared.facts
    splits = facts.splits
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    labels = ", ".join(facts.labels[:8]) + (", ..." if len(facts.labels) > 8 else "")
    if facts.tag_scheme:
        labels += f" ({facts.tag_scheme.name} tags)"
    names = list(dict.fromkeys(arm.name for arm in arms))
    seconds = estimate_seconds(context, arms, recipe)
    return {
        "source": f"{recipe.source.model} ({context.source.architecture})",
        "device": _describe_device(context.device, get_dtype_name(recipe.finetune.training)),
        **({"adapt": _describe_stages(recipe)} if recipe.stages else {}),
        "rows": f"train {train} of {splits['train']}, validation {splits['validation']}, "
        f"test {splits['test']} ({_describe_dropped_rows(facts)})",
        "labels": labels or "a number",
        "arms": f"{', '.join(names)} x seeds {recipe.measure.seeds}: {jobs} to run",
        "time": f"about {console.format_duration(seconds)}"
        + (" beside adaptation" if recipe.stages else ""),
    }


def _describe_dropped_rows(facts: PreparedFacts) -> str:
    """Say what happened to the other rows that were read."""
    words = f"{facts.bad_rows} bad, {facts.duplicates} duplicate rows dropped"
    if facts.conflicting:
        words += f", {facts.conflicting} rows with contradictory labels dropped"
    return words


def build_adaptation_header(recipe: Recipe, context: ExperimentContext) -> dict[str, str]:
    """Return the header of a recipe that only adapts."""
    return {
        "source": f"{recipe.source.model} ({context.source.architecture})",
        "device": _describe_device(context.device, get_dtype_name(recipe.stages[-1].training)),
        "adapt": _describe_stages(recipe),
    }


def _describe_stages(recipe: Recipe) -> str:
    """Return the adaptations in words, one after the other."""
    words = []
    for stage in recipe.stages:
        own = stage.corpus == "task" or recipe.data.unlabeled is None
        where = "train's own inputs" if own else "data.unlabeled"
        epochs = stage.training["num_train_epochs"]
        words.append(f"{stage.objective} {stage.method} on {where}, {epochs:g} epochs")
    return "; then ".join(words)


def _describe_device(device: str, dtype: str) -> str:
    """Return the device and the number of processes, or how to use all devices."""
    count, visible = distributed.get_world_size(), count_devices()
    if count > 1:
        return f"{device}, {dtype}, {count} processes"
    if visible > 1:
        launch = f"accelerate launch --num_processes {visible} -m hftl run RECIPE"
        return f"{device}, {dtype}, one of {visible}; to use all: {launch}"
    return f"{device}, {dtype}"
