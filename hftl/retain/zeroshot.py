"""KL to the classes that CLIP tells without training: pictures against its texts of their names."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.model.head import anatomy_in, encoder_in
from hftl.retain.kl import kl_rows
from hftl.retain.view import BESIDE, in_eval

TEMPLATE = "a photo of a {}."


class ZeroShotHead(nn.Module):
    """CLIP's own classifier of named classes (Radford et al. 2021, arXiv:2103.00020, figure 3).

    Args:
        projection: from the image tower's pooled output to the space shared with texts.
        texts: (classes, width) of length 1.
        scale: what cosines are multiplied by, exp of the learnt logarithm.
    """

    def __init__(self, projection: nn.Module, texts: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("texts", texts)
        self.register_buffer("scale", scale)

    def forward(self, pooled: Tensor) -> Tensor:
        """(rows, classes) logits of (rows, width) pooled outputs."""
        texts: Any = self.texts
        return self.scale * F.normalize(self.projection(pooled).float(), dim=-1) @ texts.T  # pyright: ignore


def zero_shot_head(clip: Any, tokenizer: Any, names: list[str]) -> ZeroShotHead:
    """The head of a `CLIPModel` for these classes.

    Args:
        clip: the whole model, texts and pictures.
        tokenizer: its own.
        names: of the classes; underscores are read as spaces.
    """
    prompts = [TEMPLATE.format(name.replace("_", " ")) for name in names]
    ids = tokenizer(
        prompts, padding=True, padding_side="right", truncation=True, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad(), in_eval(clip):
        pooled = clip.text_model(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]
        ).pooler_output
        texts = F.normalize(clip.text_projection(pooled).float(), dim=-1)
    scale = clip.logit_scale.detach().exp()
    return ZeroShotHead(deepcopy(clip.visual_projection), texts, scale).requires_grad_(False)


class ZeroShotKL:
    """T^2 KL(original || model) of the zero-shot classes, for each row (CAR-FT, Mao et al. 2022,
    arXiv:2211.16175).

    It costs a pass of the image tower and one of the original's at every step.

    Args:
        weight: of the mean over rows.
        head: see `zero_shot_head`.
        temperature: see `KLToOriginal`.
        direction: `forward` or `reverse`.
        inputs: `target`, `general` or `both`.
    """

    def __init__(
        self, weight: float, head: ZeroShotHead, temperature: float = 1.0,
        direction: str = "forward", inputs: str = "target",
    ) -> None:  # fmt: skip
        self.weight = weight
        self.inputs = inputs
        self._head = head.eval()
        self._temperature = temperature
        self._direction = direction
        self._tower: Any = None
        self._original: Any = None
        self._adapter: PeftModel | None = None

    def begin(self, model: nn.Module) -> None:
        """Finds the image tower; without an adapter a copy of it is kept.

        Raises:
            RecipeError: if the model has none of CLIP's.
        """
        anatomy = anatomy_in(model)
        self._tower = encoder_in(model, anatomy)
        if self._tower.config.model_type != "clip_vision_model":
            raise RecipeError(
                f"kl.on=zero_shot: {self._tower.config.model_type} tells no classes by their names",
                "Use a CLIP source, or kl.on=relational",
            )
        self._head.to(next(model.parameters()).device)
        if isinstance(model, PeftModel):
            self._adapter, self._original = model, self._tower
        else:
            self._original = deepcopy(self._tower).requires_grad_(False)

    def values(self, batch: dict[str, Any], chosen: Tensor, epoch: int) -> Tensor:
        """(chosen rows,) float32.

        Args:
            batch: `pixel_values` and what else the tower takes.
            chosen: (batch,) bool.
            epoch: of no use here.
        """
        del epoch
        beside = ("labels", *BESIDE)
        inputs = {
            key: value[chosen] if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in beside
        }
        if not chosen.any():
            return inputs["pixel_values"].new_zeros(0, dtype=torch.float32)
        now = self._head(self._tower(**inputs).pooler_output)
        with torch.no_grad(), in_eval(self._original), self._off():
            original = self._head(self._original(**inputs).pooler_output)
        return kl_rows(original, now, self._temperature, self._direction)

    def _off(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter is None else self._adapter.disable_adapter()
