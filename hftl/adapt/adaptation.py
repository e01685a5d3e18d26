"""Adapt an encoder: train a new head of the objective, then the encoder under its guard."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from hftl.adapt.facts import AdaptEvaluation
from hftl.adapt.guard import (
    AdaptationResult,
    GuardedCheckpoint,
    GuardRule,
    HeadTraining,
)
from hftl.config.adapt import Adapt
from hftl.errors import RecipeError
from hftl.runtime import distributed
from hftl.runtime.hardware import get_dtype_name, is_sharded
from hftl.train.arguments import EVAL_BATCH_SIZE, build_training_arguments
from hftl.train.callbacks import replace_progress_callbacks, time_forward, time_step
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.loss import select_model_inputs
from hftl.train.step_checkpoint import CheckpointSpec, CheckpointWriter
from hftl.train.steps import count_training_steps
from hftl.train.trainer import TransferTrainer

MAX_EVALUATIONS = 10
"""Evaluations of loss and guard in one adaptation."""
TRAIN_BATCH_SIZE = 32
HEAD_LEARNING_RATE = 1e-3
HEAD_MAX_STEPS = 2000
HEAD_EVAL_STEPS = 40
"""Steps between evaluations of a new head."""
TIMED_ROWS = 8
"""Rows that a CPU is timed on, at most: it is as busy with few as with many."""
HEAD_MIN_IMPROVEMENT = 0.005
"""A head has levelled off when its loss falls by less than this share, twice."""


@dataclass(frozen=True)
class AdaptationData:
    """Hold the rows of an adaptation: corpus, and rows held out of it.

    `general` is other text or other pictures, where there are any; `collate` makes batches of all.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    general: Dataset[Any] | None
    collate: Callable[[list[Any]], dict[str, Tensor]]


def train_new_head(
    model: Any, fresh: tuple[str, ...], task: AdaptationData, stage: Adapt, seed: int, device: str,
    checkpoints: CheckpointSpec | None = None,
) -> HeadTraining:  # fmt: skip
    """Train the head's weights that the source lacks until its held-out loss levels off.

    The encoder is frozen: gradients of an untrained head would only distort it (Kumar et al. 2022,
    arXiv:2202.10054).

    Args:
        model: the objective; left with the best head.
        fresh: names of the parameters to train.
        task: the corpus.
        stage: the recipe's section.
        seed: of the order and the masks.
        device: where it trains.
        checkpoints: where they are; None: nowhere.
    """
    model.requires_grad_(False)
    for name, parameter in model.head_parameters().items():
        parameter.requires_grad = name in fresh
    batch = stage.training.get("per_device_train_batch_size", TRAIN_BATCH_SIZE)
    defaults = {
        "learning_rate": HEAD_LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": HEAD_MAX_STEPS,
        "eval_steps": HEAD_EVAL_STEPS,
        "warmup_steps": 10,
        "metric_for_best_model": "eval_loss",
    }
    precision = {k: v for k, v in stage.training.items() if k in ("bf16", "fp16")}
    best = BestWeightsCallback("eval_loss", False, 2, HEAD_MIN_IMPROVEMENT)
    with tempfile.TemporaryDirectory() as folder:
        args = _build_arguments(
            precision | {"per_device_train_batch_size": batch}, defaults, folder, seed, device
        )
        trainer = _build_trainer(model, args, task, best, task.held_out)
        trainer.checkpoints = None if checkpoints is None else CheckpointWriter(checkpoints)
        trainer.train()
    _remove_autocast(trainer, model)
    best.restore(model)
    assert best.best is not None
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return HeadTraining(steps=trainer.state.global_step, loss=(losses[0], best.best))


def adapt_encoder(
    model: nn.Module,
    task: AdaptationData,
    stage: Adapt,
    rule: GuardRule,
    measure: Callable[[], float] | None,
    seed: int,
    device: str,
    checkpoints: CheckpointSpec,
) -> AdaptationResult:
    """Train the trainable weights under the guard; continue from the newest whole checkpoint.

    Args:
        model: the objective, its head warmed and its trainable parameters chosen.
        task: the corpus.
        stage: the recipe's section.
        rule: decides which weights are allowed.
        measure: returns the guard's value of the current model; None where the rule needs none.
        seed: of the order, the masks and the dropout.
        device: where it trains.
        checkpoints: where they are.

    Raises:
        NumericError: when a loss is not finite.
    """
    safe = GuardedCheckpoint(rule, measure, stage.patience)
    rows: Any = task.train
    args = _build_guarded_arguments(stage, len(rows), str(checkpoints.folder), seed, device)
    writer = CheckpointWriter(replace(checkpoints, every=_count_save_steps(stage, len(rows))))
    # The first evaluation is the start, which what was stopped has behind it.
    args.eval_on_start = writer.last is None
    # The guard reads the general loss when the target's comes: evaluate it first.
    held = {"general": task.general} if task.general is not None else {}
    trainer = _build_trainer(model, args, task, safe, {**held, "target": task.held_out})
    trainer.checkpoints = writer
    set_seed(seed)
    trainer.train()
    _remove_autocast(trainer, model)
    adapted = safe.restore(model)
    return AdaptationResult(
        kept="adapted" if adapted else "original",
        why=None if adapted else rule.explain(safe.history),
        step=safe.best.step,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        history=[AdaptEvaluation(**vars(evaluation)) for evaluation in safe.history],
        learning_rate=args.learning_rate,
        precision=get_dtype_name(stage.training),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        **({} if trainer.micro_batch is None else {"micro_batch": trainer.micro_batch}),
    )


def _build_guarded_arguments(
    stage: Adapt, rows: int, folder: str, seed: int, device: str
) -> TrainingArguments:
    """Return the arguments of a training that is evaluated `MAX_EVALUATIONS` times."""
    steps = count_steps(stage, rows)
    interval = max(1, math.ceil(steps / MAX_EVALUATIONS))
    defaults = {
        "per_device_train_batch_size": TRAIN_BATCH_SIZE,
        "eval_steps": interval,
    }
    args = _build_arguments(stage.training, defaults, folder, seed, device)
    if 0 < args.warmup_steps * steps < 1 and args.warmup_steps < 1:
        # transformers rounds up, and the first step of a warm-up has rate 0: the only one, or one
        # of a few.
        args.warmup_steps = 0
    return args


def count_steps(stage: Adapt, rows: int) -> int:
    """Return the number of optimizer steps of an adaptation on so many rows."""
    processes = distributed.get_world_size()
    epochs = stage.training["num_train_epochs"]
    return count_training_steps(stage.training, rows, epochs, TRAIN_BATCH_SIZE, processes)


def _count_save_steps(stage: Adapt, rows: int) -> int:
    """Return the steps after which a checkpoint is written; 0: only when time asks for one.

    Below 1 `save_steps` is a share of all steps, as transformers reads it.
    """
    steps = float(stage.training.get("save_steps", 0))
    return math.ceil(steps * count_steps(stage, rows)) if 0 < steps < 1 else int(steps)


def _build_arguments(
    training: Mapping[str, object], defaults: Mapping[str, object], folder: str, seed: int,
    device: str,
) -> TrainingArguments:  # fmt: skip
    if is_sharded():
        raise RecipeError(
            "adaptation does not run under FSDP",
            "Launch with recipes/accelerate/multi_gpu.yaml; each process holds the whole encoder",
        )
    common = {
        "eval_strategy": "steps",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 50,
        "prediction_loss_only": True,
    }
    return build_training_arguments("adapt", training, {**common, **defaults}, folder, seed, device)


def _build_trainer(
    model: nn.Module,
    args: TrainingArguments,
    task: AdaptationData,
    callback: TrainerCallback,
    held_out: Dataset[Any] | dict[str, Dataset[Any]],
) -> TransferTrainer:
    trainer = TransferTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=held_out,
        data_collator=task.collate,
        callbacks=[callback],
    )
    replace_progress_callbacks(trainer)
    return trainer


def _remove_autocast(trainer: TransferTrainer, model: nn.Module) -> None:
    """Remove the autocast that accelerate leaves around forward: measures are in fp32."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def estimate_adaptation_seconds(
    model: nn.Module, task: AdaptationData, stage: Adapt, device: str
) -> float:
    """Estimate the seconds of all steps and looks at held-out losses, as if none stopped early.

    The guard's own passes are not counted. The weights stay as they are.

    Args:
        model: the objective, on the device, its trainable parameters chosen.
        task: the corpus.
        stage: the recipe's section.
        device: where it trains.
    """
    rows: Any = task.train
    size = int(stage.training.get("per_device_train_batch_size", TRAIN_BATCH_SIZE))
    steps = count_steps(stage, len(rows))
    micro = steps * int(stage.training.get("gradient_accumulation_steps", 1))
    used = min(size, len(rows))
    timed = min(used, TIMED_ROWS) if device == "cpu" else used
    batch = _collate_first_rows(task, rows, timed)
    step = time_step(model, batch, stage.training, device).worked * used / timed
    looks = 0.0
    for held in (task.held_out, task.general):
        if held is not None:
            count = len(held)  # pyright: ignore[reportArgumentType]
            timed = min(TIMED_ROWS if device == "cpu" else EVAL_BATCH_SIZE, count)
            batch = _collate_first_rows(task, held, timed)
            seconds = time_forward(model, batch, stage.training, device).worked
            looks += seconds * count / timed
    return micro * step + min(steps, MAX_EVALUATIONS + 1) * looks / distributed.get_world_size()


def _collate_first_rows(task: AdaptationData, rows: Any, size: int) -> dict[str, Tensor]:
    """Return the first rows as a batch of the objective."""
    return select_model_inputs(task.collate([rows[i] for i in range(min(size, len(rows)))]))
