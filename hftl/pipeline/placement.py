"""Decide whether processes share each arm or take arms and seeds of their own, and how many.

The decision counts passes of rows, not seconds, and all arms, not only those that are missing: the
same command decides the same again, on a busy machine and after an interruption too.
"""

from collections.abc import Sequence

from hftl.config.recipe import Arm, Recipe
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.pipeline.estimate import (
    FINISH_SECONDS,
    RowCosts,
    estimate_seconds,
    estimate_solved_seconds,
    estimate_trained_arms,
)
from hftl.pipeline.schedule import Placement, Task, estimate_makespan, plan_tasks
from hftl.runtime import distributed
from hftl.runtime.hardware import count_cores, count_devices, get_memory_bytes, is_sharded

STEP_PASSES = 3.0
"""Forward passes that a training step counts as."""
DATA_EFFICIENCY = 0.95
"""Of processes that share each step, against one."""
NOMINAL_FLOPS = 2e11
"""A second of one core, for the decision alone; real ones differ by the machine and the model."""
MIN_NOMINAL_SECONDS = 60.0
"""Trainings of less are not worth starting processes for."""
START_SECONDS = 8.0
"""Seconds in which a process has imported torch and read the run."""
CONTENTION = 1.15
"""How much longer a training takes beside another one, which uses the same memory and cache."""
LIBRARY_BYTES = 1.5e9
WEIGHT_COPIES = 8
"""Memory of a training in copies of the weights: gradients, optimizer, activations."""


def choose_placement(context: ExperimentContext, recipe: Recipe) -> Placement:
    """Choose by `measure.parallel`, the launcher and the machine. No collective is called.

    Raises:
        RecipeError: if arms are to be dealt out, and the launcher cuts the model.
    """
    parallel, processes = recipe.measure.parallel, distributed.get_world_size()
    jobs = [
        (arm, seed) for arm in recipe.arms for seed in recipe.measure.seeds
        if not arm.spec.is_solved
    ]  # fmt: skip
    if processes > 1:
        return _place_on_launched(context, recipe, jobs, processes)
    if parallel == "data" or not jobs:
        return Placement("data", 1)
    return _place_locally(context, recipe, jobs)


def _place_on_launched(
    context: ExperimentContext, recipe: Recipe, jobs: Sequence[tuple[Arm, int]], processes: int
) -> Placement:
    """Choose for the processes of a launcher."""
    parallel = recipe.measure.parallel
    if is_sharded():
        if parallel == "arms":
            raise RecipeError(
                "measure.parallel=arms puts a whole model on each device, and the launcher asks "
                "for FSDP, which cuts it",
                "Launch with recipes/accelerate/multi_gpu.yaml, or set measure.parallel to data",
            )
        return Placement("data", processes, reason="FSDP cuts the model")
    if parallel != "auto":
        return Placement(parallel, processes, reason=f"measure.parallel is {parallel}")
    if len(jobs) <= processes:
        return Placement("data", processes, reason=f"there are {len(jobs)} trainings")
    tasks = _plan_passes(context, recipe, jobs)
    makespan = estimate_makespan(tasks, processes)
    shared = sum(task.seconds for task in tasks) / processes / DATA_EFFICIENCY
    if _get_nominal_seconds(context, shared) < MIN_NOMINAL_SECONDS:
        return Placement("data", processes, reason="they are quick")
    ratio = f"{shared / makespan:.2f} times as fast as sharing each"
    mode = "arms" if makespan <= shared else "data"
    return Placement(mode, processes, reason=f"{len(jobs)} trainings dealt out are {ratio}")


def _place_locally(
    context: ExperimentContext, recipe: Recipe, jobs: Sequence[tuple[Arm, int]]
) -> Placement:
    """Choose the processes that this one starts: one a core, where that is quicker."""
    is_auto = recipe.measure.parallel == "auto"
    tasks = _plan_passes(context, recipe, jobs)
    most = sum(task.kind != "search" for task in tasks)
    if context.device != "cpu":
        # Without a launcher a run takes one device, unless the recipe says otherwise.
        count = 1 if is_auto else min(count_devices(), most)
        return Placement("arms" if count > 1 else "data", count, True, None, "one on each device")
    nominal = _get_nominal_seconds(context, sum(task.seconds for task in tasks))
    if is_auto and nominal < MIN_NOMINAL_SECONDS:
        return Placement("data", 1)
    cores = count_cores(respects_threads=is_auto)
    needed = LIBRARY_BYTES + WEIGHT_COPIES * _measure_weight_bytes(context)
    # This process waits, and holds memory as well.
    processes = min(cores, int(get_memory_bytes() / needed) - 1, most)
    if processes < 2:
        return Placement("data", 1)
    return Placement("arms", processes, True, cores // processes, f"of {len(jobs)} trainings")


def _plan_passes(
    context: ExperimentContext, recipe: Recipe, jobs: Sequence[tuple[Arm, int]]
) -> list[Task]:
    """Return the tasks of all trainings, their `seconds` in forward passes of a row."""
    arms = [arm for arm, _ in jobs]
    units = RowCosts(1.0, 1.0, {arm.name: STEP_PASSES for arm in arms})
    return plan_tasks(jobs, recipe, estimate_trained_arms(context, arms, recipe, units))


def _get_nominal_seconds(context: ExperimentContext, passes: float) -> float:
    """Return the seconds of forward passes at a nominal speed: 2 operations a weight and token."""
    rows = context.encode_rows(context.prepared.rows["validation"][:64])
    tokens = sum(map(context.inputs.length, rows)) / max(1, len(rows))
    return passes * tokens * 2 * _measure_weight_bytes(context) / 4 / NOMINAL_FLOPS


def _measure_weight_bytes(context: ExperimentContext) -> int:
    """Return the size of the source's weights."""
    files = [*context.source.folder.glob("*.safetensors"), *context.source.folder.glob("*.bin")]
    return sum(path.stat().st_size for path in files)


def estimate_placed_seconds(
    context: ExperimentContext, jobs: Sequence[tuple[Arm, int]], recipe: Recipe, costs: RowCosts,
    placement: Placement,
) -> float:  # fmt: skip
    """Estimate the seconds of arms and seeds as they are placed."""
    arms = [arm for arm, _ in jobs]
    if placement.mode == "data":
        return estimate_seconds(context, arms, recipe, costs)
    trained = [(arm, seed) for arm, seed in jobs if not arm.spec.is_solved]
    tasks = plan_tasks(trained, recipe, estimate_trained_arms(context, arms, recipe, costs))
    seconds = estimate_makespan(tasks, placement.processes)
    if placement.local and placement.processes > 1 and context.device == "cpu":
        seconds *= CONTENTION
    return (
        estimate_solved_seconds(context, arms, recipe, costs)
        + seconds
        + FINISH_SECONDS
        + (START_SECONDS if trained else 0)
    )
