"""Build tiny models with a solved head, and trainers with regularizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_trainer import Rows, trainer_of
from torch import nn
from torch.utils.data import Dataset

from hftl.config.section import Source
from hftl.finetune.trainable import prepare
from hftl.models.heads import build_model, get_last_linear, get_model_architecture
from hftl.models.source import find_source
from hftl.retain.build import Step
from hftl.retain.reference import eval_mode
from hftl.train.trainer import TransferTrainer


class UnlabelledRows(Rows):
    """Hold general rows, without labels."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__(rows)
        self.ids = self.ids.flip(1)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {k: v for k, v in super().__getitem__(i).items() if k != "labels"}


def stack_rows(rows: int) -> dict[str, torch.Tensor]:
    """Return the first rows of `Rows` as a batch."""
    data = Rows()
    return {key: torch.stack([data[i][key] for i in range(rows)]) for key in data[0]}


def solve_head(model: nn.Module, data: Dataset | None = None) -> nn.Module:
    """Return the model with its last layer solved on the rows' own labels, as a probe would."""
    rows: Any = data or Rows()
    layer = get_last_linear(model, get_model_architecture(model))
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = {key: torch.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}
    labels = batch.pop("labels")
    with torch.no_grad(), eval_mode(model):
        model(**batch)
        targets = 2.0 * nn.functional.one_hot(labels, layer.out_features).float()
        solution = torch.linalg.lstsq(inputs[0], targets - targets.mean()).solution
        # A solver's last digits differ from call to call.
        layer.weight.copy_(solution.T.round(decimals=3))
        layer.bias.zero_()
    handle.remove()
    return model


def build_probed_model(
    folder: Path, strategy: str, pooling: str = "mean", dropout: float = 0.0
) -> Any:
    """Return a model whose head was solved before a strategy wrapped it."""
    source = find_source(Source(model=str(folder)))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(source.config, name, dropout)
    loaded = build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)
    return prepare(solve_head(loaded.model), strategy, fresh=loaded.fresh)


def perturb(model: nn.Module, by: float, seed: int = 0) -> nn.Module:
    """Return the model with noise added to all that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def build_trainer(
    model: Any, folder: Path, regularizers: Any, more: dict[str, Any], **settings: Any
) -> Any:
    """Return a `TransferTrainer` with regularizers.

    Args:
        model: what is trained.
        folder: of its output.
        regularizers: a list.
        more: other arguments of the trainer.
        **settings: training arguments.
    """

    def build(**arguments: Any) -> TransferTrainer:
        return TransferTrainer(**arguments, retain=regularizers, **more)

    return trainer_of(model, folder, build, **settings)  # pyright: ignore


def run_first_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Train, and return the loss and the gradients of the first optimizer step."""
    gradients: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    train_batch, take_step = trainer.training_step, torch.optim.SGD.step

    def record_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = train_batch(*args, **kwargs)
        if not gradients:
            losses.append(float(loss))
        return loss

    def record_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not gradients:
            named = trainer.model.named_parameters()
            gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return take_step(optimizer, *args, **kwargs)

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
