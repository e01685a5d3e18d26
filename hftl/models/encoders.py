"""Find the encoder, its blocks and their layers in a model, and its classes in transformers."""

import inspect
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hftl.errors import RecipeError
from hftl.models import packing
from hftl.models.architecture_spec import (
    TOKEN_CLASSIFICATION,
    WEIGHT_LAYERS,
    ArchitectureSpec,
)
from hftl.models.architectures import ARCHITECTURES, get_config_spec
from hftl.models.fused_block import FusedBlock, can_fuse
from hftl.train.hf_compat import get_attention_implementation

VERSION_FIX = "Use a transformers version in hftl's range"


def get_stock_encoder(model: nn.Module, architecture: ArchitectureSpec) -> nn.Module:
    """Return the encoder inside a stock task class, or the model itself where it is one."""
    return getattr(model, architecture.encoder, model)


def list_block_paths(encoder: nn.Module, architecture: ArchitectureSpec) -> list[str]:
    """Return the paths of the blocks in the encoder, from bottom to top.

    Raises:
        RecipeError: if a path of the spec does not lead to a list of modules.
    """
    patterns = architecture.blocks
    if architecture.blocks_are_listed:
        return list(patterns)
    paths: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        outer = [""]
        for step in pattern.split(".*."):
            outer = [
                f"{path}.{index}"
                for prefix in outer
                for path in [f"{prefix}.{step}".removeprefix(".")]
                for index in range(_count_children(encoder, path))
            ]
        paths += outer
    return paths


def _count_children(encoder: nn.Module, path: str) -> int:
    modules = get_submodule(encoder, path)
    if not isinstance(modules, (nn.ModuleList, nn.Sequential)):
        kind = type(modules).__name__
        raise RecipeError(f"{path} is a {kind}, expected a list of blocks", VERSION_FIX)
    return len(modules)


def get_blocks(encoder: nn.Module, architecture: ArchitectureSpec) -> list[nn.Module]:
    """Return the blocks from bottom to top, after comparing their layers with the spec.

    Raises:
        RecipeError: if the blocks are elsewhere, or hold other layers, than the spec says.
    """
    blocks = [get_submodule(encoder, path) for path in list_block_paths(encoder, architecture)]
    targets = set(architecture.lora_targets)
    optional = (*architecture.optional_targets, *architecture.skipped_layers)
    for block in blocks:
        layers = list_weight_layers(block)
        strange = {name for name in layers - targets if not has_suffix(name, optional)}
        for name in sorted(strange | (targets - layers)):
            raise RecipeError(
                f"a block has {'a' if name in strange else 'no'} linear layer {name!r}; it has "
                f"{', '.join(sorted(layers))}",
                VERSION_FIX,
            )
    return blocks


def list_weight_layers(block: nn.Module) -> set[str]:
    """Return the paths of a block's linear and convolutional layers.

    A layer that carries an adapter counts once.
    """
    modules = dict(block.named_modules())
    wrapped = tuple(name for name, module in modules.items() if hasattr(module, "base_layer"))
    plain = {name for name, module in modules.items() if isinstance(module, WEIGHT_LAYERS)}
    return {*wrapped, *(name for name in plain if not has_prefix(name, wrapped))}


def get_submodule(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        RecipeError: if there is none: the architecture is not what its name says.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise RecipeError(f"{type(module).__name__} has no module {path!r}", VERSION_FIX) from error


def has_prefix(name: str, paths: tuple[str, ...]) -> bool:
    """Return whether a parameter or module is one of the paths or lies below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether the path of a module is one of the suffixes or ends with one."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def get_task_class(config: Any, task: str) -> Any:
    """Return the class of transformers for the config and the task; None if there is none."""
    import transformers

    kinds = ["TOKEN"] if task == TOKEN_CLASSIFICATION else ["SEQUENCE", "IMAGE"]
    for kind in kinds:
        mapping = getattr(transformers, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING")
        classes = mapping.get(type(config), None)
        if classes is not None:
            # DeiT has two; the first is the one without a teacher.
            return classes[0] if isinstance(classes, (list, tuple)) else classes
    return None


def get_encoder_class(config: Any) -> Any:
    """Return the class that `AutoModel` builds of the config."""
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def build_on_meta(kind: Any, config: Any) -> Any:
    """Build a model without weights, in eval mode."""
    with torch.device("meta"):
        return kind(deepcopy(config)).eval()


def count_blocks(config: Any) -> int:
    """Return how many blocks the architecture builds, counted without weights.

    Raises:
        RecipeError: if the architecture is not supported.
    """
    architecture = get_config_spec(config)
    kind = get_task_class(config, "classification") or get_encoder_class(config)
    model = build_on_meta(kind, config)
    return len(get_blocks(get_stock_encoder(model, architecture), architecture))


def check_block_count(section: str, requested: int, present: int, passed: int) -> None:
    """Refuse to train more blocks than there are.

    Args:
        section: of the recipe: `finetune` or `adapt`.
        requested: blocks to train.
        present: blocks that the model holds.
        passed: layers that share the blocks; 0 where each block is one layer.

    Raises:
        RecipeError: naming the numbers.
    """
    if not 1 <= requested <= present:
        plural = "s" if present > 1 else ""
        shared = f", which its {passed} layers share" if passed > present else ""
        raise RecipeError(
            f"{section}.blocks={requested}, but the source model has {present} block{plural}"
            f"{shared}",
            f"Use at most {present}, or train everything (full)",
        )


# Padding of texts.


def accepts_attention_mask(encoder: Any) -> bool:
    """Return whether the forward of a text encoder takes an attention mask; FNet's does not.

    Args:
        encoder: a transformers model or its class.
    """
    return "attention_mask" in inspect.signature(encoder.forward).parameters


def hide_padding(model: nn.Module) -> None:
    """Make text encoders run without padding: those that would read it, and those that can pack.

    FNet (Lee-Thorp et al. 2022, arXiv:2105.03824) has no attention mask and mixes all positions of
    a row, so that a text's output would depend on the padding that its batch needs. It then runs
    the rows of one length at a time, cut to that length. Others compute padding for nothing; see
    `packing`. A class keeps its name, which transformers writes into config.json.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _is_unchanged_text_encoder(module):
            spec = ARCHITECTURES.get(module.config.model_type)
            if spec is None or spec.modality != "text":
                continue  # a part of a vision-language model
            if not accepts_attention_mask(module):
                _mix_in(module, _RunsByLength)
            elif _can_pack(module, spec):
                module.set_attn_implementation(packing.NAME)
                _mix_in(module, packing.PackedEncoder)
                vars(module)["has_padding_offset"] = spec.has_padding_offset
                _fuse_blocks(module, spec)


def _can_pack(encoder: PreTrainedModel, spec: ArchitectureSpec) -> bool:
    """Return whether an encoder packs; not with another attention, which its owner chose."""
    is_decoder = getattr(encoder.config, "is_decoder", False)
    attention = get_attention_implementation(encoder.config)
    return spec.packs and attention in ("sdpa", packing.NAME) and not is_decoder


def _fuse_blocks(encoder: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Let packed rows run each block of a packed encoder as one function, where it is known."""
    layout = spec.post_norm
    if layout is not None:
        for block in get_blocks(encoder, spec):
            if can_fuse(block, layout, encoder.config):
                _mix_in(block, FusedBlock)
                vars(block)["layout"] = layout


def _is_unchanged_text_encoder(model: Any) -> bool:
    return (
        model.base_model is model
        and model.main_input_name == "input_ids"
        and not isinstance(model, (_RunsByLength, packing.PackedEncoder))
    )


def _mix_in(module: Any, forward: type) -> None:
    """Let a module run the forward of another class; its own class keeps its name."""
    kind = type(module)

    def reduce(self: Any, protocol: Any) -> Any:
        # The name is that of the stock class: pickle is given both classes instead.
        if type(self) is not mixed:
            return super(mixed, self).__reduce_ex__(protocol)
        return _create_mixed, (forward, kind), self.__getstate__()

    namespace = {"__module__": kind.__module__, "__reduce_ex__": reduce}
    mixed = type(kind.__name__, (forward, kind), namespace)
    module.__class__ = mixed


def _create_mixed(forward: type, kind: Any) -> Any:
    """Return a module of a class with another's forward, still without its content."""
    module = kind.__new__(kind)
    _mix_in(module, forward)
    return module


class _RunsByLength:
    """Replace the forward of such an encoder; mixed into the encoder's own class."""

    config: Any

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, **more: Any
    ) -> BaseModelOutputWithPooling:
        """Return hidden states (batch, length, width), 0 at padding, and the pooler's output.

        Args:
            input_ids: (batch, length), padded on the right.
            token_type_ids: (batch, length).
            more: further arguments of the encoder; `return_dict` is always true.
        """
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(_count_tokens(input_ids, self.config.pad_token_id)):
            rows_of[length].append(row)
        hidden = pooled = None
        plain: Any = super()
        for length, rows in rows_of.items():
            types = None if token_type_ids is None else token_type_ids[rows, :length]
            output = plain.forward(
                input_ids[rows, :length], token_type_ids=types, **more | {"return_dict": True}
            )
            part = output.last_hidden_state
            if hidden is None:
                hidden = part.new_zeros(*input_ids.shape, part.shape[-1])
            hidden[rows, :length] = part
            if output.pooler_output is not None:
                if pooled is None:
                    pooled = part.new_zeros(len(input_ids), output.pooler_output.shape[-1])
                pooled[rows] = output.pooler_output
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,  # pyright: ignore[reportArgumentType]
            pooler_output=pooled,  # pyright: ignore[reportArgumentType]
        )


def _count_tokens(input_ids: Tensor, pad_id: int) -> list[int]:
    """Return the length of each row up to its last token that is not padding, at least 1."""
    places = (input_ids != pad_id) * input_ids.new_ones(input_ids.shape).cumsum(1)
    return places.amax(1).clamp(min=1).tolist()
