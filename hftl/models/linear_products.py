"""Multiply by linear layers that read one input, side by side, with plain LoRA or without.

A frozen weight is cast to the precision of the products once and not in every step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hftl.models.lora_kernels import LinearTensors
from hftl.train.hf_compat import count_changes


class FrozenCasts:
    """Hold frozen tensors in another precision, cast again only after one of them has changed."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._cast: tuple[Tensor, Tensor | None] | None = None
        # The tensors themselves are held too: no other then comes to lie where one of them did.
        self._sources: list[Tensor] = []

    def cast(
        self, layers: Sequence[LinearTensors], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layers' weights and biases, one below the other; see `stack_layers`."""
        tensors = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
        state = (dtype, *((t.data_ptr(), count_changes(t)) for t in tensors))
        if self._cast is None or state != self._state:
            self._cast, self._state = stack_layers(layers, dtype), state
            self._sources = [t.detach() for t in tensors]
        return self._cast


def stack_layers(
    layers: Sequence[LinearTensors], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return weights (sum of outputs, in) and biases (sum of outputs,) of layers, in a precision.

    All layers have a bias, or none.
    """
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    biases = [layer.bias.detach().to(dtype) for layer in layers if layer.bias is not None]
    if len(layers) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None


class LinearProducts:
    """Hold layers that read one input, in the precision of the products.

    Args:
        layers: all with a bias, or all without.
        dtype: of the products.
        frozen: what holds the layers' casts where none of them trains; else None.
    """

    def __init__(
        self, layers: Sequence[LinearTensors], dtype: torch.dtype, frozen: FrozenCasts | None
    ) -> None:
        self.layers = layers
        if frozen is None or layers[0].weight.dtype == dtype:
            self.weight, self.bias = stack_layers(layers, dtype)
        else:
            self.weight, self.bias = frozen.cast(layers, dtype)
        self.down = self.up = None
        adapted = [layer for layer in layers if layer.down is not None]
        if adapted:
            self.down = torch.cat([layer.down for layer in adapted]).to(dtype)  # pyright: ignore
            self.up = _stack_ups(layers, len(self.down)).to(dtype)

    def multiply(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs side by side, and those of LoRA's lower factors; of rows (n, in)."""
        if self.bias is None:
            output = rows @ self.weight.t()
        else:
            output = torch.addmm(self.bias, rows, self.weight.t())
        if self.down is None or self.up is None:
            return output, None
        inner = rows @ self.down.t()
        return output.addmm_(inner, self.up.t()), inner

    def differentiate(
        self, rows: Tensor, inner: Tensor | None, gradient: Tensor, needed: Sequence[bool],
        needs_rows: bool = True,
    ) -> tuple[Any, list[Tensor | None]]:  # fmt: skip
        """Return the gradients of the rows, and of weight, bias, down and up of each layer.

        Args:
            rows: (n, in).
            inner: see `multiply`.
            gradient: of the outputs side by side.
            needed: which tensors need one; four for each layer.
            needs_rows: whether the rows need one; else it is None.
        """
        of_rows = gradient @ self.weight if needs_rows else None
        of_downs = of_ups = None
        if inner is not None and self.up is not None and self.down is not None:
            of_inner = gradient @ self.up
            if of_rows is not None:
                of_rows.addmm_(of_inner, self.down)
            of_downs = (of_inner.t() @ rows).to(torch.float32)
            # So and not the other way round: the product of few rows by many columns.
            of_ups = (inner.t() @ gradient).to(torch.float32)
        of_weights = None
        if any(needed[::4]):
            of_weights = (gradient.t() @ rows).to(self.layers[0].weight.dtype)
        of_biases = gradient.sum(0).to(torch.float32) if any(needed[1::4]) else None
        gradients: list[Tensor | None] = []
        output = rank = 0
        for number, layer in enumerate(self.layers):
            outputs = slice(output, output + len(layer.weight))
            ranks = slice(rank, rank + (0 if layer.down is None else len(layer.down)))
            output, rank = outputs.stop, ranks.stop
            parts = (
                None if of_weights is None else of_weights[outputs],
                None if of_biases is None else of_biases[outputs],
                None if of_downs is None else of_downs[ranks],
                None if of_ups is None else of_ups[ranks, outputs].t() * layer.scale,
            )
            needs = needed[4 * number : 4 * number + 4]
            gradients += [part if need else None for part, need in zip(parts, needs, strict=True)]
        return of_rows, gradients


def _stack_ups(layers: Sequence[LinearTensors], rank: int) -> Tensor:
    """Return LoRA's upper factors times their scales, each in its layer's rows and its ranks."""
    outputs = sum(len(layer.weight) for layer in layers)
    stacked = layers[0].weight.new_zeros(outputs, rank)
    row = column = 0
    for layer in layers:
        if layer.up is not None:
            height, width = layer.up.shape
            stacked[row : row + height, column : column + width] = layer.up * layer.scale
            column += width
        row += len(layer.weight)
    return stacked
