"""The one Trainer subclass, for adaptation and fine-tuning, and for a user's own script."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hftl.errors import RecipeError
from hftl.processes import gather
from hftl.retain.retention import Retention, Term
from hftl.train import step
from hftl.train.checkpoint import load_plain, save_plain
from hftl.train.loader import batches_of, loader_of
from hftl.train.loss import counted, uncounted
from hftl.train.mixing import Collate, Numbered, rows_to_know
from hftl.train.modes import training_modes
from hftl.train.optimizer import groups, layer_rates, optimizer_of
from hftl.train.order import RankBatches, SeededOrder
from hftl.train.sharding import check_sharded, check_whole, shard_by_block


class TransferTrainer(Trainer):
    """transformers' Trainer, with what transfer needs.

    Frozen modules run in eval mode, so that their outputs are a function of the input alone; the
    loss is a mean over the counted elements of the whole step (see `summed_loss`), however it is
    cut into micro-batches and processes; the order of rows is a function of seed and epoch, and
    every row is used once an epoch on any number of processes; evaluation counts every row once; a
    loss that is not finite stops.

    Args:
        retain: terms that keep the model near the original: `KLToOriginal`, `L2SP`, `EWC`. The
            original is the model as it is handed over.
        reference: another original, for KL.
        general_dataset: rows of what the original was good at, mixed into every step: for terms on
            them, and where they have labels of the task, for its loss (replay).
        general_ratio: rows of general data for each row of the target.
        general_weight: of the mean loss over labelled general rows, beside the target's mean.
        layer_decay: each block's learning rate is that of the one above it times this.
        rates: learning rates of `embeddings`, `blocks` (a list from the bottom) and `head`.

    Raises:
        NumericError: from `train`, on all processes, when the loss is NaN or infinite.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        retain: Term | Sequence[Term] | Retention = (),
        reference: nn.Module | None = None,
        general_dataset: Any | None = None,
        general_ratio: float = 0.5,
        general_weight: float = 1.0,
        layer_decay: float | None = None,
        rates: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.retention = (
            retain if isinstance(retain, Retention) else Retention(retain, reference, general_ratio)
        )
        step.check_arguments(self.compute_loss_func, general_ratio)
        self._rates = layer_rates(layer_decay, rates)
        self._general = general_dataset
        self._general_share = general_weight / self.retention.ratio
        if self.retention.weights:
            self.add_callback(step.AfterStep(self.retention))
        check_whole(self._numbers_rows and self.is_fsdp_enabled)
        self._modes: list[tuple[nn.Module, bool]] | None = None
        self._batches: RankBatches | None = None
        self._step_loss: Tensor | float = 0.0
        self._rows = torch.tensor(1)
        self._evaluated: list[Tensor] = []

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', without what costs time at every step; FSDP shards block by block.

        Raises:
            RecipeError: where the launcher asked for FSDP and this device has none.
        """
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False
        # It waits for the device at every micro-batch, and what it hides stops the training here.
        self.args.logging_nan_inf_filter = False
        super().create_accelerator_and_postprocess()
        check_sharded(self.is_fsdp_enabled, self.args)
        if self.is_fsdp_enabled:
            shard_by_block(self.accelerator.state.fsdp_plugin, self.model)  # pyright: ignore

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `train`; the frozen modules are looked up anew."""
        self._modes = None
        self._step_loss = 0.0
        # A checkpoint is loaded later: the model is still what it starts from.
        self.ask_original()
        if self.args.world_size > 1:
            # With one seed, dropout would hit the same units in every process's rows.
            torch.manual_seed(self.args.seed + self.args.process_index)
        return super().train(*args, **kwargs)

    def ask_original(self) -> None:
        """Has the original look at the rows, where a term needs it; the second time does nothing.

        `train` does so by itself.
        """
        if self._numbers_rows:
            self.retention.start(
                self.accelerator.unwrap_model(self.model), rows_to_know(*self._training_rows()),
                self.args.device, self._autocast, self.args.seed,
            )  # fmt: skip

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers'; with a rate for each part of the model where that was asked for.

        Raises:
            RecipeError: for an optimizer that groups parameters in its own way.
        """
        if self.optimizer is None and self._rates is not None:
            inside: Any = self.accelerator.unwrap_model(self.model if model is None else model)
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, inside
            )
            chosen = groups(inside, self.args.learning_rate, self.args.weight_decay, self._rates)
            self.optimizer = optimizer_of(kind, settings, chosen)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> Any:
        """This process's share of every step, or transformers' loader for another sampling."""
        order = self._get_train_sampler()
        if not isinstance(order, SeededOrder):
            self._batches = None
            if self._numbers_rows:
                raise RecipeError(
                    "retain and general_dataset need rows in a seeded order, got "
                    f"train_sampling_strategy={self.args.train_sampling_strategy} or a dataset "
                    "without a length",
                    "Use random sampling of a dataset with a length",
                )
            return super().get_train_dataloader()
        general = None if self._general is None else len(self._general)
        self._batches = batches_of(
            order, general, self.retention.ratio, self._train_batch_size,
            self.args.dataloader_drop_last, self.accelerator,
        )  # fmt: skip
        dataset, collate = self._training_rows()
        return loader_of(dataset, self._batches, collate, self.args, self.accelerator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """A step's micro-batches, and how many elements the loss counts in it on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches or "labels" not in batches[0]:
            return batches, None
        last = self.accelerator.gradient_state.end_of_dataloader
        if last and self._batches and self._batches.idle:
            batches[-1]["labels"] = uncounted(batches[-1]["labels"], slice(0, 1))
        here = step.step_items(batches, device)
        items, self._rows = self.accelerator.gather(here).reshape(-1, 2).sum(0)  # pyright: ignore
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, summed over the batch and divided by the items of the whole step.

        Without a count, as in evaluation, it is divided by the items of the batch. Outputs may have
        `slots`, the labels that their logits are for, and `penalty` (batch,), added in training as
        the mean over the step's rows.
        """
        # Holding a frozen model in eval makes it look as in evaluation: smoothing is asked first.
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if model.training:
            self._hold_frozen_in_eval()
        labels = inputs["labels"]
        outputs = model(**step.model_inputs(inputs))
        loss = step.task_loss(outputs, inputs, self._general_share, smoothing)
        if num_items_in_batch is None:
            loss = loss / counted(labels).clamp(min=1)
        else:
            # The gradients of processes are averaged, and the counts are those of all.
            processes = self.accelerator.num_processes
            loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes
            penalty = step.penalty(outputs, labels) / self._rows.clamp(min=1)
            loss = loss + penalty * processes
            if "row" in inputs:
                loss = loss + processes * self.retention.loss(
                    self.accelerator.unwrap_model(model), inputs, outputs, step.target_rows(inputs),
                    self._rows, int(self.state.epoch or 0), self._autocast,
                )  # fmt: skip
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """As transformers'; a loss that is not finite stops before the optimizer's step."""
        loss = super().training_step(model, inputs, *args)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            # Once a step, not a micro-batch: it waits for the device. All processes see one sum.
            total = self.accelerator.gather(self._step_loss).mean().item()  # pyright: ignore
            self._step_loss = 0.0
            step.check_finite(total, self.state.global_step)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """As transformers'; rows that only fill up the last batch count for nothing."""
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, *args, **kwargs)
        last = step.real_rows(len(inputs["labels"]), self.accelerator)
        labels = uncounted(inputs["labels"], slice(last, None))
        found = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        loss, items = found[0], counted(labels)
        if loss is not None:
            self._evaluated.append(torch.stack([loss * items, items.to(loss)]))
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As transformers'; the loss is the mean over all counted elements, not over batches."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self._evaluated and output.metrics is not None:
            mine = torch.stack(self._evaluated).cpu().double().sum(0).tolist()
            loss, items = (sum(column) for column in zip(*gather(mine), strict=True))
            output.metrics[name] = loss / max(1.0, items)
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers'; of a model that is none of its classes, what trains."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, (PreTrainedModel, PeftModel)):
            super()._save(output_dir, state_dict)
            return
        save_plain(model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers'; of a model that is none of its classes, what `_save` has written."""
        mine = self.accelerator.unwrap_model(self.model)
        if isinstance(mine, (PreTrainedModel, PeftModel)) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_plain(mine, Path(resume_from_checkpoint))

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """Evaluation's count, which would be that of all processes; here it is the batch's own."""
        return None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededOrder(len(dataset), seed)  # pyright: ignore[reportArgumentType]

    @property
    def _numbers_rows(self) -> bool:
        """Whether rows carry their numbers: for terms, or for general data."""
        return self.retention.asks or self._general is not None

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision that training multiplies in."""
        return self.accelerator.autocast()

    def _training_rows(self) -> tuple[Any, Any]:
        """The rows of training, and what makes a batch of them."""
        dataset, general = (
            self._remove_unused_columns(part, description="Training")
            if isinstance(part, datasets.Dataset)
            else part
            for part in (self.train_dataset, self._general)
        )
        collate = self.data_collator
        if not isinstance(dataset, datasets.Dataset):
            collate = self._get_collator_with_removed_columns(collate, "Training")
        if not self._numbers_rows:
            return dataset, collate
        rows: Any = Numbered(dataset, general)
        return rows, Collate(collate, len(rows))

    def _hold_frozen_in_eval(self) -> None:
        if self._modes is None:
            self._modes = training_modes(self.accelerator.unwrap_model(self.model))
        for module, live in self._modes:
            module.training = live
