"""Compute a block of BERT's kind on packed rows as one function, forward and backward.

Attention, its residual, the feed-forward layers and theirs, each sum normalised (post-norm). As
separate layers under autocast they cast every input and weight anew, draw dropout bit by bit and
add up three gradients of one input; as one function they do not. The sums stay in fp32; products
run in autocast's precision, and without autocast in fp32, as the separate layers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hftl.models.architecture_spec import PostNormBlock
from hftl.models.dropout import draw_mask, get_factor
from hftl.models.linear_products import FrozenCasts, LinearProducts
from hftl.models.lora_kernels import LinearTensors, read_linear
from hftl.models.packed_attention import (
    AttentionGroups,
    AttentionState,
    attend,
    differentiate_attention,
)
from hftl.models.packing import Packing
from hftl.train.hf_compat import has_hooks

GROUPS = ((0, 1, 2), (3,), (4,), (5,))
"""Layers that read one input: query, key and value; attention's output; the feed-forward two."""


class _Setup(NamedTuple):
    """Hold what a block computes with beside its tensors."""

    groups: AttentionGroups
    dtype: torch.dtype
    scale: float
    attention_dropout: float
    dropouts: tuple[float, float]
    """After attention, and after the feed-forward layers."""
    epsilons: tuple[float, float]
    lora_scales: tuple[float, ...]
    casts: tuple[FrozenCasts, ...]

    def build_products(self, tensors: Sequence[Tensor | None]) -> list[LinearProducts]:
        """Return the products of `GROUPS` of 24 tensors: weight, bias, down, up of each layer."""
        layers = [
            LinearTensors(*tensors[4 * n : 4 * n + 4], scale)  # pyright: ignore
            for n, scale in enumerate(self.lora_scales)
        ]
        products = []
        for numbers, casts in zip(GROUPS, self.casts, strict=True):
            group = [layers[n] for n in numbers]
            trains = any(x.weight.requires_grad or _requires_grad(x.bias) for x in group)
            products.append(LinearProducts(group, self.dtype, None if trains else casts))
        return products


class _Block(torch.autograd.Function):
    """Compute hidden states (1, tokens, width) in fp32 of the same."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, setup: _Setup, *tensors: Tensor | None) -> Tensor:
        """Compute the block.

        Args:
            ctx: of autograd.
            hidden: (1, tokens, width) float32.
            setup: of the block.
            tensors: see `_Setup.build_products`, then weight and bias of both layer norms.
        """
        with torch.autocast("cpu", enabled=False):
            qkv, out, up, down = products = setup.build_products(tensors[:24])
            rows = hidden[0].to(setup.dtype)
            heads, inner_qkv = qkv.multiply(rows)
            mixed, state = attend(heads, setup.groups, setup.scale, setup.attention_dropout)
            output, inner_out = out.multiply(mixed)
            first = _add_and_normalize(hidden[0], output, setup, 0, tensors)
            middle = first.output.to(setup.dtype)
            wide, inner_up = up.multiply(middle)
            active = F.gelu(wide)
            output, inner_down = down.multiply(active)
            second = _add_and_normalize(first.output, output, setup, 1, tensors)
        ctx.save_for_backward(
            rows, inner_qkv, mixed, inner_out, middle, inner_up, wide, active, inner_down,
            *first[1:], *second[1:], *tensors[24:], *state.flatten(),
        )  # fmt: skip
        ctx.setup, ctx.products = setup, products
        return second.output.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of hidden states and tensors."""
        setup, (qkv, out, up, down) = ctx.setup, ctx.products
        saved = ctx.saved_tensors
        rows, inner_qkv, mixed, inner_out, middle, inner_up, wide, active, inner_down = saved[:9]
        first, second, norms = saved[9:13], saved[13:17], saved[17:21]
        state = AttentionState.unflatten(saved[21:], setup.groups)
        needed = ctx.needs_input_grad[2:]
        with torch.autocast("cpu", enabled=False):
            of_sum, of_output, of_norm2 = _differentiate_norm(
                gradient[0], second, norms[2:], setup, 1, needed[26:]
            )
            of_active, of_down = down.differentiate(active, inner_down, of_output, needed[20:24])
            of_wide = torch.ops.aten.gelu_backward(of_active, wide)
            of_middle, of_up = up.differentiate(middle, inner_up, of_wide, needed[16:20])
            of_sum += of_middle
            of_sum, of_output, of_norm1 = _differentiate_norm(
                of_sum, first, norms[:2], setup, 0, needed[24:26]
            )
            of_mixed, of_out = out.differentiate(mixed, inner_out, of_output, needed[12:16])
            of_heads = differentiate_attention(
                state, setup.groups, setup.scale, setup.attention_dropout, of_mixed
            )
            needs_rows = ctx.needs_input_grad[0]
            of_rows, of_qkv = qkv.differentiate(rows, inner_qkv, of_heads, needed[:12], needs_rows)
            if of_rows is not None:
                of_sum += of_rows
        return of_sum.unsqueeze(0), None, *of_qkv, *of_out, *of_up, *of_down, *of_norm1, *of_norm2


class _Normalized(NamedTuple):
    """Hold layer norm's output, and what its gradient needs."""

    output: Tensor
    total: Tensor
    mean: Tensor
    deviation: Tensor
    mask: Tensor | None


def _add_and_normalize(
    hidden: Tensor, output: Tensor, setup: _Setup, number: int, tensors: Sequence[Any]
) -> _Normalized:
    """Return the layer norm of hidden states plus a layer's output, which dropout masks."""
    dropout, mask = setup.dropouts[number], None
    if dropout:
        mask = draw_mask(output.shape, dropout)
        output.mul_(mask.to(output.dtype))
    total = torch.add(hidden, output, alpha=get_factor(dropout))
    weight, bias = tensors[24 + 2 * number : 26 + 2 * number]
    epsilon = setup.epsilons[number]
    normed = torch.native_layer_norm(total, total.shape[-1:], weight, bias, epsilon)
    return _Normalized(normed[0], total, *normed[1:], mask)


def _differentiate_norm(
    gradient: Tensor, saved: Sequence[Any], norm: Sequence[Tensor], setup: _Setup, number: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Return the gradients of the sum, of the layer's output before dropout, and of the norm."""
    total, mean, deviation, mask = saved
    of_sum, *of_norm = torch.ops.aten.native_layer_norm_backward(
        gradient, total, total.shape[-1:], mean, deviation, *norm, [True, *needed]
    )
    if mask is None:
        return of_sum, of_sum.to(setup.dtype), of_norm
    of_output = (of_sum * get_factor(setup.dropouts[number])).to(setup.dtype)
    return of_sum, of_output.mul_(mask.to(setup.dtype)), of_norm


@dataclass(frozen=True)
class _Parts:
    """Hold the modules of a block."""

    linears: list[Any]
    attention: Any
    dropouts: list[Any]
    norms: list[Any]


class FusedBlock:
    """Replace the forward of such a block; mixed into the block's own class."""

    layout: PostNormBlock

    def forward(self, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
        """Return hidden states; a batch that is not packed goes the class's own way.

        Args:
            hidden_states: (1, tokens, width).
            args: of the block's own forward.
            more: the same, `packing` among them for packed rows.
        """
        packing: Packing | None = more.get("packing")
        layers = None
        if packing is not None and packing.is_short and hidden_states.dtype == torch.float32:
            layers = self._read_layers()
        if packing is None or layers is None:
            plain: Any = super()
            return plain.forward(hidden_states, *args, **more)
        parts = self._find_parts()
        tensors = [t for layer in layers for t in layer[:4]]
        norms = [t for norm in parts.norms for t in (norm.weight, norm.bias)]
        setup = self._build_setup(parts, layers, packing)
        return _Block.apply(hidden_states, setup, *tensors, *norms)  # pyright: ignore

    def _find_parts(self) -> _Parts:
        block: Any = self
        layout = self.layout
        return _Parts(
            [block.get_submodule(path) for path in layout.linears],
            block.get_submodule(layout.attention),
            [None if path is None else block.get_submodule(path) for path in layout.dropouts],
            [block.get_submodule(path) for path in layout.norms],
        )

    def _read_layers(self) -> list[LinearTensors] | None:
        """Return the block's linear layers; None where it computes more than they say."""
        block: Any = self
        if any(has_hooks(module) for module in block.modules() if module is not block):
            return None
        layers = [read_linear(linear) for linear in self._find_parts().linears]
        if any(x is None or x.weight.dtype != torch.float32 for x in layers):
            return None
        alike = all((x.bias is None) == (layers[0].bias is None) for x in layers[:3])  # pyright: ignore
        return layers if alike else None  # pyright: ignore

    def _build_setup(
        self, parts: _Parts, layers: Sequence[LinearTensors], packing: Packing
    ) -> _Setup:
        attention = parts.attention
        width = layers[0].weight.shape[0]
        heads = width // attention.attention_head_size
        is_cast = torch.is_autocast_enabled("cpu")
        return _Setup(
            packing.group(heads),
            torch.get_autocast_dtype("cpu") if is_cast else torch.float32,
            attention.scaling,
            attention.dropout.p if attention.training else 0.0,
            tuple(0.0 if one is None or not one.training else one.p for one in parts.dropouts),  # pyright: ignore
            tuple(norm.eps for norm in parts.norms),  # pyright: ignore
            tuple(layer.scale for layer in layers),
            vars(self).setdefault("frozen_casts", tuple(FrozenCasts() for _ in GROUPS)),
        )


def can_fuse(block: nn.Module, layout: PostNormBlock, config: Any) -> bool:
    """Return whether a block's activation is GELU, and it holds all that the layout names."""
    paths = {name for name, _ in block.named_modules()}
    named = {*layout.linears, *layout.norms, layout.attention, *filter(None, layout.dropouts)}
    return getattr(config, layout.activation) == "gelu" and named <= paths


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
