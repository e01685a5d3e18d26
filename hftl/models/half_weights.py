"""Hold frozen linear layers of a bf16 checkpoint in bf16, and compute with them in fp32.

A decoder is mostly frozen weights, published in bf16. Held so they take half the memory, and a
product in fp32 widens one layer's weights at a time, which is exact: outputs are those of the same
checkpoint in fp32. Under autocast they multiply as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _WidenedLinear(torch.autograd.Function):
    """Multiply by a frozen bf16 weight; the backward pass widens it again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., out) of (..., in) and (out, in), in the precision of the inputs."""
        ctx.save_for_backward(weight)
        return F.linear(inputs, weight.to(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        """Return the gradient of the inputs; the layer is frozen."""
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class HalfLinear(nn.Linear):
    """Replace the forward of a frozen linear layer whose weight is held in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) of (..., in)."""
        if torch.is_autocast_enabled(input.device.type) or self.weight.dtype == input.dtype:
            return super().forward(input)
        return _WidenedLinear.apply(input, self.weight, self.bias)  # pyright: ignore


def hold_in_half(model: nn.Module) -> int:
    """Hold every frozen linear weight that bf16 holds exactly in bf16; return how many.

    Those are the weights of a checkpoint in bf16. What trains stays in fp32, and so does a module
    that holds two copies of a layer, one of which trains.
    """
    count = 0
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.requires_grad:
            continue
        if module.bias is not None and module.bias.requires_grad:
            continue
        half = module.weight.detach().to(torch.bfloat16)
        if torch.equal(half.to(module.weight.dtype), module.weight):
            module.weight.data = half
            module.__class__ = HalfLinear
            count += 1
    return count
