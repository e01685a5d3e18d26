"""Unfreeze gradually: the head, then block after block from the top, while validation improves.

Howard & Ruder 2018, arXiv:1801.06146, section 3.3. One optimizer holds all parameters from the
start; what is frozen has no gradient, so that nothing moves it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments

from hftl.config.finetune import Gradual
from hftl.errors import RecipeError
from hftl.finetune.trainable import split_phases
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import is_sharded
from hftl.train.checkpoint import BestWeightsCallback, iterate_trainable
from hftl.train.hf_compat import release_model
from hftl.train.step_checkpoint import (
    CheckpointSpec,
    CheckpointWriter,
    Rhythm,
    commit_checkpoint,
    find_checkpoint,
    is_writable,
    load_optimizer,
    remove_older,
    write_optimizer,
    write_tensors,
)
from hftl.train.trainer import TransferTrainer

PHASE_SEEDS = 1009
"""More than any model has; the seeds of two trainings' phases differ."""
PHASE_FOLDER = "phase-{}"
"""Of the checkpoints within a phase."""
STATE_FILE, WEIGHTS_FILE, BEST_FILE = "state.json", "weights.safetensors", "best.safetensors"


@dataclass(frozen=True)
class GradualProgress:
    """Hold the progress of gradual unfreezing, from which a stopped training continues."""

    phase: int = 0
    stopped: bool = False
    """Whether a phase was no better, so that nothing more is unfrozen."""
    epochs: float = 0.0
    """Of all phases."""
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    """The best value of all evaluations."""
    epoch: float | None = None
    """That of the best evaluation."""


def fit_gradual(
    model: nn.Module,
    make: Callable[..., TransferTrainer],
    args: TrainingArguments,
    best: BestWeightsCallback,
    gradual: Gradual,
    checkpoints: CheckpointSpec | None,
) -> tuple[TransferTrainer, list[dict[str, float]]]:
    """Train phase by phase and leave the best weights of all phases in the model.

    A phase that is no better than the best before it is the last in which anything is unfrozen. The
    phase of `gradual.final_epochs`, if any, starts from the best weights.

    Args:
        model: everything that may train requires a gradient; it does afterwards.
        make: makes a trainer of the model from its TrainingArguments, with other arguments where
            they are given.
        args: of the first phase; their seed is that of the training, and each phase has its own
            from it.
        best: keeps the best evaluation over all phases; it counts epochs over all of them.
        gradual: the recipe's section.
        checkpoints: where they are, between phases and within them; None: nowhere.

    Returns:
        The last trainer, and {epoch, loss, ...} of every evaluation, with its `phase`.

    Raises:
        RecipeError: under FSDP.
    """
    if is_sharded():
        raise RecipeError(
            "gradual unfreezing does not run under FSDP, whose shards stay as they were cut",
            "Launch with recipes/accelerate/multi_gpu.yaml, or use another finetune.strategy",
        )
    everything = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = [name for name, _ in iterate_trainable(model)]
    start = {name: t.cpu().clone() for name, t in _get_tensors(model, names).items()}
    parts = split_phases(model)
    # The original's outputs are read, and the optimizer made, while everything requires a gradient.
    first = trainer = make(args)
    first.prepare_regularizers()
    optimizer = first.create_optimizer()
    phases, rhythm = checkpoints and checkpoints.nest("phases"), Rhythm(model)
    done = _restore_progress(phases, model, best, optimizer)
    while (number := _next_phase(done, len(parts), gradual)) is not None:
        last = number == len(parts)
        if last:
            _set_tensors(_get_tensors(model, names), start | best.weights)
            _scale_learning_rates(optimizer, gradual.final_rate)
        for name, parameter in everything.items():
            parameter.requires_grad = last or name in parts[number]
        epochs = gradual.final_epochs if last else gradual.epochs
        trainer = _make_phase_trainer(make, args, number, epochs, optimizer, checkpoints)
        done = _train_phase(trainer, model, number, best, done)
        _save_progress(phases, rhythm, _get_tensors(model, names), best, optimizer, done)
    for parameter in everything.values():
        parameter.requires_grad = True
    _set_tensors(_get_tensors(model, names), start | best.weights)
    return trainer, done.history


def _make_phase_trainer(
    make: Callable[..., TransferTrainer], args: TrainingArguments, number: int, epochs: float,
    optimizer: Any, checkpoints: CheckpointSpec | None,
) -> TransferTrainer:  # fmt: skip
    """Return the trainer of a phase, which has its own length, seed and checkpoints."""
    own = copy(args)
    own.num_train_epochs = epochs
    own.seed = own.data_seed = args.seed * PHASE_SEEDS + number
    trainer = make(own, optimizers=(optimizer, None))
    if checkpoints is not None:
        within = checkpoints.nest(PHASE_FOLDER.format(number), phase=number)
        trainer.checkpoints = CheckpointWriter(within)
    return trainer


def _next_phase(done: GradualProgress, unfreezing: int, gradual: Gradual) -> int | None:
    """Return the number of the next phase; the final one is `unfreezing`, and None is the end."""
    if done.phase < unfreezing and not done.stopped:
        return done.phase
    return unfreezing if gradual.final_epochs and done.phase <= unfreezing else None


def _train_phase(
    trainer: TransferTrainer,
    model: nn.Module,
    number: int,
    best: BestWeightsCallback,
    done: GradualProgress,
) -> GradualProgress:
    """Train one phase, which ends with an evaluation."""
    before, passed = best.best, done.epochs
    best.evaluations_without_gain = 0
    trainer.train()
    if not any("eval_loss" in row for row in trainer.state.log_history):
        trainer.evaluate()
    release_model(trainer.accelerator, model)
    gained = before is None or best.best != before
    if gained:
        best.epoch = passed + float(best.epoch or 0)
    rows = [
        {**row, "epoch": passed + row.get("epoch", 0.0), "phase": number}
        for row in trainer.state.log_history
    ]
    epochs = passed + float(trainer.state.epoch or 0)
    return GradualProgress(
        number + 1, done.stopped or not gained, epochs, [*done.history, *rows], best.best,
        best.epoch,
    )  # fmt: skip


def _get_tensors(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return the named parameters and statistics, detached.

    Not to be held from phase to phase: under DDP the parameters get other memory.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name].detach() for name in names}


def _set_tensors(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Set all that trains to the given values."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _scale_learning_rates(optimizer: Any, share: float) -> None:
    """Multiply every learning rate of the next phase by a share."""
    for group in optimizer.param_groups:
        group["initial_lr"] = share * group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"]


def _save_progress(
    phases: CheckpointSpec | None, rhythm: Rhythm, tensors: dict[str, Tensor],
    best: BestWeightsCallback, optimizer: Any, done: GradualProgress,
) -> None:  # fmt: skip
    """Write the state after a phase if it is due, and remove what led there. Collective.

    Phases since the last one that was written are trained again after a stop, to the same weights.
    """
    if phases is None:
        return

    def write() -> None:
        if not (phases.every or rhythm.is_due):
            return
        started = time.monotonic()
        if not is_writable(optimizer):
            rhythm.note_written(math.inf)
            return
        with commit_checkpoint(phases.folder / f"step-{done.phase}", phases.cache_key) as aside:
            write_tensors(aside / WEIGHTS_FILE, tensors)
            write_tensors(aside / BEST_FILE, best.weights)
            state = {**asdict(done), "optimizer": write_optimizer(aside, optimizer)}
            run_folder.write_text(aside / STATE_FILE, json.dumps(state))
        remove_older(phases.folder)
        for number in range(done.phase):
            within = phases.folder.with_name(PHASE_FOLDER.format(number))
            shutil.rmtree(within, ignore_errors=True)
        rhythm.note_written(time.monotonic() - started)

    distributed.broadcast_from_main(write)


def _restore_progress(
    phases: CheckpointSpec | None, model: nn.Module, best: BestWeightsCallback, optimizer: Any
) -> GradualProgress:
    """Restore the saved state if there is one of this training. Collective."""
    if phases is None:
        return GradualProgress()
    folder: Path | None = distributed.broadcast_from_main(
        lambda: find_checkpoint(phases.folder, phases.cache_key)
    )
    if folder is None:
        return GradualProgress()
    state = json.loads((folder / STATE_FILE).read_text("utf-8"))
    load_optimizer(folder, optimizer, state.pop("optimizer"))
    progress = GradualProgress(**state)
    _set_tensors(dict(iterate_trainable(model)), load_file(folder / WEIGHTS_FILE))
    best.best, best.epoch = progress.best, progress.epoch
    best.weights = load_file(folder / BEST_FILE)
    return progress
