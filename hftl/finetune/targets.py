"""Standardize regression targets while a model trains, and restore the label's unit afterwards.

A loss in the label's unit moves an optimizer by the size of the unit: the bias of prices would take
as many steps as the prices are large.
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
    """Hold the mean and standard deviation of an arm's training targets."""

    mean: float
    sd: float

    def standardize(self, targets: np.ndarray) -> np.ndarray:
        """Return targets, float64 in the label's unit, in standard deviations from the mean."""
        return (targets - self.mean) / self.sd

    def restore(self, outputs: np.ndarray) -> np.ndarray:
        """Return standardized outputs in the label's unit, float64."""
        return outputs.astype(np.float64) * self.sd + self.mean

    def standardize_head(self, model: nn.Module) -> None:
        """Fold the scale out of the head, so that the model returns standardized outputs."""
        self._rescale_head(model, 1 / self.sd, -self.mean / self.sd)

    def restore_head(self, model: nn.Module) -> None:
        """Fold the scale into the head, so that the model returns outputs in the label's unit."""
        self._rescale_head(model, self.sd, self.mean)

    def _rescale_head(self, model: nn.Module, factor: float, shift: float) -> None:
        with torch.no_grad():
            # The head under an adapter is the original's, and has the same unit.
            for layer in get_last_linear_copies(model, get_model_architecture(model)):
                weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
                layer.weight.copy_(weight * factor)
                layer.bias.copy_(bias * factor + shift)


def compute_target_scale(context: ExperimentContext, seed: int) -> TargetScale | None:
    """Return the scale of the targets that an arm of this seed trains on; None for classes."""
    if context.prepared.task != "regression":
        return None
    targets = context.prepared.encode_targets(context.select_train_rows(seed))
    mean, sd = float(targets.mean()), float(targets.std())
    return TargetScale(mean, sd or abs(mean) * CONSTANT_TARGET_SPREAD or 1.0)
