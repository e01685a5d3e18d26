"""Count what a computation does, without a clock: FLOPs, bytes, syncs and passes of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten


class Counts(BaseModel):
    """Hold what was counted.

    `flops` are those of matrix products and attention, `written` the bytes of all tensors that
    operations returned, `syncs` the times that a host would have waited for its device, `tokens`
    those that passed a block of the encoder, padding included, summed over blocks.
    """

    flops: float = 0
    written: float = 0
    syncs: float = 0
    tokens: float = 0


def multiply(left: Tensor, right: Tensor) -> float:
    """Return the FLOPs of (..., n, k) times (..., k, m)."""
    return 2.0 * left.numel() * right.shape[-1]


def attend(query: Tensor, key: Tensor) -> float:
    """Return the FLOPs of attention's forward: two products of (batch, heads, length, width)."""
    return 4.0 * query.numel() * key.shape[-2]


FLOPS: dict[Any, Callable[..., float]] = {
    aten.mm: lambda left, right, *_: multiply(left, right),
    aten.bmm: lambda left, right, *_: multiply(left, right),
    aten.addmm: lambda _, left, right, *__: multiply(left, right),
    aten.addmm_: lambda _, left, right, *__: multiply(left, right),
    aten.baddbmm: lambda _, left, right, *__: multiply(left, right),
    aten.baddbmm_: lambda _, left, right, *__: multiply(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, *_: attend(query, key),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, query, key, *__: 2.5 * attend(query, key)
    ),
}
"""What torch's FlopCounterMode lacks is the CPU's flash attention, and products in place."""
SYNCS = (aten._local_scalar_dense, aten.nonzero, aten.equal)


class OperationCounter(TorchDispatchMode):
    """Count the operations below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **kwargs or {})
        packet, counts = func._overloadpacket, self.counts
        if packet in FLOPS:
            counts.flops += FLOPS[packet](*args)
        counts.syncs += packet in SYNCS
        # Views write nothing.
        if not func.is_view:
            results = result if isinstance(result, (tuple, list)) else (result,)
            counts.written += sum(t.nbytes for t in results if isinstance(t, Tensor))
        return result


@contextmanager
def count_operations(block: str) -> Iterator[Counts]:
    """Yield counts of all that runs inside, complete at its end.

    Args:
        block: the name of the class of the encoder's blocks.
    """
    with OperationCounter() as counter:
        before: list[float] = []

        def note_flops(module: nn.Module, _: Any) -> None:
            if type(module).__name__ == block:
                before.append(counter.counts.flops)

        def count_tokens(module: nn.Module, _: Any, output: Any) -> None:
            # A block that only hands on what a cache holds has computed nothing.
            if type(module).__name__ == block and before.pop() < counter.counts.flops:
                states = output[0] if isinstance(output, tuple) else output
                counter.counts.tokens += prod(states.shape[:-1])

        hooks = [
            register_module_forward_pre_hook(note_flops), register_module_forward_hook(count_tokens)
        ]  # fmt: skip
        try:
            yield counter.counts
        finally:
            for hook in hooks:
                hook.remove()
