"""Time a forward pass or a training step on one batch, in the precision of training."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hftl.train.hardware import precision
from hftl.train.modes import training_modes

REPEATS = 2
"""Calls that are timed, after one that is not."""


def time_step(
    model: nn.Module, batch: dict[str, Any], training: dict[str, Any], device: str
) -> float:
    """Return the seconds of one training step: forward, backward and optimizer, weights unmoved.

    Args:
        model: on the device; what requires a gradient trains. Left with its modules in the modes
            of training.
        batch: the model's inputs.
        training: fields of TrainingArguments, for the precision.
        device: where the model is.
    """
    for module, live in training_modes(model):
        module.training = live
    # At rate 0 the step costs what any step costs, and changes nothing.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    inputs = _moved(batch, device)

    def step() -> None:
        with _autocast(training, device):
            outputs = model(**inputs).logits
        outputs.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, device)


def time_forward(
    model: nn.Module, batch: dict[str, Any], training: dict[str, Any] | None, device: str
) -> float:
    """Return the seconds of one forward pass in eval mode; without `training` in fp32."""
    model.eval()
    inputs = _moved(batch, device)

    def forward() -> None:
        with torch.no_grad(), _autocast(training or {"bf16": False}, device):
            model(**inputs)

    return _timed(forward, device)


def _moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _autocast(training: dict[str, Any], device: str) -> AbstractContextManager[Any]:
    chosen = precision(training)
    dtype = torch.float16 if chosen["fp16"] else torch.bfloat16
    return torch.autocast(device, dtype, enabled=any(chosen.values()))


def _timed(work: Callable[[], None], device: str) -> float:
    work()
    _wait(device)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    # The shorter one: what else the machine did in between is not the work's.
    return min(seconds)


def _wait(device: str) -> None:
    """Wait for an accelerator, which works behind the caller's back."""
    if device == "cuda":
        torch.cuda.synchronize()
