"""Find encoder, head and architecture of a model: stock, pooled, or under an adapter."""

from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hftl.errors import RecipeError
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION, ArchitectureSpec
from hftl.models.architectures import get_config_spec
from hftl.models.encoders import (
    get_stock_encoder,
    get_task_class,
)
from hftl.models.pooled_model import PooledModel


def unwrap_adapter(model: nn.Module) -> nn.Module:
    """Return the model under a peft adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def count_embedded_tokens(model: nn.Module) -> int:
    """Return how many tokens a text encoder, or a task class around one, embeds."""
    # Of the weight: LoRA on the embedding stands before it without a count of its own.
    embedding: Any = model.get_input_embeddings()  # pyright: ignore
    return embedding.weight.shape[0]


def get_encoder(model: nn.Module, architecture: ArchitectureSpec) -> nn.Module:
    """Return the encoder of a `PooledModel`, a stock task class or an adapter over either."""
    if isinstance(model, PooledModel):
        return unwrap_adapter(model.encoder)
    return get_stock_encoder(unwrap_adapter(model), architecture)


def get_last_linear(model: nn.Module, architecture: ArchitectureSpec) -> nn.Linear:
    """Return the head's last layer; under an adapter, the copy that trains."""
    return get_last_linear_copies(model, architecture)[-1]


def get_last_linear_copies(model: nn.Module, architecture: ArchitectureSpec) -> list[nn.Linear]:
    """Return the copies of the head's last layer.

    Under an adapter these are the original and then the one that trains; else the layer alone.
    """
    if isinstance(model, PooledModel):
        return [model.head]
    copies: list[Any] = [unwrap_adapter(model)]
    for name in architecture.head.last_linear.split("."):
        copies = [getattr(copy, name) for copy in copies]
        if isinstance(copies[-1], ModulesToSaveWrapper):
            (wrapper,) = copies
            trained = wrapper.modules_to_save[wrapper.active_adapters[0]]
            copies = [wrapper.original_module, trained]
    return copies


def get_model_spec(model: nn.Module) -> ArchitectureSpec:
    """Return the spec of a `PooledModel`, a stock task class or an adapter over either.

    Raises:
        RecipeError: if the architecture is not supported, or the class is none of those.
    """
    inner = unwrap_adapter(model.encoder if isinstance(model, PooledModel) else model)
    config = getattr(inner, "config", None)
    if config is not None:
        if isinstance(model, PooledModel):
            return get_config_spec(config)
        for task in ("classification", TOKEN_CLASSIFICATION):
            stock = get_task_class(config, task)
            if stock is not None and isinstance(inner, stock):
                return get_config_spec(config).for_task(task)
    raise RecipeError(
        f"{type(inner).__name__} is no sequence, token or image classification model of "
        "transformers",
        "Load it with one of AutoModelFor{Sequence,Token,Image}Classification",
    )


def list_unused_parts(model: nn.Module, architecture: ArchitectureSpec) -> tuple[str, ...]:
    """Return the parts of the encoder that no output of this model depends on."""
    if isinstance(model, PooledModel) and architecture.pooler:
        return (*architecture.unused_parts, architecture.pooler)
    return architecture.unused_parts
