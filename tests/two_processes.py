"""Trainings that one process and two must agree on; run by torchrun, and imported by the test.

As a program: `two_processes.py FOLDER` writes what each rank saw to `FOLDER/<rank>.pt`; with
`sharded` behind it, what FSDP's ranks saw.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from adaptations import adapted, model_of, stage_of, task_of
from conftest import tiny_config
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

from hftl.adapt import adaptation as stage_module
from hftl.config.finetune import Gradual
from hftl.errors import DataError, NumericError, RecipeError
from hftl.finetune.gradual import GradualCheckpoint, fit_gradual
from hftl.finetune.trainable import prepare
from hftl.models.heads import PooledModel
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
from hftl.train.checkpoint import BestWeightsCallback, gather_trainable_state
from hftl.train.trainer import TransferTrainer

GLOBAL_BATCH = 8
CASES = {
    "text-full": {"rows": 45},
    "text-lora": {"rows": 45},
    "image-full": {"rows": 41},
    "image-lora": {"rows": 45},
    "tokens-full": {"rows": 44, "steps": 12},
    "target-full": {"rows": 41, "steps": 12},
    "several-full": {"rows": 41, "steps": 12},
    "accumulated-full": {"rows": 45, "accumulated": 2},
    "pooled-lora": {"rows": 45, "steps": 12},
    "native-lora": {"rows": 41, "steps": 12},
    "retained-lora": {"rows": 41, "steps": 12, "retain": True},
    "retained-full": {"rows": 45, "steps": 12, "retain": True, "accumulated": 2},
}
ADAPTATIONS = [("mlm", "full"), ("mlm", "lora"), ("mae", "full")]
"""Objectives and methods."""
SHARDED = ["tokens-full", "pooled-lora", "native-lora"]


def kind_of(name: str) -> str:
    """What the case's rows are."""
    kind = name.split("-")[0]
    return {"accumulated": "text", "native": "text", "retained": "pooled"}.get(kind, kind)


class Rows(Dataset):
    """Random inputs of unequal length, or pictures, whose first value tells the row."""

    def __init__(self, kind: str, rows: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        for i in range(rows):
            label: Any = int(torch.randint(0, 3, (), generator=draw))
            if kind == "image":
                picture = torch.randn(3, 12, 12, generator=draw)
                picture[0, 0, 0] = i
                self.rows.append({"pixel_values": picture, "labels": label})
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
    """Pads to the longest row of the batch; position 0 of the types tells the row."""
    if "pixel_values" in rows[0]:
        pictures = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": pictures, "interpolate_pos_encoding": True, "labels": labels}
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: torch.Tensor, filler: int) -> torch.Tensor:
        return nn.functional.pad(values, (0, length - len(values)), value=filler)

    ids = torch.stack([padded(row["input_ids"], 0) for row in rows])
    mask = torch.stack([padded(torch.ones_like(row["input_ids"]), 0) for row in rows])
    first = rows[0]["labels"]
    if not torch.is_tensor(first):
        labels = torch.tensor([row["labels"] for row in rows])
    elif first.is_floating_point():
        labels = torch.stack([row["labels"] for row in rows])
    else:
        labels = torch.stack([padded(row["labels"], -100) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny(kind: str, strategy: str) -> nn.Module:
    """A random model without dropout."""
    torch.manual_seed(0)
    if kind == "image":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return with_lora(ViTForImageClassification(config), strategy)
    config = tiny_config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.num_labels = 1 if kind == "target" else 3
    if kind == "tokens":
        return AutoModelForTokenClassification.from_config(config)
    if kind == "pooled":
        encoder = AutoModel.from_config(config, add_pooling_layer=False)
        return prepare(PooledModel(encoder, "mean", config.hidden_size, 3), strategy)
    return prepare(AutoModelForSequenceClassification.from_config(config), strategy)


def with_lora(model: nn.Module, strategy: str) -> nn.Module:
    """peft's own wrapping, for an architecture that `prepare` need not know."""
    from peft import LoraConfig, get_peft_model

    if strategy == "full":
        return model
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = [name for name in targets if name != "classifier"]
    config = LoraConfig(target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(model, config)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, gathered from all ranks where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class Watch(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
            }


class Watched(TransferTrainer):
    """Remembers which inputs counted in each micro-batch."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> torch.Tensor:
        labels = inputs["labels"].flatten(1) if inputs["labels"].dim() > 1 else inputs["labels"]
        empty = labels.isnan() if labels.is_floating_point() else labels == -100
        empty = empty if empty.dim() == 1 else empty.all(1)
        empty = empty | inputs["general"] if "general" in inputs else empty
        values = inputs.get("input_ids", inputs.get("pixel_values"))
        seen = [bytes_of(v) for v, none in zip(values, empty, strict=True) if not none]
        self.__dict__.setdefault("seen", []).append(seen)
        return super().training_step(model, inputs, *args)


class Sharded(Watched):
    """Lifts accelerate's check that FSDP needs a GPU: its code runs on CPUs as well."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.accelerator.is_fsdp2


class BreaksOnRank1(TransferTrainer):
    """The loss of rank 1 is not a number at the third step."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        broken = self.args.process_index == 1 and self.state.global_step == 2
        return loss * torch.nan if broken else loss


def bytes_of(values: torch.Tensor) -> bytes:
    """Tells a row, however far it was padded."""
    return values[values != 0].numpy().tobytes()


def metrics_of(told: Any) -> dict[str, float]:
    """Numbers that a row left out, repeated or out of place would change."""
    labels, logits = np.asarray(told.label_ids), np.asarray(told.predictions)
    kept = labels != -100 if labels.dtype.kind == "i" else np.ones(labels.shape, bool)
    if labels.dtype.kind == "i":
        right = logits.argmax(-1)[kept] == labels[kept]
        return {"right": float(right.sum()), "count": float(kept.sum()), "rows": len(labels)}
    return {"sum": float((logits.reshape(labels.shape) * labels).sum()), "rows": len(labels)}


def trainer_of(
    name: str, folder: Path, kind: type[TransferTrainer] = Watched, callbacks: Any = None
) -> Any:
    """A trainer of the case whose global batch is the same for any number of processes."""
    case, data, strategy = CASES[name], kind_of(name), name.split("-")[1]
    accumulated = case.get("accumulated", 1) if get_world_size() > 1 else 1
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        disable_tqdm=True, max_steps=case.get("steps", 50), learning_rate=2e-3,
        per_device_train_batch_size=GLOBAL_BATCH // get_world_size() // accumulated,
        gradient_accumulation_steps=accumulated, per_device_eval_batch_size=4,
        logging_steps=1, eval_strategy="epoch", remove_unused_columns=False,
        label_names=["labels"], warmup_steps=5,
    )  # fmt: skip
    return kind(
        model=tiny(data, strategy), args=args, train_dataset=Rows(data, case["rows"]),
        eval_dataset=Rows(data, 13), data_collator=collate, compute_metrics=metrics_of,
        callbacks=callbacks, **(retained(strategy) if case.get("retain") else {}),
    )  # fmt: skip


def retained(strategy: str) -> dict[str, Any]:
    """Terms on both kinds of rows and on weights, and general rows, labelled where all trains."""
    model = tiny("pooled", strategy)
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
    return {
        "retain": [
            KLToOriginal(3.0, anchors=12, inputs="both"),
            KLToOriginal(2.0, "features", inputs="general"),
            L2SP(0.5, head=0.2),
            L2SP(1.5, decoupled=strategy == "full"),
            EWC(0.5, {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}),
        ],
        "general_dataset": general,
        "general_ratio": 0.4,
        "general_weight": 0.7,
    }


def information() -> dict[str, tuple[dict[str, torch.Tensor], float]]:
    """The Fisher information of a tiny model on eleven rows, by kind."""
    model: Any = tiny("pooled", "full")
    rows, named = Rows("pooled", 11), dict(model.encoder.named_parameters())

    def batch(number: int) -> dict[str, Any]:
        return collate([rows[number]])

    kinds = ("features", "exact", "sampled", "empirical")
    return {kind: compute_fisher(model, named, 11, batch, kind, seed=4) for kind in kinds}


def outcome(name: str, folder: Path, kind: type[TransferTrainer] = Watched) -> dict[str, Any]:
    """What one training saw and left."""
    watch, best = Watch(), BestWeightsCallback("eval_loss", greater=False, patience=None)
    trainer = trainer_of(name, folder, kind, callbacks=[watch, best])
    trainer.train()
    model = trainer.model.eval()
    logits = []
    with torch.no_grad():
        for row in trainer.train_dataset:
            inputs = {k: v for k, v in collate([row]).items() if k != "labels"}
            logits.append(model(**inputs).logits[0])
    state = gather_trainable_state(trainer.model_wrapped, trainer.accelerator)
    trainer.remove_callback(best)
    spoil(trainer.model)
    trainer.evaluate()
    best.restore(trainer.model)
    reshard(trainer.model)
    history = trainer.state.log_history
    return {
        "seen": trainer.seen,
        "gradients": watch.gradients,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "logits": logits,
        "state": state,
        "best": (best.epoch, best.best),
        "restored": gather_trainable_state(trainer.model_wrapped, trainer.accelerator),
        "again": trainer.evaluate()["eval_loss"],
        "evaluations": [
            {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
            for entry in history
            if "eval_loss" in entry
        ],
        "shards": sum(isinstance(p.data, DTensor) for p in trainer.model.parameters()),
        "finds_unused": getattr(trainer.model_wrapped, "find_unused_parameters", None),
    }


def adaptation(objective: str, method: str, folder: Path) -> dict[str, Any]:
    """What an adaptation left whose global batch is the same for any number of processes."""
    source = folder / f"tiny-{objective}"
    model = run_main_first(lambda: model_of(objective, source, method))
    stage = stage_of(
        objective,
        method,
        per_device_train_batch_size=GLOBAL_BATCH // get_world_size(),
        optim="sgd",
        learning_rate=0.1,
    )
    task = task_of(objective, source, general=True)
    told, state = adapted(model, task, stage, folder / f"{objective}-{method}")
    return {"told": told, "state": state}


class Stops(TransferTrainer):
    """As Ctrl-C in the middle of an epoch, with a checkpoint behind it."""

    def training_step(self, *args: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return super().training_step(*args)


def resumed(folder: Path) -> bool:
    """Whether an adaptation with dropout that was stopped ends, bit for bit, as one that was not.

    Its dropout differs from process to process.
    """
    source = folder / "tiny-mlm"

    def found(name: str) -> Any:
        model = model_of("mlm", source, "full", dropout=0.1)
        stage = stage_of("mlm", per_device_train_batch_size=GLOBAL_BATCH // get_world_size())
        return adapted(model, task_of("mlm", source), stage, folder / name)

    whole = found("whole")
    stage_module.TransferTrainer = Stops
    try:
        found("parts")
    except KeyboardInterrupt:
        stage_module.TransferTrainer = TransferTrainer
    again = found("parts")
    same = [torch.equal(tensor, again[1][name]) for name, tensor in whole[1].items()]
    files = {path.name for path in (folder / "parts" / "checkpoint-8").iterdir()}
    return again[0] == whole[0] and all(same) and {"rng_state_0.pth", "rng_state_1.pth"} <= files


class Improves(BestWeightsCallback):
    """Validation says that every evaluation is better than the one before."""

    def on_evaluate(self, *args: Any, metrics: Any = None, **more: Any) -> None:
        super().on_evaluate(*args, metrics={self.metric: (self.best or 0) + 1}, **more)


def unfrozen(folder: Path, state: Path | None, dropout: float, stop: int = 9) -> dict[str, Any]:
    """What gradual unfreezing changed in each phase, and what it left.

    Args:
        folder: for the Trainer.
        state: where the state after each phase is kept.
        dropout: of the model; it differs from process to process.
        stop: the phase in the middle of which it is interrupted.
    """
    model = tiny("pooled", "gradual")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    best = Improves("eval_loss", greater=True, patience=None)
    changed: list[set[str]] = []
    losses: list[float] = []
    finds_unused: list[bool] = []

    class Noted(TransferTrainer):
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
        return Noted(
            model=model, args=args, train_dataset=Rows("pooled", 45), callbacks=[best],
            eval_dataset=Rows("pooled", 13), data_collator=collate, layer_decay=0.7, **more,
        )  # fmt: skip

    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        disable_tqdm=True, learning_rate=2e-3, logging_steps=1, eval_strategy="epoch",
        per_device_train_batch_size=GLOBAL_BATCH // get_world_size(), remove_unused_columns=False,
        label_names=["labels"], weight_decay=0.1, ddp_find_unused_parameters=False,
    )  # fmt: skip
    kept = None if state is None else GradualCheckpoint(state, {"of": "a test"})
    _, history = fit_gradual(model, make, args, best, Gradual(final_epochs=1), kept)
    return {
        "changed": changed, "losses": losses, "finds_unused": finds_unused,
        "epochs": history[-1]["epoch"],
        "state": {name: p.detach().clone() for name, p in model.named_parameters()},
    }  # fmt: skip


def goes_on(folder: Path) -> list[int]:
    """How many phases are left after a stop in each, where the end is the same bit for bit."""
    whole = unfrozen(folder, None, dropout=0.1)
    left = []
    for stop in (1, 2, 4):
        state = folder / f"gradual-{stop}"
        try:
            unfrozen(folder, state, dropout=0.1, stop=stop)
        except KeyboardInterrupt:
            again = unfrozen(folder, state, dropout=0.1)
            same = [torch.equal(tensor, again["state"][n]) for n, tensor in whole["state"].items()]
            left.append(len(again["changed"]) if all(same) else -1)
    return left


def reshard(model: nn.Module) -> None:
    """Makes FSDP forget what was not written into its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def spoil(model: nn.Module) -> None:
    """Zeroes all that trains."""
    reshard(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            data = parameter.detach()
            (data.to_local() if isinstance(data, DTensor) else data).zero_()


def refused(folder: Path, kind: type[TransferTrainer]) -> str:
    """What this rank raises in training."""
    try:
        trainer_of("text-full", folder, kind).train()
    except (NumericError, RecipeError) as error:
        return str(error)
    return "nothing"


class Odd(Exception):
    """Does not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def raised(error: Exception) -> tuple[str, str, bool]:
    """How an error of rank 0 arrives."""

    def fail() -> None:
        raise error if is_main() else AssertionError("only rank 0 may compute")

    try:
        broadcast_from_main(fail)
    except (DataError, OSError, Odd, RuntimeError) as found:
        return type(found).__name__, str(found), is_raised_by_main(found)
    return "nothing", "", False


def main(folder: Path) -> None:
    """All cases, then an error that ends the program on every rank."""
    assert get_world_size() == 2
    found: dict[Any, Any] = {name: outcome(name, folder) for name in CASES}
    found |= {names: adaptation(*names, folder) for names in ADAPTATIONS}
    found["information"] = information()
    found["resumed"] = resumed(folder)
    found["unfrozen"] = unfrozen(folder, folder / "gradual", dropout=0.0)
    found["goes_on"] = goes_on(folder)
    found["broken"] = refused(folder, BreaksOnRank1)
    found["shared"] = broadcast_from_main(lambda: {"by": broadcast_from_main(get_rank)})
    found["gathered"] = gather_values({"rank": get_rank()})
    errors = [DataError("no rows", "Add some"), FileNotFoundError(2, "gone", "a"), Odd("a", "b")]
    found["raised"] = [raised(error) for error in errors]
    found["alone"] = broadcast_from_main(
        lambda: (gather_values(get_rank()), shard_items([5, 6, 7]))
    )
    found["mine"] = shard_items([5, 6, 7])
    found["first"] = run_main_first(lambda: get_rank())
    torch.save(found, folder / f"{get_rank()}.pt")
    end()


def sharded(folder: Path) -> None:
    """FSDP's cases, in the environment that accelerate's launcher makes of a configuration."""
    assert get_world_size() == 2
    found: dict[str, Any] = {name: outcome(name, folder, Sharded) for name in SHARDED}
    found["on_cpu"] = refused(folder, Watched)
    torch.save(found, folder / f"{get_rank()}.pt")
    close_process_group()


def end() -> None:
    """As a program ends: rank 0 reports, which takes a while."""

    def fail() -> None:
        raise DataError("the last error")

    code = 0
    try:
        broadcast_from_main(fail)
    except DataError as error:
        code = error.exit_code
        if not is_raised_by_main(error):
            time.sleep(2)
            print(f"rank {get_rank()} reports: {error}", flush=True)
    finally:
        close_process_group()
    sys.exit(code)


if __name__ == "__main__":
    (sharded if "sharded" in sys.argv else main)(Path(sys.argv[1]))
