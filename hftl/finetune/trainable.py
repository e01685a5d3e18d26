"""Set which parameters of a model train, for the strategies of `finetune/strategies.py`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hftl.config.finetune import DEFAULT_LORA
from hftl.errors import RecipeError
from hftl.finetune.strategies import FINETUNE_STRATEGIES, STRATEGIES, Trains
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
    """Set which parameters train under a strategy and return the model, wrapped for `lora`.

    Args:
        model: a stock sequence, token or image classification model of a supported architecture,
            or a `PooledModel`.
        strategy: `head` (the last linear layer), `partial` (the top `blocks`, what follows them,
            and the head), `lora` (adapters in every block, and the head), or `full` (all that an
            output depends on); `gradual` is `full`, which `gradual.split_phases` divides.
        blocks: the number of top blocks that train under `partial`.
        lora: fields of `peft.LoraConfig`.
        fresh: modules that the checkpoint lacks (`output_loading_info`'s missing keys), which must
            train and be saved. None: head and pooler are taken as such, which is safe.

    Raises:
        RecipeError: for an unsupported architecture or class, an unknown strategy, or too many
            blocks.
    """
    if strategy not in FINETUNE_STRATEGIES:
        raise RecipeError(
            f"unknown strategy {strategy!r}",
            f"Use {', '.join(FINETUNE_STRATEGIES[:-1])} or {FINETUNE_STRATEGIES[-1]}",
        )
    return unfreeze(model, STRATEGIES[strategy].trains, blocks, lora, fresh)


def unfreeze(
    model: nn.Module, trains: Trains, blocks: int = 2, lora: dict[str, Any] | None = None,
    fresh: Sequence[str] | None = None,
) -> nn.Module:  # fmt: skip
    """Let one kind of parameters train, freeze the others, and return the model; see `prepare`."""
    architecture = get_model_architecture(model)
    encoder = get_encoder(model, architecture)
    if fresh is None:
        fresh = _list_untrained_modules(model, architecture)
    model.requires_grad_(trains == "everything")
    match trains:
        case "adapters":
            model = add_lora(model, architecture, DEFAULT_LORA | (lora or {}), fresh)
        case "head":
            get_last_linear(model, architecture).requires_grad_(True)
        case "top_blocks":
            _unfreeze_top(model, architecture, blocks, fresh)
        case "everything" | "nothing":
            pass
    unused = list_unused_parts(model, architecture)
    for name, parameter in encoder.named_parameters():
        if has_prefix(name, unused):
            parameter.requires_grad = False
    return model


def count_trainable_parameters(model: nn.Module) -> int:
    """Count the parameters, as numbers, that the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _unfreeze_top(
    model: nn.Module, architecture: ArchitectureSpec, blocks: int, fresh: Sequence[str]
) -> None:
    """Unfreeze the top blocks and all that follows them: final norms, pooler, head."""
    encoder: Any = get_encoder(model, architecture)
    encoder_blocks = get_blocks(encoder, architecture)
    check_block_count("finetune", blocks, len(encoder_blocks), count_layers(encoder.config))
    for block in encoder_blocks[-blocks:]:
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
    """Return the pooler's name where a stock class has one, since a checkpoint may lack it."""
    if isinstance(model, PooledModel) or not architecture.pooler:
        return []
    pooler = getattr(get_encoder(model, architecture), architecture.pooler, None)
    return [] if pooler is None else [f"{architecture.encoder}.{architecture.pooler}"]
