"""Compute KL on heads that the source brings along: masked language, and CLIP's named classes."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from hftl.config.retain import KL
from hftl.data.masking import MaskingSpec, mask_tokens
from hftl.errors import RecipeError
from hftl.models.image_architectures import IMAGE_HALVES
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.models.pooled_model import PooledModel
from hftl.retain.kl import RowKL
from hftl.retain.original import eval_mode
from hftl.retain.regularizer import BATCH_METADATA, RegularizerContext, Step, TrainingStart


class ZeroShotHead(nn.Module):
    """Classify images by class names, as CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3).

    Args:
        projection: from the image tower's pooled output to the space shared with texts.
        texts: (classes, width) of length 1.
        scale: what cosines are multiplied by.
        bias: what is added to them; it is the same for all classes.
    """

    def __init__(
        self, projection: nn.Module, texts: Tensor, scale: float, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("texts", texts)
        self.scale, self.bias = scale, bias

    def forward(self, pooled: Tensor) -> Tensor:
        """Return (rows, classes) logits of (rows, width) pooled outputs."""
        texts: Any = self.texts
        embedding = F.normalize(self.projection(pooled).float(), dim=-1)
        return self.scale * embedding @ texts.T + self.bias


class PretrainingHeadKL(RowKL):
    """Penalize KL on a head that the source brings along, and that fine-tuning does not use.

    It costs a pass of the encoder and one of the original's at every step.
    """

    def __init__(self, config: KL) -> None:
        self.config = config
        self._adapter: PeftModel | None = None

    def prepare(self, start: TrainingStart) -> None:
        """Refuse inputs of which there are none, and attach the head to the model."""
        super().prepare(start)
        self.attach(start.model)

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Find the encoder that trains, and hold the original's."""

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Return the context in which the trained encoder is the original's."""
        return nullcontext() if self._adapter is None else self._adapter.disable_adapter()


class ZeroShotKL(PretrainingHeadKL):
    """Penalize KL of the zero-shot classes (CAR-FT, Mao et al. 2022, arXiv:2211.16175).

    Args:
        config: the recipe's section.
        head: see `load_zero_shot_head` in `finetune/zero_shot.py`.
    """

    def __init__(self, config: KL, head: ZeroShotHead) -> None:
        super().__init__(config)
        self._head = head.eval()
        self._tower: Any = None
        self._original: Any = None

    @classmethod
    def from_config(cls, config: KL, context: RegularizerContext) -> Self:
        """Build the term of a recipe on the source's own head."""
        return cls(config, context.load_zero_shot_head())

    def attach(self, model: nn.Module) -> None:
        """Find the image tower; without an adapter a copy of it is the original.

        Raises:
            RecipeError: if the model has none of a pair's.
        """
        self._tower = get_encoder(model, get_model_spec(model))
        if self._tower.config.model_type not in IMAGE_HALVES:
            raise RecipeError(
                f"kl.on=zero_shot: {self._tower.config.model_type} cannot classify by class names",
                "Use a CLIP, SigLIP or MetaCLIP source, or kl.on=relational",
            )
        self._head.to(next(model.parameters()).device)
        if isinstance(model, PeftModel):
            self._adapter, self._original = model, self._tower
        else:
            self._original = deepcopy(self._tower).requires_grad_(False)

    def compute_values(self, step: Step, chosen: Tensor) -> Tensor:
        """Return the KL of the chosen rows, (chosen rows,) float32."""
        inputs = {
            key: value[chosen] if isinstance(value, Tensor) else value
            for key, value in step.batch.items()
            if key not in ("labels", *BATCH_METADATA)
        }
        if not chosen.any():
            return inputs["pixel_values"].new_zeros(0, dtype=torch.float32)
        current = self._head(self._tower(**inputs).pooler_output)
        with torch.no_grad(), eval_mode(self._original), self.disable_adapter():
            original = self._head(self._original(**inputs).pooler_output)
        return self.compute_softmax_kl(original, current)


class TokenKL(PretrainingHeadKL):
    """Penalize T^2 KL of the vocabulary's distributions, the mean over chosen tokens of a row.

    The head is the original's, frozen (Jin et al. 2022, arXiv:2110.08534, section 4.2).

    Args:
        config: the recipe's section.
        language_model: the original with its trained head; it is frozen.
        is_other: True if the original is not the weights that training starts from.
    """

    def __init__(self, config: KL, language_model: Any, is_other: bool = False) -> None:
        super().__init__(config)
        self._original = language_model.requires_grad_(False).eval()
        self._current = language_model
        self._is_other = is_other

    @abstractmethod
    def choose_tokens(self, step: Step, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids that both models see, and flattened positions in them that are compared.

        Args:
            step: with the batch.
            chosen: (batch,) bool.
        """

    def attach(self, model: nn.Module) -> None:
        """Put the head on the encoder that trains; with an adapter that is the original's too.

        Raises:
            RecipeError: if the two encoders have different architectures.
        """
        encoder: Any = get_encoder(model, get_model_spec(model))
        if encoder.config.model_type != self._original.encoder.config.model_type:
            raise RecipeError(
                f"kl.on={self.config.on}: the head is of "
                f"{self._original.encoder.config.model_type}, the model of "
                f"{encoder.config.model_type}",
                "Give the language model of the same source",
            )
        self._original.to(next(model.parameters()).device)
        adapter = model.encoder if isinstance(model, PooledModel) else model
        if isinstance(adapter, PeftModel) and not self._is_other:
            self._adapter = adapter
        else:
            self._current = deepcopy(self._original)
        self._current.encoder = encoder

    def compute_values(self, step: Step, chosen: Tensor) -> Tensor:
        """Return the KL of the chosen rows, (chosen rows,) float32; 0 where no token is chosen."""
        mask = step.batch["attention_mask"][chosen]
        ids, flat = self.choose_tokens(step, chosen)
        rows = ids.new_zeros(len(ids), dtype=torch.float32)
        if not len(flat):
            return rows
        current = self._current(ids, flat, flat, mask).logits
        with torch.no_grad(), eval_mode(self._original), self.disable_adapter():
            original = self._original(ids, flat, flat, mask).logits
        values = self.compute_softmax_kl(original, current)
        row_index = flat // ids.shape[1]
        counts = rows.index_add(0, row_index, torch.ones_like(values)).clamp(min=1)
        return rows.index_add(0, row_index, values) / counts


class MaskedTokenKL(TokenKL):
    """Compare what both models predict for masked tokens.

    Both see the same masks, a function of (seed, epoch, row).

    Args:
        config: the recipe's section.
        masked_lm: the original with its trained masked-LM head; it is frozen.
        masking: which tokens are masked.
        seed: of the masks.
        is_other: True if the original is not the weights that training starts from.
    """

    def __init__(
        self, config: KL, masked_lm: Any, masking: MaskingSpec, seed: int, is_other: bool = False
    ) -> None:
        super().__init__(config, masked_lm, is_other)
        self._masking = masking
        self._seed = seed

    @classmethod
    def from_config(cls, config: KL, context: RegularizerContext) -> Self:
        """Build the term of a recipe on the source's own head."""
        masked_lm, masking = context.load_masked_lm()
        return cls(config, masked_lm, masking, context.seed, not context.original_is_start)

    def choose_tokens(self, step: Step, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return masked ids, and the positions of the masked tokens in the flattened ids."""
        batch = step.batch
        numbers = batch["row"][chosen].tolist()
        return self.mask_rows(
            batch["input_ids"][chosen], batch["attention_mask"][chosen], numbers, step.epoch
        )

    def mask_rows(
        self, ids: Tensor, mask: Tensor, numbers: list[int], epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Return masked ids, and the positions of masked tokens in the flattened ids.

        Padding takes no part in the draw: how far a row is padded depends on its batch, and its
        masks must not.
        """
        masked, flat = ids.cpu().numpy().copy(), []
        for i, (number, row_mask) in enumerate(zip(numbers, mask.cpu().numpy(), strict=True)):
            draw = np.random.default_rng([self._seed, epoch, number])
            real = np.flatnonzero(row_mask > 0)
            tokens, positions = mask_tokens(
                masked[i, real], np.zeros(len(real), np.int64), self._masking, draw
            )
            masked[i, real] = tokens
            flat.append(real[positions] + i * ids.shape[1])
        joined = np.concatenate(flat) if flat else np.zeros(0, np.int64)
        return torch.from_numpy(masked).to(ids.device), torch.from_numpy(joined).to(ids.device)


class NextTokenKL(TokenKL):
    """Compare what both models predict after every token of a row but the last."""

    @classmethod
    def from_config(cls, config: KL, context: RegularizerContext) -> Self:
        """Build the term of a recipe on the source's own head."""
        return cls(config, context.load_causal_lm(), not context.original_is_start)

    def choose_tokens(self, step: Step, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids as they are, and the positions of tokens with another after them."""
        mask = step.batch["attention_mask"][chosen] > 0
        followed = torch.zeros_like(mask)
        followed[:, :-1] = mask[:, :-1] & mask[:, 1:]
        return step.batch["input_ids"][chosen], followed.flatten().nonzero().flatten()
