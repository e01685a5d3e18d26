"""Go on after memory ran out in a step: with smaller micro-batches, and the same rows a step.

A loss is divided by the labelled elements of its whole step, so that the gradients of a step do not
depend on how it is cut; where they would, it is not cut. The step is tried again from its start:
what a broken backward pass has added to gradients is thrown away, and dropout draws as it would
have drawn.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from hftl.errors import DataWarning, ResourceError, format_error_line, is_out_of_memory
from hftl.retain.regularizer import Batch, LossTerm, Regularizer
from hftl.train.checkpoint import has_live_batch_norm, iterate_running_statistics

AGREED_STEPS = 20
"""First steps in which processes exchange their gradients after the backward pass, and not in it:
only then may one of them run out of memory without the others waiting for it for ever. Once it
has run out, all steps are such: DDP counts backward passes, and processes have as many as parts."""

BUCKET_BYTES = 25 << 20
"""Gradients that are exchanged at once, at most; a larger one goes alone."""

TrainPiece = Callable[[nn.Module, Batch], Tensor]
"""Run a part of a micro-batch forward and backward, and return its share of the step's loss."""


class MicroBatches:
    """Cut the micro-batches of a training into as many pieces as memory asks for.

    Args:
        accelerator: of the training.
        forget: called before a step is tried again.
        find_dependence: see `find_batch_dependence`.
    """

    def __init__(
        self, accelerator: Accelerator, forget: Callable[[], None],
        find_dependence: Callable[[], tuple[str, str] | None],
    ) -> None:  # fmt: skip
        self.pieces = 1
        self._accelerator = accelerator
        self._forget = forget
        self._find_dependence = find_dependence
        self._step: list[Batch] = []
        self._random: list[Tensor] = []
        self._statistics: list[Tensor] | None = None
        self._reason = ""

    def count_rows(self, rows: int) -> int | None:
        """Return how many of a micro-batch's rows run at once; None where memory never ran out."""
        return None if self.pieces == 1 else -(-rows // self.pieces)

    def run(
        self, model: nn.Module, inside: nn.Module, batch: Batch, is_last: bool, step: int,
        train: TrainPiece,
    ) -> Tensor:  # fmt: skip
        """Run a micro-batch forward and backward; return its share of the step's loss.

        Collective in the first steps of several processes, and once memory ran out.

        Args:
            model: as it is trained, wrapped for several processes.
            inside: the same without a wrapper.
            batch: the micro-batch.
            is_last: whether it is the step's last one.
            step: of the optimizer, from 0.
            train: runs a part of the batch.

        Raises:
            ResourceError: on all processes, if memory runs out on single rows, or on a micro-batch
                that cannot be cut.
        """
        shares = self._accelerator.num_processes > 1
        is_parallel = shares and _is_data_parallel(self._accelerator)
        agrees = is_parallel and (step < AGREED_STEPS or self.pieces > 1)
        if not self._step:
            self._random = _get_random_states(self._accelerator.device)
        self._step.append(batch)
        if shares and not agrees:
            loss = self._train(model, [batch], train)
        else:
            # DDP broadcasts buffers in its forward pass: after one that broke on a process, that
            # process alone would broadcast them once more.
            unwrapped = inside if agrees else model
            loss = self._run_or_retry(unwrapped, batch, is_last, step, train, agrees)
        if is_last:
            self._step = []
            if is_parallel:
                self._share_statistics(inside)
        return loss

    def _run_or_retry(
        self, model: nn.Module, batch: Batch, is_last: bool, step: int, train: TrainPiece,
        agrees: bool,
    ) -> Tensor:  # fmt: skip
        # After a failure the rest of the step waits for what the processes agree on.
        loss = None if self._reason else self._try(model, [batch], train)
        while (is_last or not agrees) and self._has_failed(loss is None, agrees):
            self._check_divisible(step)
            self._halve(step, agrees)
            model.zero_grad()
            self._forget()
            _set_random_states(self._random, self._accelerator.device)
            loss = self._try(model, self._step, train)
        if agrees and is_last:
            _average_gradients(model, self._accelerator)
        return torch.zeros((), device=self._accelerator.device) if loss is None else loss

    def _try(self, model: nn.Module, batches: list[Batch], train: TrainPiece) -> Tensor | None:
        """Return the loss of the last of some micro-batches; None where memory ran out."""
        try:
            return self._train(model, batches, train)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = format_error_line(error)
        # Here the error has gone, and with it the tensors that its traceback holds.
        if self._accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._accelerator.device.type == "mps":
            torch.mps.empty_cache()
        return None

    def _train(self, model: nn.Module, batches: list[Batch], train: TrainPiece) -> Tensor:
        losses: list[Tensor] = []
        for batch in batches:
            losses = [train(model, piece) for piece in split_batch(batch, self.pieces)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _has_failed(self, here: bool, agrees: bool) -> bool:
        """Return whether memory ran out, on any process where they agree."""
        if agrees:
            flag = torch.tensor([int(here)], device=self._accelerator.device)
            here = bool(self._accelerator.gather(flag).any())  # pyright: ignore
        if not here:
            self._reason = ""
        return here

    def _share_statistics(self, model: nn.Module) -> None:
        """Give all processes the running statistics of the first one, as DDP does. Collective.

        DDP does so before a forward pass, so that evaluations would read what each has moved.
        """
        if self._statistics is None:
            self._statistics = [tensor for _, tensor in iterate_running_statistics(model)]
        for tensor in self._statistics:
            torch.distributed.broadcast(tensor, 0)

    def _check_divisible(self, step: int) -> None:
        """Refuse to cut a micro-batch whose loss depends on which rows run together.

        Raises:
            ResourceError: naming what does.
        """
        dependence = self._find_dependence()
        if dependence is not None:
            reason, fix = dependence
            raise ResourceError(
                f"memory ran out at step {step}, and micro-batches cannot run in parts: {reason}"
                + (f" ({self._reason})" if self._reason else ""),
                f"Set {fix}, or a smaller per_device_train_batch_size, which changes the training",
            )

    def _halve(self, step: int, agrees: bool) -> None:
        """Cut micro-batches into twice as many pieces.

        Raises:
            ResourceError: if they are single rows already.
        """
        rows = max(find_batch_size(batch) or 1 for batch in self._step)
        if agrees:
            sizes = torch.tensor([rows], device=self._accelerator.device)
            rows = int(self._accelerator.gather(sizes).max())  # pyright: ignore
        if self.pieces >= rows:
            raise ResourceError(
                f"memory ran out on a single row at step {step}"
                + (f": {self._reason}" if self._reason else ""),
                "Set gradient_checkpointing: true in training, lower data.max_length or "
                "data.image_size, or use a smaller source",
            )
        self.pieces *= 2
        warnings.warn(
            f"memory ran out at step {step}: micro-batches run in {self.pieces} parts from now on, "
            f"of {-(-rows // self.pieces)} rows at most; a step holds the same rows as before",
            DataWarning,
            stacklevel=2,
        )
        self._reason = ""


def find_batch_dependence(model: nn.Module, terms: Sequence[LossTerm]) -> tuple[str, str] | None:
    """Return what lets the loss of a row depend on its batch, and what to set against it.

    Args:
        model: as it is trained.
        terms: of the loss, beside the task's.
    """
    if has_live_batch_norm(model):
        return (
            "BatchNorm normalizes by the rows of a micro-batch", "finetune.freeze_batchnorm: true"
        )  # fmt: skip
    for term in terms:
        if isinstance(term, Regularizer) and term.compares_rows:
            name = type(term).__name__
            return f"{name} compares the rows of a micro-batch", "retain.kl.anchors above 0"
    return None


def split_batch(batch: Batch, pieces: int) -> Iterator[Batch]:
    """Yield the rows of a batch in so many parts at most; what is no tensor is in each."""
    rows = find_batch_size(batch) or 1
    size = -(-rows // pieces)
    if size == rows:
        yield batch
        return
    for start in range(0, rows, size):
        yield {
            key: value[start : start + size] if _has_rows(value, rows) else value
            for key, value in batch.items()
        }


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _is_data_parallel(accelerator: Accelerator) -> bool:
    """Return whether each process holds the whole model."""
    return accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def _average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Average the gradients of all processes, as the backward pass of DDP does. Collective."""
    import torch.distributed as dist

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_gradient = [int(parameter.grad is not None) for parameter in parameters]
    anywhere = torch.tensor(has_gradient, device=accelerator.device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, counts in zip(parameters, anywhere.tolist(), strict=True):
        if counts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _fill_buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat.div_(accelerator.num_processes))
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _fill_buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype that are exchanged at once, as each exchange has its delay."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        is_full = sum(held.nbytes for held in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (is_full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _get_random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a forward pass draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])
