"""The task's loss as a sum over counted elements, and how many those are."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The class id that says there is no label; among float targets that is NaN."""


def summed_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The loss over all counted elements, summed, in fp32.

    Integer labels: cross-entropy. Float (batch,) or (batch, patches, values): squared error. Float
    (batch, classes): binary cross-entropy, each class for itself.

    Args:
        logits: (..., classes), (batch, 1) for a target, or (batch, patches, values).
        labels: (...) int64, -100 where there is none; or float, NaN where there is none.
        smoothing: share of each class label's weight that is spread over all classes.
    """
    wide = logits.float()
    if not labels.is_floating_point():
        flat = wide.reshape(-1, wide.shape[-1])
        return F.cross_entropy(
            flat, labels.reshape(-1), reduction="sum", ignore_index=IGNORED,
            label_smoothing=smoothing,
        )  # fmt: skip
    counts = ~labels.isnan()
    targets = labels.float().where(counts, 0.0)
    if labels.dim() == 2:
        each = F.binary_cross_entropy_with_logits(wide, targets, reduction="none")
    else:
        each = F.mse_loss(wide.reshape(targets.shape), targets, reduction="none")
    return each.where(counts, 0.0).sum()


def counted(labels: Tensor) -> Tensor:
    """How many elements the loss counts: a scalar int64 on the labels' device."""
    there = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return there.sum()


def counted_rows(labels: Tensor) -> Tensor:
    """Which rows hold anything that counts: (batch,) bool."""
    there = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return there.reshape(len(labels), -1).any(1)


def uncounted(labels: Tensor, rows: slice = slice(None)) -> Tensor:
    """A copy of the labels of which these rows count for nothing."""
    empty = labels.clone()
    empty[rows] = torch.nan if labels.is_floating_point() else IGNORED
    return empty
