"""Train what one process and two must agree on; run by torchrun, and imported by the test.

As a program: `two_processes.py FOLDER` writes the results of each rank to `FOLDER/<rank>.pt`; with
`sharded` behind it, those of FSDP's ranks.
"""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import bench_of, sentences, write_csv
from support.adaptations import adapt, build_stage, build_task, load_objective
from support.tiny import save_tiny, tiny_config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hftl.adapt import adaptation
from hftl.config.finetune import Gradual
from hftl.config.recipe import Recipe
from hftl.errors import DataError, NumericError, RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.gradual import fit_gradual
from hftl.finetune.trainable import prepare
from hftl.models.pooled_model import PooledModel
from hftl.retain.fisher import EWC, compute_fisher
from hftl.retain.kl import KLToOriginal
from hftl.retain.weights import L2SP, iterate_encoder_parameters, iterate_lora_layers
from hftl.runtime.distributed import (
    broadcast_from_main,
    close_process_group,
    gather_values,
    get_rank,
    get_world_size,
    is_main,
    is_raised_by_main,
    run_main_first,
    shard_items,
)
from hftl.runtime.watchdog import watch_processes
from hftl.train import memory
from hftl.train.checkpoint import BestWeightsCallback, gather_trainable_state
from hftl.train.step_checkpoint import CheckpointSpec, CheckpointWriter
from hftl.train.trainer import TransferTrainer

GLOBAL_BATCH, STEPS, EVAL_ROWS = 8, 6, 13
CASES: dict[str, dict[str, Any]] = {
    # Rows leave a last batch that both ranks share unequally (21), or that one lacks (17).
    "text-full": {"rows": 21},
    "image-full": {"rows": 17},
    "tokens-full": {"rows": 20},
    "target-full": {"rows": 17},
    "several-full": {"rows": 17},
    "accumulated-full": {"rows": 21, "accumulated": 2},
    "pooled-lora": {"rows": 21},
    "native-lora": {"rows": 17},
    "retained-lora": {"rows": 17, "retain": True},
    "retained-full": {"rows": 21, "retain": True, "accumulated": 2},
    "weighted-full": {"rows": 21, "accumulated": 2, "class_weight": [0.3, 2.0, 5.0]},
}
ADAPTATIONS = [("mlm", "lora"), ("mae", "full")]
"""Objectives and methods."""
SHARDED = ["tokens-full", "pooled-lora", "native-lora"]


def get_kind(name: str) -> str:
    """Return the kind of a case's rows."""
    kind = name.split("-")[0]
    kinds = {"accumulated": "text", "native": "text", "weighted": "text", "retained": "pooled"}
    return kinds.get(kind, kind)


class Rows(Dataset):
    """Hold random inputs of unequal length, or images, all different."""

    def __init__(self, kind: str, rows: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        for i in range(rows):
            label: Any = int(torch.randint(0, 3, (), generator=draw))
            if kind == "image":
                image = torch.randn(3, 12, 12, generator=draw)
                self.rows.append({"pixel_values": image, "labels": label})
                continue
            ids = torch.randint(5, 30, (3 + i % 5,), generator=draw)
            if kind == "tokens":
                label = torch.where(ids % 3 > 0, ids % 3, -100)
                label[0] = i % 3
            if kind == "target":
                label = -100.0 if i == 7 else float(torch.randn((), generator=draw))
            if kind == "several":
                label = torch.rand(3, generator=draw).round()
            self.rows.append({"input_ids": ids, "place": i, "labels": label})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad to the longest row of the batch."""
    if "pixel_values" in rows[0]:
        images = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": images, "interpolate_pos_encoding": True, "labels": labels}
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values: torch.Tensor, filler: int) -> torch.Tensor:
        return nn.functional.pad(values, (0, length - len(values)), value=filler)

    ids = torch.stack([pad(row["input_ids"], 0) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in rows])
    first = rows[0]["labels"]
    if not torch.is_tensor(first):
        labels = torch.tensor([row["labels"] for row in rows])
    elif first.is_floating_point():
        labels = torch.stack([row["labels"] for row in rows])
    else:
        labels = torch.stack([pad(row["labels"], -100) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build_tiny(kind: str, strategy: str) -> nn.Module:
    """Return a random model without dropout."""
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "image":
        config: Any = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_labels=3, **still,
        )  # fmt: skip
        return ViTForImageClassification(config)
    config = tiny_config("bert", num_labels=1 if kind == "target" else 3, **still)
    if kind == "tokens":
        return AutoModelForTokenClassification.from_config(config)
    if kind == "pooled":
        encoder = AutoModel.from_config(config, add_pooling_layer=False)
        return prepare(PooledModel(encoder, "mean", config.hidden_size, 3), strategy)
    return prepare(AutoModelForSequenceClassification.from_config(config), strategy)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy, gathered from all ranks where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class FirstGradients(TrainerCallback):
    """Hold the gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: gather(p.grad) for name, p in model.named_parameters() if p.grad is not None
            }


class RowTrainer(TransferTrainer):
    """Remember which rows counted in each micro-batch, in `seen`."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> torch.Tensor:
        labels = inputs["labels"].flatten(1) if inputs["labels"].dim() > 1 else inputs["labels"]
        empty = labels.isnan() if labels.is_floating_point() else labels == -100
        empty = empty if empty.dim() == 1 else empty.all(1)
        empty = empty | inputs["general"] if "general" in inputs else empty
        values = inputs.get("input_ids", inputs.get("pixel_values"))
        seen = [to_bytes(v) for v, none in zip(values, empty, strict=True) if not none]
        self.__dict__.setdefault("seen", []).append(seen)
        return super().training_step(model, inputs, *args)


class ShardedTrainer(RowTrainer):
    """Lift accelerate's check that FSDP needs a GPU: its code runs on CPUs as well."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.accelerator.is_fsdp2


class BrokenTrainer(TransferTrainer):
    """Make the loss of rank 1 NaN at the third step."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        broken = self.args.process_index == 1 and self.state.global_step == 2
        return loss * torch.nan if broken else loss


class ScarceTrainer(RowTrainer):
    """Let memory of rank 1 hold one row, and run out inside the model's forward pass."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        compute = partial(super().compute_loss, model, inputs, *args, **kwargs)
        is_scarce = model.training and self.args.process_index == 1
        return self.run_out(compute) if is_scarce and len(inputs["labels"]) > 1 else compute()

    def run_out(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        inside = self.accelerator.unwrap_model(self.model)
        with inside.register_forward_pre_hook(run_out_of_memory):
            return compute()


class ScarcerTrainer(ScarceTrainer):
    """Let it run out in the backward pass."""

    def run_out(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = compute()
        loss.register_hook(run_out_of_memory)
        return loss


def run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class NormedModel(nn.Module):
    """Classify images by the means of channels that a BatchNorm normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, pixel_values: torch.Tensor, labels: Any = None, **_: Any) -> Any:
        logits = self.head(self.norm(pixel_values).mean((-2, -1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class StoppedTrainer(TransferTrainer):
    """Stop as Ctrl-C does in the middle of an epoch, with a checkpoint behind it."""

    def training_step(self, *args: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return super().training_step(*args)


def to_bytes(values: torch.Tensor) -> bytes:
    """Return what identifies a row, however far it was padded."""
    return values[values != 0].numpy().tobytes()


def compute_metrics(outputs: Any) -> dict[str, float]:
    """Return numbers that a row left out, repeated or out of place would change."""
    labels, logits = np.asarray(outputs.label_ids), np.asarray(outputs.predictions)
    if labels.dtype.kind != "i":
        return {"sum": float((logits.reshape(labels.shape) * labels).sum()), "rows": len(labels)}
    counted = labels != -100
    right = logits.argmax(-1)[counted] == labels[counted]
    return {"right": float(right.sum()), "count": float(counted.sum()), "rows": len(labels)}


def build_trainer(
    name: str, folder: Path, kind: type[TransferTrainer] = RowTrainer, callbacks: Any = None
) -> Any:
    """Return a case's trainer, of the same global batch for any number of processes."""
    case, data, strategy = CASES[name], get_kind(name), name.split("-")[1]
    accumulated = case.get("accumulated", 1) if get_world_size() > 1 else 1
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        disable_tqdm=True, max_steps=STEPS, learning_rate=2e-3, warmup_steps=2,
        per_device_train_batch_size=GLOBAL_BATCH // get_world_size() // accumulated,
        gradient_accumulation_steps=accumulated, per_device_eval_batch_size=4,
        logging_steps=1, eval_strategy="epoch", remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip
    return kind(
        model=build_tiny(data, strategy), args=args, train_dataset=Rows(data, case["rows"]),
        eval_dataset=Rows(data, EVAL_ROWS), data_collator=collate, compute_metrics=compute_metrics,
        callbacks=callbacks, **(build_retention(strategy) if case.get("retain") else {}),
        class_weight=case.get("class_weight"), focal_gamma=2.0 if "class_weight" in case else 0.0,
    )  # fmt: skip


def build_retention(strategy: str) -> dict[str, Any]:
    """Return terms on both kinds of rows and on weights, and general rows."""
    model = build_tiny("pooled", strategy)
    shapes = {name: p.shape for name, p in iterate_encoder_parameters(model)}
    shapes |= {
        f"{n}.weight": layer.base_layer.weight.shape for n, layer in iterate_lora_layers(model)
    }
    draw = torch.Generator().manual_seed(1)
    general = Rows("pooled", 9)
    for row in general.rows:
        if strategy == "lora":
            del row["labels"]
        row["input_ids"] = row["input_ids"].flip(0)
    fisher = {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    return {
        "retain": [
            KLToOriginal(3.0, anchors=12, inputs="both"),
            KLToOriginal(2.0, "features", inputs="general"),
            L2SP(0.5, head=0.2), L2SP(1.5, decoupled=strategy == "full"), EWC(0.5, fisher),
        ],
        "general_dataset": general, "general_ratio": 0.4, "general_weight": 0.7,
    }  # fmt: skip


def compute_information() -> dict[str, tuple[dict[str, torch.Tensor], float]]:
    """Return the Fisher information of a tiny model on eleven rows, by kind."""
    model: Any = build_tiny("pooled", "full")
    rows, named = Rows("pooled", 11), dict(model.encoder.named_parameters())

    def batch(number: int) -> dict[str, Any]:
        return collate([rows[number]])

    kinds = ("features", "exact", "sampled", "empirical")
    return {kind: compute_fisher(model, named, 11, batch, kind, seed=4) for kind in kinds}


def train_norm(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Return the statistics that this rank's BatchNorm holds after so many steps."""
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        disable_tqdm=True, max_steps=steps, per_device_train_batch_size=4,
        remove_unused_columns=False, label_names=["labels"], ddp_find_unused_parameters=False,
    )  # fmt: skip
    model = NormedModel()
    TransferTrainer(
        model=model, args=args, train_dataset=Rows("image", 17), data_collator=collate
    ).train()
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def train_case(name: str, folder: Path, kind: type[TransferTrainer] = RowTrainer) -> dict[str, Any]:
    """Return what one training saw and left."""
    first, best = FirstGradients(), BestWeightsCallback("eval_loss", greater=False, patience=None)
    trainer = build_trainer(name, folder, kind, callbacks=[first, best])
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        logits = [
            model(**{k: v for k, v in collate([row]).items() if k != "labels"}).logits[0]
            for row in trainer.train_dataset
        ]
    state = gather_trainable_state(trainer.model_wrapped, trainer.accelerator)
    trainer.remove_callback(best)
    zero_trainable(trainer.model)
    trainer.evaluate()
    best.restore(trainer.model)
    reshard(trainer.model)
    history = trainer.state.log_history
    return {
        "seen": trainer.seen, "gradients": first.gradients, "logits": logits, "state": state,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "best": (best.epoch, best.best),
        "restored": gather_trainable_state(trainer.model_wrapped, trainer.accelerator),
        "again": trainer.evaluate()["eval_loss"],
        "evaluations": [
            {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
            for entry in history if "eval_loss" in entry
        ],
        "shards": sum(isinstance(p.data, DTensor) for p in trainer.model.parameters()),
        "finds_unused": getattr(trainer.model_wrapped, "find_unused_parameters", None),
    }  # fmt: skip


def adapt_case(objective: str, method: str, folder: Path) -> Any:
    """Return the outcome of an adaptation, of the same global batch for any number of processes."""
    source = folder / f"tiny-{objective}"
    model = run_main_first(lambda: load_objective(objective, source, method))
    batch = GLOBAL_BATCH // get_world_size()
    stage = build_stage(
        objective, method, per_device_train_batch_size=batch, optim="sgd", learning_rate=0.1
    )
    task = build_task(objective, source, general=True)
    return adapt(model, task, stage, folder / f"{objective}-{method}")


def resumes_adaptation(folder: Path) -> bool:
    """Return whether a stopped adaptation ends, bit for bit, as one that was not stopped.

    Its dropout differs from process to process.
    """
    source = folder / "tiny-mlm"

    def run(name: str) -> Any:
        model = load_objective("mlm", source, "full", dropout=0.1)
        stage = build_stage("mlm", per_device_train_batch_size=GLOBAL_BATCH // get_world_size())
        return adapt(model, build_task("mlm", source), stage, folder / name)

    whole = run("whole")
    adaptation.TransferTrainer = StoppedTrainer
    try:
        run("parts")
    except KeyboardInterrupt:
        adaptation.TransferTrainer = TransferTrainer
    again = run("parts")
    same = [torch.equal(tensor, again[1][name]) for name, tensor in whole[1].items()]
    return again[0] == whole[0] and all(same) and (folder / "parts" / "step-8").exists()


def resumes_training(folder: Path, stops: list[int]) -> bool:
    """Return whether a training with dropout that stops after steps ends as one without a stop."""

    def train(place: Path | None, stop: int | None = None) -> Any:
        trainer = build_trainer("retained-full", folder, TransferTrainer)
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        if place is not None:
            spec = CheckpointSpec(place, {"of": "a test"}, every=1)
            trainer.checkpoints = CheckpointWriter(spec)
            if stop is not None:
                flag_after(trainer, stop)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
        losses = [row.get("loss", row.get("eval_loss")) for row in rows]
        return losses, gather_trainable_state(trainer.model_wrapped, trainer.accelerator)

    whole, place = train(None), folder / "training"
    for stop in stops:
        try:
            train(place, stop)
        except SystemExit as ended:
            assert ended.code == 128 + signal.SIGTERM
    again = train(place)
    return again[0] == whole[0] and all(torch.equal(t, again[1][n]) for n, t in whole[1].items())


def flag_after(trainer: TransferTrainer, step: int) -> None:
    """Send SIGTERM to rank 1 alone in a step: both ranks must end after it."""
    train_batch = trainer.training_step

    def stop(*args: Any) -> torch.Tensor:
        if trainer.state.global_step + 1 == step and get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batch(*args)

    trainer.training_step = stop  # pyright: ignore[reportAttributeAccessIssue]


def train_with_frozen_blocks(folder: Path, cache: str) -> dict[str, Any]:
    """Return what training of the top block left, and how many times the lowest block has run."""
    model, table = folder / f"frozen-{cache}", folder / f"frozen-{cache}.csv"

    def write_inputs() -> None:
        # By one rank alone: the other would read what is being written again.
        if is_main():
            save_tiny("bert", model)
            write_csv(table, ["text", "label"], sentences(50))

    run_main_first(write_inputs)
    training = {"max_steps": 12, "learning_rate": 1e-3, "bf16": False}
    recipe = Recipe.parse({
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "finetune": {
            "strategy": "partial", "blocks": 1, "pooling": "mean", "cache": cache,
            "training": training,
        },
    })  # fmt: skip
    context = bench_of(recipe)
    context.feature_root = folder / "features"
    steps: list[bool] = []
    forward = TransferTrainer.training_step

    def count(self: Any, model: Any, *args: Any) -> Any:
        block = self.accelerator.unwrap_model(model).encoder.encoder.layer[0]
        handle = block.register_forward_hook(lambda *_: steps.append("forward" in vars(block)))
        loss = forward(self, model, *args)
        handle.remove()
        return loss

    TransferTrainer.training_step = count
    output = train_arm(context, recipe.finetune, 0, compared=False)
    TransferTrainer.training_step = forward
    return {"passed over": steps, "history": output.facts.history, "logits": output.logits["test"]}


class Improving(BestWeightsCallback):
    """Let every evaluation be better than the one before."""

    def on_evaluate(self, *args: Any, metrics: Any = None, **more: Any) -> None:
        super().on_evaluate(*args, metrics={self.metric: (self.best or 0) + 1}, **more)


def unfreeze_gradually(
    folder: Path, state: Path | None, dropout: float, stop: int = 9
) -> dict[str, Any]:
    """Return what gradual unfreezing changed in each phase, and what it left.

    Args:
        folder: for the Trainer.
        state: where the state after each phase is stored.
        dropout: of the model; it differs from process to process.
        stop: the phase in the middle of which it is interrupted.
    """
    model = build_tiny("pooled", "gradual")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    best = Improving("eval_loss", greater=True, patience=None)
    changed: list[set[str]] = []
    losses: list[float] = []
    finds_unused: list[bool] = []

    class PhaseTrainer(TransferTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            super().train(*args, **kwargs)
            now = dict(model.named_parameters())
            changed.append({name for name in now if not torch.equal(now[name], before[name])})
            losses.extend(row["loss"] for row in self.state.log_history if "loss" in row)
            finds_unused.append(getattr(self.model_wrapped, "find_unused_parameters", False))

        def training_step(self, *args: Any) -> torch.Tensor:
            if len(changed) == stop and self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args)

    def make(args: TrainingArguments, **more: Any) -> TransferTrainer:
        return PhaseTrainer(
            model=model, args=args, train_dataset=Rows("pooled", 21), callbacks=[best],
            eval_dataset=Rows("pooled", EVAL_ROWS), data_collator=collate, layer_decay=0.7, **more,
        )  # fmt: skip

    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        disable_tqdm=True, learning_rate=2e-3, logging_steps=1, eval_strategy="epoch",
        per_device_train_batch_size=GLOBAL_BATCH // get_world_size(), remove_unused_columns=False,
        label_names=["labels"], weight_decay=0.1, ddp_find_unused_parameters=False,
    )  # fmt: skip
    checkpoint = None if state is None else CheckpointSpec(state, {"of": "a test"}, every=1)
    _, history = fit_gradual(model, make, args, best, Gradual(final_epochs=1), checkpoint)
    return {
        "changed": changed, "losses": losses, "finds_unused": finds_unused,
        "epochs": history[-1]["epoch"],
        "state": {name: p.detach().clone() for name, p in model.named_parameters()},
    }  # fmt: skip


def count_resumed_phases(folder: Path) -> int:
    """Return how many phases follow a stop in the third, or -1 where the end then differs."""
    whole, state = unfreeze_gradually(folder, None, dropout=0.1), folder / "gradual-stopped"
    try:
        unfreeze_gradually(folder, state, dropout=0.1, stop=2)
    except KeyboardInterrupt:
        again = unfreeze_gradually(folder, state, dropout=0.1)
    same = [torch.equal(tensor, again["state"][n]) for n, tensor in whole["state"].items()]
    return len(again["changed"]) if all(same) else -1


def reshard(model: nn.Module) -> None:
    """Drop what FSDP gathered and did not write into its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def zero_trainable(model: nn.Module) -> None:
    """Set all that trains to zero."""
    reshard(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            data = parameter.detach()
            (data.to_local() if isinstance(data, DTensor) else data).zero_()


def train_to_error(folder: Path, kind: type[TransferTrainer]) -> str:
    """Return the message that this rank raises in training."""
    try:
        build_trainer("text-full", folder, kind).train()
    except (NumericError, RecipeError) as error:
        return str(error)
    return "nothing"


class Unpicklable(Exception):
    """Do not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def receive_error(error: Exception) -> tuple[str, str, bool]:
    """Return how an error of rank 0 arrives."""

    def fail() -> None:
        raise error if is_main() else AssertionError("only rank 0 may compute")

    try:
        broadcast_from_main(fail)
    except (DataError, OSError, Unpicklable, RuntimeError) as received:
        return type(received).__name__, str(received), is_raised_by_main(received)
    return "nothing", "", False


def list_beats(folder: Path) -> list[list[str]]:
    """Return the names in a run folder while its processes are watched, and once that has ended."""
    folder.mkdir(exist_ok=True)
    seen = []
    for watched in (watch_processes(folder, print), nullcontext()):
        with watched:
            gather_values(None)
            seen.append(sorted(path.name for path in folder.rglob("*")))
            gather_values(None)
    return seen


def main(folder: Path) -> None:
    """Run all cases, then raise an error that ends the program on every rank."""
    assert get_world_size() == 2
    results: dict[Any, Any] = {name: train_case(name, folder) for name in CASES}
    results |= {names: adapt_case(*names, folder) for names in ADAPTATIONS}
    results["information"] = compute_information()
    results["resumed"] = resumes_adaptation(folder)
    results["resumed training"] = resumes_training(folder, [2, 3, 5])
    results["unfrozen"] = unfreeze_gradually(folder, folder / "gradual", dropout=0.0)
    results["resumed phases"] = count_resumed_phases(folder)
    for cache in ("always", "never"):
        results[f"frozen {cache}"] = train_with_frozen_blocks(folder, cache)
    agreed_steps, memory.AGREED_STEPS = memory.AGREED_STEPS, 1
    results["scarce"] = train_case("text-full", folder, ScarceTrainer)["state"]
    results["norms"] = [train_norm(folder, steps) for steps in (1, 3)]
    memory.AGREED_STEPS = agreed_steps
    results["scarcer"] = train_case("accumulated-full", folder, ScarcerTrainer)["state"]
    results["broken"] = train_to_error(folder, BrokenTrainer)
    results["shared"] = broadcast_from_main(lambda: {"by": broadcast_from_main(get_rank)})
    results["gathered"] = gather_values({"rank": get_rank()})
    errors = [
        DataError("no rows", "Add some"), FileNotFoundError(2, "gone", "a"), Unpicklable("a", "b"),
    ]  # fmt: skip
    results["raised"] = [receive_error(error) for error in errors]
    results["on main alone"] = broadcast_from_main(
        lambda: (gather_values(get_rank()), shard_items([5, 6, 7]))
    )
    results["shard"] = shard_items([5, 6, 7])
    results["first"] = run_main_first(get_rank)
    results["beats"] = list_beats(folder / "watched")
    torch.save(results, folder / f"{get_rank()}.pt")
    end_with_error()


def main_sharded(folder: Path) -> None:
    """Run FSDP's cases, in the environment that accelerate's launcher makes of a configuration."""
    assert get_world_size() == 2
    results: dict[str, Any] = {n: train_case(n, folder, ShardedTrainer) for n in SHARDED}
    results["on_cpu"] = train_to_error(folder, RowTrainer)
    torch.save(results, folder / f"{get_rank()}.pt")
    close_process_group()


def end_with_error() -> None:
    """End as the command line does: rank 0 reports, which takes a while."""

    def fail() -> None:
        raise DataError("the last error")

    code = 0
    try:
        broadcast_from_main(fail)
    except DataError as error:
        code = error.exit_code
        if not is_raised_by_main(error):
            time.sleep(1)
            print(f"rank {get_rank()} reports: {error}", flush=True)
    finally:
        close_process_group()
    sys.exit(code)


if __name__ == "__main__":
    # Every training ends with accelerate's gc.collect().
    gc.freeze()
    (main_sharded if "sharded" in sys.argv else main)(Path(sys.argv[1]))
