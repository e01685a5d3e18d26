"""Set a learning rate for every part of a model, and which weights decay.

Discriminative rates (Howard & Ruder 2018, arXiv:1801.06146, section 3.2), as a decay by layer
(Clark et al. 2020, arXiv:2003.10555, appendix A): for L blocks, rate d^(L + 1 - l) with l = 0 for
the embeddings, i + 1 for block i, and L + 1 for all that stands after the blocks, the head with it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from hftl.errors import RecipeError, suggest_closest
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.encoders import get_submodule, has_prefix, list_block_paths
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.train.facts import LearningRate

NO_DECAY_NAMES = (
    "bias", "position_embedding", "rel_embeddings", "cls_token", "mask_token", "register_tokens",
    "distillation_token", "logit_scale",
)  # fmt: skip
"""Parts of names whose weights do not decay, whatever their shape: `bias` is also in the names of
relative positions' tables, `logit_scale` is Swin v2's temperature of attention."""
RATE_PARTS = ("embeddings", "blocks", "head")
"""Parts of a model that a rate can be set for by name."""
SELF_GROUPING_SETTINGS = {"params", "model", "optimizer_dict"}
"""Settings of optimizers that choose their parameters themselves, as GaLore does."""


@dataclass(frozen=True)
class LayerLearningRates:
    """Hold the learning rates of parts of a model, where they differ from one rate for all.

    Args:
        decay: each block's rate is that of the one above it times this.
        embeddings: the rate of what comes before the blocks; None: by `decay`.
        blocks: the rates of the blocks, from the bottom; the last one holds for all above it.
        head: the rate of all that comes after the blocks.
    """

    decay: float | None = None
    embeddings: float | None = None
    blocks: tuple[float, ...] | None = None
    head: float | None = None

    def rate(self, base: float, depth: int, blocks: int) -> float:
        """Return the learning rate at a depth: 0 the embeddings, `blocks` + 1 the head.

        Raises:
            RecipeError: if there are more rates than blocks.
        """
        check_block_rates("rates", self.blocks, blocks)
        named = self.embeddings if depth == 0 else self.head if depth == blocks + 1 else None
        if 0 < depth <= blocks and self.blocks is not None:
            named = self.blocks[min(depth, len(self.blocks)) - 1]
        if named is not None:
            return named
        return base * (1.0 if self.decay is None else self.decay) ** (blocks + 1 - depth)


def check_block_rates(section: str, rates: Sequence[float] | None, blocks: int) -> None:
    """Refuse more rates than there are blocks.

    Args:
        section: where they are given: `finetune.lr` in a recipe.
        rates: of the blocks, or None.
        blocks: how many the model holds.

    Raises:
        RecipeError: naming the numbers.
    """
    if rates is not None and len(rates) > blocks:
        plural = "s" if blocks > 1 else ""
        raise RecipeError(
            f"{section}.blocks has {len(rates)} rates, but the source model has {blocks} "
            f"block{plural}",
            f"Give at most {blocks}, from the bottom up",
        )


def build_layer_rates(
    decay: float | None, rates: Mapping[str, Any] | None
) -> LayerLearningRates | None:
    """`LayerLearningRates` of a recipe's `layer_decay` and `lr`; None where neither is given.

    Raises:
        RecipeError: for the rate of a part that no model has.
    """
    strange = [str(name) for name in rates or () if name not in RATE_PARTS]
    if strange:
        raise RecipeError(
            f"rates[{strange[0]!r}]{suggest_closest(strange[0], list(RATE_PARTS))}",
            f"Give rates of {', '.join(RATE_PARTS)}",
        )
    if decay is None and not rates:
        return None
    given = dict(rates or {})
    blocks = given.get("blocks")
    return LayerLearningRates(
        decay, given.get("embeddings"), None if blocks is None else tuple(blocks), given.get("head")
    )


def compute_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the depth of every parameter by its name, and the number of blocks.

    A tied parameter has its first name only. What stands in a stage behind its blocks (Swin's
    merging of patches) is as deep as the last of them, what stands before them (ConvNeXt's
    downsampling) as the first, in the first stage as the embeddings; what all blocks read
    (DeBERTa's relative embeddings) as deep as the embeddings.

    Raises:
        RecipeError: if the architecture is not supported.
    """
    architecture = get_model_spec(model)
    encoder = get_encoder(model, architecture)
    paths = list_block_paths(encoder, architecture)
    depth_of = {id(p): len(paths) + 1 for p in model.parameters()}
    depth_of |= {id(p): 0 for p in encoder.parameters()}
    for outer, inside in _find_stages(paths).items():
        before = inside[0] if inside[0] > 1 else 0
        for name, parameter in get_submodule(encoder, outer).named_parameters(outer):
            has_begun = name.startswith(f"{paths[inside[0] - 1]}.")
            before = inside[-1] if has_begun else before
            depth_of[id(parameter)] = before
    for depth, path in enumerate(paths, 1):
        depth_of |= {id(p): depth for p in get_submodule(encoder, path).parameters()}
    for name, parameter in encoder.named_parameters():
        if has_prefix(name, (*architecture.final_parts, *_list_pooler(architecture))):
            depth_of[id(parameter)] = len(paths) + 1
    return {name: depth_of[id(p)] for name, p in model.named_parameters()}, len(paths)


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a weight decays: not vectors, tokens and positions."""
    return parameter.ndim > 1 and not any(part in name for part in NO_DECAY_NAMES)


class ParameterGroup(TypedDict):
    """Hold one group of an optimizer, and the depth of its parameters."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    depth: int


def build_parameter_groups(
    model: nn.Module, base: float, weight_decay: float, rates: LayerLearningRates
) -> list[ParameterGroup]:
    """Return the optimizer's groups, from the embeddings to the head.

    Every trainable parameter is in exactly one of them.

    Args:
        model: not wrapped for many processes.
        base: the learning rate that `rates` starts from.
        weight_decay: of what decays.
        rates: what differs.
    """
    depth_of, blocks = compute_depths(model)
    members: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[depth_of[name], has_weight_decay(name, parameter)].append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates.rate(base, depth, blocks),
            "weight_decay": weight_decay if decayed else 0.0,
            "depth": depth,
        }
        for (depth, decayed), parameters in sorted(members.items())
    ]


def build_optimizer(
    kind: Any, settings: Mapping[str, object], groups: list[ParameterGroup]
) -> torch.optim.Optimizer:
    """Build the optimizer of TrainingArguments over these groups.

    Args:
        kind: its class.
        settings: its arguments.
        groups: see `build_parameter_groups`.

    Raises:
        RecipeError: if it groups parameters in its own way.
    """
    plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not plain or SELF_GROUPING_SETTINGS & settings.keys():
        raise RecipeError(
            "training.optim names an optimizer that groups parameters in its own way, and "
            "layer_decay and lr need groups of theirs",
            "Leave them out, or use adamw_torch",
        )
    return kind(groups, **settings)  # pyright: ignore[reportArgumentType]


def summarize_learning_rates(
    model: nn.Module, base: float, rates: LayerLearningRates
) -> list[LearningRate]:
    """Return the learning rate of each trainable part, from the bottom up."""
    _, blocks = compute_depths(model)
    by_depth: dict[int, list[ParameterGroup]] = defaultdict(list)
    for group in build_parameter_groups(model, base, 1.0, rates):
        by_depth[group["depth"]].append(group)
    return [
        LearningRate(
            part="embeddings" if depth == 0 else "head" if depth > blocks else f"block {depth}",
            parameters=sum(map(_count_parameters, groups)),
            decayed=sum(_count_parameters(group) for group in groups if group["weight_decay"]),
            rate=groups[0]["lr"],
        )
        for depth, groups in by_depth.items()
    ]


def _count_parameters(group: ParameterGroup) -> int:
    return sum(parameter.numel() for parameter in group["params"])


def _find_stages(paths: list[str]) -> dict[str, list[int]]:
    """Return the stages that hold lists of blocks, and the depths of the blocks in each."""
    stages: dict[str, list[int]] = defaultdict(list)
    for depth, path in enumerate(paths, 1):
        outer = path.rsplit(".", 2)[0]
        # Of one list of blocks the outer path is its owner, which holds more than a stage.
        if outer.rsplit(".", 1)[-1].isdigit():
            stages[outer].append(depth)
    return stages


def _list_pooler(architecture: ArchitectureSpec) -> tuple[str, ...]:
    return (architecture.pooler,) if architecture.pooler else ()
