"""Compute KL to the original: a value for each row, where the original's output is meaningful.

Forward is KL(original || model), the mean-seeking one whose gradient is soft cross-entropy's
(Hinton et al. 2015, arXiv:1503.02531, section 2; Li & Hoiem 2016, arXiv:1606.09282, equation 2).
All of it is computed in fp32.
"""

from abc import abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hftl.config.retain import KL
from hftl.errors import RecipeError
from hftl.retain.original import ModelOutputs, OriginalOutputs
from hftl.retain.regularizer import Regularizer, RegularizerContext, Step, TrainingStart

DEFAULT_TAU = {"text": 0.05, "image": 0.07}
"""The temperature of cosines that sentence encoders (Reimers & Gurevych 2019) and self-distilled
image encoders (Caron et al. 2021) are trained with."""


class RowKL(Regularizer[KL]):
    """Average a KL over the rows of its `inputs`."""

    section = KL

    def loss(self, step: Step) -> Tensor:
        """Return weight * the mean over rows; a row counts the same in whatever batch it comes."""
        values = self.compute_values(step, step.select_rows(self.config.inputs))
        return self.weight * values.sum() / step.count_rows(self.config.inputs)

    def compute_softmax_kl(self, original: Tensor, current: Tensor) -> Tensor:
        """Return KL between two distributions given as logits, over the last axis."""
        return compute_row_kl(original, current, self.config.temperature, self.config.direction)

    @abstractmethod
    def compute_values(self, step: Step, chosen: Tensor) -> Tensor:
        """Return the KL of the chosen rows of a batch, (chosen rows,) float32."""

    def prepare(self, start: TrainingStart) -> None:
        """Refuse inputs of which the training has none: the term would do nothing.

        Raises:
            RecipeError: naming the inputs.
        """
        if self.config.inputs != "target" and start.rows.total == start.rows.target:
            raise RecipeError(
                f"kl.inputs={self.config.inputs!r} is of general rows, and there are none",
                "Give general_dataset=, or use inputs='target'",
            )


class KLToOriginal(RowKL):
    """Penalize KL between the original's distribution and the model's.

    LwF (Li & Hoiem 2016) is `on="probe", temperature=2, weight=1` on a model whose head was solved
    or warmed up with the encoder frozen.

    Args:
        weight: of the mean over rows in the loss; 0 leaves the term out.
        on: `relational`: how similar each row is to others (to a fixed bank of the original's
            embeddings, or to the batch's own), the native distribution of sentence encoders;
            `probe`: the head's classes, for which the head must be trained; `features`: a Gaussian
            around each embedding.
        temperature: the logits are divided by it and the result is multiplied by its square, so
            that the gradient keeps its size.
        direction: `forward` or `reverse`.
        inputs: the rows it is taken on: `target`, `general`, or `both`.
        tau: relational: what cosines are divided by, 0.05 by default.
        anchors: relational: rows of the bank; 0: each row against the others of its batch, so that
            the value depends on how a step is cut into batches.
        variance: probe of a regression: of the target around the original's prediction.
        cached: True if the original's outputs are computed once; None: where inputs repeat.
        solved: probe: the head is a solved probe, and its quality is not checked.

    Raises:
        RecipeError: for a negative weight or an unknown form, direction or kind of inputs.
    """

    def __init__(
        self, *values: Any, variance: float = 1.0, cached: bool | None = None, solved: bool = False,
        **keys: Any,
    ) -> None:  # fmt: skip
        super().__init__(*values, **keys)
        if self.config.weight == "auto" or self.config.on_pretraining_head:
            raise RecipeError(
                f"KLToOriginal: weight={self.config.weight!r}, on={self.config.on!r} need a recipe",
                "Give a number, and one of probe, relational, features",
            )
        if not variance > 0:
            raise RecipeError(f"KLToOriginal: variance={variance} must be above 0", "Raise it")
        self.variance, self.cached, self._is_solved = variance, cached, solved
        self.tau = self.config.tau or DEFAULT_TAU["text"]
        self._original: OriginalOutputs | None = None
        self._bank: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_config(cls, config: KL, context: RegularizerContext) -> Self:
        """Build the term of a recipe; the probe that starts the head is solved."""
        keys = config.model_copy(update={"tau": config.tau or context.tau}).model_dump()
        variance = context.measure_target_variance() if config.on == "probe" else 1.0
        return cls(variance=variance, solved=True, **keys)

    @property
    def compares_rows(self) -> bool:
        """Return True if rows are compared with their batch, and not with a bank."""
        return self.config.on == "relational" and self.config.anchors == 0

    def prepare(self, start: TrainingStart) -> None:
        """Run the original on the rows, once for all terms of a training.

        Raises:
            RecipeError: if the original's head is weak, if its outputs vary and should be cached,
                or if it is not what the model starts from.
        """
        super().prepare(start)
        if "original" not in start.shared:
            start.shared["original"] = _compute_original(start)
        original = self._original = start.shared["original"]
        anchors = self.draw_anchors(start)
        self._bank = None
        if len(anchors):
            self._bank = anchors.to(start.device), original.get_embeddings(anchors.tolist())
        if self.config.on == "probe" and original.logit_kind != "words" and not self._is_solved:
            original.check_head()

    def draw_anchors(self, start: TrainingStart) -> Tensor:
        """Return the numbers of the bank's rows, drawn from those that the term is taken on."""
        if self.config.on != "relational":
            return torch.empty(0, dtype=torch.long)
        first = start.rows.target if self.config.inputs == "general" else 0
        last = start.rows.target if self.config.inputs == "target" else start.rows.total
        order = torch.randperm(last - first, generator=torch.Generator().manual_seed(start.seed))
        return (order[: self.config.anchors] + first).sort().values

    def compute_values(self, step: Step, chosen: Tensor) -> Tensor:
        """Return the KL of the chosen rows, (chosen rows,) float32."""
        assert self._original is not None
        if "outputs" not in step.shared:
            step.shared["outputs"] = self._original.compare(step.batch, step.outputs)
        original, current = step.shared["outputs"]
        with torch.autocast(current.logits.device.type, enabled=False):
            return self._compute_kl(original.select(chosen), current.select(chosen), step, chosen)

    def _compute_kl(
        self, original: ModelOutputs, current: ModelOutputs, step: Step, chosen: Tensor
    ) -> Tensor:
        assert self._original is not None
        if self.config.on == "features":
            return compute_feature_kl(original.embedding, current.embedding, self._original.spread)
        if self.config.on == "relational":
            bank = hidden = None
            if self._bank is not None:
                numbers, bank = self._bank
                hidden = step.batch["row"][chosen].unsqueeze(1) == numbers
            return self.compute_relational_kl(original.embedding, current.embedding, bank, hidden)
        if self._original.logit_kind != "words":
            kind = self._original.logit_kind
            return self.compute_probe_kl(original.logits, current.logits, kind)
        tokens = step.batch.get("labelled_tokens")
        return self.compute_word_kl(
            original.logits, current.logits, None if tokens is None else tokens[chosen]
        )

    def compute_probe_kl(self, original: Tensor, current: Tensor, kind: str) -> Tensor:
        """Return KL between two heads' outputs, (...) float32.

        Args:
            original: (..., outputs) logits.
            current: the same of the model.
            kind: `classes` (softmax), `labels` (independent), or `target` (a Gaussian of
                `variance` around one value: squared distance over twice the variance).
        """
        if kind == "target":
            return ((current - original).float() ** 2).squeeze(-1) / (2 * self.variance)
        if kind == "labels":
            # A yes or no is a softmax over the logit and 0.
            original, current = (F.pad(side.unsqueeze(-1), (0, 1)) for side in (original, current))
            return self.compute_softmax_kl(original, current).sum(-1)
        return self.compute_softmax_kl(original, current)

    def compute_word_kl(self, original: Tensor, current: Tensor, tokens: Tensor | None) -> Tensor:
        """Return the mean KL over a row's labelled tokens, (rows,) float32.

        Args:
            original: (rows, length, outputs) logits.
            current: the same of the model.
            tokens: (rows, length) bool: the head is not trained on the others, such as special
                tokens and the rest of a word. None: all.
        """
        values = self.compute_probe_kl(original, current, "classes")
        counts = torch.ones_like(values) if tokens is None else tokens.to(values.dtype)
        return (values * counts).sum(-1) / counts.sum(-1).clamp(min=1)

    def compute_relational_kl(
        self, original: Tensor, current: Tensor, bank: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        """Return KL between the rows' similarities to others, (rows,) float32.

        q_ij = softmax_j(cos(f_i, a_j) / tau): of the original and of the model to the same anchors
        a, or, without a bank, of each to its own embeddings of the batch (Fang et al. 2021, SEED,
        arXiv:2101.04731, equations 2 to 5). Zeros where a batch of one has no others.

        Args:
            original: (rows, width).
            current: (rows, width).
            bank: (anchors, width) of the original, or None.
            hidden: (rows, anchors) bool, True where an anchor is the row itself.
        """
        sides = [F.normalize(side.float(), dim=-1) for side in (original, current)]
        if bank is None:
            if len(current) < 2:
                return current.float().sum(-1) * 0.0
            hidden = torch.eye(len(current), dtype=torch.bool, device=current.device)
            cosines = [side @ side.T for side in sides]
        else:
            anchors = F.normalize(bank.float(), dim=-1)
            cosines = [side @ anchors.T for side in sides]
        if hidden is not None:
            # Not -inf: the difference of two infinities is NaN.
            cosines = [side.masked_fill(hidden, -1e4 * self.tau) for side in cosines]
        return self.compute_softmax_kl(cosines[0] / self.tau, cosines[1] / self.tau)


def _compute_original(start: TrainingStart) -> OriginalOutputs:
    """Run the original for all terms of a training, cached if none of them objects.

    Raises:
        RecipeError: if a term asks for a cache, and the inputs vary.
    """
    terms = [term for term in start.regularizers if isinstance(term, KLToOriginal)]
    if not start.rows.repeats and any(term.cached for term in terms):
        raise RecipeError(
            "kl.cached=True, but the rows differ from epoch to epoch, as by augmentation",
            "Leave cached out, or set data.augment=none",
        )
    return OriginalOutputs(
        start.model, start.reference, start.rows,
        anchors=[int(number) for term in terms for number in term.draw_anchors(start)],
        cache=start.rows.repeats and all(term.cached is not False for term in terms),
        reads_logits=any(term.config.on == "probe" for term in terms),
        device=start.device, autocast=start.autocast,
    )  # fmt: skip


def compute_feature_kl(original: Tensor, current: Tensor, spread: Tensor) -> Tensor:
    """Return KL between Gaussians around two embeddings, |f - f0|^2 / (2 spread), (rows,) float32.

    As a penalty: LDIFS (Mukhoti et al. 2024, arXiv:2308.13320).

    Args:
        original: (rows, width).
        current: (rows, width).
        spread: scalar variance of the original's embeddings, summed over their width, so that 1/2
            is as far as two unrelated rows are from their mean.
    """
    return ((current.float() - original.float()) ** 2).sum(-1) / (2 * spread)


def compute_row_kl(original: Tensor, current: Tensor, temperature: float, direction: str) -> Tensor:
    """Return T^2 KL(softmax(original / T) || softmax(current / T)) over the last axis.

    Reverse swaps the two.
    """
    logs = [F.log_softmax(side.float() / temperature, -1) for side in (original, current)]
    if direction == "reverse":
        logs = logs[::-1]
    return temperature**2 * (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
