"""What retention compares of a model on a batch: each row's embedding, and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.models.heads import (
    PooledModel,
    get_encoder,
    get_model_architecture,
    pool_tokens,
    unwrap_adapter,
)

BATCH_METADATA = ("row", "general", "told")
"""What a batch holds for the terms, beside the model's inputs and the labels: the rows' numbers,
which are general data, and which tokens words are told by."""


@dataclass(frozen=True)
class ModelOutputs:
    """A model's outputs on some rows.

    Args:
        embedding: (rows, width) float32: of a text the mean of its last hidden states (of a
            `PooledModel` what it pools), of a picture what the head sees; None where nothing asked.
        logits: (rows, outputs) or (rows, length, outputs) float32.
    """

    embedding: Tensor | None
    logits: Tensor

    def select(self, chosen: Tensor) -> "ModelOutputs":
        """These rows only."""
        embedding = None if self.embedding is None else self.embedding[chosen]
        return ModelOutputs(embedding, self.logits[chosen])


class EmbeddingHook:
    """Catches each row's embedding whenever the model runs.

    Raises:
        RecipeError: if the architecture is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self._caught: Any = None
        architecture = get_model_architecture(model)
        self._is_text = architecture.modality == "text" and not isinstance(model, PooledModel)
        if self._is_text:
            where = get_encoder(model, architecture)
            self._hook = where.register_forward_hook(self._catch_output)
        else:
            where = _find_head_module(model, architecture.head.last_linear)
            self._hook = where.register_forward_pre_hook(self._catch_input)

    def read_outputs(self, outputs: Any, mask: Tensor | None) -> ModelOutputs:
        """The last run's embeddings beside its outputs, in fp32.

        Args:
            outputs: what the model gave.
            mask: (batch, length), 1 where a token counts; None for pictures.
        """
        caught, self._caught = self._caught, None
        if caught is None:
            raise RecipeError(
                "the model ran without the part that retention looks at", "Report this"
            )
        if self._is_text:
            seen = torch.ones(caught.shape[:2]) if mask is None else mask
            caught = pool_tokens(caught.float(), seen.to(caught.device), "mean")
        return ModelOutputs(caught.float(), outputs.logits.float())

    def close(self) -> None:
        """Takes the hook off."""
        self._hook.remove()

    def _catch_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._caught = output[0]

    def _catch_input(self, module: nn.Module, args: Any) -> None:
        self._caught = args[0]


def _find_head_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path or, where peft keeps two copies of it, what chooses between them."""
    if isinstance(model, PooledModel):
        return model.head
    found: Any = unwrap_adapter(model)
    for name in path.split("."):
        found = getattr(found, name)
        if isinstance(found, ModulesToSaveWrapper):
            return found
    return found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
