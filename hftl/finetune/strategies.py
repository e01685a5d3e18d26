"""The strategies: which parameters train. `prepare` works on any supported transformers model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hftl.config.finetune import DEFAULT_LORA
from hftl.errors import RecipeError
from hftl.models.architectures import ArchitectureSpec, count_layers
from hftl.models.encoders import check_block_count, get_blocks, get_submodule, has_prefix
from hftl.models.heads import (
    PooledModel,
    get_encoder,
    get_last_linear,
    get_model_architecture,
    list_unused_parts,
)
from hftl.models.lora import add_lora


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
            output depends on); `gradual` is `full`, of which `gradual.split_phases` train in turn.
        blocks: how many top blocks train under `partial`.
        lora: fields of `peft.LoraConfig`.
        fresh: modules that the checkpoint did not have (`output_loading_info`'s missing keys),
            which must train and be saved. None: head and pooler are taken as such, which is safe.

    Raises:
        RecipeError: for an unsupported architecture or class, an unknown strategy, or too many
            blocks.
    """
    architecture = get_model_architecture(model)
    encoder = get_encoder(model, architecture)
    if fresh is None:
        fresh = _list_untrained_modules(model, architecture)
    everything = strategy in ("full", "gradual")
    model.requires_grad_(everything)
    if strategy == "lora":
        model = add_lora(model, architecture, DEFAULT_LORA | (lora or {}), fresh)
    elif strategy == "head":
        get_last_linear(model, architecture).requires_grad_(True)
    elif strategy == "partial":
        _unfreeze_top(model, architecture, blocks, fresh)
    elif not everything:
        raise RecipeError(
            f"unknown strategy {strategy!r}", "Use head, partial, gradual, lora or full"
        )
    unused = list_unused_parts(model, architecture)
    for name, parameter in encoder.named_parameters():
        if has_prefix(name, unused):
            parameter.requires_grad = False
    return model


def count_trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _unfreeze_top(
    model: nn.Module, architecture: ArchitectureSpec, blocks: int, fresh: Sequence[str]
) -> None:
    encoder: Any = get_encoder(model, architecture)
    found = get_blocks(encoder, architecture)
    check_block_count("finetune", blocks, len(found), count_layers(encoder.config))
    for block in found[-blocks:]:
        block.requires_grad_(True)
    for path in architecture.final_parts:
        get_submodule(encoder, path).requires_grad_(True)
    if isinstance(model, PooledModel):
        model.head.requires_grad_(True)
        return
    if architecture.pooler and getattr(encoder, architecture.pooler, None) is not None:
        get_submodule(encoder, architecture.pooler).requires_grad_(True)
    for name in [*architecture.head.parts, *fresh]:
        get_submodule(model, name).requires_grad_(True)


def _list_untrained_modules(model: nn.Module, architecture: ArchitectureSpec) -> list[str]:
    if isinstance(model, PooledModel) or not architecture.pooler:
        return []
    pooler = getattr(get_encoder(model, architecture), architecture.pooler, None)
    return [] if pooler is None else [f"{architecture.encoder}.{architecture.pooler}"]
