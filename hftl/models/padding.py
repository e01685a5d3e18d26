"""Encoders without an attention mask, which read padding as text: each row without its padding."""

import inspect
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def accepts_attention_mask(encoder: Any) -> bool:
    """Return whether the forward of an encoder of texts takes an attention mask; FNet's does not.

    Args:
        encoder: a transformers model or its class.
    """
    return "attention_mask" in inspect.signature(encoder.forward).parameters


def hide_padding(model: nn.Module) -> None:
    """Let every encoder of texts in the model that takes no attention mask see no padding.

    FNet (Lee-Thorp et al. 2022, arXiv:2105.03824) mixes all places of a row, so that a text's
    output depends on how far its neighbours in the batch have it padded. Such an encoder is made
    to run the rows of one length at a time, cut to that length. Its class keeps its name, which
    transformers writes into config.json.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _ignores_padding_mask(module):
            kind = type(module)
            module.__class__ = type(
                kind.__name__, (_RunsByLength, kind), {"__module__": kind.__module__}
            )


def _ignores_padding_mask(model: Any) -> bool:
    """Return whether a module is a bare encoder of texts without a mask, and not yet changed."""
    return (
        model.base_model is model
        and model.main_input_name == "input_ids"
        and not accepts_attention_mask(model)
        and not isinstance(model, _RunsByLength)
    )


class _RunsByLength:
    """The forward of such an encoder; mixed into the class of the encoder itself."""

    config: Any

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, **more: Any
    ) -> BaseModelOutputWithPooling:
        """Return hidden states (batch, length, width), 0 at the padding, and the pooled (batch,
        width) where there is a pooler.

        Args:
            input_ids: (batch, length), padded on the right.
            token_type_ids: (batch, length).
            more: further arguments of the encoder; `return_dict` is always true.
        """
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(_count_tokens(input_ids, self.config.pad_token_id)):
            rows_of[length].append(row)
        hidden = pooled = None
        plain: Any = super()
        for length, rows in rows_of.items():
            types = None if token_type_ids is None else token_type_ids[rows, :length]
            output = plain.forward(
                input_ids[rows, :length], token_type_ids=types, **more | {"return_dict": True}
            )
            part = output.last_hidden_state
            if hidden is None:
                hidden = part.new_zeros(*input_ids.shape, part.shape[-1])
            hidden[rows, :length] = part
            if output.pooler_output is not None:
                if pooled is None:
                    pooled = part.new_zeros(len(input_ids), output.pooler_output.shape[-1])
                pooled[rows] = output.pooler_output
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,  # pyright: ignore[reportArgumentType]
            pooler_output=pooled,  # pyright: ignore[reportArgumentType]
        )


def _count_tokens(input_ids: Tensor, pad_id: int) -> list[int]:
    """Return the length of each row up to its last token that is no padding, at least 1."""
    places = (input_ids != pad_id) * input_ids.new_ones(input_ids.shape).cumsum(1)
    return places.amax(1).clamp(min=1).tolist()
