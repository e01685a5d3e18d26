"""The terms that keep a model near the original, as the trainer sees them: start, and add."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.retain.hooks import BATCH_METADATA, EmbeddingHook, ModelOutputs
from hftl.retain.kl import (
    KLToOriginal,
    check_general_rows,
    compute_kl,
    count_expected_rows,
    select_rows,
)
from hftl.retain.reference import Reference, check_head_quality
from hftl.runtime import distributed

Batch = dict[str, Any]


@runtime_checkable
class WeightTerm(Protocol):
    """A penalty on the weights, as `L2SP` and `EWC`."""

    def start(self, model: nn.Module) -> None:
        """Remembers what has to be, before anything is trained."""
        ...

    def penalty(self, model: nn.Module) -> Tensor:
        """A scalar with its weight, 0 at the start."""
        ...


@runtime_checkable
class PretrainingHeadTerm(Protocol):
    """KL of outputs that the model's own forward does not have, as `MaskedKL` and `ZeroShotKL`."""

    weight: float
    inputs: str

    def begin(self, model: nn.Module) -> None:
        """Gets ready, before anything is trained."""
        ...

    def values(self, batch: Batch, chosen: Tensor, epoch: int) -> Tensor:
        """The value of each chosen row of a batch."""
        ...


Term = KLToOriginal | WeightTerm | PretrainingHeadTerm


@dataclass(frozen=True)
class TrainingRows:
    """All rows of a training, for the original to look at.

    Args:
        target: how many rows the target has; those behind them are general.
        total: how many there are.
        batches: their numbers, in batches of like length.
        batch: makes a batch of some numbers; `labels` among it.
        repeats: whether a row is the same in every epoch.
    """

    target: int
    total: int
    batches: list[list[int]]
    batch: Callable[[list[int]], Batch]
    repeats: bool


class Retention:
    """The terms of one training.

    Args:
        terms: what is added to the loss; those of weight 0 are left out.
        given: the original, where it is not what the training starts from.
        ratio: rows of general data for each row of the target.
    """

    def __init__(self, terms: Term | Sequence[Term], given: nn.Module | None, ratio: float) -> None:
        terms = terms if isinstance(terms, Sequence) else [terms]
        strange = [t for t in terms if isinstance(t, type) or not isinstance(t, Term)]
        if strange:
            raise RecipeError(
                f"retain holds a {type(strange[0]).__name__}, expected terms",
                "Use KLToOriginal, L2SP and EWC",
            )
        self.kls = [t for t in terms if isinstance(t, KLToOriginal) and t.weight > 0]
        self.own = [t for t in terms if isinstance(t, PretrainingHeadTerm) and t.weight > 0]
        self.weights = [t for t in terms if isinstance(t, WeightTerm)]
        self.ratio = ratio
        self._given = given
        self._reference: Reference | None = None
        self._tap: EmbeddingHook | None = None
        self._known: ModelOutputs | None = None
        self._banks: dict[int, tuple[Tensor, Tensor]] = {}
        self._spread: Tensor | None = None
        self._kind = "classes"
        self._started = False

    @property
    def asks(self) -> bool:
        """Whether anything is left to add."""
        return bool(self.kls or self.own or self.weights)

    def start(
        self,
        model: nn.Module,
        rows: TrainingRows,
        device: torch.device,
        autocast: Callable[[], Any],
        seed: int,
    ) -> None:
        """Asks the original before anything is trained; the second time does nothing.

        Args:
            model: not wrapped, at its starting weights.
            rows: all rows of the training.
            device: where the model is.
            autocast: the context that training runs in.
            seed: of the banks of anchors.

        Raises:
            RecipeError: if the original has no opinion, cannot be cached though it should, or is
                not what the model starts from.
        """
        if self._started:
            return
        self._started = True
        check_general_rows([*self.kls, *self.own], rows.total - rows.target)
        for term in self.weights:
            term.start(model)
        for term in self.own:
            term.begin(model)
        if not self.kls:
            return
        cached = _is_cached(self.kls, rows)
        self._reference = Reference(model, self._given, copied=not cached)
        first = _move_batch(rows.batch(rows.batches[0][:4]), device)
        self._kind = _find_logit_kind(first["labels"])
        if self._kind == "words" and any(term.on == "probe" for term in self.kls):
            cached = False
            self._reference.close()
            self._reference = Reference(model, self._given, copied=True)
        self._reference.check(model, first)
        self._look(rows, device, autocast, seed, cached)
        self._tap = EmbeddingHook(model)
        if cached:
            self._reference.close()
            self._reference, self._given = None, None

    def loss(
        self, model: nn.Module, batch: Batch, outputs: Any, counts: Tensor, target: Tensor,
        epoch: int, autocast: Callable[[], Any],
    ) -> Tensor:  # fmt: skip
        """What a batch adds to the loss of its step.

        Args:
            model: not wrapped.
            batch: what the model has just run on, with `row`, the rows' numbers.
            outputs: what it gave.
            counts: (batch,) bool, the target's rows that count.
            target: how many of them the whole step has, on all processes.
            epoch: the number of this one, from 0.
            autocast: the context that training runs in.
        """
        total = outputs.logits.new_zeros((), dtype=torch.float32)
        if self._tap is not None:
            now = self._tap.read_outputs(outputs, batch.get("attention_mask"))
            general = batch["general"]
            original = self._original(batch, autocast)
            for term in self.kls:
                chosen = select_rows(term, general, counts)
                values = self._values(term, original, now, batch, chosen)
                rows = count_expected_rows(term, target, self.ratio)
                total = total + term.weight * values.sum() / rows
        for term in self.own:
            values = term.values(batch, select_rows(term, batch["general"], counts), epoch)
            rows = count_expected_rows(term, target, self.ratio)
            total = total + term.weight * values.sum() / rows
        if self.weights:
            share = counts.sum() / target.clamp(min=1)
            penalties = [term.penalty(model) for term in self.weights]
            total = total + torch.stack(penalties).sum() * share
        return total

    def after_step(self, model: nn.Module, optimizer: Any) -> None:
        """What terms do to the weights themselves after the optimizer's step."""
        for term in self.weights:
            step = getattr(term, "after_step", None)
            if step is not None:
                step(model, optimizer)

    def _values(
        self,
        term: KLToOriginal,
        original: ModelOutputs,
        now: ModelOutputs,
        batch: Batch,
        chosen: Tensor,
    ) -> Tensor:
        """The term's value of each chosen row."""
        bank = hidden = None
        if id(term) in self._banks:
            numbers, bank = self._banks[id(term)]
            hidden = batch["row"][chosen].unsqueeze(1) == numbers
        told = batch.get("told")
        device = now.logits.device.type
        with torch.autocast(device, enabled=False):
            return compute_kl(
                term, original.select(chosen), now.select(chosen), self._kind, bank, hidden,
                self._spread, None if told is None else told[chosen],
            )  # fmt: skip

    def _original(
        self, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> ModelOutputs:
        """The original's outputs on a batch, computed now or before."""
        if self._known is not None:
            return self._known.select(batch["row"])
        assert self._reference is not None
        inputs = {key: value for key, value in batch.items() if key not in BATCH_METADATA}
        with autocast():
            return self._reference(inputs)

    def _look(
        self,
        rows: TrainingRows,
        device: torch.device,
        autocast: Callable[[], Any],
        seed: int,
        cached: bool,
    ) -> None:
        """Has the original look at all rows, or at those that the banks need."""
        wanted = {id(t): _draw_anchors(t, rows, seed) for t in self.kls if t.on == "relational"}
        wanted = {key: numbers for key, numbers in wanted.items() if len(numbers)}
        sample = torch.arange(min(rows.target, 256)).tolist()
        needed = set(range(rows.total)) if cached else {
            *sample, *(int(n) for numbers in wanted.values() for n in numbers)
        }  # fmt: skip
        seen, labels = self._seen(rows, needed, device, autocast)
        place = {number: i for i, number in enumerate(sorted(needed))}
        embedding = seen.embedding
        assert embedding is not None
        for key, numbers in wanted.items():
            found = embedding[[place[int(n)] for n in numbers]]
            self._banks[key] = numbers.to(device), found
        # Of the same rows whether the others are cached or not.
        seen_by_all = embedding[[place[number] for number in sample]]
        self._spread = seen_by_all.var(0, unbiased=False).sum().clamp(min=1e-12)
        target = [place[n] for n in sorted(needed) if n < rows.target]
        for term in self.kls:
            if term.on == "probe" and self._kind != "words" and not term.solved:
                check_head_quality(seen.logits[target], labels[target], self._kind)
        self._known = seen if cached else None

    def _seen(
        self,
        rows: TrainingRows,
        needed: set[int],
        device: torch.device,
        autocast: Callable[[], Any],
    ) -> tuple[ModelOutputs, Tensor]:
        """The original's outputs and the labels of some rows, by their numbers; the batches are
        shared among the processes."""
        assert self._reference is not None
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        batches = [[n for n in batch if n in needed] for batch in rows.batches]
        for numbers in distributed.shard_items([batch for batch in batches if batch]):
            batch = _move_batch(rows.batch(numbers), device)
            labels = batch["labels"].cpu()
            with autocast():
                view = self._reference(batch)
            assert view.embedding is not None
            # Of words only the embedding is ever kept: their logits are as ragged as the rows.
            flat = view.logits if view.logits.dim() == 2 else view.logits[:, 0]
            parts = (view.embedding.cpu(), flat.cpu(), labels)
            found.update(zip(numbers, zip(*parts, strict=True), strict=True))
        whole = {k: v for part in distributed.gather_values(found) for k, v in part.items()}
        columns = list(zip(*(whole[number] for number in sorted(needed)), strict=True))
        embedding, logits = (torch.stack(column).to(device) for column in columns[:2])
        same = len({label.shape for label in columns[2]}) == 1
        labels = torch.stack(columns[2]).to(device) if same else torch.empty(0)
        return ModelOutputs(embedding, logits), labels


def _is_cached(terms: list[KLToOriginal], rows: TrainingRows) -> bool:
    """Whether the original's outputs are computed once.

    Raises:
        RecipeError: if they should be, and the inputs vary.
    """
    if not rows.repeats and any(term.cached for term in terms):
        raise RecipeError(
            "kl.cached=True, but the rows differ from epoch to epoch, as by augmentation",
            "Leave cached out, or set data.augment=none",
        )
    return rows.repeats and all(term.cached is not False for term in terms)


def _draw_anchors(term: KLToOriginal, rows: TrainingRows, seed: int) -> Tensor:
    """The numbers of the rows in a term's bank, drawn from those it is taken on."""
    first = rows.target if term.inputs == "general" else 0
    last = rows.target if term.inputs == "target" else rows.total
    order = torch.randperm(last - first, generator=torch.Generator().manual_seed(seed))
    return (order[: term.anchors] + first).sort().values


def _find_logit_kind(labels: Tensor) -> str:
    """What the labels are: see `row_values`."""
    if labels.is_floating_point():
        return "target" if labels.dim() == 1 else "labels"
    return "classes" if labels.dim() == 1 else "words"


def _move_batch(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
