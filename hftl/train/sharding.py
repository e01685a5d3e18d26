"""How FSDP cuts a model."""

from typing import Any

from torch import nn


def shard_by_block(plugin: Any, model: nn.Module) -> None:
    """Makes each block a unit of FSDP, unless the launcher's configuration names the classes.

    transformers' own list holds the embeddings too, inside which accelerate then shards the word
    embeddings once more, and fails.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
        plugin.transformer_cls_names_to_wrap = [type(blocks[0]).__name__]
