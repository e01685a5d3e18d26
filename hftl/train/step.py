"""What a step's loss is made of: which labels count, and for how much."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_pt_utils import find_batch_size

from hftl.errors import NumericError, RecipeError
from hftl.retain.build import Retention
from hftl.retain.reference import BATCH_METADATA
from hftl.train.loss import (
    IGNORE_INDEX,
    compute_replay_loss,
    compute_summed_loss,
    count_labels,
    has_labels,
    ignore_rows,
)
from hftl.train.objective import labels_fit_logits


def select_model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key not in ("labels", *BATCH_METADATA)}


def drop_metadata(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without what only terms read, labels included."""
    return {key: value for key, value in batch.items() if key not in BATCH_METADATA}


def compute_task_loss(
    outputs: Any, logits: Tensor, batch: dict[str, Any], share: float, smoothing: float,
    problem: str | None,
) -> Tensor:  # fmt: skip
    """Return the task's loss of a batch, summed, a labelled general row counting for `share`.

    Args:
        outputs: which may hold `slots`, the labels that the logits are for.
        logits: of the outputs.
        batch: with `labels`, and `general` (batch,) bool where general rows are among them.
        share: see `replayed_loss`.
        smoothing: see `summed_loss`.
        problem: see `summed_loss`.

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
        return compute_replay_loss(logits, labels, batch["general"], share, smoothing, problem)
    return compute_summed_loss(logits, labels, smoothing, problem)


def prepend_loss(outputs: Any, loss: Tensor) -> Any:
    """Return outputs as the Trainer's evaluation reads them: of a tuple the loss comes first."""
    if isinstance(outputs, Tensor):
        return loss, outputs
    is_plain = isinstance(outputs, tuple) and not hasattr(outputs, "logits")
    return (loss, *outputs) if is_plain else outputs


def find_labelled_rows(batch: dict[str, Any]) -> Tensor:
    """Return which rows of a batch hold anything that counts: (batch,) bool.

    Without `labels`, as in question answering, these are all.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim():
        return has_labels(labels)
    return torch.ones(find_batch_size(batch) or 1, dtype=torch.bool)


def sum_penalty(outputs: Any, labels: Tensor) -> Tensor | float:
    """The sum of `outputs.penalty` (batch,) over the rows that count; 0 where there is none."""
    found = getattr(outputs, "penalty", None)
    return 0.0 if found is None else found.float().where(has_labels(labels), 0.0).sum()


def find_target_rows(batch: dict[str, Any]) -> Tensor:
    """Return which rows of a batch are the target's and hold what counts: (batch,) bool."""
    counts = find_labelled_rows(batch)
    return counts & ~batch["general"] if "general" in batch else counts


def count_step_items(batches: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Return (2,) int64: the target's counted elements in a step's batches, and its rows with any.

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


def blank_filler(batches: list[dict[str, Any]], has_filler: bool) -> list[dict[str, Any]]:
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


def check_finite_loss(total: float, step: int) -> None:
    """Refuses a step's loss that is no number.

    Raises:
        NumericError: naming the step.
    """
    if not math.isfinite(total):
        raise NumericError(
            f"the loss is {total} at step {step}", "Lower the learning rate, or look at the data"
        )


def count_real_rows(rows: int, accelerator: Accelerator) -> int:
    """How many of an evaluated batch's rows are not there to make the last batches of ranks
    equal."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - accelerator.process_index * rows))


class RetentionCallback(TrainerCallback):
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
