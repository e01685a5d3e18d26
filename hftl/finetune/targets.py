"""Regression targets in units of their own spread while a model trains, in the label's unit before
and after.

A loss in the label's unit moves an optimizer by the unit and not by what is to be learnt: the bias
of prices would take as many steps as they are large.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hftl.finetune.context import ExperimentContext
from hftl.models.heads import get_last_linear_copies, get_model_architecture

CONSTANT_TARGET_SPREAD = 1e-3
"""The spread of targets that do not vary, as a share of their size: outputs stay near them."""


@dataclass(frozen=True)
class TargetScale:
    """The mean and standard deviation of the targets that an arm learns from."""

    mean: float
    sd: float

    def standardize(self, targets: np.ndarray) -> np.ndarray:
        """Return targets, float64 in the label's unit, in standard deviations from the mean."""
        return (targets - self.mean) / self.sd

    def restore(self, outputs: np.ndarray) -> np.ndarray:
        """Return standardised outputs in the label's unit, float64."""
        return outputs.astype(np.float64) * self.sd + self.mean

    def standardize_head(self, model: nn.Module) -> None:
        """Fold the scale out of the head, so that the model gives standardised outputs."""
        self._change(model, 1 / self.sd, -self.mean / self.sd)

    def restore_head(self, model: nn.Module) -> None:
        """Fold the scale into the head, so that the model gives outputs in the label's unit."""
        self._change(model, self.sd, self.mean)

    def _change(self, model: nn.Module, factor: float, shift: float) -> None:
        with torch.no_grad():
            # Under an adapter the head that it wraps is the original's, and has the same unit.
            for layer in get_last_linear_copies(model, get_model_architecture(model)):
                weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
                layer.weight.copy_(weight * factor)
                layer.bias.copy_(bias * factor + shift)


def compute_target_scale(bench: ExperimentContext, seed: int) -> TargetScale | None:
    """Return the scale of the targets that an arm of this seed learns from; None for classes."""
    if bench.prepared.task != "regression":
        return None
    targets = bench.prepared.encode_targets(bench.select_train_rows(seed))
    mean, sd = float(targets.mean()), float(targets.std())
    return TargetScale(mean, sd or abs(mean) * CONSTANT_TARGET_SPREAD or 1.0)
