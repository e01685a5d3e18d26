"""The classes that transformers has for an architecture, and what its config tells of layers."""

from copy import deepcopy
from typing import Any

import torch

from hftl.errors import RecipeError
from hftl.model.parts import TOKENS


def stock_class(config: Any, task: str) -> Any:
    """The transformers class of the config's architecture for a task; None if there is none."""
    from transformers.models.auto import modeling_auto as auto

    kinds = ["TOKEN"] if task == TOKENS else ["SEQUENCE", "IMAGE"]
    for kind in kinds:
        found = getattr(auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING").get(type(config), None)
        if found is not None:
            # DeiT has two; the first is the one without a teacher.
            return found[0] if isinstance(found, (list, tuple)) else found
    return None


def auto_class(config: Any) -> Any:
    """What `AutoModel` makes of the config."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def empty(kind: Any, config: Any) -> Any:
    """A model without weights, in eval mode."""
    with torch.device("meta"):
        return kind(deepcopy(config)).eval()


def encoder_config(config: Any) -> Any:
    """What describes the encoder: the vision part of a composite config, or the config."""
    return getattr(config, "vision_config", config)


def layers(config: Any) -> int:
    """How many layers an input passes; albert has fewer blocks, which its layers share.

    Raises:
        RecipeError: if the config does not tell.
    """
    inner = encoder_config(config)
    told = getattr(inner, "depths", None) or getattr(inner, "num_hidden_layers", None)
    if told is None:
        raise RecipeError(
            f"source.model: the config of {config.model_type!r} tells no number of layers",
            "Use a transformer encoder",
        )
    return sum(told) if isinstance(told, (list, tuple)) else told
