"""The task's loss as a sum over counted elements, and how many those are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The class id that says there is no label; among float targets that is NaN."""
MANY_CLASSES = 1024
"""Classes from which on a loss in fp32 beside the logits would be felt in memory."""
ROWS_PER_CHUNK = 64
"""Rows of which the loss is taken at a time there."""


def compute_summed_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, problem: str | None = None
) -> Tensor:
    """Return the loss over all counted elements, summed, in fp32.

    Integer labels: cross-entropy. Float (batch,) or (batch, patches, values): squared error. Float
    (batch, classes): binary cross-entropy, each class for itself, unless `problem` is `regression`.

    Args:
        logits: (..., classes), (batch, targets), or (batch, patches, values).
        labels: (...) int64, -100 where there is none; or float, NaN where there is none.
        smoothing: share of each class label's weight that is spread over all classes.
        problem: transformers' `problem_type`, where the model has one.
    """
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


def is_multi_label(labels: Tensor, problem: str | None) -> bool:
    """Return whether float labels are yes or no for each class, rather than targets."""
    if problem is None:
        return labels.dim() == 2
    return problem == "multi_label_classification"


def compute_replay_loss(
    logits: Tensor, labels: Tensor, general: Tensor, share: float, smoothing: float = 0.0,
    problem: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the target's loss, summed, and `share` of that of labelled general rows (replay).

    Args:
        logits: see `compute_summed_loss`.
        labels: see `compute_summed_loss`, a row of the batch each.
        general: (batch,) bool.
        share: what a general row counts for.
        smoothing: see `compute_summed_loss`.
        problem: see `compute_summed_loss`.
    """
    own = compute_summed_loss(logits, ignore_rows(labels, general), smoothing, problem)
    return own + share * compute_summed_loss(
        logits, ignore_rows(labels, ~general), smoothing, problem
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in fp32, summed, of some rows at a time.

    Keeps the gradient, softmax minus one-hot, in the logits' dtype instead of their logarithms in
    fp32: over a vocabulary those are the largest tensors of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        for start in range(0, len(logits), ROWS_PER_CHUNK):
            piece = slice(start, start + ROWS_PER_CHUNK)
            told, counts = labels[piece], labels[piece] != IGNORE_INDEX
            logs = logits[piece].float().log_softmax(-1)
            column = told.where(counts, 0).unsqueeze(1)
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
    """How many elements the loss counts: a scalar int64 on the labels' device."""
    there = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX
    return there.sum()


def has_labels(labels: Tensor) -> Tensor:
    """Which rows hold anything that counts: (batch,) bool."""
    there = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX
    return there.reshape(len(labels), -1).any(1)


def ignore_rows(labels: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
    """A copy of the labels of which these rows count for nothing."""
    empty = labels.clone()
    empty[rows] = torch.nan if labels.is_floating_point() else IGNORE_INDEX
    return empty
