"""The one Trainer subclass, for adaptation and fine-tuning, and for a user's own script."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from hftl.errors import NumericError
from hftl.model.anatomy import ANATOMIES


class SeededOrder(Sampler[int]):
    """A permutation that is a function of (seed, epoch) alone, not of workers or processes."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


class TransferTrainer(Trainer):
    """transformers' Trainer, with what transfer needs.

    Frozen modules run in eval mode, so that their outputs are a function of the input alone; the
    loss is a mean over the examples of the whole step, however it is cut into micro-batches and
    processes; the order of rows is a function of seed and epoch; a loss that is not finite stops.

    Raises:
        NumericError: from `train`, when the loss is NaN or infinite.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer counts the step's items only for models it thinks will use the count.
        self.model_accepts_loss_kwargs = True
        self._modes: list[tuple[nn.Module, bool]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `train`; the frozen modules are looked up anew."""
        self._modes = None
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, summed over the batch and divided by the items of the whole step."""
        # Holding a frozen model in eval makes it look as in evaluation: smoothing is asked first.
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if model.training:
            self._hold_frozen_in_eval()
        labels = inputs["labels"]
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        items = len(labels) if num_items_in_batch is None else num_items_in_batch
        loss = summed_loss(outputs.logits, labels, smoothing) / items
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The gradients of processes are averaged, and `items` counts those of all.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """As transformers'; a loss that is not finite stops before the optimizer's step."""
        loss = super().training_step(model, inputs, *args)
        if not torch.isfinite(loss):
            raise NumericError(
                f"the loss is {loss.item()} at step {self.state.global_step}",
                "Lower finetune.training.learning_rate, or look at the data",
            )
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededOrder(len(dataset), seed)  # pyright: ignore[reportArgumentType]

    def _hold_frozen_in_eval(self) -> None:
        if self._modes is None:
            self._modes = training_modes(self.accelerator.unwrap_model(self.model))
        for module, live in self._modes:
            module.training = live


def summed_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy for integer labels, squared error for float targets, summed, in fp32.

    Args:
        logits: (..., classes), or (batch, 1) for a target.
        labels: (...) int64, -100 where there is none; or (batch,) float.
        smoothing: share of each label's weight that is spread over all classes.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum")
    flat = logits.float().reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.reshape(-1), reduction="sum", label_smoothing=smoothing)


def training_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Which modules run in train mode: those whose every parameter trains.

    A module without parameters follows its parent; LoRA's own dropout, and the one directly
    before the head, are live.
    """
    config = getattr(getattr(model, "encoder", model), "config", None)
    anatomy = ANATOMIES.get(getattr(config, "model_type", ""))
    head_dropout = anatomy.head_dropout if anatomy else None
    modes: list[tuple[nn.Module, bool]] = []

    def visit(module: nn.Module, path: str, parent: bool) -> None:
        trains = [parameter.requires_grad for parameter in module.parameters()]
        always = "lora_dropout" in path or path.removeprefix("base_model.model.") == head_dropout
        live = all(trains) if trains else parent or always
        modes.append((module, live))
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, live)

    visit(model, "", False)
    return modes
