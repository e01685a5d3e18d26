"""The original's outputs on a batch: by the same weights with the adapter off, or by a copy."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.models.heads import PooledModel
from hftl.retain.hooks import EmbeddingHook, ModelOutputs, eval_mode

OUTPUT_TOLERANCE = 1e-3
"""The largest difference, relative to the largest output, between a model that has not been
trained and its reference; what bf16 leaves of one number is more, so this is looked at in fp32."""


class Reference:
    """What the original says of a batch: without gradient, and without dropout.

    Args:
        model: what is about to be trained; now it is the original.
        given: another original, for instance the source before adaptation; it is frozen.
        copied: whether the model's own weights will change, so that a copy has to be kept; with an
            adapter none is needed where the weights under it stay.
    """

    def __init__(self, model: nn.Module, given: nn.Module | None, copied: bool) -> None:
        self._head: nn.Module | None = None
        self._adapter: PeftModel | None = None
        self.is_given = given is not None
        adapter = model.encoder if isinstance(model, PooledModel) else model
        if given is not None:
            self.model = given.requires_grad_(False).to(next(model.parameters()).device)
        elif isinstance(adapter, PeftModel) and not (copied and _trains_base_weights(adapter)):
            self.model, self._adapter = model, adapter
            if isinstance(model, PooledModel):
                # The head is outside the adapter, and trains.
                self._head = deepcopy(model.head).requires_grad_(False)
        else:
            self.model = deepcopy(model).requires_grad_(False) if copied else model
        # The model's own hooks are copied with it; this one is the copy's.
        self._tap = EmbeddingHook(self.model)

    def __call__(self, batch: dict[str, Any]) -> ModelOutputs:
        """The original's outputs on a batch, which may hold `labels`; every mode is left as it
        was."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        off: AbstractContextManager[Any] = nullcontext()
        if self._adapter is not None:
            off = self._adapter.disable_adapter()
        with torch.no_grad(), eval_mode(self.model), off:
            seen = self._tap.read_outputs(self.model(**inputs), batch.get("attention_mask"))
            if self._head is not None:
                assert seen.embedding is not None
                width = self._head(seen.embedding.to(next(self._head.parameters()).dtype))
                seen = ModelOutputs(seen.embedding, width.float())
        return seen

    def check(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Compares with the model before it is trained: the original is what it starts from.

        Raises:
            RecipeError: if they differ, as where an adapter has changed the weights under it.
        """
        if self.is_given or self.model is model and self._adapter is None:
            return
        tap = EmbeddingHook(model)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad(), eval_mode(model):
            now = tap.read_outputs(model(**inputs), batch.get("attention_mask"))
        tap.close()
        then = self(batch)
        for name, one, other in (
            ("embeddings", now.embedding, then.embedding), ("logits", now.logits, then.logits),
        ):  # fmt: skip
            apart = _compute_relative_difference(one, other)
            if not apart <= OUTPUT_TOLERANCE:
                raise RecipeError(
                    f"the model differs from its reference before training: {name} by {apart:.1e} "
                    "of the largest",
                    "Use LoRA that leaves the base as it is and starts at zero, or give reference=",
                )

    def close(self) -> None:
        """Lets go of the model."""
        self._tap.close()


def _trains_base_weights(model: PeftModel) -> bool:
    """Whether more trains than the adapter: with it off, what is left would move as well."""
    own = (str(model.base_model.prefix), ".modules_to_save.", ".trainable_tokens_")
    return any(
        parameter.requires_grad and not any(part in name for part in own)
        for name, parameter in model.named_parameters()
    )


def _compute_relative_difference(one: Tensor | None, other: Tensor | None) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    assert one is not None and other is not None
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


# Whether a reference's head says anything of the labels: KL on one nobody trained is noise.


WEAK_HEAD_RATIO = 0.95
"""A head has an opinion if its loss is below this share of that of the labels' shares alone."""


@dataclass(frozen=True)
class HeadQuality:
    """What a head says of the labels: its loss, and that of the labels' shares alone."""

    loss: float
    shares: float

    @property
    def is_weak(self) -> bool:
        """Whether the head is hardly better than the shares, or worse."""
        return not self.loss < WEAK_HEAD_RATIO * self.shares


def measure_head_quality(logits: Tensor, labels: Tensor, kind: str) -> HeadQuality | None:
    """Compares a head with one that knows only how frequent each label is.

    Args:
        logits: (rows, outputs) of the original on training rows.
        labels: (rows,) int64, -100 where there is none, or float, NaN where there is none, or
            (rows, outputs) of 0 and 1.
        kind: `classes`, `labels` or `target`.

    Returns:
        None where no row has a label.
    """
    counts = labels >= 0 if kind == "classes" else ~labels.isnan().reshape(len(labels), -1).any(1)
    logits, labels = logits[counts].double(), labels[counts]
    if not len(labels):
        return None
    if kind == "target":
        loss = F.mse_loss(logits.squeeze(-1), labels.double())
        blind = labels.double().var(unbiased=False)
    elif kind == "labels":
        loss = F.binary_cross_entropy_with_logits(logits, labels.double())
        share = labels.double().mean(0)
        blind = F.binary_cross_entropy(share.expand_as(logits), labels.double())
    else:
        loss = F.cross_entropy(logits, labels)
        share = labels.bincount(minlength=logits.shape[1]).double() / len(labels)
        blind = -(torch.xlogy(share, share)).sum()
    return HeadQuality(float(loss), float(blind))


def check_head_quality(logits: Tensor, labels: Tensor, kind: str) -> None:
    """Refuses a head that says nothing of the labels; see `measure_head_quality`.

    Raises:
        RecipeError: if it is no better than the labels' shares, as a head that nobody trained.
    """
    found = measure_head_quality(logits, labels, kind)
    if found is not None and found.is_weak:
        raise RecipeError(
            f"kl.on=probe: the reference's head says nothing of the labels (loss {found.loss:.3f}, "
            f"{found.shares:.3f} by their shares alone): nobody has trained it, or the encoder's "
            "features do not tell them",
            "Start the head from a probe (head_init: probe); where it is one, use on: relational",
        )
