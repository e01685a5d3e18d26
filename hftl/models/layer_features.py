"""Compute the features of a frozen encoder after every layer and in every pooling, in one pass."""

from collections import defaultdict
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hftl.data.image_inputs import ImageInputs
from hftl.data.patched_inputs import PatchedInputs
from hftl.data.text_inputs import EncodedRow, TextInputs, WordInputs
from hftl.models.encoders import accepts_attention_mask, get_blocks
from hftl.models.features import run_batches, run_fast
from hftl.models.heads import LoadedModel
from hftl.models.packing import Packing
from hftl.models.pooled_model import pool_tokens

TOKEN_POOLING = "token"
"""The pooling of tasks with a label a word: the state at the word's first token."""


class LayerSite(NamedTuple):
    """Name where features are read: after a layer, 0 for the embeddings, and how they are pooled.

    The last layer is read after the encoder's final norm. Its pooling `native` is the input of the
    last linear layer of the stock task class.
    """

    layer: int
    pooling: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.pooling}"


def compute_layer_features(
    built: LoadedModel, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs, device: str
) -> tuple[dict[LayerSite, int], list[np.ndarray]]:
    """Return the width of every site, and the features of every row at all of them. Collective.

    Args:
        built: the stock task class of the source, or its encoder under hftl's own head where it
            has none, as it was loaded.
        encoded: rows as the encoder takes them.
        inputs: collates them and splits a batch's outputs into rows.
        device: the model's.

    Returns:
        The widths in the order of the columns, and (outputs, sum of widths) float32 for each row:
        one output, or one a word.
    """
    numbers_of: dict[int, list[int]] = defaultdict(list)
    # An encoder without a mask runs the rows of one length at a time, so its blocks see a part of
    # a batch with several lengths.
    one_length = isinstance(inputs, TextInputs) and not accepts_attention_mask(built.encoder)
    for number, row in enumerate(encoded):
        numbers_of[inputs.length(row) if one_length else 0].append(number)
    computed: dict[int, np.ndarray] = {}
    with run_fast(built.model), _LayerTap(built, inputs) as tap:
        for numbers in numbers_of.values():
            rows = [encoded[number] for number in numbers]
            values = run_batches(built.model, rows, inputs, device, tap.read, "features")
            computed.update(zip(numbers, values, strict=True))
    return tap.widths, [computed[number] for number in range(len(encoded))]


class _LayerTap(ExitStack):
    """Catch the states between the blocks of a model while it runs, and pool them."""

    def __init__(self, built: LoadedModel, inputs: TextInputs | ImageInputs) -> None:
        super().__init__()
        self.widths: dict[LayerSite, int] = {}
        self._inputs = inputs
        self._prefix = built.architecture.prefix_tokens
        self._reads_last_token = built.architecture.pooled_logits == "last"
        self._states: list[Tensor] = []
        self._last: list[Tensor] = []
        self._head_input: list[Tensor] = []
        self._batch: dict[str, Any] = {}
        self._packing: Packing | None = None
        blocks = get_blocks(built.encoder, built.architecture)
        self._hook(built.model.register_forward_pre_hook(self._catch_batch, with_kwargs=True))
        self._hook(blocks[0].register_forward_pre_hook(self._catch_embeddings, with_kwargs=True))
        for block in blocks:
            self._hook(block.register_forward_hook(self._catch_block))
        self._hook(built.encoder.register_forward_hook(self._catch_encoder))
        # A pooler without weights in the checkpoint differs by seed: its output is no feature.
        is_stock = built.pooling == "native" and not isinstance(inputs, WordInputs)
        if built.features_are_shared and is_stock:
            self._hook(built.last_linear.register_forward_pre_hook(self._catch_head_input))

    def _hook(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _catch_batch(self, _: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        self._batch, self._packing = batch, None
        self._states.clear()

    def _catch_embeddings(self, _: nn.Module, args: Any, more: dict[str, Any]) -> None:
        # A block whose weights all layers share is entered once a layer.
        if not self._states:
            self._states.append(args[0] if args else more["hidden_states"])

    def _catch_block(self, _: nn.Module, args: Any, output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def _catch_encoder(self, _: nn.Module, args: Any, output: Any) -> None:
        # A model of timm ends with its classifier, so that its last block's state is the last.
        self._last = [self._states[-1] if isinstance(output, Tensor) else output[0]]

    def _catch_head_input(self, _: nn.Module, args: Any) -> None:
        self._head_input = [args[0]]

    def read(self, output: Any) -> Tensor:
        """Return (batch, all columns), or (batch, length, all columns) for words."""
        columns: dict[LayerSite, Tensor] = {}
        for layer, states in enumerate([*self._states[:-1], *self._last]):
            for pooling, pooled in self._pool(states).items():
                columns[LayerSite(layer, pooling)] = pooled.float()
        if self._head_input:
            last = LayerSite(len(self._states) - 1, "native")
            columns[last] = self._head_input[0].float()
        self.widths = {site: pooled.shape[-1] for site, pooled in columns.items()}
        return torch.cat(list(columns.values()), -1)

    def _unpack(self, states: Tensor) -> Tensor:
        """Return (batch, length, width) of states, which may be packed, see `packing`."""
        mask = self._batch.get("attention_mask")
        if mask is None:
            return states
        if states.shape[0] == len(mask):
            return states[:, : mask.shape[1]]  # Longformer pads to whole windows
        self._packing = self._packing or Packing(mask.bool())
        return self._packing.unpack(states)

    def _pool_packed(self, states: Tensor) -> dict[str, Tensor]:
        """Return what `_pool` does of packed texts, (1, tokens, width), as they lie."""
        lengths, tokens = self._batch["attention_mask"].sum(1), states[0]
        # Texts of a length lie beside each other: there are few lengths in a batch.
        kinds, counts = (kind.tolist() for kind in lengths.unique_consecutive(return_counts=True))
        ends = lengths.cumsum(0)
        texts = tokens[: ends[-1]].split([a * b for a, b in zip(kinds, counts, strict=True)])
        means = [
            text.view(-1, kind, text.shape[-1]).mean(1)
            for text, kind in zip(texts, kinds, strict=True)
        ]
        pooled = {"mean": torch.cat(means)}
        if self._reads_last_token:
            return pooled | {"last": tokens[ends - 1]}
        return pooled | {"cls": tokens[ends - lengths]}

    def _pool(self, states: Tensor) -> dict[str, Tensor]:
        """Return the states of a batch in every pooling that they allow."""
        if isinstance(self._inputs, WordInputs):
            return {TOKEN_POOLING: self._unpack(states)}
        if isinstance(self._inputs, TextInputs):
            mask = self._batch["attention_mask"]
            if len(states) != len(mask):
                return self._pool_packed(states)
            states = states[:, : mask.shape[1]]  # Longformer pads to whole windows
            pooled = {"mean": pool_tokens(states, mask, "mean")}
            if self._reads_last_token:
                # The first token of a decoder has seen nothing; rows are padded on the right.
                return pooled | {"last": states[torch.arange(len(states)), mask.sum(1) - 1]}
            return pooled | {"cls": pool_tokens(states, mask, "cls")}
        states = self._unpack(states)
        if states.ndim == 4:
            rows, columns, last = states.shape[1:]
            return {"mean": states.mean((1, 2) if rows == columns != last else (2, 3))}
        if isinstance(self._inputs, PatchedInputs):
            mask = self._batch["pixel_attention_mask"]
            return {"mean": pool_tokens(states, mask, "mean")}
        side = self._batch["pixel_values"].shape[-1]
        prefix = self._prefix or states.shape[1] - (side // self._inputs.patch_size) ** 2
        if prefix <= 0:
            return {"mean": states.mean(1)}
        # The class token, then registers, then the patches.
        return {"mean": states[:, prefix:].mean(1), "cls": states[:, 0]}
