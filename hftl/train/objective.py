"""Plan who computes the loss of a training: the model, or hftl where both losses are equal."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils.generic import can_return_loss, find_labels

from hftl.errors import RecipeError
from hftl.models.model_parts import unwrap_adapter
from hftl.retain.original import eval_mode
from hftl.retain.regularizer import Batch
from hftl.train.hf_compat import has_replaced_loss, unwrap_forward
from hftl.train.loss import (
    compute_summed_loss,
    count_labels,
    has_labels,
    is_multi_label,
    labels_fit_logits,
)

KNOWN_HEADS = (
    "ForSequenceClassification", "ForImageClassification", "ForTokenClassification", "ForMaskedLM",
)  # fmt: skip
"""Heads of transformers whose loss is a mean over elements that hftl can count."""
PROBLEM_TYPE_HEADS = ("ForSequenceClassification", "ForImageClassification")
"""Heads that read `config.problem_type`."""
LOSS_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 3e-2
"""How far the model's own loss may be from hftl's, in full and in half precision."""


@dataclass(frozen=True)
class LossPlan:
    """Say how the loss of a batch is computed.

    Args:
        uses_model_loss: the model computes the loss; otherwise hftl does, from the logits.
        counts_items: the model divides a sum by `num_items_in_batch`; otherwise its loss is taken
            for a mean over the rows of its batch.
        problem: transformers' `problem_type`, where hftl computes the loss and the model has one.
    """

    uses_model_loss: bool
    counts_items: bool = False
    problem: str | None = None

    def read_labels(self, labels: Tensor) -> Tensor:
        """Return the labels as the loss reads them: targets of a regression are floats."""
        is_target = self.problem == "regression" and not self.uses_model_loss
        return labels.float() if is_target and not labels.is_floating_point() else labels


def can_compute_loss(model: nn.Module) -> bool:
    """Return whether the model's own forward can return a loss."""
    inner = unwrap_adapter(model)
    if is_hftl_module(inner):
        return False
    parameters = inspect.signature(inner.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    kind = type(inner)
    return "labels" in parameters or open_ended or bool(find_labels(kind)) or can_return_loss(kind)


def has_stock_loss(model: nn.Module) -> bool:
    """Return whether the loss is computed by a forward of transformers, as it is published."""
    inner = unwrap_adapter(model)
    forward = unwrap_forward(inner)
    return str(forward.__module__).startswith("transformers.") and not has_replaced_loss(inner)


def has_known_head(model: nn.Module) -> bool:
    """Return whether the model is one of `KNOWN_HEADS`, with transformers' own loss."""
    owner = getattr(unwrap_forward(unwrap_adapter(model)), "__qualname__", "").split(".")[0]
    return has_stock_loss(model) and owner.endswith(KNOWN_HEADS)


def has_known_loss(model: nn.Module) -> bool:
    """Return whether hftl computes the loss, or may compute it."""
    return not can_compute_loss(model) or has_known_head(model)


def plan_loss(
    model: nn.Module,
    batch: Batch,
    accepts_count: bool,
    accelerator: Accelerator,
) -> LossPlan:
    """Return how to compute the loss of a training, from one of its batches.

    hftl computes it where the model cannot, and for `KNOWN_HEADS`, where its sum over all counted
    elements makes steps exact; the latter only if it equals the model's own loss on this batch.
    Collective: every process must call it.

    Args:
        model: not wrapped for many processes.
        batch: what the model takes, and the labels; on the model's device.
        accepts_count: whether the model's forward accepts `num_items_in_batch`.
        accelerator: of the training.
    """

    def is_true_anywhere(value: bool) -> bool:
        flag = torch.tensor([int(value)], device=accelerator.device)
        return bool(accelerator.gather(flag).any())  # pyright: ignore[reportAttributeAccessIssue]

    if not can_compute_loss(model):
        return LossPlan(False, problem=_find_problem_type(model, read_config=True))
    if has_known_head(model) and isinstance(batch.get("labels"), Tensor):
        if not is_true_anywhere(_loss_differs(model, batch)):
            return LossPlan(False, problem=_find_problem_type(model))
    can_count = accepts_count and isinstance(batch.get("labels"), Tensor)
    counts = can_count and not is_true_anywhere(_ignores_item_count(model, batch))
    return LossPlan(True, counts_items=counts)


def check_trainable_dtype(model: nn.Module) -> None:
    """Refuse to train weights in half precision, whose steps are mostly too small to be kept.

    Frozen weights may be of any precision.

    Raises:
        RecipeError: naming the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RecipeError(
                f"{name} trains and is {kind}: most of its updates would round to nothing",
                "Load the model with dtype=torch.float32 and set bf16=True, which multiplies in "
                "half precision and keeps the weights whole",
            )


def check_label_smoothing(model: nn.Module, has_own_loss: bool) -> None:
    """Refuse label smoothing where it would do nothing, as far as the model tells.

    Args:
        model: what is trained.
        has_own_loss: whether a function of the user computes the loss.

    Raises:
        RecipeError: naming the reason.
    """
    config = getattr(unwrap_adapter(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and _reads_problem_type(model) and getattr(config, "num_labels", 2) == 1:
        problem = "regression"
    if has_own_loss:
        raise _build_smoothing_error("compute_loss_func computes the loss")
    if problem in ("regression", "multi_label_classification"):
        raise _build_smoothing_error(f"problem_type is {problem}")


def check_smoothing_targets(model: nn.Module, labels: Any, objective: LossPlan) -> None:
    """Refuse label smoothing of what has no classes, and in the place of a model's own loss.

    Raises:
        RecipeError: naming the reason.
    """
    if not isinstance(labels, Tensor):
        raise _build_smoothing_error("the rows have no `labels`")
    if labels.is_floating_point() or objective.problem == "regression":
        raise _build_smoothing_error("the labels are numbers, not classes")
    if objective.uses_model_loss and not has_stock_loss(model):
        name = type(unwrap_adapter(model)).__name__
        raise _build_smoothing_error(f"{name} computes its own loss, which smoothing would replace")


def check_weighting_targets(model: nn.Module, labels: Any, plan: LossPlan) -> None:
    """Refuse class weights and focal loss of what has no classes, and of a model's own loss.

    Raises:
        RecipeError: naming the reason.
    """
    reason = None
    if plan.uses_model_loss:
        name = type(unwrap_adapter(model)).__name__
        reason = f"{name}, or compute_loss_func, computes the loss of a batch by itself"
    elif not isinstance(labels, Tensor):
        reason = "the rows have no `labels`"
    elif labels.is_floating_point() and not is_multi_label(labels, plan.problem):
        reason = "the labels are numbers, not classes"
    elif plan.problem == "regression":
        reason = "problem_type is regression"
    if reason is not None:
        raise RecipeError(
            f"class_weight and focal_gamma weigh the loss of each labelled element, and {reason}",
            "Leave them out, or weigh in your own loss",
        )


def check_has_labels(batch: Batch, plan: LossPlan) -> None:
    """Refuse a batch without labels where hftl computes the loss.

    Raises:
        RecipeError: naming what the rows hold.
    """
    if not plan.uses_model_loss and not isinstance(batch.get("labels"), Tensor):
        raise RecipeError(
            f"the rows hold {', '.join(map(str, batch))}, and no labels",
            "Name their labels `labels`",
        )


def check_mixes_rows(model: nn.Module, plan: LossPlan) -> None:
    """Refuse general rows in the batches of a model that computes the loss of a batch by itself.

    Raises:
        RecipeError: naming the model.
    """
    if plan.uses_model_loss:
        raise RecipeError(
            f"general_dataset mixes rows into every batch, and {type(model).__name__} computes "
            "the loss of a batch by itself",
            "Leave general_dataset out, or use a stock class of transformers",
        )


def check_scalar_loss(model: nn.Module, loss: Tensor) -> None:
    """Refuse a loss of more than one number.

    Raises:
        RecipeError: naming the model and the shape.
    """
    if loss.numel() != 1:
        raise RecipeError(
            f"{type(model).__name__} returns a loss of shape {list(loss.shape)}",
            "Return one number from its forward where labels are given, as the first output",
        )


def _build_smoothing_error(reason: str) -> RecipeError:
    return RecipeError(
        f"label_smoothing_factor spreads the weight of a class, and {reason}",
        "Set it to 0, or smooth in your own loss",
    )


def find_logits(outputs: Any, model: nn.Module) -> Tensor:
    """Return the logits of a model's outputs: a ModelOutput, a mapping, a tuple or a tensor.

    Raises:
        RecipeError: naming the model, if there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple) and not hasattr(outputs, "logits"):
        logits = outputs[0] if outputs else None
    elif isinstance(outputs, dict):
        logits = outputs.get("logits")
    else:
        logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise RecipeError(
        f"{type(unwrap_adapter(model)).__name__} returns neither a loss nor logits",
        "Return a loss from its forward where labels are given, or `logits`",
    )


def name_logits(outputs: Any, model: nn.Module) -> Any:
    """Return outputs that have `logits` as an attribute."""
    if hasattr(outputs, "logits"):
        return outputs
    return SimpleNamespace(logits=find_logits(outputs, model))


def _loss_differs(model: nn.Module, batch: Batch) -> bool:
    """Return whether the model's own loss on a batch is another than hftl's."""
    labels = batch["labels"]
    rows = has_labels(labels)
    if not rows.any():
        return False
    part = {
        key: value[rows] if isinstance(value, Tensor) and len(value) == len(rows) else value
        for key, value in batch.items()
        if not isinstance(value, Tensor) or value.dim()
    }
    if labels.is_floating_point():
        part["labels"] = part["labels"].nan_to_num(0.0)
    outputs = _forward_in_eval(model, part)
    if isinstance(outputs, tuple):  # config.return_dict is false
        own, logits = (*outputs, None)[:2]
    else:
        own, logits = outputs.get("loss"), outputs.get("logits")
    if own is None or logits is None:
        return True
    objective = LossPlan(False, problem=_find_problem_type(model))
    labels = objective.read_labels(part["labels"])
    if not labels_fit_logits(logits, labels, objective.problem):
        return True
    same = compute_summed_loss(logits, labels, problem=objective.problem) / count_labels(labels)
    tolerance = LOSS_TOLERANCE if logits.dtype == torch.float32 else HALF_PRECISION_TOLERANCE
    return not torch.allclose(own.float(), same.float(), rtol=tolerance, atol=tolerance)


def _ignores_item_count(model: nn.Module, batch: Batch) -> bool:
    """Return whether the loss stays as it is, whatever `num_items_in_batch` is."""
    count = torch.tensor(1, device=batch["labels"].device)
    losses = [
        _find_loss(_forward_in_eval(model, {**batch, "num_items_in_batch": factor * count}))
        for factor in (1, 2)
    ]
    if any(loss is None for loss in losses):
        return False
    return bool(losses[0] == losses[1]) and bool(losses[0] != 0)


def _find_loss(outputs: Any) -> Any:
    if isinstance(outputs, dict):
        return outputs.get("loss")
    return outputs[0] if isinstance(outputs, tuple) and outputs else None


def _forward_in_eval(model: nn.Module, batch: Batch) -> Any:
    """Return the outputs on a batch in eval mode, without a trace in any random state."""
    with torch.no_grad(), eval_mode(model), _preserve_random_state():
        return model(**batch)


@contextmanager
def _preserve_random_state() -> Iterator[None]:
    """Put the states of the generators of Python, NumPy and torch back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _find_problem_type(model: nn.Module, read_config: bool = False) -> str | None:
    """Return the config's `problem_type`, if the model's loss depends on it."""
    config = getattr(unwrap_adapter(model), "config", None)
    return (
        getattr(config, "problem_type", None) if read_config or _reads_problem_type(model) else None
    )


def _reads_problem_type(model: nn.Module) -> bool:
    owner = getattr(unwrap_forward(unwrap_adapter(model)), "__qualname__", "").split(".")[0]
    return owner.endswith(PROBLEM_TYPE_HEADS)


def is_hftl_module(model: nn.Module) -> bool:
    """Return whether the model is one of hftl's own, whose loss is the trainer's business."""
    # FSDP replaces the class of a module by a subclass that it defines itself.
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]
