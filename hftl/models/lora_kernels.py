"""Compute LoRA layers faster, at peft's outputs and gradients.

peft's forward runs three layers, and under autocast every one of them casts its input and its
weight anew, also the frozen one, which never changes. On a CPU they train as one function. While
predictions are made they are merged into the layers that they adapt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hftl.models.half_weights import HalfLinear
from hftl.train.hf_compat import count_changes


class _LoraProduct(torch.autograd.Function):
    """Compute x W' + b + s (x A') B', of which A and B train, in the precision of the frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Return (rows, out) of x (..., in), down (rank, in), up (out, rank), weight (out, in)."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
            low, high = down.to(weight.dtype), up.to(weight.dtype)
            inner = rows @ low.t()
            output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            output.addmm_(inner, high.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, low, high, weight)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, down.dtype, up.dtype)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of x, down and up."""
        rows, inner, low, high, weight = ctx.saved_tensors
        of_x = of_down = of_up = None
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.to(weight.dtype)
            of_inner = (gradient @ high).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ weight).addmm_(of_inner, low)
                of_x = of_x.view(ctx.shape).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_down = (of_inner.t() @ rows).to(ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                # So and not the other way round: the product of few rows by many columns.
                of_up = (inner.t() @ gradient).t().mul(ctx.scale).to(ctx.dtypes[2])
        return of_x, of_down, of_up, None, None, None


class LinearTensors(NamedTuple):
    """Hold the tensors of a linear layer, and of plain LoRA on it: down (rank, in), up (out, rank).

    It computes x W' + b + scale (x down') up'.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def read_linear(module: Any) -> LinearTensors | None:
    """Return the tensors of a linear layer; None of one that computes anything else."""
    if type(module) is nn.Linear:
        return LinearTensors(module.weight, module.bias)
    if not isinstance(module, Linear) or type(module.base_layer) is not nn.Linear:
        return None
    base: Any = module.base_layer
    if module.merged != module.disable_adapters:
        return LinearTensors(base.weight, base.bias)
    name = module.active_adapters[0] if module.active_adapters else ""
    if not isinstance(module, _FusedLinear) or not module.is_plain_adapter(name):
        return None
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return LinearTensors(base.weight, base.bias, down, up, module.scaling[name])  # pyright: ignore


class _FusedLinear(Linear):
    """Compute peft's dense layer by `_LoraProduct` where it is plain LoRA on a CPU."""

    _frozen: tuple[Any, ...] = ()
    """What the frozen tensors were, and what they are in the precision of the training."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output; what is not plain LoRA goes peft's own way."""
        name = self.active_adapters[0] if self.active_adapters else ""
        if args or kwargs or not self._is_plain(x, name):
            return super().forward(x, *args, **kwargs)
        weight, bias = self._cast_frozen()
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        rows: Any = _LoraProduct.apply(x, down, up, weight, bias, self.scaling[name])
        # Swin V2 changes the output in place, which autograd refuses of views made in a function.
        return rows.view(*x.shape[:-1], -1)

    def _is_plain(self, x: Tensor, name: str) -> bool:
        """Return whether it trains on a CPU, as plain LoRA."""
        base, is_cast = self.base_layer, torch.is_autocast_enabled("cpu")
        return (
            x.device.type == "cpu"
            and (is_cast or torch.is_grad_enabled() and x.dtype == base.weight.dtype)
            and self.is_plain_adapter(name)
            and not torch.compiler.is_compiling()
        )

    def is_plain_adapter(self, name: str) -> bool:
        """Return whether one adapter is on, on a frozen layer, without dropout, bias or variant."""
        base = self.base_layer
        return (
            len(self.active_adapters) == 1
            and name in self.lora_A
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and not self.lora_bias[name]
            and isinstance(self.lora_dropout[name], nn.Identity)
            and type(base) in (nn.Linear, HalfLinear)
            and not any(parameter.requires_grad for parameter in base.parameters())
        )

    def _cast_frozen(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in autocast's precision, cast again only after they changed."""
        base: Any = self.base_layer
        weight, bias = base.weight, base.bias
        if not torch.is_autocast_enabled("cpu"):
            return weight, bias
        dtype = torch.get_autocast_dtype("cpu")
        state = (
            dtype,
            *((t.data_ptr(), count_changes(t)) for t in (weight, bias) if t is not None),
        )
        if not self._frozen or self._frozen[0] != state:
            cast = (None if t is None else t.detach().to(dtype) for t in (weight, bias))
            # The weight itself is held too: no other tensor then comes to lie where it did.
            self._frozen = (state, *cast, weight.detach())
        return self._frozen[1], self._frozen[2]


def fuse_lora(model: nn.Module) -> None:
    """Let peft's dense layers compute as one function; the rest is peft's."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = _FusedLinear


@contextmanager
def merge_lora(model: nn.Module) -> Iterator[None]:
    """Merge LoRA into the layers that it adapts while outputs are computed: one product, not three.

    The layers get their own tensors back, so that nothing is rounded. Adapters of embeddings stay
    beside them: a tied decoder, which they do not change, shares the weight.
    """
    layers: list[Any] = [module for module in model.modules() if _can_merge(module)]
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                before.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()
            layer.merge()
        yield
    finally:
        for parameter, own in reversed(before):
            parameter.data = own
        for layer in layers:
            layer.merged_adapters.clear()


def _can_merge(module: Any) -> bool:
    """Return whether a layer's weight plus its adapter's update is what the layer computes.

    A weight in half precision would round the update away, and peft cannot merge a bias into a
    layer that has none, nor every variant. Other kinds of layer, as timm's convolutions with
    standardized weights, may compute something else of their weight.
    """
    if type(module) not in (Linear, _FusedLinear, Conv2d) or not module.active_adapters:
        return False
    if type(module.get_base_layer()) not in (nn.Linear, nn.Conv2d):
        return False
    weight, bias = module.get_base_layer().weight, module.get_base_layer().bias
    is_whole = weight.dtype == torch.float32 and weight.numel() > 0
    adds_bias = any(module.lora_bias.values()) and bias is None
    has_variants = not all(module.use_dora.get(name) for name in module.lora_variant)
    return is_whole and not (adds_bias or has_variants or module.merged or module.disable_adapters)
