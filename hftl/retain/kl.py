"""KL to the original, a value for each row, where the original has an opinion.

Forward is KL(original || model), the mean-seeking one whose gradient is soft cross-entropy's
(Hinton et al. 2015, arXiv:1503.02531, section 2; Li & Hoiem 2016, arXiv:1606.09282, equation 2).
All of it is computed in fp32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.models.heads import get_encoder, get_model_architecture
from hftl.retain.hooks import BATCH_METADATA, ModelOutputs, eval_mode

KL_FORMS = ("probe", "relational", "features")
KL_INPUTS = ("target", "general", "both")
KL_DIRECTIONS = ("forward", "reverse")


class RowRegularizer(Protocol):
    """A term with a value for each row of its `inputs`."""

    @property
    def inputs(self) -> str:
        """target, general or both."""
        ...


@dataclass(frozen=True)
class KLToOriginal:
    """KL between the original's distribution and the model's.

    LwF (Li & Hoiem 2016) is `on="probe", temperature=2, weight=1` on a model whose head was solved
    or warmed up with the encoder frozen.

    Args:
        weight: of the mean over rows in the loss; 0 leaves the term out.
        on: `relational`: how similar each row is to others (to a fixed bank of the original's
            embeddings, or to the batch's own), the native distribution of sentence encoders;
            `probe`: the head's classes, which somebody must have trained; `features`: a Gaussian
            around each embedding.
        temperature: the logits are divided by it and the result is multiplied by its square, so
            that the gradient keeps its size.
        direction: `forward` or `reverse`.
        inputs: the rows it is taken on: `target`, `general`, or `both`.
        tau: relational: what cosines are divided by.
        anchors: relational: rows of the bank; 0: each row against the others of its batch, so that
            the value depends on how a step is cut into batches.
        variance: probe of a regression: of the target around the original's prediction.
        cached: whether the original's outputs are computed once; None: where inputs repeat.
        solved: probe: the head is known to be one that was solved, so that nobody asks whether it
            says anything of the labels.

    Raises:
        RecipeError: for a negative weight or an unknown form, direction or kind of inputs.
    """

    weight: float = 0.1
    on: str = "relational"
    temperature: float = 1.0
    direction: str = "forward"
    inputs: str = "target"
    tau: float = 0.05
    anchors: int = 256
    variance: float = 1.0
    cached: bool | None = None
    solved: bool = False

    def __post_init__(self) -> None:
        for name, known in (("on", KL_FORMS), ("inputs", KL_INPUTS), ("direction", KL_DIRECTIONS)):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"kl.{name}={getattr(self, name)!r}", f"Use one of {', '.join(known)}"
                )
        for name in ("temperature", "tau", "variance"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"kl.{name}={getattr(self, name)} must be above 0", "Raise it")
        if self.weight < 0:
            raise RecipeError(f"kl.weight={self.weight} would drive the model away", "Raise it")


def compute_probe_kl(term: KLToOriginal, original: Tensor, now: Tensor, kind: str) -> Tensor:
    """KL between what two heads say, for each row.

    Args:
        term: temperature, direction, variance.
        original: (..., outputs) logits.
        now: the same of the model.
        kind: `classes` (softmax), `labels` (a yes or no for each), or `target` (a Gaussian of
            `variance` around one value: squared distance over twice the variance).

    Returns:
        (...) float32.
    """
    if kind == "target":
        return ((now - original).float() ** 2).squeeze(-1) / (2 * term.variance)
    if kind == "labels":
        two = torch.stack([original, torch.zeros_like(original)], -1)
        other = torch.stack([now, torch.zeros_like(now)], -1)
        return compute_row_kl(two, other, term.temperature, term.direction).sum(-1)
    return compute_row_kl(original, now, term.temperature, term.direction)


def compute_relational_kl(
    term: KLToOriginal, original: Tensor, now: Tensor, bank: Tensor | None, hidden: Tensor | None
) -> Tensor:
    """KL between the rows' similarities to others, for each row.

    q_ij = softmax_j(cos(f_i, a_j) / tau): of the original and of the model to the same anchors a,
    or, without a bank, of each to its own embeddings of the batch (Fang et al. 2021, SEED,
    arXiv:2101.04731, equations 2 to 5).

    Args:
        term: temperature, direction, tau.
        original: (rows, width).
        now: (rows, width).
        bank: (anchors, width) of the original, or None.
        hidden: (rows, anchors) bool, where an anchor is the row itself.

    Returns:
        (rows,) float32; zeros where a batch of one has no others.
    """
    sides = [F.normalize(side.float(), dim=-1) for side in (original, now)]
    if bank is None:
        if len(now) < 2:
            return now.float().sum(-1) * 0.0
        hidden = torch.eye(len(now), dtype=torch.bool, device=now.device)
        told = [side @ side.T for side in sides]
    else:
        anchors = F.normalize(bank.float(), dim=-1)
        told = [side @ anchors.T for side in sides]
    if hidden is not None:
        # Not -inf: a difference of two of them would be no number.
        told = [similar.masked_fill(hidden, -1e4 * term.tau) for similar in told]
    return compute_row_kl(told[0] / term.tau, told[1] / term.tau, term.temperature, term.direction)


def compute_feature_kl(original: Tensor, now: Tensor, spread: Tensor) -> Tensor:
    """KL between Gaussians around two embeddings: |f - f0|^2 / (2 spread), for each row.

    Args:
        original: (rows, width).
        now: (rows, width).
        spread: the variance, a scalar: the original's embeddings' own, summed over their width, so
            that 1/2 is as far as two unrelated rows are from their mean.

    Returns:
        (rows,) float32. As a penalty: LDIFS (Mukhoti et al. 2024, arXiv:2308.13320).
    """
    return ((now.float() - original.float()) ** 2).sum(-1) / (2 * spread)


def compute_row_kl(original: Tensor, now: Tensor, temperature: float, direction: str) -> Tensor:
    """T^2 KL(softmax(original / T) || softmax(now / T)) over the last axis, or the other way."""
    logs = [F.log_softmax(side.float() / temperature, -1) for side in (original, now)]
    if direction == "reverse":
        logs = logs[::-1]
    return temperature**2 * (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def select_rows(term: RowRegularizer, general: Tensor, counts: Tensor) -> Tensor:
    """Which rows of a batch a term is taken on: (batch,) bool.

    Args:
        term: its `inputs`.
        general: (batch,) bool.
        counts: (batch,) bool, the target's rows that count.
    """
    if term.inputs == "target":
        return counts & ~general
    return general if term.inputs == "general" else general | counts


def check_general_rows(terms: Sequence[RowRegularizer], general: int) -> None:
    """Refuses terms on general rows where there are none: they would do nothing, or count less.

    Args:
        terms: their `inputs`.
        general: how many general rows there are.

    Raises:
        RecipeError: naming the inputs.
    """
    strange = [term.inputs for term in terms if term.inputs != "target"]
    if strange and not general:
        raise RecipeError(
            f"kl.inputs={strange[0]!r} is of general rows, and there are none",
            "Give general_dataset=, or use inputs='target'",
        )


def count_expected_rows(term: RowRegularizer, target: Tensor, ratio: float) -> Tensor:
    """How many rows of a step a term is a mean over; of general ones the share they are on average,
    so that each counts the same in whatever step it comes."""
    share = {"target": 1.0, "general": ratio, "both": 1.0 + ratio}[term.inputs]
    return target.clamp(min=1) * share


def compute_kl(
    term: KLToOriginal, original: ModelOutputs, now: ModelOutputs, kind: str, bank: Tensor | None,
    hidden: Tensor | None, spread: Tensor | None, told: Tensor | None,
) -> Tensor:  # fmt: skip
    """The term's value for each row, (rows,) float32.

    Args:
        term: what is compared.
        original: the reference's outputs on the rows.
        now: the model's.
        kind: see `compute_probe_kl`; `words`: classes for each token, averaged over those `told`.
        bank: see `compute_relational_kl`.
        hidden: see `compute_relational_kl`.
        spread: see `compute_feature_kl`.
        told: (rows, length) bool, the tokens that words are told by: of the others, as the special
            ones and the rest of a word, nobody has trained the head to say anything.
    """
    if term.on == "probe":
        if kind != "words":
            return compute_probe_kl(term, original.logits, now.logits, kind)
        each = compute_probe_kl(term, original.logits, now.logits, "classes")
        counts = torch.ones_like(each) if told is None else told.to(each.dtype)
        return (each * counts).sum(-1) / counts.sum(-1).clamp(min=1)
    assert original.embedding is not None and now.embedding is not None
    if term.on == "relational":
        return compute_relational_kl(term, original.embedding, now.embedding, bank, hidden)
    assert spread is not None
    return compute_feature_kl(original.embedding, now.embedding, spread)


# KL to the classes that CLIP tells without training: pictures against its texts of their names.


PROMPT_TEMPLATE = "a photo of a {}."


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


def build_zero_shot_head(clip: Any, tokenizer: Any, names: list[str]) -> ZeroShotHead:
    """The head of a `CLIPModel` for these classes.

    Args:
        clip: the whole model, texts and pictures.
        tokenizer: its own.
        names: of the classes; underscores are read as spaces.
    """
    prompts = [PROMPT_TEMPLATE.format(name.replace("_", " ")) for name in names]
    ids = tokenizer(
        prompts, padding=True, padding_side="right", truncation=True, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad(), eval_mode(clip):
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
        head: see `build_zero_shot_head`.
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
        architecture = get_model_architecture(model)
        self._tower = get_encoder(model, architecture)
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
        beside = ("labels", *BATCH_METADATA)
        inputs = {
            key: value[chosen] if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in beside
        }
        if not chosen.any():
            return inputs["pixel_values"].new_zeros(0, dtype=torch.float32)
        now = self._head(self._tower(**inputs).pooler_output)
        with torch.no_grad(), eval_mode(self._original), self._off():
            original = self._head(self._original(**inputs).pooler_output)
        return compute_row_kl(original, now, self._temperature, self._direction)

    def _off(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter is None else self._adapter.disable_adapter()
