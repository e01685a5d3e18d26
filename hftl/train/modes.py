"""Which modules run in train mode: frozen ones never do."""

from torch import nn

from hftl.errors import RecipeError
from hftl.model.head import anatomy_in


def training_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Which modules run in train mode: those whose every parameter trains.

    A module without parameters follows its parent; LoRA's own dropout, and the one directly
    before the head, are live.
    """
    try:
        head_dropout = anatomy_in(model).head_dropout
    except RecipeError:  # A user's own model: its head is where its parameters train.
        head_dropout = None
    modes: list[tuple[nn.Module, bool]] = []

    def visit(module: nn.Module, path: str, parent: bool) -> None:
        trains = [parameter.requires_grad for parameter in module.parameters()]
        always = "lora_dropout" in path or path.removeprefix("base_model.model.") == head_dropout
        live = all(trains) if trains else parent or always
        modes.append((module, live))
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, live)

    visit(model, "", False)
    return modes
