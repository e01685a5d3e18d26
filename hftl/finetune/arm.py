"""Train or solve one arm for one seed, and interpolate its weights with the original ones.

theta(alpha) = (1 - alpha) theta0 + alpha theta1 (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903,
equation 1). Under LoRA the effective weight is W0 + alpha s B A, so B alone is scaled.
"""

import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from hftl.config.finetune import Finetune, Gradual
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import NumericError, RecipeError, format_error_line
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.context import ExperimentContext, RegularizerSetup
from hftl.finetune.gradual import GradualCheckpoint, fit_gradual
from hftl.finetune.guard_metrics import score_validation
from hftl.finetune.pretraining_heads import embed_compared_rows
from hftl.finetune.targets import TargetScale, compute_target_scale
from hftl.finetune.trainable import count_trainable_parameters, unfreeze
from hftl.measure.metrics import METRICS, SELECTION_METRICS, compute_all_metrics
from hftl.measure.statistics import select_within_one_standard_error
from hftl.models.features import predict_logits
from hftl.models.heads import LoadedModel
from hftl.runtime import distributed
from hftl.runtime.hardware import get_dtype_name, is_sharded
from hftl.train.arguments import build_training_arguments as common_arguments
from hftl.train.callbacks import replace_progress_callbacks
from hftl.train.checkpoint import (
    BestWeightsCallback,
    gather_trainable_state,
    iterate_trainable,
    to_local_shard,
)
from hftl.train.trainer import TransferTrainer

LORA_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.")
"""How peft names the factors of an update."""


def select_alpha(
    model: nn.Module, start: dict[str, Tensor], alphas: Sequence[float],
    score: Callable[[], tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    """Set the model to the best interpolation between its start and its trained weights.

    That is the smallest alpha within one standard error of the best score, since the nearer the
    original the less is forgotten. It costs an evaluation for each alpha.

    Args:
        model: trained; what trains must have the same head at both ends.
        start: the trained parameters at the start, by name.
        alphas: shares of the way, 0 the original.
        score: of the model as it is: the score on validation, more is better, and its standard
            error.

    Returns:
        `alpha`, the one kept, and what was `tried`: {alpha, score, error} each.
    """
    end = {name: tensor.clone() for name, tensor in iterate_trainable(model)}
    seen = []
    for alpha in alphas:
        set_interpolated_weights(model, start, end, alpha)
        seen.append(score())
    scores, errors = zip(*seen, strict=True)
    chosen = select_within_one_standard_error(scores, errors, alphas)
    set_interpolated_weights(model, start, end, alphas[chosen])
    return {
        "alpha": alphas[chosen],
        "tried": [
            {"alpha": alpha, "score": value, "error": error}
            for alpha, (value, error) in zip(alphas, seen, strict=True)
        ],
    }


def set_interpolated_weights(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], alpha: float
) -> None:
    """Set the trainable parameters between start and end; 0 and 1 are the ends exactly.

    Args:
        model: with the parameters of both.
        start: by name.
        end: by name.
        alpha: the share.
    """
    with torch.no_grad():
        for name, parameter in iterate_trainable(model):
            here, factor = to_local_shard(parameter), LORA_FACTOR.search(name)
            if factor is not None:
                here.copy_(end[name] if factor[1] == "A" else alpha * end[name])
            elif alpha in (0, 1):
                here.copy_((start, end)[int(alpha)][name])
            else:
                here.copy_(torch.lerp(start[name].to(here), end[name].to(here), alpha))


# One arm x seed: trained, or solved, and its predictions and weights.


def solve_head(context: ExperimentContext, finetune: Finetune, seed: int) -> ArmOutput:
    """Solve the strategy `head`: the probe, copied into the model's last layer."""
    started = time.perf_counter()
    probe = context.solve_probe(finetune.pooling, seed)
    logits = {
        split: probe.logits(
            context.extract_features(finetune.pooling, seed, context.prepared.rows[split])
        )
        for split in MEASURED_SPLITS
    }
    built = context.build_model(finetune.pooling, seed)
    built.model.requires_grad_(False)
    init_head_from_probe(context, built, finetune.pooling, seed)
    built.last_linear.requires_grad_(True)
    return ArmOutput(
        logits,
        collect_trained_tensors(built),
        count_trainable_parameters(built.model),
        {"penalty": probe.penalty},
        {"train_seconds": time.perf_counter() - started},
        # Of an encoder that is the source as it is there is nothing to compare.
        embed_compared_rows(context, built) if context.base else {},
    )


def train_arm(
    context: ExperimentContext, finetune: Finetune, seed: int,
    regularizers: RegularizerSetup = RegularizerSetup(),  # noqa: B008 (immutable)
    state: GradualCheckpoint | None = None,
) -> ArmOutput:  # fmt: skip
    """Train a strategy that starts from the source, with the probe's head or a random one.

    Args:
        context: what all arms share.
        finetune: the recipe's section.
        seed: of shots, order and initialisation.
        regularizers: what keeps it near its original.
        state: where gradual unfreezing keeps how far it has come.
    """
    built = context.build_model(finetune.pooling, seed)
    if finetune.head_init == "probe":
        init_head_from_probe(
            context, built, finetune.pooling, seed, compute_target_scale(context, seed)
        )
    set_seed(seed)
    model = unfreeze(built.model, finetune, built.fresh)
    built = LoadedModel(model, built.architecture, built.pooling, built.fresh)
    rates = {"layer_decay": finetune.layer_decay, "rates": finetune.learning_rates}
    gradual = finetune.gradual if finetune.spec.schedule == "phases" else None
    return train_model(
        context, built, finetune.training, finetune.patience, seed, regularizers,
        gradual=gradual, state=state, rates=rates,
    )  # fmt: skip


def train_model(
    context: ExperimentContext,
    built: LoadedModel,
    training: dict[str, Any],
    patience: int | None,
    seed: int,
    regularizers: RegularizerSetup = RegularizerSetup(),  # noqa: B008 (immutable)
    compared: bool = True,
    gradual: Gradual | None = None,
    state: GradualCheckpoint | None = None,
    rates: dict[str, Any] | None = None,
) -> ArmOutput:
    """Train a prepared model, keep its best evaluation on validation, and predict in fp32.

    What is `compared` with the source leaves its embeddings. The head is one of standardised
    targets, and is left in the label's unit.
    """
    started = time.perf_counter()
    scale = compute_target_scale(context, seed)
    if scale is not None:
        if regularizers.reference is not None:
            scale.standardize_head(regularizers.reference)
        # Weights in another unit are not what a stopped training goes on from.
        state = state and replace(
            state, cache_key={**state.cache_key, "target_scale": asdict(scale)}
        )
    trained = iterate_trainable(built.model) if regularizers.alphas else ()
    start = {name: tensor.clone() for name, tensor in trained}
    # FSDP cuts the model into pieces; what it learns is put into this whole one.
    whole = deepcopy(built.model) if is_sharded() else built.model
    with tempfile.TemporaryDirectory() as scratch_folder:
        task, rates = context.prepared.task, rates or {}
        args = build_finetune_arguments(training, task, scratch_folder, seed, context.device)
        best = build_keep_best(args, patience)
        make = partial(_build_trainer, context, built, best, seed, regularizers, scale, **rates)
        if gradual is None:
            trainer = _fit_at_once(built.model, make(args), best)
            history, epochs = trainer.state.log_history, trainer.state.epoch
        else:
            phased = partial(fit_gradual, built.model, make, args, best, gradual, state)
            trainer, history = _run_training(phased)
            epochs = history[-1]["epoch"]
    if whole is not built.model:
        weights = gather_trainable_state(built.model, trainer.accelerator)
        built = replace(built, model=_load_trained_weights(whole, weights))
    facts = {
        "learning_rate": args.learning_rate,
        "precision": get_dtype_name(training),
        "epochs": epochs,
        "best_epoch": best.epoch,
        "history": _clean_history(history),
        **({} if scale is None else {"target_scale": asdict(scale)}),
        **regularizers.facts,
    }
    if regularizers.alphas:
        score = lambda: _score_validation(context, built, scale)  # noqa: E731
        facts["interpolation"] = select_alpha(built.model, start, regularizers.alphas, score)
    if regularizers.measure_forgetting is not None:
        facts["forgotten"] = regularizers.measure_forgetting(built)
    return _predict_splits(context, built, scale, facts, time.perf_counter() - started, compared)


def _fit_at_once(
    model: nn.Module, trainer: TransferTrainer, best: BestWeightsCallback
) -> TransferTrainer:
    """Train all that is open from start to end, and restore the best evaluation's weights."""
    _run_training(trainer.train)
    # accelerate leaves its autocast around forward; predictions are made in fp32.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    best.restore(model)
    return trainer


def _build_trainer(
    context: ExperimentContext,
    built: LoadedModel,
    best: BestWeightsCallback,
    seed: int,
    regularizers: RegularizerSetup,
    scale: TargetScale | None,
    args: TrainingArguments,
    /,
    **more: Any,
) -> TransferTrainer:
    """Build the trainer of an arm; `more` overrides its arguments."""
    held = _sort_by_length(context, context.prepared.rows["validation"])
    standardise = None if scale is None else scale.standardize

    def metrics_of(evaluation: Any) -> dict[str, float]:
        outputs = (
            evaluation.predictions
            if scale is None
            else scale.restore(np.asarray(evaluation.predictions))
        )
        return _compute_metrics(context, held, outputs, evaluation.label_ids)

    given: dict[str, Any] = {
        "model": built.model,
        "args": args,
        # The phases of gradual unfreezing count epochs from 0, and see other crops.
        "train_dataset": context.build_dataset(
            context.select_train_rows(seed), args.data_seed, standardise
        ),
        "eval_dataset": context.build_dataset(held, None, standardise),
        "data_collator": context.inputs.collate,
        "compute_metrics": metrics_of,
        "callbacks": [best],
        **regularizers.build_trainer_arguments(),
    }
    trainer = TransferTrainer(**(given | more))
    replace_progress_callbacks(trainer)
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
    rows = context.encode_rows(context.prepared.rows["validation"])
    built.model.to(context.device)
    outputs = predict_logits(built.model, rows, context.inputs, context.device)
    if scale is not None:
        outputs = scale.restore(outputs)
    return distributed.broadcast_from_main(lambda: score_validation(context, outputs))


def _load_trained_weights(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model with every trainable parameter set to its trained value."""
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trains != set(tensors):
        raise RuntimeError(f"trained and trainable differ: {sorted(trains ^ set(tensors))[0]}")
    model.load_state_dict(tensors, strict=False)
    return model


def _predict_splits(
    context: ExperimentContext, built: LoadedModel, scale: TargetScale | None,
    facts: dict[str, Any], train_seconds: float, compared: bool,
) -> ArmOutput:  # fmt: skip
    """Return the output of a trained model: its predictions on all measured rows, and its weights.

    Its head is left in the label's unit.
    """
    started = time.perf_counter()
    built.model.to(context.device)
    logits = {}
    for split in MEASURED_SPLITS:
        encoded = context.encode_rows(context.prepared.rows[split])
        outputs = predict_logits(built.model, encoded, context.inputs, context.device)
        # Far from 0 float32 would round what the model says.
        logits[split] = outputs if scale is None else scale.restore(outputs)
    if scale is not None:
        scale.restore_head(built.model)
    embeddings = embed_compared_rows(context, built) if compared else {}
    timings = {
        "train_seconds": train_seconds, "predict_seconds": time.perf_counter() - started,
    }  # fmt: skip
    count = count_trainable_parameters(built.model)
    return ArmOutput(logits, collect_trained_tensors(built), count, facts, timings, embeddings)


def build_finetune_arguments(
    training: dict[str, Any], task: str, folder: str, seed: int, device: str
) -> TrainingArguments:
    """Build the TrainingArguments of `finetune.training`.

    Raises:
        RecipeError: if transformers refuses the values, or nothing measures the chosen metric.
    """
    defaults = {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "metric_for_best_model": SELECTION_METRICS[task],
    }
    args = common_arguments("finetune", training, defaults, folder, seed, device)
    measured = ["loss", *METRICS[task]]
    if str(args.metric_for_best_model).removeprefix("eval_") not in measured:
        raise RecipeError(
            f"finetune.training.metric_for_best_model={args.metric_for_best_model} is not measured",
            f"Use one of {', '.join(measured)}",
        )
    name = str(args.metric_for_best_model).removeprefix("eval_")
    # transformers takes all but a loss for a score: of an error it would keep the worst.
    args.greater_is_better = name != "loss" and METRICS[task][name].sign > 0
    if training.get("greater_is_better", args.greater_is_better) != args.greater_is_better:
        better = "more" if args.greater_is_better else "less"
        raise RecipeError(
            f"finetune.training.greater_is_better={training['greater_is_better']}: of {name} "
            f"{better} is better",
            "Leave it out",
        )
    return args


def build_keep_best(args: TrainingArguments, patience: int | None) -> BestWeightsCallback:
    """Build the callback for the metric that TrainingArguments names; by default the loss."""
    name = str(args.metric_for_best_model)
    key = name if name.startswith("eval_") else f"eval_{name}"
    return BestWeightsCallback(key, bool(args.greater_is_better), patience)


def init_head_from_probe(
    context: ExperimentContext,
    built: LoadedModel,
    pooling: str,
    seed: int,
    scale: TargetScale | None = None,
) -> None:
    """Start the head from the probe (LP-FT; Kumar et al. 2022, arXiv:2202.10054).

    With a scale the head is one of standardised targets, rounded to float32 once: another unit of
    the targets starts from the same weights.
    """
    probe = context.solve_probe(pooling, seed)
    weight, bias = probe.exact
    if scale is not None:
        weight, bias = weight / scale.sd, (bias - scale.mean) / scale.sd
    with torch.no_grad():
        built.last_linear.weight.copy_(torch.from_numpy(weight))
        built.last_linear.bias.copy_(torch.from_numpy(bias))


def collect_trained_tensors(built: LoadedModel) -> dict[str, Tensor]:
    """Return all that the source model lacks: trained tensors, and new ones even if frozen."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in built.model.named_parameters()
        if tensor.requires_grad or any(f"{module}." in name for module in built.fresh)
    }
    return tensors


def _compute_metrics(
    context: ExperimentContext, rows: list[Row], outputs: Any, labels: Any
) -> dict[str, float]:
    """Compute the task's metrics of what the Trainer gathered; truncated words have no labels
    there."""
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if not np.isfinite(outputs).all():
        raise NumericError("the outputs on validation are not finite", "Lower the learning rate")
    if context.prepared.task == "token-classification":
        counted = labels != -100
        whole = np.full((sum(context.prepared.count_words(rows)), outputs.shape[-1]), np.nan)
        whole[_mask_untruncated_words(context, rows)] = outputs[counted]
        outputs = whole
    return compute_all_metrics(
        context.prepared.task,
        context.prepared.encode_for_metrics(rows),
        context.decode_logits(rows, outputs),
    )


def _mask_untruncated_words(context: ExperimentContext, rows: list[Row]) -> np.ndarray:
    """Return True for each word, row after row, that was not truncated."""
    return np.concatenate([np.asarray(row["words"]) >= 0 for row in context.encode_rows(rows)])


def _sort_by_length(context: ExperimentContext, rows: list[Row]) -> list[Row]:
    """Sort the rows by length, so that evaluation pads little."""
    lengths = [context.inputs.length(encoded) for encoded in context.encode_rows(rows)]
    return [row for _, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0])]


def _clean_history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return losses and validation metrics by epoch, without what differs from run to run."""
    reported = ("epoch", "loss", "eval_loss", "phase")
    rows = [
        {k: v for k, v in entry.items() if k in reported or k.startswith("eval_")} for entry in log
    ]
    timed = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]
    place = {"epoch", "phase"}
    return [row for row in rows if row.keys() - place and all(map(math.isfinite, row.values()))]
