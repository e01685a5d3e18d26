"""Run the original on the rows of a training: its outputs, cached or batch by batch.

The original is the model that KL compares to: the weights that training starts from, with the
adapter off or as a frozen copy, unless the caller gives another model, the `reference`, in its
place. Its outputs are taken in eval mode, without gradient, in fp32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hftl.errors import RecipeError
from hftl.models.model_parts import get_encoder, get_model_spec, unwrap_adapter
from hftl.models.pooled_model import PooledModel, pool_tokens
from hftl.retain.regularizer import BATCH_METADATA, Batch, TrainingRows
from hftl.runtime import distributed

OUTPUT_TOLERANCE = 1e-3
"""The largest difference, relative to the largest output, between an untrained model and its
original. Compared in fp32: bf16 alone rounds by more."""
WEAK_HEAD_RATIO = 0.95
"""A head is weak if its loss is above this share of the loss of the label frequencies alone."""
LOGIT_KIND_OF_TASK = {
    "classification": "classes", "token-classification": "classes", "multi-label": "labels",
    "regression": "target",
}  # fmt: skip
"""See `compute_fisher` and `measure_head_quality`; each word has classes."""
SPREAD_ROWS = 256
"""Rows of the target that the spread of the original's embeddings is measured on, at most."""


@dataclass(frozen=True)
class ModelOutputs:
    """Hold a model's outputs on some rows.

    Args:
        embedding: (rows, width) float32: for a text the mean of its last hidden states (of a
            `PooledModel` what it pools), for an image the input of the last linear layer.
        logits: (rows, outputs) or (rows, length, outputs) float32.
    """

    embedding: Tensor
    logits: Tensor

    def select(self, rows: Tensor) -> "ModelOutputs":
        """Return the outputs of some rows, by a bool mask or by indices."""
        return ModelOutputs(self.embedding[rows], self.logits[rows])


class EmbeddingHook:
    """Catch each row's embedding whenever the model runs.

    Raises:
        RecipeError: if the architecture is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self._embedding: Any = None
        architecture = get_model_spec(model)
        self._is_text = architecture.modality == "text" and not isinstance(model, PooledModel)
        if self._is_text:
            module = get_encoder(model, architecture)
            self._handle = module.register_forward_hook(self._catch_output)
        else:
            module = _find_head_module(model, architecture.head.last_linear)
            self._handle = module.register_forward_pre_hook(self._catch_input)

    def read_outputs(self, outputs: Any, mask: Tensor | None) -> ModelOutputs:
        """Return the embeddings of the model's last run beside its logits, in fp32.

        Args:
            outputs: what the model returned.
            mask: (batch, length), 1 at real tokens; None for images.
        """
        embedding, self._embedding = self._embedding, None
        if embedding is None:
            raise RecipeError(
                "the model ran without the module whose embeddings retention compares",
                "Report this",
            )
        if self._is_text:
            mask = torch.ones(embedding.shape[:2]) if mask is None else mask
            embedding = pool_tokens(embedding.float(), mask.to(embedding.device), "mean")
        return ModelOutputs(embedding.float(), outputs.logits.float())

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    def _catch_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._embedding = output[0]

    def _catch_input(self, module: nn.Module, args: Any) -> None:
        self._embedding = args[0]


def _find_head_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path or, where peft holds two copies of it, their wrapper."""
    if isinstance(model, PooledModel):
        return model.head
    module: Any = unwrap_adapter(model)
    for name in path.split("."):
        module = getattr(module, name)
        if isinstance(module, ModulesToSaveWrapper):
            return module
    return module


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Original:
    """Run the original on a batch, without gradient and without dropout.

    Args:
        model: the model to be trained; its present weights are the original.
        reference: the original, if it is another, as the source before adaptation; it is frozen.
        needs_copy: True if the original is still used after training has begun. With an adapter
            no copy is made where only the adapter trains.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, needs_copy: bool) -> None:
        self._head: nn.Module | None = None
        self._adapter: PeftModel | None = None
        self._is_another = reference is not None
        adapter = model.encoder if isinstance(model, PooledModel) else model
        if reference is not None:
            self.model = reference.requires_grad_(False).to(next(model.parameters()).device)
        elif isinstance(adapter, PeftModel) and not (needs_copy and _trains_base_weights(adapter)):
            self.model, self._adapter = model, adapter
            if isinstance(model, PooledModel):
                # The head is outside the adapter, and trains.
                self._head = deepcopy(model.head).requires_grad_(False)
        else:
            self.model = deepcopy(model).requires_grad_(False) if needs_copy else model
        # deepcopy copies hooks too: this one must be registered on the copy.
        self._hook = EmbeddingHook(self.model)

    def __call__(self, batch: Batch) -> ModelOutputs:
        """Return the original's outputs on a batch, which may hold `labels`."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        adapter_off: AbstractContextManager[Any] = nullcontext()
        if self._adapter is not None:
            adapter_off = self._adapter.disable_adapter()
        with torch.no_grad(), eval_mode(self.model), adapter_off:
            raw = self.model(**inputs)
            outputs = self._hook.read_outputs(raw, batch.get("attention_mask"))
            if self._head is not None:
                dtype = next(self._head.parameters()).dtype
                logits = self._head(outputs.embedding.to(dtype)).float()
                outputs = ModelOutputs(outputs.embedding, logits)
        return outputs

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse an original whose outputs differ from those of the model before training.

        Raises:
            RecipeError: naming the outputs, as where an adapter has changed the base weights.
        """
        if self._is_another or self.model is model and self._adapter is None:
            return
        hook = EmbeddingHook(model)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad(), eval_mode(model):
            current = hook.read_outputs(model(**inputs), batch.get("attention_mask"))
        hook.remove()
        original = self(batch)
        for name in ("embedding", "logits"):
            difference = _relative_difference(getattr(current, name), getattr(original, name))
            if not difference <= OUTPUT_TOLERANCE:
                raise RecipeError(
                    f"the model differs from its reference before training: {name} by "
                    f"{difference:.1e} of the largest",
                    "Use LoRA that leaves the base as it is and starts at zero, or give reference=",
                )

    def close(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()


def _trains_base_weights(model: PeftModel) -> bool:
    """Return True if more trains than the adapter, so that the base under it changes too."""
    adapter_parts = (str(model.base_model.prefix), ".modules_to_save.", ".trainable_tokens_")
    return any(
        parameter.requires_grad and not any(part in name for part in adapter_parts)
        for name, parameter in model.named_parameters()
    )


def _relative_difference(current: Tensor, original: Tensor) -> float:
    """Return the largest difference, over the original's largest value where that is above 1."""
    return float((current - original).abs().max() / original.abs().max().clamp(min=1.0))


class OriginalOutputs:
    """Compare the model in training with the original, on the rows of every batch.

    The constructor runs the original on every row if `cache`, else on those of the anchors and of
    the spread. Collective: every process must call it.

    Args:
        model: the model to be trained, not wrapped, at its starting weights.
        reference: the original, if it is another model, or None.
        rows: all rows of the training.
        anchors: numbers of the rows whose embeddings `get_embeddings` must return.
        cache: True to compute all outputs now; the original is then released.
        reads_logits: True if logits are compared, which cannot be cached for words.
        device: of the model.
        autocast: returns the context of the training's precision.

    Raises:
        RecipeError: if the model differs from its original.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module | None, rows: TrainingRows,
        anchors: Iterable[int], cache: bool, reads_logits: bool, device: torch.device,
        autocast: Callable[[], Any],
    ) -> None:  # fmt: skip
        self._rows, self._device, self._autocast = rows, device, autocast
        first = move_batch(rows.collate(rows.batches[0][:4]), device)
        self.logit_kind = find_logit_kind(first["labels"])
        # Logits of words are ragged, and too many to keep.
        cache = cache and not (reads_logits and self.logit_kind == "words")
        self.original: Original | None = Original(model, reference, needs_copy=not cache)
        self.original.check(model, first)
        spread_rows = range(min(rows.target, SPREAD_ROWS))
        needed = set(range(rows.total)) if cache else {*spread_rows, *anchors}
        self._numbers = sorted(needed)
        self._known, self._labels = self._compute_rows(needed)
        embeddings = self.get_embeddings(spread_rows)
        self.spread = embeddings.var(0, unbiased=False).sum().clamp(min=1e-12)
        self._hook = EmbeddingHook(model)
        self._is_cached = cache
        if cache:
            self.original.close()
            self.original = None

    def get_embeddings(self, numbers: Iterable[int]) -> Tensor:
        """Return the original's embeddings of anchors, by row numbers, (rows, width)."""
        index = {number: i for i, number in enumerate(self._numbers)}
        return self._known.embedding[[index[number] for number in numbers]]

    def check_head(self) -> None:
        """Refuse a head that is hardly better than the label frequencies; see `HeadQuality`."""
        target = [i for i, number in enumerate(self._numbers) if number < self._rows.target]
        check_head_quality(self._known.logits[target], self._labels[target], self.logit_kind)

    def compare(self, batch: Batch, outputs: Any) -> tuple[ModelOutputs, ModelOutputs]:
        """Return the original's outputs on a batch and the model's own.

        Args:
            batch: what the model has just run on, with `row`, the rows' numbers.
            outputs: what the model returned.
        """
        current = self._hook.read_outputs(outputs, batch.get("attention_mask"))
        if self._is_cached:
            return self._known.select(batch["row"]), current
        assert self.original is not None
        inputs = {key: value for key, value in batch.items() if key not in BATCH_METADATA}
        with self._autocast():
            return self.original(inputs), current

    def _compute_rows(self, needed: set[int]) -> tuple[ModelOutputs, Tensor]:
        """Return the original's outputs and the labels of rows, ordered by number.

        Batches are distributed over the processes, and the results gathered.
        """
        assert self.original is not None
        computed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        batches = [[n for n in batch if n in needed] for batch in self._rows.batches]
        for numbers in distributed.shard_items([batch for batch in batches if batch]):
            batch = move_batch(self._rows.collate(numbers), self._device)
            with self._autocast():
                outputs = self.original(batch)
            # The logits of words are as ragged as the rows, and nothing reads them from here.
            logits = outputs.logits if outputs.logits.dim() == 2 else outputs.logits[:, 0]
            columns = (outputs.embedding.cpu(), logits.cpu(), batch["labels"].cpu())
            computed.update(zip(numbers, zip(*columns, strict=True), strict=True))
        all_rows = {k: v for part in distributed.gather_values(computed) for k, v in part.items()}
        columns = list(zip(*(all_rows[number] for number in sorted(needed)), strict=True))
        embedding, logits = (torch.stack(column).to(self._device) for column in columns[:2])
        have_one_shape = len({label.shape for label in columns[2]}) == 1
        labels = torch.stack(columns[2]).to(self._device) if have_one_shape else torch.empty(0)
        return ModelOutputs(embedding, logits), labels


def find_logit_kind(labels: Tensor) -> str:
    """Return what logits are of, by the labels: `classes`, `words`, `labels` or `target`."""
    if labels.is_floating_point():
        return "target" if labels.dim() == 1 else "labels"
    return "classes" if labels.dim() == 1 else "words"


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@dataclass(frozen=True)
class HeadQuality:
    """Compare a head's loss on the labels with `shares`, that of the label frequencies alone."""

    loss: float
    shares: float

    @property
    def is_weak(self) -> bool:
        """Return True if the head is hardly better than the frequencies, or worse."""
        return not self.loss < WEAK_HEAD_RATIO * self.shares


def measure_head_quality(logits: Tensor, labels: Tensor, kind: str) -> HeadQuality | None:
    """Return how well a head predicts labels; None where no row has a label.

    Args:
        logits: (rows, outputs) of the original on training rows.
        labels: (rows,) int64, -100 where there is none, or float, NaN where there is none, or
            (rows, outputs) of 0 and 1.
        kind: `classes`, `labels` or `target`.
    """
    counts = labels >= 0 if kind == "classes" else ~labels.isnan().reshape(len(labels), -1).any(1)
    logits, labels = logits[counts].double(), labels[counts]
    if not len(labels):
        return None
    if kind == "target":
        loss = F.mse_loss(logits.squeeze(-1), labels.double())
        baseline = labels.double().var(unbiased=False)
    elif kind == "labels":
        loss = F.binary_cross_entropy_with_logits(logits, labels.double())
        share = labels.double().mean(0)
        baseline = F.binary_cross_entropy(share.expand_as(logits), labels.double())
    else:
        loss = F.cross_entropy(logits, labels)
        share = labels.bincount(minlength=logits.shape[1]).double() / len(labels)
        baseline = -(torch.xlogy(share, share)).sum()
    return HeadQuality(float(loss), float(baseline))


def check_head_quality(logits: Tensor, labels: Tensor, kind: str) -> None:
    """Refuse a head that is no better than the label frequencies; see `measure_head_quality`.

    Raises:
        RecipeError: as for a head that was never trained.
    """
    quality = measure_head_quality(logits, labels, kind)
    if quality is not None and quality.is_weak:
        raise RecipeError(
            f"kl.on=probe: the reference's head does not predict the labels (loss "
            f"{quality.loss:.3f}, {quality.shares:.3f} by label frequencies alone): it was never "
            "trained, or the encoder's features do not separate them",
            "Start the head from a probe (head_init: probe); if it is one, use on: relational",
        )
