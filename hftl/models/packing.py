"""Run text encoders without padding: the tokens of a batch in one row, apart in attention alone.

Between attentions an encoder treats every token for itself, so that padding costs time and changes
nothing. On a CPU the encoders whose `ArchitectureSpec` says `packs` run a batch as one row of all
its tokens; only attention puts them back into rows. The batch stays as it is, and so do its
outputs, but for rounding. In fp32 and without gradient a model runs as its stock class runs it,
but inside `pack_predictions`. The names are those of transformers' attention
interface: https://huggingface.co/docs/transformers/attention_interface
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hftl.models.packed_attention import (
    AttentionGroups,
    AttentionState,
    attend,
    differentiate_attention,
)

NAME = "hftl_packed"
SHORT_TEXT = 128
"""Positions up to which attention holds all its weights, which a CPU then computes faster than its
kernel that does not."""
PADDING = 0.1
"""Share of padding from which packing pays with that kernel."""
SIZE_BITS = 4
"""Significant bits of the length of a packed row in half precision."""


def round_up_size(tokens: int) -> int:
    """Return a length of at least so many tokens, one of few: eight between powers of two.

    oneDNN compiles a kernel of its own for each shape of a product in half precision. That takes
    several times as long as the product, and every batch would have another number of tokens.
    """
    step = 1 << max(0, tokens.bit_length() - SIZE_BITS)
    return -(-tokens // step) * step


class Packing:
    """Hold where each token of a packed row stands in its batch.

    A row that is longer than its tokens ends with a text of its own, which nothing reads.

    Args:
        mask: (batch, length) bool, True at tokens, the first position among them.
        rounds_up: whether the row gets one of few lengths, see `round_up_size`.
    """

    def __init__(self, mask: Tensor, rounds_up: bool = False) -> None:
        self.mask = mask
        self.batch, self.length = mask.shape
        tokens = mask.flatten().nonzero().flatten()
        self.count = len(tokens)
        self.spare = round_up_size(self.count) - self.count if rounds_up else 0
        self.tokens = F.pad(tokens, (0, self.spare))
        self._groups: dict[int, AttentionGroups] = {}
        self.is_whole = True
        """Whether the row still has all its tokens, or a hook inside has left some."""

    @property
    def is_short(self) -> bool:
        """Return whether attention holds all its weights."""
        return self.length <= SHORT_TEXT

    def pack(self, batch: Tensor) -> Tensor:
        """Return (1, tokens) of (batch, length)."""
        return batch.flatten()[self.tokens].unsqueeze(0)

    def locate(self, places: Tensor) -> Tensor:
        """Return where tokens stand in the row, of their places in the flattened batch."""
        return (self.mask.flatten().cumsum(0) - 1)[places]

    def unpack(self, row: Tensor) -> Tensor:
        """Return (batch, length, width), 0 at padding, of (1, tokens, width)."""
        places = row.new_zeros(self.mask.numel(), row.shape[-1])
        real = self.tokens[: self.count]
        return places.index_copy(0, real, row[0, : self.count]).view(*self.mask.shape, -1)

    def group(self, heads: int) -> AttentionGroups:
        """Return how the texts run in attention."""
        if heads not in self._groups:
            lengths = self.mask.sum(1).numpy()
            texts = np.append(lengths, self.spare) if self.spare else lengths
            self._groups[heads] = AttentionGroups(texts, heads)
        return self._groups[heads]


class _ShortAttention(torch.autograd.Function):
    """Compute attention of packed rows; see `packed_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """Return (1, tokens, heads, width) of three (1, heads, tokens, width)."""
        products = torch.stack([x[0].transpose(0, 1) for x in (query, key, value)], 1)
        groups = packing.group(query.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            output, state = attend(products.flatten(1), groups, scale, dropout)
        ctx.save_for_backward(*state.flatten())
        ctx.groups, ctx.scale, ctx.dropout = groups, scale, dropout
        return output.view(1, *products.shape[::2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of query, key and value."""
        state = AttentionState.unflatten(ctx.saved_tensors, ctx.groups)
        with torch.autocast(gradient.device.type, enabled=False):
            of_products = differentiate_attention(
                state, ctx.groups, ctx.scale, ctx.dropout, gradient[0].flatten(1)
            )
        heads = of_products.view(len(of_products), 3, *gradient.shape[2:]).permute(1, 2, 0, 3)
        return *heads.unsqueeze(1), None, None, None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | None = None, scaling: float | None = None, dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return what transformers' `sdpa` does; of a packed row, each row of its batch for itself."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing.is_short:
        return _ShortAttention.apply(query, key, value, packing, scale, dropout), None
    shape = (packing.batch, packing.length, *query.shape[1::2])
    rows = (packing.unpack(x.transpose(1, 2).flatten(2)).view(shape) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in rows), attn_mask=packing.mask[:, None, None],
        scale=scale, dropout_p=dropout,
    )  # fmt: skip
    return output.transpose(1, 2).flatten(0, 1)[packing.tokens].unsqueeze(0), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class PackedEncoder:
    """Replace the forward of such an encoder; mixed into the encoder's own class."""

    config: Any
    has_padding_offset: bool
    packing: Packing | None = None
    """Of the batch that is running packed."""
    packs_predictions = False
    """Whether batches in fp32 without gradient run packed, too."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any
    ) -> Any:
        """Return the encoder's outputs, hidden states (batch, length, width) 0 at padding.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 1 at tokens; None: everywhere.
            more: further arguments of the encoder.
        """
        plain: Any = super()
        more = {name: value for name, value in more.items() if value is not None}
        types = more.pop("token_type_ids", None)
        mask = attention_mask
        if mask is None and input_ids is not None:
            mask = torch.ones_like(input_ids)
        if input_ids is None or mask is None or not self._packs(mask, more):
            more |= {} if types is None else {"token_type_ids": types}
            return plain.forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        packing = Packing(mask.bool(), torch.is_autocast_enabled("cpu"))
        types = {} if types is None else {"token_type_ids": packing.pack(types)}
        try:
            vars(self)["packing"] = packing
            output = plain.forward(
                input_ids=packing.pack(input_ids), **types, **more, packing=packing,
                position_ids=packing.pack(self._count_positions(input_ids)),
            )  # fmt: skip
        finally:
            vars(self)["packing"] = None
        if not packing.is_whole:
            return output
        output.last_hidden_state = packing.unpack(output.last_hidden_state)
        if output.get("pooler_output") is not None:
            pooler: Any = self.pooler  # pyright: ignore[reportAttributeAccessIssue]
            output.pooler_output = pooler(output.last_hidden_state)
        return output

    def _packs(self, mask: Tensor, more: dict[str, Any]) -> bool:
        """Return whether a batch runs packed: on a CPU, where it is faster."""
        flags = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        is_plain = all(more.get(name, getattr(self.config, name)) == flags[name] for name in flags)
        return (
            mask.device.type == "cpu"
            and (
                self.packs_predictions
                or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")
            )
            and mask.ndim == 2
            and is_plain
            and more.keys() <= flags.keys()
            and not torch.compiler.is_compiling()
            and (mask.shape[1] <= SHORT_TEXT or bool(mask.float().mean() <= 1 - PADDING))
            # Poolers and heads read the first position.
            and bool(mask[:, 0].all())
        )

    def _count_positions(self, input_ids: Tensor) -> Tensor:
        """Return each token's position (batch, length), as the encoder counts them itself."""
        if self.has_padding_offset:
            is_token = input_ids != self.config.pad_token_id
            return is_token.cumsum(1) * is_token + self.config.pad_token_id
        return torch.arange(input_ids.shape[1]).expand_as(input_ids)


@contextmanager
def pack_predictions(model: nn.Module) -> Iterator[None]:
    """Let the encoders of a model run packed in fp32 without gradient, too."""
    encoders = [module for module in model.modules() if isinstance(module, PackedEncoder)]
    try:
        for encoder in encoders:
            encoder.packs_predictions = True
        yield
    finally:
        for encoder in encoders:
            encoder.packs_predictions = False
