"""LoRA on an encoder: what is wrapped, what is saved beside it."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from hftl.errors import RecipeError
from hftl.model.anatomy import Anatomy, blocks_of, encoder_of
from hftl.model.head import PooledModel


def add_lora(
    model: nn.Module, anatomy: Anatomy, lora: dict[str, Any], fresh: Sequence[str]
) -> nn.Module:
    """Wraps the linear layers of every block; head and fresh modules train and are saved whole.

    Args:
        model: a `PooledModel`, whose encoder is wrapped, or a stock task class.
        anatomy: where its parts lie.
        lora: fields of `peft.LoraConfig`; `target_modules` defaults to all linears of the blocks.
        fresh: modules whose weights the checkpoint does not have.

    Raises:
        RecipeError: if peft refuses the settings, or wraps another number of layers than asked.
    """
    given = dict(lora)
    if given.get("target_modules") in (None, "all-linear"):
        given["target_modules"] = list(anatomy.lora_targets)
    pooled = isinstance(model, PooledModel)
    saved = set(given.pop("modules_to_save", None) or [])
    if not pooled:
        saved |= {_suffix(name, anatomy) for name in [*anatomy.head, *fresh]}
    task = TaskType.FEATURE_EXTRACTION if pooled else TaskType.SEQ_CLS
    wrapped: Any = model.encoder if pooled else model
    try:
        config = LoraConfig(**given, task_type=task, modules_to_save=sorted(saved) or None)
        adapted = get_peft_model(wrapped, config)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"finetune.lora: peft refuses it: {str(error).splitlines()[0]}", "Correct the section"
        ) from error
    if lora.get("target_modules") in (None, "all-linear"):
        _check_wrapped(adapted, anatomy, given)
    if not pooled:
        return adapted
    model.encoder = adapted
    for parameter in model.head.parameters():
        parameter.requires_grad = True
    return model


def wrapped_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that carry a LoRA adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def adapter_of(model: nn.Module) -> PeftModel:
    """The peft model inside."""
    found = model.encoder if isinstance(model, PooledModel) else model
    if not isinstance(found, PeftModel):
        raise TypeError(f"{type(found).__name__} carries no adapter")
    return found


def _suffix(name: str, anatomy: Anatomy) -> str:
    """A module's path without the encoder's name; peft matches by suffix.

    A module inside the head is saved with its whole head: peft wraps no module twice.
    """
    inside = name.removeprefix(f"{anatomy.encoder}.")
    return next((head for head in anatomy.head if inside.startswith(f"{head}.")), inside)


def _check_wrapped(adapted: Any, anatomy: Anatomy, given: dict[str, Any]) -> None:
    blocks = blocks_of(encoder_of(adapted.base_model.model, anatomy), anatomy)
    chosen = given.get("layers_to_transform")
    layers = len(blocks) if chosen is None else len([chosen] if isinstance(chosen, int) else chosen)
    expected = layers * len(anatomy.lora_targets)
    found = len(wrapped_layers(adapted))
    if found != expected and not given.get("exclude_modules"):
        raise RecipeError(
            f"LoRA wrapped {found} layers, expected {expected}", "Name finetune.lora.target_modules"
        )
