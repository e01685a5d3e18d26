"""Compute attention of the texts of a packed row, a few of similar length at a time.

Texts of one length need no padding among each other, and the matrices of a few stay in a core's
cache. Softmax and the products around it run in fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hftl.models.dropout import draw_mask, get_factor

GROUP_ROWS = 8


class _Group(NamedTuple):
    """Hold where the matrices of a few texts lie: places start to stop, texts x heads of them."""

    start: int
    stop: int
    matrices: int
    length: int
    bias: Tensor
    """(matrices, 1, length), 0 at tokens and -inf at padding."""


class AttentionGroups:
    """Hold how the tokens of a packed row are gathered for attention and put back.

    Args:
        lengths: tokens of each text, at least 1, in their order in the row.
        heads: of attention.
    """

    def __init__(self, lengths: np.ndarray, heads: int) -> None:
        self.heads = heads
        offsets = np.cumsum(lengths) - lengths
        order = np.argsort(lengths, kind="stable")
        head, parts = np.arange(heads)[:, None], np.arange(3)[:, None]
        self.groups: list[_Group] = []
        gather, scatter, self.places = [], np.zeros((int(lengths.sum()), heads), np.int64), 0
        for first in range(0, len(order), GROUP_ROWS):
            rows = order[first : first + GROUP_ROWS]
            count, length = lengths[rows][:, None], int(lengths[rows].max())
            position = np.arange(length)
            is_token = position < count
            # At padding the text's last token stands in; nothing reads it.
            tokens = offsets[rows][:, None] + np.minimum(position, count - 1)
            gather.append((tokens[:, None] * 3 * heads + head).ravel())
            matrices, start = len(rows) * heads, self.places
            self.places += matrices * length
            places = np.arange(start, self.places).reshape(len(rows), heads, length)
            scatter[tokens[is_token]] = places.transpose(0, 2, 1)[is_token]
            bias = np.where(is_token, np.float32(0), np.float32(-np.inf)).repeat(heads, 0)
            padding = torch.from_numpy(bias[:, None])
            self.groups.append(_Group(start, self.places, matrices, length, padding))
        self.gather = torch.from_numpy((np.concatenate(gather) + parts * heads).ravel())
        """Row of (tokens, 3, heads) for each row of (3, places)."""
        self.scatter = torch.from_numpy(scatter.ravel())
        """Place of each row of (tokens, heads)."""
        self.back = torch.from_numpy((scatter[:, None] + parts * self.places).ravel())
        """Row of (3, places) for each row of (tokens, 3, heads)."""


class AttentionState(NamedTuple):
    """Hold what the gradient of attention needs.

    Rows are queries, keys and values, (3 * places, width); weights and masks are of each group,
    (matrices, length, length), masks none without dropout.
    """

    rows: Tensor
    weights: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    def flatten(self) -> tuple[Tensor, ...]:
        """Return all tensors, which `unflatten` takes apart."""
        return (self.rows, *self.weights, *self.masks)

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], groups: AttentionGroups) -> "AttentionState":
        """Return the state of `flatten`."""
        rows, *more = tensors
        count = len(groups.groups)
        return cls(rows, tuple(more[:count]), tuple(more[count:]))


def attend(
    products: Tensor, groups: AttentionGroups, scale: float, dropout: float
) -> tuple[Tensor, AttentionState]:
    """Return attention's output (tokens, heads * width) in the precision of its input, and state.

    Args:
        products: queries, keys and values side by side, (tokens, 3 * heads * width).
        groups: of the packed row.
        scale: of the products of queries and keys.
        dropout: of the weights.
    """
    width = products.shape[1] // (3 * groups.heads)
    rows = products.reshape(-1, width).index_select(0, groups.gather)
    query, key, value = _scale_rows(rows, scale, dropout)
    output = query.new_empty(groups.places, width)
    all_weights, masks = [], []
    for group in groups.groups:
        q, k, v, out = (_view_group(x, group) for x in (query, key, value, output))
        weights = torch.baddbmm(group.bias, q, k.transpose(1, 2)).softmax(-1)
        all_weights.append(weights)
        if dropout:
            masks.append(draw_mask(weights.shape, dropout))
            weights = weights * masks[-1].to(torch.float32)
        torch.bmm(weights, v, out=out)
    heads = output.index_select(0, groups.scatter).to(products.dtype)
    state = AttentionState(rows, tuple(all_weights), tuple(masks))
    return heads.view(len(products), -1), state


def differentiate_attention(
    state: AttentionState, groups: AttentionGroups, scale: float, dropout: float, gradient: Tensor
) -> Tensor:
    """Return the gradient of `products` in `attend`, of the gradient of its output."""
    width = state.rows.shape[1]
    query, key, value = _scale_rows(state.rows, scale, dropout)
    of_output = query.new_zeros(groups.places, width)
    of_output.index_copy_(0, groups.scatter, gradient.reshape(-1, width).to(query.dtype))
    of_rows = query.new_empty(3, groups.places, width)
    for number, group in enumerate(groups.groups):
        q, k, v, out = (_view_group(x, group) for x in (query, key, value, of_output))
        of_query, of_key, of_value = (_view_group(x, group) for x in of_rows)
        weights = live = state.weights[number]
        of_weights = torch.bmm(out, v.transpose(1, 2))
        if dropout:
            mask = state.masks[number].to(torch.float32)
            live = weights * mask
            of_weights *= mask
        of_weights *= weights
        of_scores = torch.addcmul(of_weights, weights, of_weights.sum(-1, True), value=-1)
        torch.bmm(live.transpose(1, 2), out, out=of_value)
        torch.bmm(of_scores, k, out=of_query)
        torch.bmm(of_scores.transpose(1, 2), q, out=of_key)
    of_rows[0] *= scale
    if dropout:
        of_rows[2] *= get_factor(dropout)
    back = of_rows.view(-1, width).index_select(0, groups.back).to(gradient.dtype)
    return back.view(len(gradient), -1)


def _scale_rows(rows: Tensor, scale: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries times the scale, keys, and values times dropout's factor, in fp32."""
    query, key, value = rows.to(torch.float32).view(3, -1, rows.shape[1]).unbind()
    return query * scale, key, value * get_factor(dropout) if dropout else value


def _view_group(rows: Tensor, group: _Group) -> Tensor:
    return rows[group.start : group.stop].view(group.matrices, group.length, -1)
