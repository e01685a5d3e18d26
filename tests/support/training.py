"""Build tiny models and trainers, and record what a training does."""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hftl.config.section import Source
from hftl.finetune.trainable import prepare
from hftl.models.heads import LoadedModel, build_model
from hftl.models.model_parts import get_last_linear, get_model_spec
from hftl.models.source import find_source
from hftl.retain.original import eval_mode
from hftl.retain.regularizer import Step
from hftl.train.trainer import TransferTrainer


class Rows(Dataset):
    """Hold random token ids of three classes."""

    def __init__(self, rows: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30, (rows, 6), generator=generator)
        self.labels = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6), "labels": self.labels[i]}


class GeneralRows(Rows):
    """Hold labelled rows that the target lacks."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__(rows)
        self.ids = self.ids.flip(1)


class UnlabelledRows(GeneralRows):
    """Hold general rows, without labels."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {k: v for k, v in super().__getitem__(i).items() if k != "labels"}


class EpochRows(Rows):
    """Hold rows whose label is the epoch, as an augmentation's randomness would depend on it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "labels": torch.tensor(self.epoch)}


def stack_rows(rows: int, labels: bool = True) -> dict[str, torch.Tensor]:
    """Return the first rows of `Rows` as a batch."""
    data = Rows(max(rows, 24))
    keys = [key for key in data[0] if labels or key != "labels"]
    return {key: torch.stack([data[i][key] for i in range(rows)]) for key in keys}


@lru_cache
def _load_classifier(folder: Path, pooling: str, dropout: float) -> LoadedModel:
    source = find_source(Source(model=str(folder)))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"):
        if hasattr(source.config, name):
            setattr(source.config, name, dropout)
    return build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)


def load_classifier(folder: Path, pooling: str = "native", dropout: float = 0.0) -> LoadedModel:
    """Return a new copy of a tiny model of three classes, its head untrained."""
    loaded = deepcopy(_load_classifier(folder, pooling, dropout))
    torch.manual_seed(0)
    return loaded


def build_classifier(
    folder: Path, strategy: str, pooling: str = "native", dropout: float = 0.0
) -> Any:
    """Return a tiny model of three classes that is prepared for a strategy."""
    loaded = load_classifier(folder, pooling, dropout)
    return _set_dropout(prepare(loaded.model, strategy, fresh=loaded.fresh), dropout)


def build_probed_model(
    folder: Path, strategy: str, pooling: str = "mean", dropout: float = 0.0
) -> Any:
    """Return a model whose head was solved before a strategy wrapped it."""
    loaded = load_classifier(folder, pooling, dropout)
    model = prepare(solve_head(loaded.model), strategy, fresh=loaded.fresh)
    return _set_dropout(model, dropout)


def _set_dropout(model: nn.Module, dropout: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def solve_head(model: nn.Module) -> nn.Module:
    """Return the model with its last layer solved on the rows' own labels, as a probe would."""
    layer = get_last_linear(model, get_model_spec(model))
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = stack_rows(24)
    labels = batch.pop("labels")
    with torch.no_grad(), eval_mode(model):
        model(**batch)
        targets = 2.0 * nn.functional.one_hot(labels, layer.out_features).float()
        solution = torch.linalg.lstsq(inputs[0], targets - targets.mean()).solution
        # A solver's last digits differ from call to call.
        layer.weight.copy_(solution.T.round(decimals=3))
        if layer.bias is not None:
            layer.bias.zero_()
    handle.remove()
    return model


def perturb(model: nn.Module, by: float, seed: int = 0) -> nn.Module:
    """Return the model with noise added to all that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def copy_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def build_trainer(
    model: Any,
    folder: Path,
    regularizers: Any = (),
    more: dict[str, Any] | None = None,
    *,
    kind: Callable[..., Trainer] = TransferTrainer,
    data: Any = None,
    **settings: Any,
) -> Any:
    """Return a trainer: three steps of plain descent over `Rows`, unless settings say otherwise.

    Regularizers are given to a `TransferTrainer` alone; `more` are other arguments of the trainer,
    and settings those of TrainingArguments.
    """
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "num_train_epochs": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "logging_strategy": "no", "optim": "sgd",
    }  # fmt: skip
    arguments = {"retain": regularizers} if kind is TransferTrainer else {}
    return kind(
        model=model, args=TrainingArguments(**(defaults | settings)),
        train_dataset=Rows() if data is None else data, **arguments, **(more or {}),
    )  # fmt: skip


def run_first_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Take one optimizer step, and return its loss and gradients."""
    gradients: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    train_batch, take_step = trainer.training_step, torch.optim.SGD.step

    def record_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = train_batch(*args, **kwargs)
        losses.append(float(loss))
        return loss

    def record_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        named = trainer.model.named_parameters()
        gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return take_step(optimizer, *args, **kwargs)

    trainer.args.max_steps = 1
    trainer.training_step = record_loss
    torch.optim.SGD.step = record_gradients  # pyright: ignore
    try:
        trainer.train()
    finally:
        torch.optim.SGD.step = take_step
    return sum(losses), gradients


def watch_losses(trainer: Any, watch: Callable[[Step, torch.Tensor], None]) -> None:
    """Call `watch` with each step and the loss of the trainer's first regularizer."""
    regularizer = trainer.retention.regularizers[0]
    compute_loss = regularizer.loss

    def compute_watched(step: Step) -> torch.Tensor:
        value = compute_loss(step)
        watch(step, value)
        return value

    regularizer.loss = compute_watched


def watch_batches(trainer: Any, watch: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Call `watch` with each batch before its loss is computed."""
    compute_loss = trainer.compute_loss

    def compute_watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        watch(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_watched


def assert_same_step(
    first: tuple[float, dict[str, torch.Tensor]], second: tuple[float, dict[str, torch.Tensor]],
    tolerance: float = 1e-6,
) -> None:  # fmt: skip
    """Compare two results of `run_first_step`."""
    assert abs(first[0] - second[0]) <= 1e-6
    assert first[1].keys() == second[1].keys()
    largest = max(1.0, *(float(value.abs().max()) for value in first[1].values()))
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], atol=tolerance * largest, rtol=1e-4)


def assert_same_parameters(
    first: nn.Module, second: nn.Module, atol: float = 0.0, rtol: float = 0.0
) -> None:
    """Compare two models' parameters, bit for bit unless a tolerance is given."""
    others = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(
            parameter, others[name], atol=atol, rtol=rtol, msg=lambda text, name=name: name + text
        )


def count_applications(monkeypatch: pytest.MonkeyPatch, function: Any) -> list[int]:
    """Return a list that grows by one whenever an autograd function is applied."""
    calls: list[int] = []
    apply = function.apply

    def count(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(function, "apply", count)
    return calls
