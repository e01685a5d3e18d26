"""Estimate how long arms take, from a few timed steps."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from hftl.config.finetune import Finetune
from hftl.config.measure import SEARCH_SHARE
from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Replay, Retain
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import select_compared_rows
from hftl.finetune.strategies import STRATEGIES
from hftl.finetune.trainable import apply_strategy, count_frozen_blocks
from hftl.finetune.used_tokens import train_used_tokens
from hftl.finetune.zero_shot import count_hypotheses
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.encoders import count_blocks
from hftl.models.features import BATCH_TOKENS, batch_by_length, run_fast
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.pipeline import weight_grid
from hftl.pipeline.schedule import ArmCost
from hftl.pipeline.weight_grid import list_selection_rows
from hftl.retain.regularizer import Batch
from hftl.runtime import distributed
from hftl.train.arguments import build_finetune_arguments
from hftl.train.callbacks import PassTime, time_forward, time_step
from hftl.train.optimizer import compute_depths
from hftl.train.steps import TRAINER_BATCH

TIMED_ROWS = 32
"""Rows that a pass is timed on, at most."""
TIMED_TOKENS = 512
"""Tokens of them, at most, on a CPU, which is as busy with few as with many."""
FINISH_SECONDS = 20.0
"""Seconds from the last arm to the end: intervals, the reload in a fresh process, card, plots."""


STORED_EPOCHS = 2
"""Epochs from which the outputs of frozen blocks are stored."""
QUIET_SLOWDOWN = 1.15
"""How much longer passes take than they work, at most, on a machine that does nothing else."""
PREDICT, EVALUATE = "(predict)", "(evaluate)"
"""Kinds of passes beside the arms' steps; no arm has such a name."""


@dataclass(frozen=True)
class RowCosts:
    """Hold the seconds that one row costs on this machine.

    Attributes:
        predict: a forward pass as final predictions are made, in fp32, rows of like length
            together.
        evaluate: a forward pass in the precision of training, rows as they come.
        step: a training step, by the name of the arm.
        slowdown: how much longer all that takes now than while the machine does nothing else.
        frozen: the share of the blocks that an arm's training never changes, by the arm's name.
    """

    predict: float
    evaluate: float
    step: Mapping[str, float]
    slowdown: float = 1.0
    frozen: Mapping[str, float] = field(default_factory=dict)


def estimate_arm(
    context: ExperimentContext, arm: Arm, recipe: Recipe, costs: RowCosts, sharing: int = 1
) -> ArmCost:
    """Estimate the seconds of an arm on one process, without what it shares with others.

    Trainings count as if none stopped early. Where `max_steps` sets their length, a step holds rows
    of every process that shares it, `sharing` of them.
    """
    measured = sum(len(context.prepared.rows[split]) for split in MEASURED_SPLITS)
    if arm.spec.is_solved:
        return ArmCost(0.0)
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    validation = len(context.prepared.rows["validation"])
    embedded = sum(map(len, select_compared_rows(context).values()))
    epochs, step = _count_epochs(context, arm, recipe, sharing), costs.step[arm.name]
    # What frozen blocks return is stored in the first of several epochs.
    once = _estimate_stored_blocks(context, arm, costs) if epochs >= STORED_EPOCHS else 0.0
    seconds_a_row = step + _estimate_retention_per_row(context, arm.retain, step, costs.evaluate)
    own = epochs * (train * (seconds_a_row - once) + validation * (costs.evaluate - once))
    own += (train + validation) * once
    own += _estimate_retention_setup(context, arm.retain, train, validation, costs, step)
    seconds = own + measured * costs.predict
    seconds += embedded * costs.predict if arm.spec.changes_encoder else 0
    # What is tried to choose a rate or a weight is predicted on validation alone.
    rate = choice = spared = 0.0
    if arm.spec.schedule == "rate_search":
        rate = SEARCH_SHARE * own + validation * costs.predict
        choice = own + validation * costs.predict
        # The seeds train for a third of the budget or for all of it; the first one has done so in
        # the search.
        spared = own * (1 + SEARCH_SHARE) / 2
        seconds += spared - own
    if arm.retain is not None and arm.retain.has_auto_weight:
        rows = validation + len(list_selection_rows(context))
        choice = len(weight_grid.WEIGHT_GRID) * (own + rows * costs.predict)
    return ArmCost(seconds, rate, choice, spared)


def estimate_trained_arms(
    context: ExperimentContext, arms: Iterable[Arm], recipe: Recipe, costs: RowCosts
) -> dict[str, ArmCost]:
    """Estimate the seconds of the arms that train, by name."""
    return {
        arm.name: estimate_arm(context, arm, recipe, costs)
        for arm in arms
        if not arm.spec.is_solved
    }


def estimate_solved_seconds(
    context: ExperimentContext, arms: Sequence[Arm], recipe: Recipe, costs: RowCosts
) -> float:
    """Estimate the seconds of frozen features, and of what the solved arms need beside them."""
    train = len(context.select_train_rows(recipe.measure.seeds[0]))
    measured = sum(len(context.prepared.rows[split]) for split in MEASURED_SPLITS)
    solved = {arm.name: arm for arm in arms if arm.spec.is_solved}
    hypotheses = sum(count_hypotheses(context, arm) for arm in solved.values())
    return (train + measured * (1 + hypotheses)) * costs.predict


def estimate_seconds(
    context: ExperimentContext, jobs: list[Arm], recipe: Recipe, costs: RowCosts
) -> float:
    """Estimate the seconds that arms take, one entry of `jobs` for each arm and seed.

    The rows of a pass are shared among the processes of a launcher.

    Args:
        context: the source and the rows.
        jobs: what is to run.
        recipe: it says how often each row is seen.
        costs: seconds a row, see `measure_costs`.
    """
    seconds = estimate_solved_seconds(context, jobs, recipe, costs)
    processes = distributed.get_world_size()
    for name, seeds in Counter(arm.name for arm in jobs).items():
        arm = next(arm for arm in jobs if arm.name == name)
        cost = estimate_arm(context, arm, recipe, costs, processes)
        rates = len(recipe.measure.scratch.learning_rates)
        seconds += seeds * cost.seed + rates * cost.rate + cost.choice - cost.spared
    return seconds / processes + FINISH_SECONDS


def measure_costs(
    context: ExperimentContext, arms: Sequence[Arm], threads: int | None = None
) -> RowCosts:
    """Time a forward pass and the training step of every arm, in a few seconds.

    No collective is called.

    Args:
        context: the source and the rows.
        arms: those that are to run.
        threads: that the arms compute with on a CPU; None: as many as here.
    """
    worked: dict[str, float] = {}
    frozen: dict[str, float] = {}
    elapsed = 0.0
    # One model after the other, as the arms run: a run is not to hold more before than in them.
    for arm in [arm for arm in arms if not arm.spec.is_solved] or arms[:1]:
        timed = _time_arm(context, arm, threads or torch.get_num_threads(), is_first=not worked)
        worked |= timed.worked
        elapsed += timed.elapsed
        frozen[arm.name] = timed.frozen
    slowdown = elapsed / sum(worked.values())
    return RowCosts(worked.pop(PREDICT), worked.pop(EVALUATE, 0.0), worked, slowdown, frozen)


class _TimedArm(NamedTuple):
    """Hold the least seconds that each kind of pass worked, the sum of those that went by in the
    first timing, and the share of the blocks that the arm never changes."""

    worked: dict[str, float]
    elapsed: float
    frozen: float


def _time_arm(context: ExperimentContext, arm: Arm, threads: int, is_first: bool) -> _TimedArm:
    """Time an arm's passes on a model of its own, twice on a busy machine."""
    usual = torch.get_num_threads()
    model = _build_timed_model(context, arm).to(context.device)
    try:
        torch.set_num_threads(threads)
        rounds = [_time_passes(context, arm, model, is_first)]
        # Threads wait for each other while other programs use their cores, which counts as work;
        # one thread alone does not. What one takes bounds what several take.
        if context.device == "cpu" and _compute_slowdown(rounds[0]) > QUIET_SLOWDOWN:
            torch.set_num_threads(1)
            rounds.append(_time_passes(context, arm, model, is_first))
    finally:
        torch.set_num_threads(usual)
    worked = {name: min(passes[name].worked for passes in rounds) for name in rounds[0]}
    elapsed = sum(passed.elapsed for passed in rounds[0].values())
    frozen = 0.0 if arm.spec.is_solved else _compute_frozen_share(model)
    return _TimedArm(worked, elapsed, frozen)


def _build_timed_model(context: ExperimentContext, arm: Arm) -> nn.Module:
    """Build what an arm trains; gradual unfreezing with half the blocks to train."""
    finetune, spec = arm.finetune, arm.spec
    if spec.is_solved:
        return context.build_model(finetune.pooling, 0).model
    built = context.build_model(finetune.pooling, 0, scratch=spec.is_baseline)
    if spec.schedule == "phases":
        half = max(1, count_blocks(context.source.config) // 2)
        finetune, spec = finetune.model_copy(update={"blocks": half}), STRATEGIES["partial"]
    return apply_strategy(built.model, finetune, built.fresh, spec)


def _time_passes(
    context: ExperimentContext, arm: Arm, model: nn.Module, is_first: bool
) -> dict[str, PassTime]:
    """Time each kind of pass once: an arm's steps by its name, predictions and evaluations.

    The last two cost the same under all arms, and are timed with the first.
    """
    passes: dict[str, PassTime] = {}
    if not arm.spec.is_solved:
        batch, rows = _collate_batch(context, arm.finetune)
        training, device = arm.finetune.training, context.device
        with _hold_used_tokens(context, model, arm.finetune):
            passes[arm.name] = _divide_time(time_step(model, batch, training, device), rows)
        if is_first:
            passes[EVALUATE] = _divide_time(time_forward(model, batch, training, device), rows)
    return passes | ({PREDICT: _time_row_prediction(context, model)} if is_first else {})


def _hold_used_tokens(
    context: ExperimentContext, model: nn.Module, finetune: Finetune
) -> AbstractContextManager[None]:
    """Let the word vectors take part that do so in the training of the first seed."""
    task, seed = context.prepared.task, _get_first_seed(context)
    args = build_finetune_arguments(finetune.training, task, "unused", seed, context.device)
    encoder = get_encoder(model, get_model_spec(model))
    return train_used_tokens(context, encoder, finetune, args, seed)


def _get_first_seed(context: ExperimentContext) -> int:
    """Return the seed whose rows are timed; the first of a run, before one begins 0."""
    return context.seeds[0] if context.seeds else 0


def _compute_slowdown(passes: Mapping[str, PassTime]) -> float:
    """Return how much longer passes took than they worked."""
    worked = sum(passed.worked for passed in passes.values())
    return sum(passed.elapsed for passed in passes.values()) / worked


def _compute_frozen_share(model: nn.Module) -> float:
    """Return the share of the blocks below all that trains."""
    return count_frozen_blocks(model) / compute_depths(model)[1]


def _divide_time(passed: PassTime, rows: int) -> PassTime:
    return PassTime(passed.worked / rows, passed.elapsed / rows)


def _collate_batch(context: ExperimentContext, finetune: Finetune) -> tuple[Batch, int]:
    """Return a batch of training rows, and its number of rows."""
    size = _get_batch_size(finetune)
    rows = context.select_train_rows(_get_first_seed(context))[:size]
    return context.inputs.collate([dict(row) for row in context.encode_rows(rows)]), len(rows)


def _get_batch_size(finetune: Finetune) -> int:
    return int(finetune.training.get("per_device_train_batch_size", TRAINER_BATCH))


def _count_epochs(context: ExperimentContext, arm: Arm, recipe: Recipe, sharing: int) -> float:
    """Count how often a training sees its rows, at most."""
    training = arm.finetune.training
    if arm.spec.schedule == "phases":
        phased = arm.finetune.gradual
        return phased.epochs * (count_blocks(context.source.config) + 1) + phased.final_epochs
    factor = recipe.measure.scratch.epochs_factor if arm.spec.schedule == "rate_search" else 1
    if training.get("max_steps", 0) > 0:
        size = _get_batch_size(arm.finetune) * int(training.get("gradient_accumulation_steps", 1))
        rows = len(context.select_train_rows(recipe.measure.seeds[0]))
        return factor * training["max_steps"] * size * sharing / rows
    return factor * float(training["num_train_epochs"])


def _estimate_stored_blocks(context: ExperimentContext, arm: Arm, costs: RowCosts) -> float:
    """Return the seconds of a row in the blocks that run once a row, as they are frozen."""
    is_stored = arm.finetune.cache != "never" and not context.augment
    phased = arm.spec.schedule == "phases"
    return costs.frozen.get(arm.name, 0.0) * costs.evaluate if is_stored and not phased else 0.0


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


def _time_row_prediction(context: ExperimentContext, model: nn.Module) -> PassTime:
    """Time a forward pass in fp32 over rows of like length, as predictions run, for each row."""
    test = context.prepared.rows["test"]
    rows = test[:: -(-len(test) // TIMED_ROWS)]
    encoded = context.encode_rows(rows)
    if context.device == "cpu":
        tokens = sum(map(context.inputs.length, encoded))
        encoded = encoded[:: -(-tokens // TIMED_TOKENS)]
    lengths = [context.inputs.length(row) for row in encoded]
    passes: list[PassTime] = []
    with run_fast(model):
        for numbers in batch_by_length(lengths, BATCH_TOKENS):
            batch = context.inputs.collate([dict(encoded[i]) for i in numbers])
            passes.append(time_forward(model, batch, None, context.device))
    total = PassTime(sum(one.worked for one in passes), sum(one.elapsed for one in passes))
    return _divide_time(total, len(encoded))
