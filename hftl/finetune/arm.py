"""Train one arm for one seed."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from hftl.config.finetune import Finetune
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.data.text_inputs import IGNORE_INDEX
from hftl.errors import NumericError, RecipeError, format_error_line
from hftl.finetune.arm_files import ArmOutput, collect_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.frozen_prefix import FrozenPrefix
from hftl.finetune.gradual import fit_gradual
from hftl.finetune.guard_metrics import score_validation
from hftl.finetune.interpolate import select_alpha
from hftl.finetune.pretraining_heads import embed_compared_rows
from hftl.finetune.trainable import apply_strategy, count_trainable_parameters
from hftl.finetune.used_tokens import train_used_tokens
from hftl.finetune.zero_shot import build_start_model
from hftl.measure.metrics import compute_all_metrics
from hftl.models.features import predict_logits, predict_with_features
from hftl.models.heads import LoadedModel, TargetScale
from hftl.retain.regularizer import Retention
from hftl.runtime import distributed
from hftl.runtime.hardware import get_dtype_name, is_sharded
from hftl.train.arguments import build_finetune_arguments
from hftl.train.callbacks import replace_progress_callbacks
from hftl.train.checkpoint import (
    BestWeightsCallback,
    gather_trainable_state,
    has_batch_norm,
    iterate_running_statistics,
    iterate_trainable,
)
from hftl.train.facts import TargetScaleFacts, TrainingFacts
from hftl.train.hf_compat import release_model
from hftl.train.step_checkpoint import CheckpointSpec, CheckpointWriter
from hftl.train.trainer import TransferTrainer


def train_arm(
    context: ExperimentContext, finetune: Finetune, seed: int,
    retention: Retention | None = None, checkpoints: CheckpointSpec | None = None,
    compared: bool = True, splits: Sequence[str] = MEASURED_SPLITS,
    measure_forgetting: Callable[[LoadedModel], float] | None = None,
) -> ArmOutput:  # fmt: skip
    """Train a strategy that starts from the source, its head as `finetune.head_init` says.

    Args:
        context: what all arms share.
        finetune: the recipe's section.
        seed: of shots, order and initialisation.
        retention: what keeps it near its original; of this training alone.
        checkpoints: where they are, from the newest of which training continues; None: nowhere.
        compared: whether it is compared with the source, for which it leaves its embeddings.
        splits: those that are predicted.
        measure_forgetting: is called on the trained model; its value is the fact `forgotten`.
    """
    finetune = context.decide_batchnorm(finetune, seed)
    built = build_start_model(context, finetune, seed, context.compute_target_scale(seed))
    set_seed(seed)
    model = apply_strategy(built.model, finetune, built.fresh)
    built = LoadedModel(model, built.architecture, built.pooling, built.fresh)
    trained = fit_model(
        context, built, finetune, seed, retention, checkpoints, measure_forgetting
    )  # fmt: skip
    return predict_trained(context, trained, compared, splits)


@dataclass(frozen=True)
class TrainedModel:
    """Hold a trained model, whose head is one of standardised targets where there is a `scale`."""

    built: LoadedModel
    scale: TargetScale | None
    facts: TrainingFacts
    timings: dict[str, float]
    note: str = ""


def fit_model(
    context: ExperimentContext, built: LoadedModel, finetune: Finetune, seed: int,
    retention: Retention | None = None, checkpoints: CheckpointSpec | None = None,
    measure_forgetting: Callable[[LoadedModel], float] | None = None,
) -> TrainedModel:  # fmt: skip
    """Train a prepared model, and keep its best evaluation on validation.

    The last three arguments are those of `train_arm`.
    """
    started = time.perf_counter()
    retention = Retention() if retention is None else retention
    scale = context.compute_target_scale(seed)
    if scale is not None and retention.reference is not None:
        scale.standardize_head(retention.reference)
    trained = iterate_trainable(built.model) if retention.alphas else ()
    start = {name: tensor.clone() for name, tensor in trained}
    # FSDP cuts the model into pieces; what it learns is put into this whole one.
    whole = deepcopy(built.model) if is_sharded() else built.model
    with ExitStack() as stack:
        scratch_folder = stack.enter_context(tempfile.TemporaryDirectory())
        args = build_finetune_arguments(
            finetune.training, context.prepared.task, scratch_folder, seed, context.device
        )
        prefix = FrozenPrefix(
            context, built, finetune, args, context.feature_root or Path(scratch_folder)
        )
        stack.enter_context(prefix.cache.install())
        prefix.fill(_list_rows_of_training(context, seed, retention))
        stack.enter_context(
            train_used_tokens(context, built.encoder, finetune, args, seed, retention)
        )
        best = build_keep_best(args, finetune.patience)
        trainers = _ArmTrainers(
            context, built, finetune, seed, best=best, retention=retention, scale=scale,
            prefix=prefix,
        )  # fmt: skip
        result = _fit(trainers, args, _add_scale(checkpoints, scale))
    if whole is not built.model:
        weights = gather_trainable_state(built.model, result.trainer.accelerator)
        built = replace(built, model=_load_trained_weights(whole, weights))
    facts = _describe_training(result, built.model, finetune, scale).merge(retention.facts)
    facts = facts.merge(context.describe_class_weights(finetune.class_weight, seed))
    if retention.alphas:
        score = lambda: _score_validation(context, built, scale)  # noqa: E731
        chosen = select_alpha(built.model, start, retention.alphas, score)
        facts = facts.merge(TrainingFacts(interpolation=chosen))
    if measure_forgetting is not None:
        facts = facts.merge(TrainingFacts(forgotten=measure_forgetting(built)))
    timings = {"train_seconds": time.perf_counter() - started, **prefix.timings}
    return TrainedModel(built, scale, facts, timings, prefix.line)


@dataclass(frozen=True)
class _ArmTrainers:
    """Build the trainers of an arm: one, or one a phase."""

    context: ExperimentContext
    built: LoadedModel
    finetune: Finetune
    seed: int
    best: BestWeightsCallback
    retention: Retention
    scale: TargetScale | None
    prefix: FrozenPrefix

    def build(self, args: TrainingArguments, optimizers: Any = (None, None)) -> TransferTrainer:
        """Build a trainer; the phases of an arm share `optimizers`."""
        context, finetune = self.context, self.finetune
        self.prefix.follow()
        held = _sort_by_length(context, context.prepared.rows["validation"])
        standardise = None if self.scale is None else self.scale.standardize
        # The phases of gradual unfreezing count epochs from 0, and see other crops.
        rows = context.select_train_rows(self.seed)
        trainer = TransferTrainer(
            self.built.model,
            args,
            train_dataset=context.build_dataset(rows, args.data_seed, standardise),
            eval_dataset=context.build_dataset(held, None, standardise),
            data_collator=context.inputs.collate,
            compute_metrics=partial(self._compute_metrics, held),
            callbacks=[self.best],
            optimizers=optimizers,
            retain=self.retention,
            class_weight=context.compute_class_weights(finetune.class_weight, self.seed),
            focal_gamma=finetune.focal_gamma,
            layer_decay=finetune.layer_decay,
            rates=finetune.learning_rates,
        )
        replace_progress_callbacks(trainer)
        return trainer

    def _compute_metrics(self, held: list[Row], evaluation: Any) -> dict[str, float]:
        """Return the metrics of an evaluation, in the label's unit."""
        outputs = evaluation.predictions
        if self.scale is not None:
            outputs = self.scale.restore(np.asarray(outputs))
        return _compute_metrics(self.context, held, outputs, evaluation.label_ids)


@dataclass(frozen=True)
class _TrainingResult:
    """Hold a training: its last trainer, its log and epochs, and the epoch of the best weights."""

    trainer: TransferTrainer
    history: list[dict[str, float]]
    epochs: float | None
    best_epoch: float | None


def _fit(
    trainers: _ArmTrainers, args: TrainingArguments, checkpoints: CheckpointSpec | None
) -> _TrainingResult:
    """Train in phases or at once, as the strategy says, and leave the best weights in the model."""
    model, best, finetune = trainers.built.model, trainers.best, trainers.finetune
    if finetune.spec.schedule == "phases":
        phased = partial(
            fit_gradual, model, trainers.build, args, best, finetune.gradual, checkpoints
        )
        trainer, history = _run_training(phased)
        return _TrainingResult(trainer, history, history[-1]["epoch"], best.epoch)
    trainer = _fit_at_once(model, trainers.build(args), best, checkpoints)
    return _TrainingResult(trainer, trainer.state.log_history, trainer.state.epoch, best.epoch)


def _add_scale(
    checkpoints: CheckpointSpec | None, scale: TargetScale | None
) -> CheckpointSpec | None:
    """Return checkpoints of this scale: weights in another unit are nothing to continue from."""
    if checkpoints is None or scale is None:
        return checkpoints
    key = {**checkpoints.cache_key, "target_scale": asdict(scale)}
    return replace(checkpoints, cache_key=key)


def _describe_training(
    result: _TrainingResult, model: nn.Module, finetune: Finetune, scale: TargetScale | None
) -> TrainingFacts:
    facts = TrainingFacts(
        learning_rate=result.trainer.args.learning_rate,
        precision=get_dtype_name(finetune.training),
        epochs=result.epochs,
        best_epoch=result.best_epoch,
        history=_clean_history(result.history),
        freeze_batchnorm=_holds_statistics(model),
        target_scale=None if scale is None else TargetScaleFacts(**asdict(scale)),
    )
    micro_batch = result.trainer.micro_batch
    return facts if micro_batch is None else facts.merge(TrainingFacts(micro_batch=micro_batch))


def _holds_statistics(model: nn.Module) -> bool | None:
    """Return whether no BatchNorm has moved its running statistics; None of a model without one."""
    return None if not has_batch_norm(model) else not any(iterate_running_statistics(model))


def _list_rows_of_training(
    context: ExperimentContext, seed: int, retention: Retention
) -> list[list[Row]]:
    """Return the rows that the run's trainings read, evaluations included, and general rows."""
    seeds = dict.fromkeys((*context.seeds, seed))
    train = [row for number in seeds for row in context.select_train_rows(number)]
    target = [*train, *context.prepared.rows["validation"]]
    if retention.general is None or context.general is None:
        return [target]
    return [target, context.general.train_rows]


def _fit_at_once(
    model: nn.Module, trainer: TransferTrainer, best: BestWeightsCallback,
    checkpoints: CheckpointSpec | None,
) -> TransferTrainer:  # fmt: skip
    """Train all that is open from start to end, and restore the best evaluation's weights.

    FSDP cuts weights and optimizer into pieces: there a stopped training starts over.
    """
    if checkpoints is not None and not is_sharded():
        trainer.checkpoints = CheckpointWriter(checkpoints)
    _run_training(trainer.train)
    # accelerate leaves its autocast around forward; predictions are made in fp32.
    release_model(trainer.accelerator, model)
    best.restore(model)
    return trainer


def _run_training(training: Callable[[], Any]) -> Any:
    try:
        return training()
    except ImportError as error:
        raise RecipeError(
            f"finetune.training needs a package: {format_error_line(error)}", "Install it"
        ) from error


def _score_validation(
    context: ExperimentContext, built: LoadedModel, scale: TargetScale | None
) -> tuple[float, float]:
    """Return the model's score on validation and its standard error."""
    outputs = predict_split(context, built, scale, "validation")
    return distributed.broadcast_from_main(lambda: score_validation(context, outputs))


def _load_trained_weights(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model with all that trains set to its trained value."""
    trains = {name for name, _ in iterate_trainable(model)}
    if trains != set(tensors):
        raise RuntimeError(f"trained and trainable differ: {sorted(trains ^ set(tensors))[0]}")
    model.load_state_dict(tensors, strict=False)
    return model


def predict_trained(
    context: ExperimentContext, trained: TrainedModel, compared: bool,
    splits: Sequence[str] = MEASURED_SPLITS,
) -> ArmOutput:  # fmt: skip
    """Return the output of a trained model: its predictions on the rows of splits, and its weights.

    They are made in fp32. Its head is left in the label's unit. `compared` as of `train_arm`.
    """
    started = time.perf_counter()
    built, scale = trained.built, trained.scale
    built.model.to(context.device)
    logits, features = {}, None
    for split in splits:
        if compared and split == "test":
            encoded = context.encode_rows(context.prepared.rows[split])
            outputs, features = predict_with_features(
                built.model, built.last_linear, encoded, context.inputs, context.device
            )
            logits[split] = outputs if scale is None else scale.restore(outputs)
        else:
            logits[split] = predict_split(context, built, scale, split)
    if scale is not None:
        scale.restore_head(built.model)
    return ArmOutput(
        logits,
        collect_trained_tensors(built),
        count_trainable_parameters(built.model),
        trained.facts,
        {**trained.timings, "predict_seconds": time.perf_counter() - started},
        embed_compared_rows(context, built, features) if compared else {},
        trained.note,
    )


def predict_split(
    context: ExperimentContext, built: LoadedModel, scale: TargetScale | None, split: str
) -> np.ndarray:
    """Return outputs (rows, outputs) for a split's rows, in the label's unit, computed in fp32."""
    built.model.to(context.device)
    rows = context.encode_rows(context.prepared.rows[split])
    outputs = predict_logits(built.model, rows, context.inputs, context.device)
    # Far from 0 float32 would round what the model says.
    return outputs if scale is None else scale.restore(outputs)


def build_keep_best(args: TrainingArguments, patience: int | None) -> BestWeightsCallback:
    """Build the callback for the metric that TrainingArguments names; by default the loss."""
    name = str(args.metric_for_best_model)
    key = name if name.startswith("eval_") else f"eval_{name}"
    return BestWeightsCallback(key, bool(args.greater_is_better), patience)


def _compute_metrics(
    context: ExperimentContext, rows: list[Row], outputs: Any, labels: Any
) -> dict[str, float]:
    """Compute the task's metrics of what the Trainer gathered; truncated words have no labels
    there."""
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if not np.isfinite(outputs).all():
        raise NumericError("the outputs on validation are not finite", "Lower the learning rate")
    if context.prepared.task == "token-classification":
        counted = labels != IGNORE_INDEX
        whole = np.full((sum(context.prepared.count_words(rows)), outputs.shape[-1]), np.nan)
        whole[_mask_untruncated_words(context, rows)] = outputs[counted]
        outputs = whole
    return compute_all_metrics(
        context.prepared.task,
        context.prepared.encode_for_metrics(rows),
        context.prepared.decode_for_metrics(rows, outputs),
    )


def _mask_untruncated_words(context: ExperimentContext, rows: list[Row]) -> np.ndarray:
    """Return True for each word, row after row, that was not truncated."""
    return np.concatenate([np.asarray(row["words"]) >= 0 for row in context.encode_rows(rows)])


def _sort_by_length(context: ExperimentContext, rows: list[Row]) -> list[Row]:
    """Sort the rows by length, so that evaluation pads little."""
    lengths = [context.inputs.length(encoded) for encoded in context.encode_rows(rows)]
    return [row for _, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0])]


def _clean_history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return losses and validation metrics by epoch, without what differs from run to run."""
    reported = ("epoch", "loss", "eval_loss", "phase")
    rows = [
        {k: v for k, v in entry.items() if k in reported or k.startswith("eval_")} for entry in log
    ]
    timed = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]
    place = {"epoch", "phase"}
    return [row for row in rows if row.keys() - place and all(map(math.isfinite, row.values()))]
