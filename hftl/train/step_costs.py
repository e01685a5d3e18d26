"""Spare a step what transformers' Trainer does in each one, and once suffices.

On a tiny model a step takes as long beside its arithmetic as on a large one.
"""

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hftl.train import hf_compat

ON_CPU = (DistributedType.NO, DistributedType.MULTI_CPU)
"""Ways to train in which each process holds all gradients, and on a CPU can read their norm."""
MARGIN = 1e-5
"""How far below the limit, or of a limit above 1, the norm of gradients surely needs no clipping:
torch divides by the norm and 1e-6, which counts at small limits."""


class StepCosts(hf_compat.TrainerHooks):
    """Replace what walks all modules or gradients in every step; mixed in before the Trainer."""

    _parameters: int | None = None

    def floating_point_ops(self, inputs: Any) -> int:
        """Return transformers' estimate of a batch's operations, the parameters counted once."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._parameters is None:
            # Walks all modules.
            self._parameters = self.model.num_parameters(exclude_embeddings=True)  # pyright: ignore
        return 6 * inputs[name].numel() * self._parameters

    def clip_gradients(self, model: nn.Module) -> Any:
        """Scale the gradients down to `max_grad_norm`; return their norm before.

        On a CPU the norm can be read, and gradients below it are not multiplied by 1.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or self.accelerator.distributed_type not in ON_CPU:
            return super().clip_gradients(model)
        if any(g.device.type != "cpu" or isinstance(g, DTensor) for g in gradients):
            return super().clip_gradients(model)
        norm: Tensor = nn.utils.get_total_norm(gradients)
        most = self.args.max_grad_norm
        if not float(norm) < most - MARGIN * max(1.0, most):
            with torch.no_grad():
                nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
        return norm


def set_training_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Set the mode of each module alone, not of those inside."""
    for module, live in modes:
        # Assigning an attribute of a module looks for parameters and buffers of the name first.
        vars(module)["training"] = live
