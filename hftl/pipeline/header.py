"""Say what a run is about to do, with the estimated time, before anything trains."""

from collections.abc import Sequence

from hftl import console
from hftl.analysis.check import warn_of_positions
from hftl.config.recipe import Arm, Recipe
from hftl.data.facts import PreparedFacts
from hftl.finetune.context import ExperimentContext
from hftl.pipeline.cache_keys import build_arm_inputs
from hftl.pipeline.estimate import FINISH_SECONDS, measure_costs
from hftl.pipeline.placement import choose_placement, estimate_placed_seconds
from hftl.pipeline.run import Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import count_devices, get_dtype_name

BUSY_SLOWDOWN = 1.5
"""How much longer passes take where other programs use the cores."""


def announce_run(run: Run, context: ExperimentContext, measures: bool) -> None:
    """Report the header and the preflight's warnings, where anything is left to run.

    Args:
        run: the run.
        context: its source and rows.
        measures: whether the command measures the arms that it trains.
    """
    missing = [
        (arm, seed)
        for arm in run.arms
        for seed in run.recipe.measure.seeds
        for read in [run_folder.read_stage_inputs(run.arm_folder(arm.name, seed))]
        if read is None
        or read.get("recipe") != build_arm_inputs(run.recipe, context, arm).get("recipe")
    ]
    if not run.arms:
        run.say(console.format_header(build_adaptation_header(run.recipe, context)))
        for warning in warn_of_positions(run.recipe, context.source):
            run.say(f"  warning: {warning}")
    if not missing:
        return
    run.say(console.format_header(build_header(run.recipe, context, missing, measures)))
    sharing = choose_placement(context, run.recipe).sharing
    for warning in context.run_preflight(run.recipe, run.arms, sharing).warnings:
        run.say(f"  warning: {warning}")


def build_header(
    recipe: Recipe, context: ExperimentContext, jobs: Sequence[tuple[Arm, int]],
    measures: bool = True,
) -> dict[str, str]:  # fmt: skip
    """Return what a run is about to do, by name: source, device, rows, labels, arms and time.

    Args:
        recipe: of the run.
        context: its source and rows.
        jobs: the arms with their seeds that are to run.
        measures: whether they are measured then.
    """
    facts = context.prepared.facts
    splits = facts.splits
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    labels = ", ".join(_format_label(recipe, label) for label in facts.labels[:8]) + (
        ", ..." if len(facts.labels) > 8 else ""
    )
    if facts.tag_scheme:
        labels += f" ({facts.tag_scheme.name} tags)"
    arms = list({arm.name: arm for arm, _ in jobs}.values())
    names = ", ".join(arm.name for arm in arms)
    placement = choose_placement(context, recipe)
    costs = measure_costs(context, arms, placement.threads)
    seconds = estimate_placed_seconds(context, jobs, recipe, costs, placement)
    seconds -= 0.0 if measures else FINISH_SECONDS
    return {
        "source": f"{recipe.source.model} ({context.source.architecture})",
        "device": _describe_device(context.device, get_dtype_name(recipe.finetune.training)),
        **({"adapt": _describe_stages(recipe)} if recipe.stages else {}),
        "rows": f"train {train} of {splits['train']}, validation {splits['validation']}, "
        f"test {splits['test']} ({_describe_dropped_rows(facts)})",
        "labels": labels or "a number",
        "arms": f"{names} x seeds {recipe.measure.seeds}: {len(jobs)} to run",
        **({"parallel": placement.text} if placement.text else {}),
        "time": f"about {console.format_duration(seconds)}"
        + (" beside adaptation" if recipe.stages else "")
        + _describe_slowdown(seconds, costs.slowdown),
    }


def _describe_slowdown(seconds: float, slowdown: float) -> str:
    """Say how long it takes while the machine is as busy as it is; nothing on an idle one."""
    if slowdown < BUSY_SLOWDOWN:
        return ""
    longer = console.format_duration(seconds * slowdown)
    return f" (the machine is busy: {longer} if it stays so)"


def _format_label(recipe: Recipe, label: str) -> str:
    """Return a label, and the words for it where the recipe gives some."""
    words = (recipe.data.label_names or {}).get(label)
    return label if words is None else f"{label} ({words})"


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
