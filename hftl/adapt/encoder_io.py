"""Set what trains of an adapted encoder, merge its adapter, and write it as a checkpoint."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import TaskType
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from hftl.errors import HftlError, RecipeError
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.architectures import count_shared_layers
from hftl.models.encoders import (
    check_block_count,
    get_blocks,
    get_encoder_class,
    get_submodule,
    has_prefix,
)
from hftl.models.heads import LoadedModel, load_class
from hftl.models.lora import wrap_with_lora
from hftl.models.model_parts import unwrap_adapter
from hftl.models.source import SourceModel

ADAPT_METHODS = ("head", "full", "lora", "lora+blocks")
FIELDS_BEYOND_LORA = ("modules_to_save", "trainable_token_indices", "target_parameters", "bias")
"""Fields of `peft.LoraConfig` that train more than low-rank updates of linear layers."""


@dataclass
class MaskedOutput(ModelOutput):
    """Hold a model's predictions of masked tokens or patches.

    Args:
        logits: (places, vocabulary), or (batch, masked patches, values of a patch).
        slots: (places,) int64, which flattened label each place answers; None: row by row.
        penalty: (batch,) float32, added to the loss of each row.
    """

    logits: Tensor | None = None
    slots: Tensor | None = None
    penalty: Tensor | None = None


class MaskedModel(Protocol):
    """Describe what `LanguageModel` and `MaskedAutoencoder` have in common.

    `fixed` are paths in the encoder that never train.
    """

    encoder: Any
    fixed: tuple[str, ...]

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters outside the encoder, by name."""
        ...


def set_trainable(
    model: MaskedModel,
    architecture: ArchitectureSpec,
    method: str,
    blocks: int,
    lora: Mapping[str, object],
) -> None:
    """Set what trains: the head always, and of the encoder what the method says.

    Args:
        model: not yet wrapped for LoRA.
        architecture: of its encoder.
        method: `head` (nothing of the encoder), `full` (all that the objective uses), `lora`
            (adapters in every block), or `lora+blocks` (the same, and the top blocks and the
            final norm whole: ExPLoRA, Khanna et al. 2025, arXiv:2406.10973, section 4).
        blocks: how many top blocks train under `lora+blocks`.
        lora: fields of `peft.LoraConfig`; `target_modules` defaults to all linears of the blocks.

    Raises:
        RecipeError: for an unknown method, too many blocks, or settings that peft refuses or that
            train more than low-rank updates.
    """
    if method not in ADAPT_METHODS:
        raise RecipeError(f"adapt.method={method}", f"Use one of {', '.join(ADAPT_METHODS[1:])}")
    encoder = model.encoder
    encoder.requires_grad_(method == "full")
    for parameter in model.head_parameters().values():
        parameter.requires_grad = True
    top = _select_top_blocks(encoder, architecture, blocks) if method == "lora+blocks" else []
    if method.startswith("lora"):
        model.encoder = _apply_lora(encoder, architecture, lora)
    for module in top:
        module.requires_grad_(True)
    for name, parameter in encoder.named_parameters():
        if has_prefix(name, model.fixed):
            parameter.requires_grad = False


def merge_encoder_state(model: MaskedModel | LoadedModel) -> dict[str, Tensor]:
    """Return the encoder's tensors by their names in `AutoModel`, with the adapter merged in.

    The merged ones are computed on copies; the others are the live tensors, detached. Parts that
    the objective's encoder is built without, as BERT's pooler, are not among them.

    Returns:
        W + s B A for a layer that carries LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1).
    """
    encoder: nn.Module = unwrap_adapter(model.encoder)
    wrapped = {
        name: module for name, module in encoder.named_modules() if isinstance(module, LoraLayer)
    }
    inside = tuple(wrapped)
    state = {name: t for name, t in encoder.state_dict().items() if not has_prefix(name, inside)}
    for name, layer in wrapped.items():
        # A sum with a weight in bf16 would be rounded to it.
        copied: Any = deepcopy(layer)
        copied = copied.float()
        copied.merge()
        state |= {f"{name}.{key}": t for key, t in copied.base_layer.state_dict().items()}
    return state


def write_encoder(source: SourceModel, state: dict[str, Tensor], folder: Path) -> None:
    """Save the source's checkpoint with an adapted encoder, as `AutoModel` loads it.

    Args:
        source: the checkpoint that was adapted. What it lacks, as BERT's pooler after masked-LM
            pre-training, the new one lacks too, so that it is known to be new.
        state: see `merge_encoder_state`.
        folder: where.
    """
    kind = get_encoder_class(source.config)
    model, missing = load_class(source, kind, deepcopy(source.config), {})
    _, strange = model.load_state_dict(state, strict=False)
    if strange:
        raise HftlError(f"the adapted encoder has a weight {strange[0]!r}", "Report this")
    loaded = {name: t for name, t in model.state_dict().items() if name not in missing}
    model.save_pretrained(folder, state_dict=loaded)


def check_encoder_complete(
    source: SourceModel, missing: Iterable[str], fixed: tuple[str, ...]
) -> None:
    """Refuse a checkpoint that lacks weights of the encoder.

    Args:
        source: the checkpoint.
        missing: names in the encoder that it does not have.
        fixed: parts of the encoder that may be missing, since the objective uses none of them.

    Raises:
        RecipeError: naming the first one.
    """
    lost = sorted(name for name in missing if not has_prefix(name, fixed))
    if lost:
        raise RecipeError(
            f"source.model: {source.name} lacks the weights of {lost[0].rsplit('.', 1)[0]}",
            "Give a complete checkpoint of this architecture",
        )


def load_head(model: MaskedModel, file: Path) -> None:
    """Load the head from a safetensors file of its tensors, all of them and no others.

    Raises:
        RecipeError: if they are another head's.
    """
    stored, live = load_file(file), model.head_parameters()
    for name in sorted(stored.keys() | live.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (stored, live)]
        if shapes[0] != shapes[1]:
            raise RecipeError(
                f"adapt: the head in {file} has {name} {shapes[0]}, expected {shapes[1]}",
                "Give every stage of adapt the same objective and decoder",
            )
        live[name].data.copy_(stored[name])


def _select_top_blocks(
    encoder: nn.Module, architecture: ArchitectureSpec, blocks: int
) -> list[nn.Module]:
    """Return the top blocks and the final norm."""
    layers = get_blocks(encoder, architecture)
    check_block_count("adapt", blocks, len(layers), count_shared_layers(encoder.config))
    return [*layers[-blocks:], *(get_submodule(encoder, path) for path in architecture.final_parts)]


def _apply_lora(
    encoder: nn.Module, architecture: ArchitectureSpec, lora: Mapping[str, object]
) -> nn.Module:
    """Return the encoder with an adapter on the linear layers of every block."""
    for key in FIELDS_BEYOND_LORA:
        if lora.get(key) not in (None, "none"):
            raise RecipeError(
                f"adapt.lora.{key}={lora[key]}: adaptation by LoRA trains low-rank updates only",
                "Leave it out, or use method full",
            )
    # peft's class for features passes arguments on that only encoders of texts know.
    task = TaskType.FEATURE_EXTRACTION if architecture.modality == "text" else None
    return wrap_with_lora(encoder, architecture, {**lora, "task_type": task}, "adapt")
