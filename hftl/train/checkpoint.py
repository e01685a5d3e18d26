"""The best weights on validation, kept in memory and put back when training ends."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hftl.errors import NumericError


class KeepBest(TrainerCallback):
    """Keeps the trainable weights of the best evaluation, and stops when none comes.

    Args:
        metric: a key of the evaluation's metrics, such as `eval_loss`.
        greater: whether more is better.
        patience: evaluations without improvement before training stops; None: never.
    """

    def __init__(self, metric: str, greater: bool, patience: int | None) -> None:
        self.metric = metric
        self.sign = 1 if greater else -1
        self.patience = patience
        self.best: float | None = None
        self.epoch: float | None = None
        self.waited = 0
        self._weights: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **_: Any
    ) -> None:
        """Compares, and copies the weights where they are the best so far."""
        value = float(metrics[self.metric])
        if value != value:
            raise NumericError(
                f"{self.metric} is NaN after epoch {state.epoch:g}", "Lower the learning rate"
            )
        if self.best is None or self.sign * value > self.sign * self.best:
            self.best, self.epoch, self.waited = value, state.epoch, 0
            self._weights = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
            return
        self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            control.should_training_stop = True

    def restore(self, model: nn.Module) -> None:
        """Puts the best weights back; without an evaluation the last ones stay."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._weights:
                    parameter.copy_(self._weights[name])
