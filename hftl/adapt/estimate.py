"""Estimate how long an adaptation trains, from a few timed steps of it."""

from typing import Any

from torch import nn

from hftl import processes
from hftl.adapt.stage import BATCH, EVALUATIONS, Task, steps_of
from hftl.sections.adapt import Adapt
from hftl.train.arguments import EVAL_BATCH
from hftl.train.step import model_inputs
from hftl.train.timing import time_forward, time_step


def estimate_seconds(model: nn.Module, task: Task, stage: Adapt, device: str) -> float:
    """Estimate the seconds of all steps and looks at held-out losses, as if none stopped early.

    The guard's own passes are not counted. The weights stay as they are.

    Args:
        model: the objective, on the device, its trainable parameters chosen.
        task: the corpus.
        stage: the recipe's section.
        device: where it trains.
    """
    rows: Any = task.train
    size = int(stage.training.get("per_device_train_batch_size", BATCH))
    steps = steps_of(stage.training, len(rows))
    micro = steps * int(stage.training.get("gradient_accumulation_steps", 1))
    step = time_step(model, _batch(task, rows, size), stage.training, device)
    looks = 0.0
    for held in (task.held_out, task.general):
        if held is not None:
            count = len(held)  # pyright: ignore[reportArgumentType]
            batch = _batch(task, held, EVAL_BATCH)
            seconds = time_forward(model, batch, stage.training, device)
            looks += seconds * max(1.0, count / EVAL_BATCH)
    return micro * step + min(steps, EVALUATIONS + 1) * looks / processes.size()


def _batch(task: Task, rows: Any, size: int) -> dict[str, Any]:
    """The first rows as the objective takes them."""
    return model_inputs(task.collate([rows[i] for i in range(min(size, len(rows)))]))
