"""How FSDP cuts a model."""

import os
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hftl.errors import RecipeError


def check_sharded(is_sharded: bool, args: TrainingArguments) -> None:
    """Refuses a launch that asks for FSDP where there is none.

    Raises:
        RecipeError: naming the device.
    """
    asked = args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and not is_sharded:
        raise RecipeError(
            f"the launcher asks for FSDP, and accelerate has none on {args.device}",
            "Launch with recipes/accelerate/multi_gpu.yaml, or on GPUs",
        )


def check_whole(cut: bool) -> None:
    """Refuses terms on weights that FSDP cuts.

    Raises:
        RecipeError: if it does.
    """
    if cut:
        raise RecipeError(
            "retain does not run under FSDP, which cuts the weights it looks at",
            "Launch with recipes/accelerate/multi_gpu.yaml",
        )


def shard_by_block(plugin: Any, model: nn.Module) -> None:
    """Makes each block a unit of FSDP, unless the launcher's configuration names the classes.

    transformers' own list holds the embeddings too, inside which accelerate then shards the word
    embeddings once more, and fails.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
        plugin.transformer_cls_names_to_wrap = [type(blocks[0]).__name__]
