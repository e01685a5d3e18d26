"""Compute the task's loss of a batch as a sum, and count the elements it is divided by.

A step's loss is the sum over its micro-batches and processes, divided once by the number of labels
of the whole step: 8 x 1 and 2 x 4 rows then give the same gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hftl.data.text_inputs import IGNORE_INDEX
from hftl.errors import RecipeError
from hftl.retain.regularizer import BATCH_METADATA, Batch
from hftl.runtime.distributed import gather_values
from hftl.train.weighted_loss import LossWeighting

MANY_CLASSES = 1024
"""Number of classes from which cross-entropy is computed in chunks, to save memory."""
ROWS_PER_CHUNK = 64
"""Rows of a chunk of cross-entropy."""


def compute_summed_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, problem: str | None = None,
    weighting: LossWeighting | None = None,
) -> Tensor:  # fmt: skip
    """Return the loss summed over all labelled elements, in fp32.

    Integer labels: cross-entropy. Float (batch,) or (batch, patches, values): squared error. Float
    (batch, classes): binary cross-entropy, each class for itself, unless `problem` is `regression`.

    Args:
        logits: (..., classes), (batch, targets), or (batch, patches, values).
        labels: (...) int64, -100 where there is none; or float, NaN where there is none.
        smoothing: share of each class label's weight that is spread over all classes.
        problem: transformers' `problem_type`, where the model has one.
        weighting: of classes, by class and hardness; None: every element counts the same.
    """
    if weighting is not None:
        return _compute_weighted_loss(logits, labels, smoothing, weighting)
    if not labels.is_floating_point() and logits.shape[-1] >= MANY_CLASSES and not smoothing:
        flat = logits.reshape(-1, logits.shape[-1])
        return _ChunkedCrossEntropy.apply(flat, labels.reshape(-1))  # pyright: ignore
    wide = logits.float()
    if not labels.is_floating_point():
        flat = wide.reshape(-1, wide.shape[-1])
        return F.cross_entropy(
            flat, labels.reshape(-1), reduction="sum", ignore_index=IGNORE_INDEX,
            label_smoothing=smoothing,
        )  # fmt: skip
    counts = ~labels.isnan()
    targets = labels.float().where(counts, 0.0)
    if is_multi_label(labels, problem):
        each = F.binary_cross_entropy_with_logits(wide, targets, reduction="none")
    else:
        each = F.mse_loss(wide.reshape(targets.shape), targets, reduction="none")
    return each.where(counts, 0.0).sum()


def _compute_weighted_loss(
    logits: Tensor, labels: Tensor, smoothing: float, weighting: LossWeighting
) -> Tensor:
    """Return the weighted loss of classes, summed; see `compute_summed_loss`."""
    is_labelled = _is_labelled(labels)
    if labels.is_floating_point():
        targets = labels.where(is_labelled, 0.0)
        return weighting.sum_label_loss(logits.float(), targets, is_labelled)
    flat = logits.float().reshape(-1, logits.shape[-1])
    classes = labels.where(is_labelled, 0).reshape(-1)
    return weighting.sum_class_loss(flat, classes, is_labelled.reshape(-1), smoothing)


def is_multi_label(labels: Tensor, problem: str | None) -> bool:
    """Return whether float labels are yes or no for each class, rather than targets."""
    if problem is None:
        return labels.dim() == 2
    return problem == "multi_label_classification"


def compute_replay_loss(
    logits: Tensor, labels: Tensor, general: Tensor, share: Tensor | float, smoothing: float = 0.0,
    problem: str | None = None, weighting: LossWeighting | None = None,
) -> Tensor:  # fmt: skip
    """Return the target's loss, summed, and `share` of that of labelled general rows (replay).

    Weights are of the target's classes alone: general rows have frequencies of their own.

    Args:
        logits: see `compute_summed_loss`.
        labels: see `compute_summed_loss`, a row of the batch each.
        general: (batch,) bool.
        share: what a general row counts for.
        smoothing: see `compute_summed_loss`.
        problem: see `compute_summed_loss`.
        weighting: of the target's rows, see `compute_summed_loss`.
    """
    own_labels = ignore_rows(labels, general)
    own = compute_summed_loss(logits, own_labels, smoothing, problem, weighting)
    return own + share * compute_summed_loss(
        logits, ignore_rows(labels, ~general), smoothing, problem
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute summed cross-entropy in fp32, some rows at a time.

    It keeps the gradient, softmax minus one-hot, in the logits' dtype instead of their logarithms
    in fp32: over a vocabulary those are the largest tensors of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        for start in range(0, len(logits), ROWS_PER_CHUNK):
            piece = slice(start, start + ROWS_PER_CHUNK)
            classes, counts = labels[piece], labels[piece] != IGNORE_INDEX
            logs = logits[piece].float().log_softmax(-1)
            column = classes.where(counts, 0).unsqueeze(1)
            loss -= logs.gather(1, column).squeeze(1).where(counts, 0.0).sum()
            if gradient is not None:
                share = logs.exp_()
                share.scatter_add_(1, column, torch.full_like(column, -1, dtype=share.dtype))
                gradient[piece] = share * counts.unsqueeze(1)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None


def count_labels(labels: Tensor) -> Tensor:
    """Return the number of labelled elements: a scalar int64 on the labels' device."""
    return _is_labelled(labels).sum()


def sum_items(labels: Tensor, weighting: LossWeighting | None = None) -> Tensor:
    """Return the number of labelled elements, or the sum of their weights."""
    if weighting is None:
        return count_labels(labels)
    return weighting.sum_weights(labels, _is_labelled(labels))


def replace_zero(count: Tensor) -> Tensor:
    """Return a divisor of a loss: 1 where nothing counts, and the loss is 0 as well."""
    return count.where(count > 0, torch.ones_like(count))


def has_labels(labels: Tensor) -> Tensor:
    """Return whether each row has a labelled element: (batch,) bool."""
    return _is_labelled(labels).reshape(len(labels), -1).any(1)


def _is_labelled(labels: Tensor) -> Tensor:
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX


def ignore_rows(labels: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
    """Return a copy of the labels in which these rows have none."""
    ignored = labels.clone()
    ignored[rows] = torch.nan if labels.is_floating_point() else IGNORE_INDEX
    return ignored


def labels_fit_logits(logits: Tensor, labels: Tensor, problem: str | None) -> bool:
    """Return whether the loss has a label for every element of the logits."""
    if problem in ("regression", "multi_label_classification") or labels.is_floating_point():
        return logits.numel() == labels.numel()
    return logits.numel() == labels.numel() * logits.shape[-1]


def select_model_inputs(batch: Batch) -> Batch:
    """Return the part of a batch that the model's forward takes."""
    return {key: value for key, value in batch.items() if key not in ("labels", *BATCH_METADATA)}


def drop_retention_keys(batch: Batch) -> Batch:
    """Return a batch with its labels, without what only regularizers read."""
    return {key: value for key, value in batch.items() if key not in BATCH_METADATA}


def compute_task_loss(
    outputs: Any, logits: Tensor, batch: Batch, share: Tensor | float, smoothing: float,
    problem: str | None, weighting: LossWeighting | None = None,
) -> Tensor:  # fmt: skip
    """Return the task's loss of a batch, summed, a labelled general row counting for `share`.

    Args:
        outputs: of the model; `slots`, if any, are the flat indices of labels the logits are for.
        logits: of the outputs.
        batch: with `labels`, and `general` (batch,) bool where general rows are among them.
        share: see `compute_replay_loss`.
        smoothing: see `compute_summed_loss`.
        problem: see `compute_summed_loss`.
        weighting: see `compute_replay_loss`.

    Raises:
        RecipeError: if labels and logits do not fit each other.
    """
    labels, slots = batch["labels"], getattr(outputs, "slots", None)
    labels = labels if slots is None else labels.reshape(-1)[slots]
    if not labels_fit_logits(logits, labels, problem):
        raise RecipeError(
            f"logits of shape {list(logits.shape)} do not fit {labels.dtype} labels of shape "
            f"{list(labels.shape)}",
            "Give a class a row or a word as an integer, or floats of the logits' shape",
        )
    if "general" in batch:
        general = batch["general"]
        return compute_replay_loss(logits, labels, general, share, smoothing, problem, weighting)
    return compute_summed_loss(logits, labels, smoothing, problem, weighting)


def prepend_loss(outputs: Any, loss: Tensor) -> Any:
    """Return outputs as the Trainer's evaluation reads them: of a tuple the loss comes first."""
    if isinstance(outputs, Tensor):
        return loss, outputs
    is_plain = isinstance(outputs, tuple) and not hasattr(outputs, "logits")
    return (loss, *outputs) if is_plain else outputs


def find_labelled_rows(batch: Batch) -> Tensor:
    """Return which rows of a batch hold anything that counts: (batch,) bool.

    Without `labels`, as in question answering, these are all.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim():
        return has_labels(labels)
    return torch.ones(find_batch_size(batch) or 1, dtype=torch.bool)


def sum_penalty(outputs: Any, labels: Tensor) -> Tensor | float:
    """Return the sum of `outputs.penalty` (batch,) over rows with labels; 0 without a penalty."""
    penalty = getattr(outputs, "penalty", None)
    return 0.0 if penalty is None else penalty.float().where(has_labels(labels), 0.0).sum()


def find_target_rows(batch: Batch) -> Tensor:
    """Return which rows of a batch are the target's and hold what counts: (batch,) bool."""
    counts = find_labelled_rows(batch)
    return counts & ~batch["general"] if "general" in batch else counts


def count_step_items(batches: list[Batch], device: torch.device) -> Tensor:
    """Return (2,) int64: the target's labelled elements in a step's batches, and its rows.

    Without `labels` rows are counted alone.
    """
    items = [torch.zeros(2, dtype=torch.int64, device=device)]
    for batch in batches:
        labels, rows = batch.get("labels"), find_target_rows(batch).sum().to(device)
        if not isinstance(labels, Tensor):
            items.append(torch.stack([rows, rows]))
            continue
        own = ignore_rows(labels, batch["general"]) if "general" in batch else labels
        items.append(torch.stack([count_labels(own).to(device), rows]))
    return torch.stack(items).sum(0)


def sum_step_weights(
    batches: list[Batch], weighting: LossWeighting, device: torch.device
) -> Tensor:
    """Return the sum of the weights of the target's elements in a step's batches: float32."""
    total = torch.zeros((), device=device)
    for batch in batches:
        labels = batch["labels"]
        own = ignore_rows(labels, batch["general"]) if "general" in batch else labels
        total += weighting.sum_weights(own, _is_labelled(own)).to(device)
    return total


def blank_filler(batches: list[Batch], has_filler: bool) -> list[Batch]:
    """Return a step's batches for counting: the last one, if it only fills up, without labels."""
    labels = batches[-1].get("labels")
    if not has_filler or not isinstance(labels, Tensor):
        return batches
    return [*batches[:-1], {**batches[-1], "labels": torch.full_like(labels, IGNORE_INDEX)}]


def check_general_ratio(ratio: float) -> None:
    """Refuse a ratio that the loss cannot be divided by.

    Args:
        ratio: general rows for each row of the target.

    Raises:
        RecipeError: naming the argument.
    """
    if not ratio > 0:
        raise RecipeError(
            f"general_ratio={ratio} must be above 0", "Raise it, or leave general_dataset out"
        )


def average_evaluated_loss(evaluated: list[Tensor]) -> float:
    """Return the mean loss over all labelled elements of all processes. Collective.

    Args:
        evaluated: (2,) a batch: the summed loss, and what it is divided by.
    """
    sums = torch.stack(evaluated).cpu().double().sum(0).tolist()
    loss, items = (sum(column) for column in zip(*gather_values(sums), strict=True))
    return loss / (items or 1.0)


def count_real_rows(rows: int, accelerator: Accelerator) -> int:
    """Return how many rows of an evaluated batch are no padding of the last batches of ranks."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - accelerator.process_index * rows))
