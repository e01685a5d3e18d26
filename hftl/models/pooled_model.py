"""Hold an encoder under hftl's own pooling and one linear head, for texts and for images."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput


def pool_tokens(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector for each row, (batch, width).

    Args:
        hidden: (batch, length, width).
        mask: (batch, length), 0 at padding.
        pooling: `mean` over the tokens that are no padding, `cls`, the first token, or `last`,
            the last one that is no padding.
    """
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        return hidden[torch.arange(len(hidden)), (places * mask).argmax(-1)]
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def mark_first_tokens(input_ids: Tensor) -> Tensor:
    """Return (batch, length) int64, 1 at each row's first token."""
    mask = torch.zeros_like(input_ids)
    mask[:, 0] = 1
    return mask


class PooledModel(nn.Module):
    """Hold an encoder of texts, `mean`, `cls` or `last` pooling, and one linear head."""

    def __init__(self, encoder: nn.Module, pooling: str, width: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        # Longformer's first token sees the whole text, as under its stock class; others see a part.
        self.sees_all = "global_attention_mask" in inspect.signature(encoder.forward).parameters
        self.head = nn.Linear(width, outputs)

    @property
    def head_parts(self) -> list[nn.Module]:
        """Return the modules after the encoder, in order."""
        return [self.head]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Tensor,
    ) -> SequenceClassifierOutput:
        """Return logits (batch, outputs) of ids (batch, length); the trainer computes the loss.

        `more` are further inputs of the encoder, as the pictures of a vision-language model.
        """
        optional = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        present = {name: tensor for name, tensor in optional.items() if tensor is not None}
        if self.sees_all:
            present["global_attention_mask"] = mark_first_tokens(input_ids)
        hidden = self.encoder(input_ids=input_ids, **present, **more).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = pool_tokens(hidden, mask, self.pooling)
        return SequenceClassifierOutput(logits=self.head(pooled))  # pyright: ignore


def pool_image_tokens(hidden: Tensor, prefix: int, pooling: str) -> Tensor:
    """Return one vector for each image, (batch, width), of `cls+mean` (batch, 2 * width).

    Args:
        hidden: (batch, prefix + patches, width).
        prefix: tokens before those of the patches: the class token, then registers.
        pooling: `cls`, the class token, `mean` over the patches, or `cls+mean`, one after the
            other.
    """
    parts = {"cls": hidden[:, 0], "mean": hidden[:, prefix:].mean(1)}
    return torch.cat([parts[name] for name in pooling.split("+")], -1)


class PooledImageModel(PooledModel):
    """Hold an encoder of images, `cls`, `mean` or `cls+mean` pooling, and one linear head.

    Args:
        encoder: returns a state for each of its tokens.
        pooling: see `pool_image_tokens`.
        width: of a state.
        outputs: classes, or 1 for regression.
        prefix: tokens before those of the patches.
    """

    def __init__(
        self, encoder: nn.Module, pooling: str, width: int, outputs: int, prefix: int
    ) -> None:
        super().__init__(encoder, pooling, width * len(pooling.split("+")), outputs)
        self.prefix = prefix

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, labels: Tensor | None = None, **arguments: Any
    ) -> ImageClassifierOutput:
        """Return logits (batch, outputs) of images (batch, 3, height, width).

        The trainer computes the loss; `arguments` are further ones of the encoder.
        """
        hidden = self.encoder(pixel_values=pixel_values, **arguments).last_hidden_state
        logits = self.head(pool_image_tokens(hidden, self.prefix, self.pooling))
        return ImageClassifierOutput(logits=logits)  # pyright: ignore[reportArgumentType]
