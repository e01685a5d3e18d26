"""Choose which modules run in train mode: frozen ones never do."""

import inspect

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hftl.errors import RecipeError
from hftl.models.heads import get_model_architecture


def list_training_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return each module and whether it runs in train mode: only if all its parameters train.

    A module without parameters follows its parent; LoRA's own dropout, and the one directly
    before the head, are live. So is a layer whose activations are to be recomputed, for itself:
    transformers does so in train mode only.

    Raises:
        RecipeError: for such a layer that is partly frozen and draws dropout in its own forward.
    """
    try:
        head_dropout = get_model_architecture(model).head.dropout
    except RecipeError:  # A user's own model: its head is where its parameters train.
        head_dropout = None
    modes: list[tuple[nn.Module, bool]] = []

    def visit(module: nn.Module, path: str, parent: bool) -> None:
        trains = [parameter.requires_grad for parameter in module.parameters()]
        always = "lora_dropout" in path or path.removeprefix("base_model.model.") == head_dropout
        live = all(trains) if trains else parent or always
        modes.append((module, live or _needs_recompute(module, any(trains))))
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, live)

    visit(model, "", False)
    return modes


def _needs_recompute(module: nn.Module, trains: bool) -> bool:
    """Return whether a partly frozen layer must look as in training, to be recomputed."""
    if not (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
        return False
    forward = inspect.unwrap(type(module).forward)
    if trains and "self.training" in inspect.getsource(forward):
        raise RecipeError(
            f"gradient checkpointing would let the frozen part of {type(module).__name__} draw "
            "dropout",
            "Leave it out, or train everything",
        )
    return trains
