"""Whether a reference's head says anything of the labels: KL on one nobody trained is noise."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hftl.errors import RecipeError

BETTER = 0.95
"""A head has an opinion if its loss is below this share of that of the labels' shares alone."""


@dataclass(frozen=True)
class Opinion:
    """What a head says of the labels: its loss, and that of the labels' shares alone."""

    loss: float
    shares: float

    @property
    def is_weak(self) -> bool:
        """Whether the head is hardly better than the shares, or worse."""
        return not self.loss < BETTER * self.shares


def opinion_of(logits: Tensor, labels: Tensor, kind: str) -> Opinion | None:
    """Compares a head with one that knows only how frequent each label is.

    Args:
        logits: (rows, outputs) of the original on training rows.
        labels: (rows,) int64, -100 where there is none, or float, NaN where there is none, or
            (rows, outputs) of 0 and 1.
        kind: `classes`, `labels` or `target`.

    Returns:
        None where no row has a label.
    """
    counts = labels >= 0 if kind == "classes" else ~labels.isnan().reshape(len(labels), -1).any(1)
    logits, labels = logits[counts].double(), labels[counts]
    if not len(labels):
        return None
    if kind == "target":
        loss = F.mse_loss(logits.squeeze(-1), labels.double())
        blind = labels.double().var(unbiased=False)
    elif kind == "labels":
        loss = F.binary_cross_entropy_with_logits(logits, labels.double())
        share = labels.double().mean(0)
        blind = F.binary_cross_entropy(share.expand_as(logits), labels.double())
    else:
        loss = F.cross_entropy(logits, labels)
        share = labels.bincount(minlength=logits.shape[1]).double() / len(labels)
        blind = -(torch.xlogy(share, share)).sum()
    return Opinion(float(loss), float(blind))


def check_opinion(logits: Tensor, labels: Tensor, kind: str) -> None:
    """Refuses a head that says nothing of the labels; see `opinion_of`.

    Raises:
        RecipeError: if it is no better than the labels' shares, as a head that nobody trained.
    """
    found = opinion_of(logits, labels, kind)
    if found is not None and found.is_weak:
        raise RecipeError(
            f"kl.on=probe: the reference's head says nothing of the labels (loss {found.loss:.3f}, "
            f"{found.shares:.3f} by their shares alone): nobody has trained it, or the encoder's "
            "features do not tell them",
            "Start the head from a probe (head_init: probe); where it is one, use on: relational",
        )
