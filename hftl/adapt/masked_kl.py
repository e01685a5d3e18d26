"""KL to what the original's masked-language head says at hidden places of the same inputs."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from hftl.adapt.mlm import MaskedLM
from hftl.data.masking import Masking, corrupt
from hftl.errors import RecipeError
from hftl.model.head import PooledModel, anatomy_in, encoder_in
from hftl.retain.kl import kl_rows
from hftl.retain.view import in_eval


class MaskedKL:
    """T^2 KL of the vocabulary's distributions, the mean over a row's hidden places.

    Both see the same hidden words, a function of (seed, epoch, row); the head is the original's,
    frozen (Jin et al. 2022, arXiv:2110.08534, section 4.2). It costs a pass of the model and one of
    the original at every step.

    Args:
        weight: of the mean over rows.
        masked: the original with its trained masked-LM head; it is frozen.
        masking: which tokens are hidden.
        seed: of the masks.
        temperature: see `KLToOriginal`.
        direction: `forward` or `reverse`.
        inputs: `target`, `general` or `both`.
        apart: whether the original is another than the weights that training starts from.
    """

    def __init__(
        self, weight: float, masked: MaskedLM, masking: Masking, seed: int,
        temperature: float = 1.0, direction: str = "forward", inputs: str = "target",
        apart: bool = False,
    ) -> None:  # fmt: skip
        self.weight = weight
        self.inputs = inputs
        self._original = masked.requires_grad_(False).eval()
        self._masking = masking
        self._seed = seed
        self._temperature = temperature
        self._direction = direction
        self._apart = apart
        self._now = masked
        self._adapter: PeftModel | None = None

    def begin(self, model: nn.Module) -> None:
        """Puts the head on the encoder that trains; with an adapter that is the original's too,
        unless it is another.

        Raises:
            RecipeError: if the two encoders are not of one architecture.
        """
        encoder: Any = encoder_in(model, anatomy_in(model))
        if encoder.config.model_type != self._original.encoder.config.model_type:
            raise RecipeError(
                f"kl.on=mlm: the head is of {self._original.encoder.config.model_type}, the model "
                f"of {encoder.config.model_type}",
                "Give the masked-LM model of the same source",
            )
        device = next(model.parameters()).device
        self._original.to(device)
        adapter = model.encoder if isinstance(model, PooledModel) else model
        if isinstance(adapter, PeftModel) and not self._apart:
            self._adapter = adapter
        else:
            self._now = deepcopy(self._original)
        self._now.encoder = encoder

    def values(self, batch: dict[str, Any], chosen: Tensor, epoch: int) -> Tensor:
        """(chosen rows,) float32; 0 where nothing of a row was hidden.

        Args:
            batch: `input_ids` and `attention_mask`, (batch, length), and `row`, their numbers.
            chosen: (batch,) bool.
            epoch: of the masks.
        """
        ids, mask = batch["input_ids"][chosen], batch["attention_mask"][chosen]
        shown, flat = self._hidden(ids, mask, batch["row"][chosen].tolist(), epoch)
        rows = ids.new_zeros(len(ids), dtype=torch.float32)
        if not len(flat):
            return rows
        now = self._now(shown, flat, flat, mask).logits
        with torch.no_grad(), in_eval(self._original), self._off():
            original = self._original(shown, flat, flat, mask).logits
        each = kl_rows(original, now, self._temperature, self._direction)
        of_row = flat // ids.shape[1]
        places = rows.index_add(0, of_row, torch.ones_like(each)).clamp(min=1)
        return rows.index_add(0, of_row, each) / places

    def _off(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter is None else self._adapter.disable_adapter()

    def _hidden(
        self, ids: Tensor, mask: Tensor, numbers: list[int], epoch: int
    ) -> tuple[Tensor, Tensor]:
        """The ids as they are shown, and the hidden places in the flattened ids.

        Padding takes no part in the draw: how far a row is padded depends on its batch, and what is
        hidden must not.
        """
        shown, flat = ids.cpu().numpy().copy(), []
        for place, (number, seen) in enumerate(zip(numbers, mask.cpu().numpy(), strict=True)):
            draw = np.random.default_rng([self._seed, epoch, number])
            real = np.flatnonzero(seen > 0)
            tokens, positions = corrupt(
                shown[place, real], np.zeros(len(real), np.int64), self._masking, draw
            )
            shown[place, real] = tokens
            flat.append(real[positions] + place * ids.shape[1])
        found = np.concatenate(flat) if flat else np.zeros(0, np.int64)
        return torch.from_numpy(shown).to(ids.device), torch.from_numpy(found).to(ids.device)
