"""What a step's loss is made of: which labels count, and for how much."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from hftl.errors import NumericError, RecipeError
from hftl.retain.retention import Retention
from hftl.retain.view import BESIDE
from hftl.train.loss import counted, counted_rows, replayed_loss, summed_loss, uncounted


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key not in ("labels", *BESIDE)}


def task_loss(outputs: Any, batch: dict[str, Any], share: float, smoothing: float) -> Tensor:
    """The task's loss of a batch, summed, a labelled general row counting for `share`.

    Args:
        outputs: with `logits`, and where they have them `slots`, the labels that those are for.
        batch: with `labels`, and `general` (batch,) bool where general rows are among them.
        share: see `replayed_loss`.
        smoothing: see `summed_loss`.
    """
    labels, slots = batch["labels"], getattr(outputs, "slots", None)
    told = labels if slots is None else labels.reshape(-1)[slots]
    if "general" in batch:
        return replayed_loss(outputs.logits, told, batch["general"], share, smoothing)
    return summed_loss(outputs.logits, told, smoothing)


def penalty(outputs: Any, labels: Tensor) -> Tensor | float:
    """The sum of `outputs.penalty` (batch,) over the rows that count; 0 where there is none."""
    found = getattr(outputs, "penalty", None)
    return 0.0 if found is None else found.float().where(counted_rows(labels), 0.0).sum()


def target_rows(batch: dict[str, Any]) -> Tensor:
    """Which rows of a batch are the target's and hold anything that counts: (batch,) bool."""
    counts = counted_rows(batch["labels"])
    return counts & ~batch["general"] if "general" in batch else counts


def step_items(batches: list[dict[str, Any]], device: torch.device) -> Tensor:
    """(2,) int64: the target's counted elements in a step's batches, and its rows with any."""
    found = []
    for batch in batches:
        labels = batch["labels"]
        own = uncounted(labels, batch["general"]) if "general" in batch else labels
        found.append(torch.stack([counted(own), target_rows(batch).sum()]).to(device))
    return torch.stack(found).sum(0)


def check_arguments(loss: Any, ratio: float) -> None:
    """Refuses what the loss would leave out, and a ratio that it cannot be divided by.

    Args:
        loss: transformers' `compute_loss_func`.
        ratio: general rows for each row of the target.

    Raises:
        RecipeError: naming the argument.
    """
    if loss is not None:
        raise RecipeError(
            "TransferTrainer takes the task's loss by itself, and compute_loss_func would not be "
            "called",
            "Leave it out, or override compute_loss in a subclass",
        )
    if not ratio > 0:
        raise RecipeError(
            f"general_ratio={ratio} must be above 0", "Raise it, or leave general_dataset out"
        )


def check_finite(total: float, step: int) -> None:
    """Refuses a step's loss that is no number.

    Raises:
        NumericError: naming the step.
    """
    if not math.isfinite(total):
        raise NumericError(
            f"the loss is {total} at step {step}", "Lower the learning rate, or look at the data"
        )


def real_rows(rows: int, accelerator: Accelerator) -> int:
    """How many of an evaluated batch's rows are not there to make the last batches of ranks
    equal."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - accelerator.process_index * rows))


class AfterStep(TrainerCallback):
    """Lets terms change the weights after the optimizer's step."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention

    def on_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Hands the model over."""
        self.retention.after_step(model, optimizer)
