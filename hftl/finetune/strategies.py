"""The strategies: which parameters train. `prepare` works on any supported transformers model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hftl.config.finetune import LORA
from hftl.errors import RecipeError
from hftl.models.architectures import check_blocks, layers
from hftl.models.heads import PooledModel, anatomy_in, encoder_in, last_linear, unused_in
from hftl.models.lora import add_lora
from hftl.models.parts import Anatomy, blocks_of, submodule, under


def prepare(
    model: nn.Module,
    strategy: str = "lora",
    blocks: int = 2,
    lora: dict[str, Any] | None = None,
    fresh: Sequence[str] | None = None,
) -> nn.Module:
    """Sets what trains and returns the model, wrapped where the strategy is `lora`.

    Args:
        model: a stock sequence, token or image classification model of a supported architecture,
            or a `PooledModel`.
        strategy: `head` (the last linear layer), `partial` (the top `blocks`, what follows them,
            and the head), `lora` (adapters in every block, and the head), or `full` (all that an
            output depends on); `gradual` is `full`, of which `gradual.phases` train in turn.
        blocks: how many top blocks train under `partial`.
        lora: fields of `peft.LoraConfig`.
        fresh: modules that the checkpoint did not have (`output_loading_info`'s missing keys),
            which must train and be saved. None: head and pooler are taken as such, which is safe.

    Raises:
        RecipeError: for an unsupported architecture or class, an unknown strategy, or too many
            blocks.
    """
    anatomy = anatomy_in(model)
    encoder = encoder_in(model, anatomy)
    if fresh is None:
        fresh = _possibly_fresh(model, anatomy)
    everything = strategy in ("full", "gradual")
    model.requires_grad_(everything)
    if strategy == "lora":
        model = add_lora(model, anatomy, LORA | (lora or {}), fresh)
    elif strategy == "head":
        last_linear(model, anatomy).requires_grad_(True)
    elif strategy == "partial":
        _unfreeze_top(model, anatomy, blocks, fresh)
    elif not everything:
        raise RecipeError(
            f"unknown strategy {strategy!r}", "Use head, partial, gradual, lora or full"
        )
    unused = unused_in(model, anatomy)
    for name, parameter in encoder.named_parameters():
        if under(name, unused):
            parameter.requires_grad = False
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _unfreeze_top(model: nn.Module, anatomy: Anatomy, blocks: int, fresh: Sequence[str]) -> None:
    encoder: Any = encoder_in(model, anatomy)
    found = blocks_of(encoder, anatomy)
    check_blocks("finetune", blocks, len(found), layers(encoder.config))
    for block in found[-blocks:]:
        block.requires_grad_(True)
    for path in anatomy.final:
        submodule(encoder, path).requires_grad_(True)
    if isinstance(model, PooledModel):
        model.head.requires_grad_(True)
        return
    if anatomy.pooler and getattr(encoder, anatomy.pooler, None) is not None:
        submodule(encoder, anatomy.pooler).requires_grad_(True)
    for name in [*anatomy.head, *fresh]:
        submodule(model, name).requires_grad_(True)


def _possibly_fresh(model: nn.Module, anatomy: Anatomy) -> list[str]:
    if isinstance(model, PooledModel) or not anatomy.pooler:
        return []
    pooler = getattr(encoder_in(model, anatomy), anatomy.pooler, None)
    return [] if pooler is None else [f"{anatomy.encoder}.{anatomy.pooler}"]
