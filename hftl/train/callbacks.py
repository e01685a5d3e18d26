"""Show a training's progress, call regularizers after a step, and time steps.

Steps are timed on one batch, in the precision of training, to estimate the time of a run.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from hftl.retain.original import move_batch
from hftl.retain.regularizer import Batch, Retention
from hftl.runtime.hardware import choose_precision
from hftl.runtime.progress import BarUpdate, open_bar
from hftl.train.checkpoint import list_training_modes

TIMED_CALLS = 1, 5
"""Calls that are timed at least and, where they are quick, at most, after one that is not."""
TIMED_SECONDS = 0.1
"""Seconds after which no further call is timed."""


class PassTime(NamedTuple):
    """Hold the seconds of one pass of a model.

    `worked` is the least that this thread computed, whatever else the machine did; `elapsed` is
    the usual time that went by, in which the thread may have waited for a core.
    """

    worked: float
    elapsed: float


def time_step(
    model: nn.Module, batch: Batch, training: Mapping[str, object], device: str
) -> PassTime:
    """Return the time of one training step: forward, backward and optimizer, weights unmoved.

    Args:
        model: on the device; what requires a gradient trains. Left with its modules in the modes
            of training.
        batch: the model's inputs.
        training: fields of TrainingArguments, for the precision.
        device: where the model is.
    """
    for module, live in list_training_modes(model):
        module.training = live
    # At rate 0 the step costs what any step costs, and changes nothing.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    inputs = move_batch(batch, torch.device(device))

    def step() -> None:
        with _autocast(training, device):
            outputs = model(**inputs).logits
        outputs.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _measure_seconds(step, device)


def time_forward(
    model: nn.Module, batch: Batch, training: Mapping[str, object] | None, device: str
) -> PassTime:
    """Return the time of one forward pass in eval mode; without `training` in fp32."""
    model.eval()
    inputs = move_batch(batch, torch.device(device))

    def forward() -> None:
        with torch.no_grad(), _autocast(training or {"bf16": False}, device):
            model(**inputs)

    return _measure_seconds(forward, device)


def _autocast(training: Mapping[str, object], device: str) -> AbstractContextManager[Any]:
    chosen = choose_precision(training)
    dtype = torch.float16 if chosen["fp16"] else torch.bfloat16
    return torch.autocast(device, dtype, enabled=any(chosen.values()))


def _measure_seconds(work: Callable[[], None], device: str) -> PassTime:
    work()
    _synchronize(device)
    fewest, most = TIMED_CALLS
    worked: list[float] = []
    elapsed: list[float] = []
    while len(elapsed) < fewest or (len(elapsed) < most and sum(elapsed) < TIMED_SECONDS):
        started, computed = time.perf_counter(), time.thread_time()
        work()
        _synchronize(device)
        worked.append(time.thread_time() - computed)
        elapsed.append(time.perf_counter() - started)
    if device != "cpu":
        # What an accelerator does is no time of this thread's.
        return PassTime(min(elapsed), min(elapsed))
    return PassTime(min(*worked, *elapsed), statistics.median(elapsed))


def _synchronize(device: str) -> None:
    """Wait for an accelerator, which works behind the caller's back."""
    if device == "cuda":
        torch.cuda.synchronize()


class ProgressBarCallback(TrainerCallback):
    """Show one bar over the optimizer's steps, and one over the batches of each evaluation."""

    def __init__(self) -> None:
        self._training, self._evaluation = ExitStack(), ExitStack()
        self._advance: BarUpdate | None = None
        self._advance_evaluation: BarUpdate | None = None
        self._evaluated = 0
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        self._loss = None
        self._advance = self._training.enter_context(open_bar("training", state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, with the epoch and the last logged loss in front of it."""
        if self._advance is not None:
            epochs = state.num_train_epochs or args.num_train_epochs
            loss = "" if self._loss is None else f", loss {self._loss:.3f}"
            self._advance(state.global_step, f"epoch {state.epoch or 0:.1f}/{epochs:g}{loss}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Move the evaluation's bar."""
        if self._advance_evaluation is None:
            batches = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            bar = open_bar("evaluation", batches)
            self._advance_evaluation = self._evaluation.enter_context(bar)
        self._evaluated += 1
        self._advance_evaluation(self._evaluated)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the evaluation's bar."""
        self._evaluation.close()
        self._advance_evaluation, self._evaluated = None, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self._training.close()
        self._advance = None


def replace_progress_callbacks(trainer: Trainer) -> None:
    """Show this trainer's progress in hftl's own way instead of transformers'."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBarCallback())


class RetentionCallback(TrainerCallback):
    """Let regularizers change the weights after the optimizer's step."""

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
        """Pass model and optimizer to the regularizers."""
        self.retention.after_step(model, optimizer)
