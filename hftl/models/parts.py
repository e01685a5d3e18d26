"""The parts of a model: their names, and the modules that stand under them."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hftl.errors import RecipeError

TOKEN_CLASSIFICATION = "token-classification"
VERSION_FIX = "Use a transformers version in hftl's range"


class HeadSpec(NamedTuple):
    """The head of one stock class; the fields of `ArchitectureSpec` of the same names."""

    head_parts: tuple[str, ...] = ("classifier",)
    last_linear: str = "classifier"
    head_dropout: str | None = "dropout"


@dataclass(frozen=True)
class ArchitectureSpec:
    """The named parts of one family.

    Paths inside the encoder are relative to it, so they hold for `AutoModel` and for the stock
    task class alike; `*` stands for every index of an outer list.

    Args:
        encoder: the encoder's attribute in the stock classification class.
        blocks: path of the ordered list of blocks in the encoder.
        lora_targets: suffixes of every linear layer of a block, and of nothing else on the way
            to the output.
        modality: text or image.
        embeddings: path of the embeddings in the encoder.
        pooler: path of the pooler in the encoder, where `AutoModel` or the stock class has one.
        final: parts of the encoder after the blocks, on the way to the head; the pooler aside.
        unused: parts of the encoder that no output of the stock class depends on.
        head: modules of the stock class after the encoder, new for every task.
        last_linear: the head's last layer, which the probe stands for.
        head_dropout: the dropout directly before it, where there is one.
        tokens: the same three of the token classification class, where there is one.
        add_pooling_layer: `AutoModel` takes that argument.
        interpolate_pos_encoding: forward takes that argument; without it an architecture has one
            image size, or interpolates by itself.
        positions_after_padding: positions count from the padding id on, so that fewer are left.
    """

    encoder: str
    blocks: str
    lora_targets: tuple[str, ...]
    modality: str = "text"
    embeddings: str = "embeddings"
    pooler: str | None = None
    final_parts: tuple[str, ...] = ()
    unused_parts: tuple[str, ...] = ()
    head_parts: tuple[str, ...] = ("classifier",)
    last_linear: str = "classifier"
    head_dropout: str | None = "dropout"
    tokens: HeadSpec | None = HeadSpec()
    add_pooling_layer: bool = False
    interpolate_pos_encoding: bool = False
    has_padding_offset: bool = False

    def for_task(self, task: str) -> "ArchitectureSpec":
        """The anatomy of the task's stock class.

        Raises:
            RecipeError: if there is no such class.
        """
        if task != TOKEN_CLASSIFICATION:
            return self
        if self.tokens is None:
            raise RecipeError(
                f"data.task: {self.encoder} has no class for {TOKEN_CLASSIFICATION}",
                "Use another source.model or another data.task",
            )
        return replace(self, pooler=None, **self.tokens._asdict())


def get_stock_encoder(model: nn.Module, anatomy: ArchitectureSpec) -> nn.Module:
    """The encoder inside a stock task class, or the model itself where it is one."""
    return getattr(model, anatomy.encoder, model)


def list_block_paths(encoder: nn.Module, pattern: str) -> list[str]:
    """The blocks' paths in the encoder, from bottom to top.

    Args:
        encoder: holds the blocks.
        pattern: path of their list; `*` stands for every index of an outer list.

    Raises:
        RecipeError: if no such list stands there.
    """
    found = [""]
    for step in pattern.split(".*."):
        lists = [f"{path}.{step}".removeprefix(".") for path in found]
        found = []
        for path in lists:
            inside = get_submodule(encoder, path)
            if not isinstance(inside, nn.ModuleList):
                raise RecipeError(
                    f"{path} is a {type(inside).__name__}, expected a list of blocks", VERSION_FIX
                )
            found += [f"{path}.{index}" for index in range(len(inside))]
    return found


def get_blocks(encoder: nn.Module, anatomy: ArchitectureSpec) -> list[nn.Module]:
    """The blocks from bottom to top.

    Raises:
        RecipeError: if the modules do not stand where the anatomy says.
    """
    get_submodule(encoder, anatomy.embeddings)
    blocks = [get_submodule(encoder, path) for path in list_block_paths(encoder, anatomy.blocks)]
    for block in blocks:
        linears = list_linear_layers(block)
        missing = linears.symmetric_difference(anatomy.lora_targets)
        if missing:
            raise RecipeError(
                f"a block has {'a' if missing <= linears else 'no'} linear layer "
                f"{min(missing)!r}; it has {', '.join(sorted(linears))}",
                VERSION_FIX,
            )
    return blocks


def list_linear_layers(block: nn.Module) -> set[str]:
    """The paths of a block's linear layers; one that carries an adapter counts once."""
    modules = dict(block.named_modules())
    wrapped = [name for name, module in modules.items() if hasattr(module, "base_layer")]
    return set(wrapped) | {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and not has_prefix(name, tuple(wrapped))
    }


def get_submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        RecipeError: if there is none; the architecture is not what its name says.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise RecipeError(f"{type(module).__name__} has no module {path!r}", VERSION_FIX) from error


def get_placeholder_name(anatomy: ArchitectureSpec) -> str:
    """Return the name of the empty tensor by which the file of a pooled model makes the stock task
    class refuse it: the weight of that class's last layer."""
    return f"{anatomy.last_linear}.weight"


def has_prefix(name: str, paths: tuple[str, ...]) -> bool:
    """Whether a parameter or module is one of the paths or lies below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


# The classes that transformers has for an architecture, and what its config tells of layers.


def get_task_class(config: Any, task: str) -> Any:
    """The transformers class of the config's architecture for a task; None if there is none."""
    from transformers.models.auto import modeling_auto as auto

    kinds = ["TOKEN"] if task == TOKEN_CLASSIFICATION else ["SEQUENCE", "IMAGE"]
    for kind in kinds:
        found = getattr(auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING").get(type(config), None)
        if found is not None:
            # DeiT has two; the first is the one without a teacher.
            return found[0] if isinstance(found, (list, tuple)) else found
    return None


def get_encoder_class(config: Any) -> Any:
    """What `AutoModel` makes of the config."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def build_on_meta(kind: Any, config: Any) -> Any:
    """A model without weights, in eval mode."""
    with torch.device("meta"):
        return kind(deepcopy(config)).eval()


def get_encoder_config(config: Any) -> Any:
    """What describes the encoder: the vision part of a composite config, or the config."""
    return getattr(config, "vision_config", config)


def count_layers(config: Any) -> int:
    """How many layers an input passes; albert has fewer blocks, which its layers share.

    Raises:
        RecipeError: if the config does not tell.
    """
    inner = get_encoder_config(config)
    told = getattr(inner, "depths", None) or getattr(inner, "num_hidden_layers", None)
    if told is None:
        raise RecipeError(
            f"source.model: the config of {config.model_type!r} tells no number of layers",
            "Use a transformer encoder",
        )
    return sum(told) if isinstance(told, (list, tuple)) else told
