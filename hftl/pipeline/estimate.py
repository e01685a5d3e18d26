"""Say what a run is about to do, and estimate how long it takes from a few timed steps."""

from collections.abc import Mapping
from dataclasses import dataclass

from hftl import console
from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Replay, Retain
from hftl.data.facts import PreparedFacts
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import select_compared_rows
from hftl.finetune.strategies import STRATEGIES
from hftl.finetune.trainable import apply_strategy
from hftl.finetune.zero_shot import count_hypotheses
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.encoders import count_blocks
from hftl.models.features import BATCH_TOKENS, batch_by_length
from hftl.pipeline import kl_weight
from hftl.pipeline.cache_keys import build_arm_inputs
from hftl.pipeline.kl_weight import has_auto_weight, list_selection_rows
from hftl.pipeline.run import Run
from hftl.retain.regularizer import Batch
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import count_devices, get_dtype_name
from hftl.train.callbacks import PassTime, time_forward, time_step

TIMED_ROWS = 128
"""Rows that a pass is timed on, at most."""
SEARCHED = 1 / 3
TRAINER_BATCH = 8
"""Of TrainingArguments, where the recipe says nothing."""
BUSY_SLOWDOWN = 1.5
"""How much longer passes take where other programs use the cores."""
FINISH_SECONDS = 20.0
"""Seconds from the last arm to the end: intervals, the reload in a fresh process, card, plots."""


@dataclass(frozen=True)
class RowCosts:
    """Hold the seconds that one row costs on this machine.

    Attributes:
        predict: a forward pass as final predictions are made, in fp32, rows of like length
            together.
        evaluate: a forward pass in the precision of training, rows as they come.
        step: a training step, by the name of the arm.
        slowdown: how much longer all that takes now than while the machine does nothing else.
    """

    predict: float
    evaluate: float
    step: Mapping[str, float]
    slowdown: float = 1.0


def estimate_seconds(
    context: ExperimentContext, jobs: list[Arm], recipe: Recipe, costs: RowCosts
) -> float:
    """Estimate the seconds that arms take, one entry of `jobs` for each arm and seed.

    Trainings count as if none stopped early. The rows of a pass are shared among the processes.

    Args:
        context: the source and the rows.
        jobs: what is to run.
        recipe: it says how often each row is seen.
        costs: seconds a row, see `measure_costs`.
    """
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    validation = len(context.prepared.rows["validation"])
    measured = sum(len(context.prepared.rows[split]) for split in MEASURED_SPLITS)
    embedded = sum(map(len, select_compared_rows(context).values()))
    seconds = (train + measured) * costs.predict
    seen: set[str] = set()
    for arm in jobs:
        if arm.spec.is_solved:
            hypotheses = 0 if arm.name in seen else count_hypotheses(context, arm)
            seconds += measured * hypotheses * costs.predict
            seen.add(arm.name)
            continue
        epochs, step = _count_epochs(context, arm, recipe), costs.step[arm.name]
        seconds_a_row = step + _estimate_retention_per_row(
            context, arm.retain, step, costs.evaluate
        )
        own = epochs * (train * seconds_a_row + validation * costs.evaluate)
        own += _estimate_retention_setup(context, arm.retain, train, validation, costs, step)
        seconds += own + measured * costs.predict
        seconds += embedded * costs.predict if arm.spec.changes_encoder else 0
        # What is tried to choose a rate or a weight is predicted on validation alone.
        if arm.name not in seen and arm.spec.schedule == "rate_search":
            rates = len(recipe.measure.scratch.learning_rates)
            tried = epochs * SEARCHED * (train * step + validation * costs.evaluate)
            seconds += rates * (tried + validation * costs.predict)
        if arm.name not in seen and has_auto_weight(arm.retain):
            rows = validation + len(list_selection_rows(context))
            seconds += len(kl_weight.WEIGHT_GRID) * (own + rows * costs.predict)
        seen.add(arm.name)
    return seconds / distributed.get_world_size() + FINISH_SECONDS


def measure_costs(context: ExperimentContext, jobs: list[Arm]) -> RowCosts:
    """Time a forward pass and the training step of every arm, in a few seconds; no collective is
    called."""
    first = next((arm for arm in jobs if not arm.spec.is_solved), None)
    finetune = (first or jobs[0]).finetune
    steps: dict[str, PassTime] = {}
    for arm in jobs:
        if not arm.spec.is_solved and arm.name not in steps:
            steps[arm.name] = _time_row_step(context, arm)
    evaluate = PassTime(0.0, 0.0) if first is None else _time_row_forward(context, finetune)
    predict = _time_row_prediction(context, finetune.pooling)
    timed = [predict, evaluate, *steps.values()]
    slowdown = sum(row.elapsed for row in timed) / sum(row.worked for row in timed)
    step_seconds = {name: row.worked for name, row in steps.items()}
    return RowCosts(predict.worked, evaluate.worked, step_seconds, slowdown)


def _divide_time(passed: PassTime, rows: int) -> PassTime:
    return PassTime(passed.worked / rows, passed.elapsed / rows)


def _time_row_step(context: ExperimentContext, arm: Arm) -> PassTime:
    """Time a training step, for each row; that of gradual unfreezing trains half the blocks."""
    finetune, spec = arm.finetune, arm.spec
    if spec.schedule == "phases":
        half = max(1, count_blocks(context.source.config) // 2)
        finetune, spec = finetune.model_copy(update={"blocks": half}), STRATEGIES["partial"]
    built = context.build_model(finetune.pooling, 0, scratch=arm.spec.is_baseline)
    model = apply_strategy(built.model, finetune, built.fresh, spec)
    batch, rows = _collate_batch(context, finetune)
    passed = time_step(model.to(context.device), batch, finetune.training, context.device)
    return _divide_time(passed, rows)


def _time_row_forward(context: ExperimentContext, finetune: Finetune) -> PassTime:
    """Time a forward pass in the precision of training, for each row."""
    model = context.build_model(finetune.pooling, 0).model.to(context.device)
    batch, rows = _collate_batch(context, finetune)
    return _divide_time(time_forward(model, batch, finetune.training, context.device), rows)


def _collate_batch(context: ExperimentContext, finetune: Finetune) -> tuple[Batch, int]:
    """Return a batch of training rows, and its number of rows."""
    size = int(finetune.training.get("per_device_train_batch_size", TRAINER_BATCH))
    rows = context.prepared.rows["train"][:size]
    return context.inputs.collate([dict(row) for row in context.encode_rows(rows)]), len(rows)


def _count_epochs(context: ExperimentContext, arm: Arm, recipe: Recipe) -> float:
    """Count how often a training sees its rows, at most."""
    if arm.spec.schedule == "phases":
        phased = arm.finetune.gradual
        return phased.epochs * (count_blocks(context.source.config) + 1) + phased.final_epochs
    factor = recipe.measure.scratch.epochs_factor if arm.spec.schedule == "rate_search" else 1
    return factor * float(arm.finetune.training["num_train_epochs"])


def _estimate_retention_per_row(
    context: ExperimentContext, retain: Retain | None, step: float, forward: float
) -> float:
    """Return the seconds that retention adds to training, for each row of the target."""
    if retain is None:
        return 0.0
    general = (retain.replay or Replay()).ratio if retain.mixes_general else 0.0
    extra_steps = sum(section.count_extra_steps(general) for section in retain.regularizers)
    reference = 0.0 if _is_cached(context, retain) else (1.0 + general) * forward
    return (general + extra_steps) * step + reference


def _estimate_retention_setup(
    context: ExperimentContext, retain: Retain | None, train: int, validation: int, costs: RowCosts,
    step: float,
) -> float:  # fmt: skip
    """Return the seconds that retention adds to a training once."""
    if retain is None:
        return 0.0
    general = len(context.general.train_rows) if context.general is not None else 0
    reads_outputs = any(section.reads_outputs for section in retain.regularizers)
    rows = train + (general if retain.mixes_general else 0) if reads_outputs else 0
    gradients = step * sum(section.setup_rows for section in retain.regularizers)
    return (rows + validation * len(retain.interpolate or ())) * costs.predict + gradients


def _is_cached(context: ExperimentContext, retain: Retain) -> bool:
    """Return True if the original's outputs are not computed at every step."""
    sections = [section for section in retain.regularizers if section.reads_outputs]
    reads_head = any(section.reads_task_head for section in sections)
    varies = context.augment or (context.prepared.task == TOKEN_CLASSIFICATION and reads_head)
    return not (sections and varies)


def _time_row_prediction(context: ExperimentContext, pooling: str) -> PassTime:
    """Time a forward pass in fp32 over rows of like length, for each row."""
    rows = context.prepared.rows["test"][:TIMED_ROWS]
    model = context.build_model(pooling, 0).model.to(context.device)
    encoded = context.encode_rows(rows)
    lengths = [context.inputs.length(row) for row in encoded]
    passes: list[PassTime] = []
    for numbers in batch_by_length(lengths, BATCH_TOKENS):
        batch = context.inputs.collate([dict(encoded[i]) for i in numbers])
        passes.append(time_forward(model, batch, None, context.device))
    total = PassTime(sum(one.worked for one in passes), sum(one.elapsed for one in passes))
    return _divide_time(total, len(rows))


# The header, with the estimated time.


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


def build_header(
    recipe: Recipe, context: ExperimentContext, arms: list[Arm], jobs: int
) -> dict[str, str]:
    """Return what a run is about to do, by name: source, device, rows, labels, arms and time."""
    facts = context.prepared.facts
    splits = facts.splits
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    labels = ", ".join(_format_label(recipe, label) for label in facts.labels[:8]) + (
        ", ..." if len(facts.labels) > 8 else ""
    )
    if facts.tag_scheme:
        labels += f" ({facts.tag_scheme.name} tags)"
    names = list(dict.fromkeys(arm.name for arm in arms))
    costs = measure_costs(context, arms)
    seconds = estimate_seconds(context, arms, recipe, costs)
    return {
        "source": f"{recipe.source.model} ({context.source.architecture})",
        "device": _describe_device(context.device, get_dtype_name(recipe.finetune.training)),
        **({"adapt": _describe_stages(recipe)} if recipe.stages else {}),
        "rows": f"train {train} of {splits['train']}, validation {splits['validation']}, "
        f"test {splits['test']} ({_describe_dropped_rows(facts)})",
        "labels": labels or "a number",
        "arms": f"{', '.join(names)} x seeds {recipe.measure.seeds}: {jobs} to run",
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
