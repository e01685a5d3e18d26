"""Show a training on the terminal: epoch, loss, step and evaluation."""

from contextlib import ExitStack
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from hftl.progress import Advance, open_bar


class TrainingProgress(TrainerCallback):
    """One bar over the optimizer's steps, and one over the batches of each evaluation."""

    def __init__(self) -> None:
        self._training, self._evaluation = ExitStack(), ExitStack()
        self._advance: Advance | None = None
        self._advance_evaluation: Advance | None = None
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


def replace_progress(trainer: Trainer) -> None:
    """Show this trainer's progress in hftl's own way instead of transformers'."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainingProgress())
