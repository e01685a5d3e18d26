"""Stop a training whose losses or gradients are not finite, or whose loss has diverged.

The numbers of a step are read before the optimizer uses them on a CPU. On an accelerator they are
copied without waiting and read one step later, or before anything is logged, evaluated or saved,
so that no step waits for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hftl.errors import NumericError
from hftl.train.checkpoint import CallbackState, StatefulCallback

FIRST_STEPS = 10
"""Steps that show where a loss begins."""
DIVERGED_FACTOR = 10.0
"""How many times its first values, and 1 at least, a loss is when it has diverged."""
DIVERGED_STEPS = 50
"""Steps in a row above that."""
MAX_NAMED_ROWS = 8

ListRows = Callable[[], list[str]]
"""Return the names of the rows of a step."""


@dataclass(frozen=True)
class StepNumbers:
    """Hold the numbers of one step, on all processes the same.

    Args:
        step: of the optimizer, from 0.
        list_rows: names the rows of the step.
        values: (3,), the loss, what regularizers add to it, and the norm of the gradients.
        is_copied: waits until `values` are on the CPU.
    """

    step: int
    list_rows: ListRows
    values: Tensor
    is_copied: Callable[[], object]


class NumberWatch(StatefulCallback):
    """Collect the numbers of every step, and stop the training by them.

    Args:
        fix: the advice where a number is not finite; the rows of the step follow it.
    """

    def __init__(self, fix: str = "Lower the learning rate") -> None:
        self._fix = fix
        self.reset()

    def reset(self) -> None:
        """Forget all steps, before a training begins."""
        self._pending: StepNumbers | None = None
        self._highest_start, self._started, self._above = 1.0, 0, 0
        self.begin_step()

    def dump_state(self) -> CallbackState:
        """Return what divergence is judged by."""
        values = {"start": self._highest_start, "started": self._started, "above": self._above}
        return values, {}

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `dump_state` returned."""
        self._highest_start, self._started = values["start"], values["started"]
        self._above = values["above"]

    def begin_step(self) -> None:
        """Forget the micro-batches of a step that begins, or is tried once more."""
        self._loss: Tensor | float = 0.0
        self._added: Tensor | float = 0.0

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, with what regularizers add."""
        self._loss = self._loss + loss.detach()

    def add_regularization(self, loss: Tensor | float) -> None:
        """Add what regularizers add to the loss of a micro-batch."""
        self._added = self._added + (loss.detach() if isinstance(loss, Tensor) else loss)

    def finish_step(
        self, step: int, norm: Tensor | float | None, accelerator: Any, list_rows: ListRows
    ) -> None:
        """Take the numbers of a step whose gradients are computed. Collective.

        Args:
            step: of the optimizer, from 0.
            norm: of the gradients; None where it says nothing, as when fp16 skips steps by itself.
            accelerator: gathers the losses of all processes.
            list_rows: names the rows of the step.

        Raises:
            NumericError: on all processes, for this step on a CPU, or for the one before.
        """
        device = accelerator.device
        here = (self._loss, self._added, 0.0 if norm is None else norm)
        values = torch.stack([_to_scalar(value, device) for value in here])
        if accelerator.num_processes > 1:
            values = accelerator.gather(values).view(-1, 3).mean(0)
        self.begin_step()
        if device.type != "cuda":
            self._check(StepNumbers(step, list_rows, values.cpu(), _do_nothing))
            return
        self.check_pending()
        copied = torch.cuda.Event()
        on_cpu = values.to("cpu", non_blocking=True)
        copied.record()
        self._pending = StepNumbers(step, list_rows, on_cpu, copied.synchronize)

    def check_pending(self) -> None:
        """Check the last step, if that is not done yet.

        Raises:
            NumericError: see `finish_step`.
        """
        if self._pending is not None:
            numbers, self._pending = self._pending, None
            self._check(numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the step before anything is made of the weights that it led to."""
        is_last = state.global_step >= state.max_steps
        if is_last or control.should_log or control.should_evaluate or control.should_save:
            self.check_pending()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the last step of an epoch, which an evaluation may follow."""
        self.check_pending()

    def _check(self, numbers: StepNumbers) -> None:
        numbers.is_copied()
        loss, added, norm = numbers.values.tolist()
        named = {"the loss of retain's regularizers": added, "the loss": loss,
                 "the norm of the gradients": norm}  # fmt: skip
        for name, value in named.items():
            if not math.isfinite(value):
                raise NumericError(
                    f"{name} is {value} at step {numbers.step}",
                    f"{self._fix}, or look at the rows of the step: "
                    f"{format_rows(numbers.list_rows())}",
                )
        self._check_divergence(numbers.step, loss - added)

    def _check_divergence(self, step: int, loss: float) -> None:
        """Raise where the task's loss has stayed far above its start."""
        if self._started < FIRST_STEPS:
            self._started += 1
            self._highest_start = max(self._highest_start, loss)
            return
        limit = DIVERGED_FACTOR * self._highest_start
        self._above = self._above + 1 if loss > limit else 0
        if self._above >= DIVERGED_STEPS:
            raise NumericError(
                f"the loss diverged: it is {loss:.4g} at step {step}, and was above {limit:.4g}, "
                f"{DIVERGED_FACTOR:g} times its start, for {DIVERGED_STEPS} steps",
                self._fix,
            )


def format_rows(names: list[str]) -> str:
    """Return the first names of rows, and how many more there are."""
    more = len(names) - MAX_NAMED_ROWS
    return ", ".join(names[:MAX_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")


def _to_scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32)
    # A number that is copied to an accelerator would wait for it; one that is filled in does not.
    return torch.full((), value, device=device)


def _do_nothing() -> None:
    """Wait for nothing: the numbers are there."""
