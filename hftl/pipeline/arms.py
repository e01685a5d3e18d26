"""The arms phase: every arm and seed that is missing, quick ones first."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl import console
from hftl.card.sections import describe_scratch_search
from hftl.config.recipe import Arm, Recipe
from hftl.data.prepare import PreparedFacts
from hftl.finetune import arm as training
from hftl.finetune import arm_files, baselines
from hftl.finetune.context import ArmOutput, ExperimentContext
from hftl.finetune.estimate import estimate_seconds
from hftl.finetune.gradual import GradualCheckpoint
from hftl.finetune.strategies import STRATEGIES
from hftl.measure.record import ScratchSearch
from hftl.models.lora import build_lora_config
from hftl.pipeline.cache_keys import build_arm_inputs, is_arm_finished
from hftl.pipeline.retention import prepare_retention
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import to_json
from hftl.runtime.hardware import count_devices, get_dtype_name, measure_energy
from hftl.runtime.progress import show_activity
from hftl.train.arguments import build_training_arguments as common_arguments

Job = tuple[Arm, int, dict[str, Any]]
"""An arm, a seed, and what its folder will tell of where it comes from."""
ArmContexts = dict[str, ExperimentContext]
"""What each arm works with, by its name: the source as it is, or adapted."""


@dataclass(frozen=True)
class Run:
    """One run in progress: the recipe, its folder, and where to say what happens."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None]

    @property
    def arms(self) -> list[Arm]:
        """Return the recipe's arms, its own first."""
        return self.recipe.arms

    def arm_folder(self, name: str, seed: int) -> Path:
        """Where an arm's files stand."""
        return self.folder / "arms" / f"{name}-seed{seed}"

    def checkpoints(self, name: str, seed: int) -> Path:
        """Where an arm that is not finished keeps how far it has come."""
        return self.folder / "checkpoints" / f"{name}-seed{seed}"


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
            training.build_finetune_arguments(arm.finetune.training, task, "unused", 0, device)
        if arm.spec.publishes_adapter:
            build_lora_config(arm.finetune.lora, "finetune.lora")
    for stage in recipe.all_stages:
        common_arguments("adapt", stage.training, {}, "unused", 0, device)
        if stage.method != "full":
            build_lora_config(stage.lora, "adapt.lora")


def run_arms(this: Run, benches: ArmContexts) -> None:
    """Runs every arm and seed that is missing, quick ones first."""
    jobs = distributed.broadcast_from_main(lambda: _list_missing_jobs(this, benches))
    distributed.broadcast_from_main(lambda: _remove_finished_checkpoints(this, jobs))
    total = len(this.arms) * len(this.recipe.measure.seeds)
    if jobs and len(jobs) < total:
        this.say(f"  {total - len(jobs)} of {total} arms x seeds stand already")
    for done, job in enumerate(jobs, total - len(jobs) + 1):
        arm, seed, _ = job
        with show_activity(f"[{done}/{total}] {arm.name} seed {seed}"):
            _run_job(this, benches[arm.name], job, f"{done}/{total}")


def _remove_finished_checkpoints(this: Run, jobs: list[Job]) -> None:
    """Removes how far arms have come that stand by now."""
    missing = [(arm.name, seed) for arm, seed, _ in jobs]
    for arm in this.arms:
        for seed in this.recipe.measure.seeds:
            if (arm.name, seed) not in missing:
                shutil.rmtree(this.checkpoints(arm.name, seed), ignore_errors=True)


def _run_job(this: Run, bench: ExperimentContext, job: Job, count: str) -> None:
    """Trains on all processes, or solves on the main one, and keeps the outcome."""
    arm, seed, _ = job
    if arm.spec.is_solved:
        distributed.broadcast_from_main(
            lambda: _commit_arm(this, bench, job, _run_arm(this, bench, arm, seed), count)
        )
        return
    with measure_energy() as energy:
        outcome = _run_arm(this, bench, arm, seed)
    outcome.timings |= energy
    distributed.broadcast_from_main(lambda: _commit_arm(this, bench, job, outcome, count))


def _commit_arm(
    this: Run, bench: ExperimentContext, job: Job, outcome: ArmOutput, count: str
) -> None:
    arm, seed, reads = job
    folder = this.arm_folder(arm.name, seed)
    with run_folder.commit_stage(folder, reads) as aside:
        arm_files.write_arm(aside, bench.prepared, outcome, arm.name, arm.strategy, seed)
    shutil.rmtree(this.checkpoints(arm.name, seed), ignore_errors=True)
    told = arm_files.read_arm(folder, bench.prepared).metrics_file
    this.say(console.format_arm_line(told, this.recipe.measure.metric, count))


def _list_missing_jobs(this: Run, benches: ArmContexts) -> list[Job]:
    """Every arm and seed that does not stand, with what it reads."""
    return [
        (arm, seed, reads)
        for arm in sorted(this.arms, key=lambda arm: list(STRATEGIES).index(arm.strategy))
        for reads in [build_arm_inputs(this.recipe, benches[arm.name], arm)]
        for seed in this.recipe.measure.seeds
        if not is_arm_finished(this.folder, this.arm_folder(arm.name, seed), reads)
    ]


def announce_run(this: Run, bench: ExperimentContext) -> None:
    """The header and the preflight's warnings, where anything is left to run."""
    wanted = [
        arm
        for arm in this.arms
        for seed in this.recipe.measure.seeds
        for read in [run_folder.read_stage_inputs(this.arm_folder(arm.name, seed))]
        if read is None or read["recipe"] != build_arm_inputs(this.recipe, bench, arm)["recipe"]
    ]
    if not this.arms:
        this.say(console.format_header(build_adaptation_header(this.recipe, bench)))
    if not wanted:
        return
    this.say(console.format_header(build_header(this.recipe, bench, wanted, len(wanted))))
    for warning in bench.run_preflight(this.recipe.data.max_length, this.arms)["warnings"]:
        this.say(f"  warning: {warning}")


def _run_arm(this: Run, bench: ExperimentContext, arm: Arm, seed: int) -> ArmOutput:
    if arm.spec.is_solved:
        return baselines.solve_arm(bench, arm, seed)
    if arm.spec.schedule == "rate_search":
        rate = _search_scratch_rate(this, bench, arm)
        return baselines.train_scratch(
            bench, arm.finetune, this.recipe.measure.scratch, rate, seed
        )
    reads = build_arm_inputs(this.recipe, bench, arm)
    kept = prepare_retention(
        bench, arm, seed, this.recipe.measure.seeds, this.folder, reads, this.say
    )
    state = GradualCheckpoint(
        this.checkpoints(arm.name, seed), reads | {"processes": distributed.get_world_size()}
    )
    return training.train_arm(bench, arm.finetune, seed, kept, state)


def _search_scratch_rate(this: Run, bench: ExperimentContext, arm: Arm) -> float:
    """The learning rate of scratch, searched once on the first seed."""
    folder = this.folder / "phases" / "search"
    reads = build_arm_inputs(this.recipe, bench, arm)
    stands = distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(folder) or {})
    if stands | {"asked": reads["asked"]} != reads:
        found = baselines.search_rate(
            bench, arm.finetune, this.recipe.measure.scratch, this.recipe.measure.seeds[0]
        )

        def keep() -> None:
            with run_folder.commit_stage(folder, reads) as aside:
                run_folder.write_text(aside / "search.json", to_json(found))

        distributed.broadcast_from_main(keep)
        this.say(f"  scratch: {describe_scratch_search(ScratchSearch.model_validate(found))}")
    return json.loads((folder / "search.json").read_text("utf-8"))["learning_rate"]


def build_header(
    recipe: Recipe, bench: ExperimentContext, wanted: list[Arm], jobs: int
) -> dict[str, str]:
    """What a run is about to do, by name: source, device, rows, labels, arms and time."""
    facts = bench.prepared.facts
    splits = facts.splits
    train = len(bench.select_train_rows(recipe.measure.seeds[0]))
    labels = ", ".join(facts.labels[:8]) + (", ..." if len(facts.labels) > 8 else "")
    if facts.tag_scheme:
        labels += f" ({facts.tag_scheme.name} tags)"
    names = list(dict.fromkeys(arm.name for arm in wanted))
    seconds = estimate_seconds(bench, wanted, recipe)
    return {
        "source": f"{recipe.source.model} ({bench.source.architecture})",
        "device": _describe_device(bench.device, get_dtype_name(recipe.finetune.training)),
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


def build_adaptation_header(recipe: Recipe, bench: ExperimentContext) -> dict[str, str]:
    """The same for a recipe that adapts only."""
    return {
        "source": f"{recipe.source.model} ({bench.source.architecture})",
        "device": _describe_device(bench.device, get_dtype_name(recipe.stages[-1].training)),
        "adapt": _describe_stages(recipe),
    }


def _describe_stages(recipe: Recipe) -> str:
    """The adaptations, one after the other."""
    words = []
    for stage in recipe.stages:
        own = stage.corpus == "task" or recipe.data.unlabeled is None
        where = "train's own inputs" if own else "data.unlabeled"
        epochs = stage.training["num_train_epochs"]
        words.append(f"{stage.objective} {stage.method} on {where}, {epochs:g} epochs")
    return "; then ".join(words)


def _describe_device(device: str, dtype: str) -> str:
    """The device and how many work, or how to put all of them to work."""
    count, visible = distributed.get_world_size(), count_devices()
    if count > 1:
        return f"{device}, {dtype}, {count} processes"
    if visible > 1:
        launch = f"accelerate launch --num_processes {visible} -m hftl run RECIPE"
        return f"{device}, {dtype}, one of {visible}; to use all: {launch}"
    return f"{device}, {dtype}"
