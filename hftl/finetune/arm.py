"""One arm x seed: trained, or solved, and its predictions and weights."""

import math
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments, set_seed

from hftl.data.load import Row
from hftl.data.text import Examples
from hftl.errors import RecipeError
from hftl.finetune.strategy import prepare, trainable_parameters
from hftl.finetune.workbench import MEASURED, Workbench
from hftl.metrics import METRICS, compute
from hftl.model.cache import logits
from hftl.model.head import Built
from hftl.sections import Finetune
from hftl.train.checkpoint import KeepBest
from hftl.train.hardware import dtype_name, precision
from hftl.train.trainer import TransferTrainer

EVAL_BATCH = 64
SELECTION = {"classification": "accuracy", "regression": "loss"}
"""What the best epoch is chosen by on validation: a fine-tuned classifier's loss rises with its
confidence while its accuracy still grows."""


@dataclass
class Outcome:
    """What an arm leaves behind.

    `logits` are (rows, outputs) for each split; `weights` the tensors that training changed or
    drew; `facts` tells how training went.
    """

    logits: dict[str, np.ndarray]
    weights: dict[str, Tensor]
    trainable_parameters: int
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


def solve_head(bench: Workbench, finetune: Finetune, seed: int) -> Outcome:
    """The strategy `head`: the probe, put into the model's last layer."""
    started = time.perf_counter()
    probe = bench.probe(finetune.pooling, seed)
    found = {
        split: probe.logits(bench.features(finetune.pooling, seed, bench.prepared.rows[split]))
        for split in MEASURED
    }
    built = bench.build(finetune.pooling, seed)
    built.model.requires_grad_(False)
    set_probe(bench, built, finetune.pooling, seed)
    built.last_linear.requires_grad_(True)
    return Outcome(
        found,
        learnt(built),
        trainable_parameters(built.model),
        {"penalty": probe.penalty},
        {"train_seconds": time.perf_counter() - started},
    )


def train_arm(bench: Workbench, finetune: Finetune, seed: int, progress: bool) -> Outcome:
    """The strategies `partial`, `lora` and `full`, from the probe's head or a random one."""
    built = bench.build(finetune.pooling, seed)
    if finetune.head_init == "probe":
        set_probe(bench, built, finetune.pooling, seed)
    set_seed(seed)
    model = prepare(built.model, finetune.strategy, finetune.blocks, finetune.lora, built.fresh)
    built = Built(model, built.anatomy, built.pooling, built.fresh)
    return fit(bench, built, finetune.training, finetune.patience, seed, progress)


def fit(
    bench: Workbench,
    built: Built,
    training: dict[str, Any],
    patience: int | None,
    seed: int,
    progress: bool,
) -> Outcome:
    """Trains a prepared model, keeps its best evaluation on validation, and predicts in fp32."""
    started = time.perf_counter()
    task = bench.prepared.task
    rows = {"train": bench.train_rows(seed), **{s: bench.prepared.rows[s] for s in MEASURED}}
    with tempfile.TemporaryDirectory() as scratch_folder:
        args = arguments(training, task, scratch_folder, seed, bench.device, progress)
        best = keep_best(args, patience)
        trainer = TransferTrainer(
            model=built.model,
            args=args,
            train_dataset=_examples(bench, rows["train"]),
            eval_dataset=_examples(bench, _short_first(bench, rows["validation"])),
            data_collator=bench.pad,
            compute_metrics=lambda told: _metrics(bench, told.predictions, told.label_ids),
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except ImportError as error:
            raise RecipeError(
                f"finetune.training needs a package: {str(error).splitlines()[0]}", "Install it"
            ) from error
    # accelerate leaves its autocast around forward; predictions are made in fp32.
    trainer.accelerator.unwrap_model(built.model, keep_fp32_wrapper=False)
    best.restore(built.model)
    trained = time.perf_counter()
    built.model.to(bench.device)
    found = {
        split: logits(built.model, bench.encoded(rows[split]), bench.pad, bench.device)
        for split in MEASURED
    }
    facts = {
        "learning_rate": args.learning_rate,
        "precision": dtype_name(training),
        "epochs": trainer.state.epoch,
        "best_epoch": best.epoch,
        "history": _history(trainer.state.log_history),
    }
    timings = {
        "train_seconds": trained - started,
        "predict_seconds": time.perf_counter() - trained,
    }
    count = trainable_parameters(built.model)
    return Outcome(found, learnt(built), count, facts, timings)


def arguments(
    training: dict[str, Any], task: str, folder: str, seed: int, device: str, progress: bool
) -> TrainingArguments:
    """TrainingArguments of the recipe's `training`, with what hftl decides.

    Raises:
        RecipeError: if transformers refuses the values.
    """
    decided = {
        "output_dir": folder,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device == "cpu",
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **precision(training),
    }
    defaults = {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "per_device_eval_batch_size": EVAL_BATCH,
        "dataloader_pin_memory": device == "cuda",
        "metric_for_best_model": SELECTION[task],
    }
    try:
        args = TrainingArguments(**(defaults | training | decided))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(
            f"finetune.training: transformers refuses it: {str(error).splitlines()[0]}",
            "Correct the section",
        ) from error
    measured = ["loss", *METRICS[task]]
    if str(args.metric_for_best_model).removeprefix("eval_") not in measured:
        raise RecipeError(
            f"finetune.training.metric_for_best_model={args.metric_for_best_model} is not measured",
            f"Use one of {', '.join(measured)}",
        )
    # transformers would split a batch over all visible devices by itself (DataParallel).
    args._n_gpu = min(1, args.n_gpu)
    return args


def keep_best(args: TrainingArguments, patience: int | None) -> KeepBest:
    """The callback for the metric that TrainingArguments names; by default the loss."""
    name = str(args.metric_for_best_model)
    key = name if name.startswith("eval_") else f"eval_{name}"
    greater = args.greater_is_better
    if greater is None:
        greater = not key.endswith(("loss", "rmse", "mae"))
    return KeepBest(key, greater, patience)


def set_probe(bench: Workbench, built: Built, pooling: str, seed: int) -> None:
    """Starts the head from the probe (LP-FT; Kumar et al. 2022, arXiv:2202.10054)."""
    probe = bench.probe(pooling, seed)
    with torch.no_grad():
        built.last_linear.weight.copy_(torch.from_numpy(probe.weight))
        built.last_linear.bias.copy_(torch.from_numpy(probe.bias))


def learnt(built: Built) -> dict[str, Tensor]:
    """All that the source model does not have: trained tensors, and fresh ones even if frozen."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in built.model.named_parameters()
        if tensor.requires_grad or any(f"{module}." in name for module in built.fresh)
    }
    return tensors


def predictions_of(task: str, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (rows,) and scores (rows, outputs) of logits.

    Classification: class ids and probabilities. Regression: the values, twice.
    """
    wide = found.astype(np.float64)
    if task == "regression":
        return wide[:, 0], wide
    shifted = np.exp(wide - wide.max(1, keepdims=True))
    return wide.argmax(1), shifted / shifted.sum(1, keepdims=True)


def _metrics(bench: Workbench, found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predictions, _ = predictions_of(bench.prepared.task, np.asarray(found))
    return compute(list(METRICS[bench.prepared.task].values()), np.asarray(labels), predictions)


def _short_first(bench: Workbench, rows: list[Row]) -> list[Row]:
    """Rows of like length side by side, so that little is padded in evaluation."""
    lengths = [len(encoded["input_ids"]) for encoded in bench.encoded(rows)]
    return [row for _, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0])]


def _examples(bench: Workbench, rows: list[Row]) -> Examples:
    return Examples(bench.encoded(rows), bench.prepared.labels(rows))


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Losses and validation metrics by epoch, without what differs from run to run."""
    kept = ("epoch", "loss", "eval_loss")
    rows = [{k: v for k, v in entry.items() if k in kept or k.startswith("eval_")} for entry in log]
    timed = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]
    return [row for row in rows if len(row) > 1 and all(map(math.isfinite, row.values()))]
