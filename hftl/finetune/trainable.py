"""Set which parameters of a model train, for the strategies of `finetune/strategies.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from hftl.config.finetune import DEFAULT_LORA, Finetune
from hftl.config.refusals import build_recipe_error
from hftl.config.upstream_args import check_lora_values
from hftl.errors import RecipeError
from hftl.finetune.strategies import FINETUNE_STRATEGIES, StrategySpec
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.architectures import count_shared_layers
from hftl.models.encoders import (
    check_block_count,
    get_blocks,
    get_submodule,
    has_prefix,
    hide_padding,
)
from hftl.models.half_weights import hold_in_half
from hftl.models.lora import add_lora
from hftl.models.model_parts import (
    get_encoder,
    get_last_linear,
    get_model_spec,
    list_unused_parts,
    unwrap_adapter,
)
from hftl.models.pooled_model import PooledModel
from hftl.runtime.hardware import is_sharded
from hftl.train.checkpoint import hold_running_statistics
from hftl.train.optimizer import compute_depths


def prepare(
    model: nn.Module,
    strategy: str = "lora",
    blocks: int = 2,
    lora: Mapping[str, object] | None = None,
    fresh: Sequence[str] | None = None,
    **keys: Any,
) -> nn.Module:
    """Set which parameters train under a strategy and return the model, wrapped for `lora`.

    A text encoder then trains without padding on a CPU; but for rounding its outputs stay the same.

    Args:
        model: a stock sequence, token or image classification model of a supported architecture,
            or a `PooledModel`.
        strategy: a name of `FINETUNE_STRATEGIES`, of which `hftl/finetune/strategies.py` says what
            trains.
        blocks: the number of top blocks, for a strategy that trains some of them.
        lora: fields of `peft.LoraConfig`.
        fresh: modules that the checkpoint lacks (`output_loading_info`'s missing keys), which must
            train and be saved. None: head and pooler are taken as such, which is safe.
        keys: further keys of a recipe's section `finetune`.

    Raises:
        RecipeError: for an unsupported architecture or class, an unknown strategy or key, a value
            or a name of `lora`, or too many blocks.
    """
    if strategy not in FINETUNE_STRATEGIES:
        raise RecipeError(
            f"unknown strategy {strategy!r}",
            f"Use {', '.join(FINETUNE_STRATEGIES[:-1])} or {FINETUNE_STRATEGIES[-1]}",
        )
    try:
        values = {"strategy": strategy, "blocks": blocks} | keys
        finetune = Finetune.model_validate(values)
    except ValidationError as error:
        raise build_recipe_error(error, "prepare", Finetune, values) from error
    if not isinstance(lora, Mapping | None):
        raise RecipeError(
            f"prepare: lora is {lora!r}, expected a mapping of fields of peft.LoraConfig",
            "Write lora={'r': 8}",
        )
    # Unlike a recipe's, the adapter of a user's own script need not fit a public base.
    settings = {**DEFAULT_LORA, **(lora or {})}
    check_lora_values(settings, "finetune.lora")
    hide_padding(model)
    return apply_strategy(model, finetune.model_copy(update={"lora": settings}), fresh)


def apply_strategy(
    model: nn.Module, finetune: Finetune, fresh: Sequence[str] | None = None,
    spec: StrategySpec | None = None,
) -> nn.Module:  # fmt: skip
    """Let what a strategy selects train, freeze the rest, and return the model; see `prepare`.

    Args:
        model: the model.
        finetune: the recipe's section.
        fresh: modules that the checkpoint lacks.
        spec: the strategy; None: that of the section.
    """
    spec = spec or finetune.spec
    architecture = get_model_spec(model)
    encoder = get_encoder(model, architecture)
    if fresh is None:
        fresh = _list_untrained_modules(model, architecture)
    model.requires_grad_(False)
    for part in spec.trains(_ModelParts(model, architecture, fresh), finetune):
        part.requires_grad_(True)
    if spec.trains_adapter:
        model = add_lora(model, architecture, finetune.lora, fresh)
    if finetune.freeze_batchnorm:
        hold_running_statistics(model)
    unused = list_unused_parts(model, architecture)
    for name, parameter in encoder.named_parameters():
        if has_prefix(name, unused):
            parameter.requires_grad = False
    if architecture.is_causal and not is_sharded():
        hold_in_half(encoder)
    return model


def count_trainable_parameters(model: nn.Module) -> int:
    """Count the parameters, as numbers, that the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class _ModelParts:
    """Find the parts of a model; see `ModelParts` in `finetune/strategies.py`."""

    model: nn.Module
    architecture: ArchitectureSpec
    fresh: Sequence[str]

    @property
    def last_linear(self) -> nn.Linear:
        """Return the head's last layer."""
        return get_last_linear(self.model, self.architecture)

    def list_top(self, blocks: int) -> list[nn.Module]:
        """Return the top blocks and all that follows them: final norms, pooler, head."""
        model, architecture = self.model, self.architecture
        encoder: Any = get_encoder(model, architecture)
        encoder_blocks = get_blocks(encoder, architecture)
        if blocks:
            whole: Any = encoder if isinstance(model, PooledModel) else unwrap_adapter(model)
            layers = count_shared_layers(whole.config)
            check_block_count("finetune", blocks, len(encoder_blocks), layers)
        top = encoder_blocks[len(encoder_blocks) - blocks :]
        top += [get_submodule(encoder, path) for path in architecture.final_parts]
        if isinstance(model, PooledModel):
            return [*top, *model.head_parts]
        if architecture.pooler and getattr(encoder, architecture.pooler, None) is not None:
            top.append(get_submodule(encoder, architecture.pooler))
        return top + [get_submodule(model, n) for n in (*architecture.head.parts, *self.fresh)]


def _list_untrained_modules(model: nn.Module, architecture: ArchitectureSpec) -> list[str]:
    """Return the pooler's name where a stock class has one, since a checkpoint may lack it."""
    if isinstance(model, PooledModel) or not architecture.pooler:
        return []
    pooler = getattr(get_encoder(model, architecture), architecture.pooler, None)
    return [] if pooler is None else [f"{architecture.encoder}.{architecture.pooler}"]


def split_phases(model: nn.Module) -> list[set[str]]:
    """Return the names of the parameters that train in each phase, of those that train at all.

    First the head and what stands with it after the blocks, then one block more each time, and with
    the lowest block the embeddings.
    """
    depth_of, blocks = compute_depths(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    lowest = [*range(blocks + 1, 1, -1), 0]
    return [{name for name in trains if depth_of[name] >= depth} for depth in lowest]


def count_frozen_blocks(model: nn.Module) -> int:
    """Return how many of the lowest blocks, and all before them, train nothing."""
    return _count_below(model, {n for n, p in model.named_parameters() if p.requires_grad})


def list_frozen_depths(model: nn.Module, finetune: Finetune) -> list[int]:
    """Return how many of the lowest blocks are frozen, more first; several in phases.

    Args:
        model: all that trains at any time requires a gradient.
        finetune: the recipe's section.
    """
    if finetune.spec.schedule == "phases":
        depths = {_count_below(model, part) for part in split_phases(model)}
    else:
        depths = {count_frozen_blocks(model)}
    return sorted(depths - {0}, reverse=True)


def _count_below(model: nn.Module, names: set[str]) -> int:
    depth_of, _ = compute_depths(model)
    return max(0, min((depth_of[name] for name in names), default=0) - 1)
