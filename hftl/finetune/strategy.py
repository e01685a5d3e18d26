"""The strategies: which parameters train. `prepare` works on any supported transformers model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hftl.errors import RecipeError
from hftl.model.adapters import add_lora
from hftl.model.anatomy import Anatomy, anatomy_of, blocks_of, encoder_of, submodule
from hftl.model.head import PooledModel, last_linear
from hftl.sections import LORA


def prepare(
    model: nn.Module,
    strategy: str = "lora",
    blocks: int = 2,
    lora: dict[str, Any] | None = None,
    fresh: Sequence[str] | None = None,
) -> nn.Module:
    """Sets what trains and returns the model, wrapped where the strategy is `lora`.

    Args:
        model: a stock sequence-classification model of a supported architecture, or a
            `PooledModel`.
        strategy: `head` (the last linear layer), `partial` (the top `blocks`, pooler and head),
            `lora` (adapters in every block, and the head), or `full`.
        blocks: how many top blocks train under `partial`.
        lora: fields of `peft.LoraConfig`.
        fresh: modules that the checkpoint did not have (`output_loading_info`'s missing keys),
            which must train and be saved. None: head and pooler are taken as such, which is safe.

    Raises:
        RecipeError: for an unsupported architecture, an unknown strategy, or too many blocks.
    """
    encoder: Any = model.encoder if isinstance(model, PooledModel) else model
    anatomy = anatomy_of(encoder.config.model_type)
    if fresh is None:
        fresh = _possibly_fresh(model, anatomy)
    if strategy == "full":
        model.requires_grad_(True)
        return model
    model.requires_grad_(False)
    if strategy == "lora":
        return add_lora(model, anatomy, LORA | (lora or {}), fresh)
    if strategy == "head":
        last_linear(model, anatomy).requires_grad_(True)
        return model
    if strategy == "partial":
        _unfreeze_top(model, anatomy, blocks, fresh)
        return model
    raise RecipeError(f"unknown strategy {strategy!r}", "Use head, partial, lora or full")


def check_blocks(wanted: int, present: int) -> None:
    """Refuses to train more blocks than there are.

    Raises:
        RecipeError: naming both numbers.
    """
    if wanted > present:
        raise RecipeError(
            f"finetune.blocks={wanted}, but the source model has {present} blocks",
            f"Use at most {present}, or strategy full",
        )


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _unfreeze_top(model: nn.Module, anatomy: Anatomy, blocks: int, fresh: Sequence[str]) -> None:
    encoder = model.encoder if isinstance(model, PooledModel) else encoder_of(model, anatomy)
    found = blocks_of(encoder, anatomy)
    check_blocks(blocks, len(found))
    for block in found[-blocks:]:
        block.requires_grad_(True)
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
    pooler = getattr(encoder_of(model, anatomy), anatomy.pooler, None)
    return [] if pooler is None else [f"{anatomy.encoder}.{anatomy.pooler}"]
