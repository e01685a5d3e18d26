"""The one Trainer subclass, for adaptation and fine-tuning, and for a user's own script."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import EvalLoopOutput

from hftl.errors import RecipeError
from hftl.retain.build import Regularizer, Retention, Step
from hftl.runtime.distributed import gather_values
from hftl.train import hf_compat, step
from hftl.train.checkpoint import (
    check_fsdp_available,
    check_unsharded,
    collect_full_state,
    load_trainable,
    save_trainable,
    set_fsdp_blocks,
)
from hftl.train.frozen_eval import list_training_modes
from hftl.train.loss import count_labels, ignore_rows
from hftl.train.objective import (
    LossPlan,
    can_compute_loss,
    check_label_smoothing,
    check_smoothing_targets,
    check_trainable_dtype,
    find_logits,
    has_known_head,
    is_hftl_module,
    plan_loss,
)  # fmt: skip
from hftl.train.optimizer import build_layer_rates, build_optimizer, build_parameter_groups
from hftl.train.replay_batches import IndexedCollator, IndexedDataset, build_training_rows
from hftl.train.samplers import (
    RankBatchSampler,
    SeededSampler,
    build_batch_sampler,
    build_dataloader,
)


class TransferTrainer(hf_compat.TrainerHooks, Trainer):
    """transformers' Trainer, with what transfer needs.

    Frozen modules run in eval mode, so that their outputs are a function of the input alone; the
    loss is a mean over the counted elements of the whole step (see `summed_loss`), however it is
    cut into micro-batches and processes; the order of rows is a function of seed and epoch, and
    every row is used once an epoch on any number of processes; evaluation counts every row once; a
    loss that is not finite stops.

    Args:
        retain: regularizers toward the original: `KLToOriginal`, `L2SP`, `EWC`. The original is
            the model as it is handed over.
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

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *more: Any,
        retain: Regularizer[Any] | Sequence[Regularizer[Any]] | Retention = (),
        reference: nn.Module | None = None,
        general_dataset: Any | None = None,
        general_ratio: float = 0.5,
        general_weight: float = 1.0,
        layer_decay: float | None = None,
        rates: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The caller's object stays as it is: some settings are changed here.
        args = None if args is None else copy(args)
        smoothing = 0.0 if args is None else args.label_smoothing_factor
        if args is not None:
            # transformers reads the config of a model to smooth, and a plain module has none.
            args.label_smoothing_factor = 0.0
        super().__init__(model, args, *more, **kwargs)
        check_trainable_dtype(self._own_model)
        if smoothing:
            check_label_smoothing(self._own_model, self.compute_loss_func is not None)
            self.args.label_smoothing_factor = smoothing
            self.label_smoother = LabelSmoother(epsilon=smoothing)
        self.retention = (
            retain if isinstance(retain, Retention) else Retention(retain, reference, general_ratio)
        )
        step.check_general_ratio(general_ratio)
        self._rates = build_layer_rates(layer_decay, rates)
        self._general = general_dataset
        self._general_share = general_weight / self.retention.ratio
        if self.retention.regularizers:
            self.add_callback(step.RetentionCallback(self.retention))
        check_unsharded(self._numbers_rows and self.is_fsdp_enabled)
        if not self.label_names and not can_compute_loss(self._own_model):
            self.label_names = ["labels"]
        self._modes: list[tuple[nn.Module, bool]] | None = None
        self._objective: LossPlan | None = None
        self._batches: RankBatchSampler | None = None
        self._has_filler = False
        self._step_loss: Tensor | float = 0.0
        self._rows = torch.tensor(1)
        self._evaluated: list[Tensor] = []

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', without what costs time at every step; FSDP shards block by block.

        Raises:
            RecipeError: where the launcher asked for FSDP and this device has none.
        """
        model = self._own_model  # None until a model_init has been called
        is_known = model is not None and (not can_compute_loss(model) or has_known_head(model))
        if self.args.ddp_find_unused_parameters is None and is_known:
            # All that trains is on the path to the loss, so the search would only cost.
            self.args.ddp_find_unused_parameters = False
        # It waits for the device at every micro-batch, and what it hides stops the training here.
        self.args.logging_nan_inf_filter = False
        super().create_accelerator_and_postprocess()
        check_fsdp_available(self.is_fsdp_enabled, self.args)
        if self.is_fsdp_enabled:
            set_fsdp_blocks(self.accelerator.state.fsdp_plugin, self.model)  # pyright: ignore

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `train`; the frozen modules are looked up anew."""
        self._modes = None
        self._objective = None
        self._step_loss = 0.0
        # A checkpoint is loaded later: the model is still what it starts from.
        self.prepare_regularizers()
        if self.args.world_size > 1:
            # With one seed, dropout would hit the same units in every process's rows.
            torch.manual_seed(self.args.seed + self.args.process_index)
        return super().train(*args, **kwargs)

    def prepare_regularizers(self) -> None:
        """Has the original look at the rows, where a term needs it; the second time does nothing.

        `train` does so by itself.
        """
        if self._numbers_rows:
            self.retention.prepare(
                self.accelerator.unwrap_model(self.model),
                build_training_rows(*self._training_rows()),
                self.args.device,
                self._autocast,
                self.args.seed,
            )

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
            chosen = build_parameter_groups(
                inside, self.args.learning_rate, self.args.weight_decay, self._rates
            )
            self.optimizer = build_optimizer(kind, settings, chosen)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> Any:
        """This process's share of every step, or transformers' loader for another sampling."""
        order = hf_compat.get_train_sampler(self)
        if not isinstance(order, SeededSampler):
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
        self._batches = build_batch_sampler(
            order, general, self.retention.ratio, hf_compat.get_train_batch_size(self),
            self.args.dataloader_drop_last, self.accelerator,
        )  # fmt: skip
        dataset, collate = self._training_rows()
        return build_dataloader(dataset, self._batches, collate, self.args, self.accelerator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return a step's micro-batches, and what its loss is divided by on all processes.

        That is the number of counted elements or, of a loss that is the model's own mean, of rows.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        objective = self._choose_objective(batches[0])
        last = self.accelerator.gradient_state.end_of_dataloader
        self._has_filler = bool(last and self._batches and self._batches.is_idle)
        if not objective.asks_model:
            for batch in batches:
                batch["labels"] = objective.read_labels(batch["labels"])
            if self._has_filler:
                batches[-1]["labels"] = ignore_rows(batches[-1]["labels"], slice(0, 1))
        here = step.count_step_items(batches[:-1] if self._has_filler else batches, device)
        items, self._rows = self.accelerator.gather(here).reshape(-1, 2).sum(0)  # pyright: ignore
        if not objective.asks_model:
            return batches, items
        count = None
        if objective.counts_items:
            labelled = step.blank_filler(batches, self._has_filler)
            count = hf_compat.count_items(self, labelled, device)
        return batches, self._rows if count is None else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task's loss, summed over the batch and divided by the items of the whole step.

        Without a count, as in evaluation, it is divided by the items of the batch. Outputs may have
        `slots`, the labels that their logits are for, and `penalty` (batch,), added in training as
        the mean over the step's rows. See `Objective` for who computes it.
        """
        objective = self._choose_objective(inputs)
        # Holding a frozen model in eval makes it look as in evaluation: smoothing is asked first.
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if model.training:
            self._hold_frozen_in_eval()
        # What a subclass computes without coming here is scaled as transformers decides.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if objective.asks_model:
            loss, outputs = self._ask_model(model, inputs, num_items_in_batch, objective)
        else:
            loss, outputs = self._loss_of_logits(
                model, inputs, num_items_in_batch, objective, smoothing
            )
        if num_items_in_batch is not None and "row" in inputs:
            seen = outputs if hasattr(outputs, "logits") else self._with_logits(outputs)
            current = Step(
                self.accelerator.unwrap_model(model), inputs, seen, self._target_rows(inputs),
                self._rows, self.retention.ratio, int(self.state.epoch or 0),
            )  # fmt: skip
            terms = [regularizer.loss(current) for regularizer in self.retention.regularizers]
            # The gradients of processes are averaged, and the counts are those of all.
            loss = loss + self.accelerator.num_processes * sum(terms)
        if not return_outputs:
            return loss
        return loss, outputs if objective.asks_model else step.prepend_loss(outputs, loss)

    def _loss_of_logits(
        self, model: nn.Module, inputs: dict[str, Any], count: Any, objective: LossPlan,
        smoothing: float,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Return the loss that hftl computes, and the outputs; see `compute_loss`."""
        inputs = {**inputs, "labels": objective.read_labels(inputs["labels"])}
        labels = inputs["labels"]
        outputs = model(**step.select_model_inputs(inputs))
        logits = find_logits(outputs, self._own_model)
        loss = step.compute_task_loss(
            outputs, logits, inputs, self._general_share, smoothing, objective.problem
        )
        if count is None:
            return loss / count_labels(labels).clamp(min=1), outputs
        # The gradients of processes are averaged, and the counts are those of all.
        processes = self.accelerator.num_processes
        loss = loss / torch.as_tensor(count).clamp(min=1) * processes
        penalty = step.sum_penalty(outputs, labels) / self._rows.clamp(min=1)
        return loss + penalty * processes, outputs

    def _ask_model(
        self, model: nn.Module, inputs: dict[str, Any], count: Any, objective: LossPlan
    ) -> tuple[Tensor, Any]:
        """Return the loss that the model computes, or compute_loss_func, and the outputs.

        A mean over the rows of a batch counts for as many rows of the step as the batch holds.
        """
        batch = step.drop_metadata(inputs)
        told = count if objective.counts_items else None
        loss, outputs = super().compute_loss(model, batch, True, told)
        if loss.numel() != 1:
            raise RecipeError(
                f"{type(self.model).__name__} returns a loss of shape {list(loss.shape)}",
                "Return one number from its forward where labels are given, as the first output",
            )
        if count is None:
            return loss, outputs
        rows = self._target_rows(inputs).sum().to(loss.device)
        share = 1.0
        if not objective.counts_items:
            share = rows / self._rows.to(loss.device).clamp(min=1) * self.accelerator.num_processes
        return torch.where(rows > 0, loss * share, torch.zeros_like(loss)), outputs

    def _target_rows(self, inputs: dict[str, Any]) -> Tensor:
        """Return which rows of a batch count in training: (batch,) bool; none of a filler."""
        rows = step.find_target_rows(inputs)
        is_filler = self._has_filler and self.accelerator.sync_gradients
        return torch.zeros_like(rows) if is_filler else rows

    def _with_logits(self, outputs: Any) -> Any:
        return SimpleNamespace(logits=find_logits(outputs, self._own_model))

    def _objective_of(self, inputs: dict[str, Any]) -> LossPlan:
        """Return how to compute the loss of a training or evaluation, from one of its batches."""
        model = self.accelerator.unwrap_model(self.model)
        batch = step.drop_metadata(hf_compat.move_inputs(self, inputs))
        if self.compute_loss_func is not None:
            objective = LossPlan(True, counts_items=isinstance(batch.get("labels"), Tensor))
        elif self.args.parallelism_config is not None:
            objective = LossPlan(True, counts_items=self.model_accepts_loss_kwargs)
        else:
            objective = plan_loss(
                model, batch, self.model_accepts_loss_kwargs, self._on_any_process
            )
        if self.args.label_smoothing_factor:
            check_smoothing_targets(model, batch.get("labels"), objective)
        if objective.asks_model and self._general is not None:
            raise RecipeError(
                f"general_dataset mixes rows into every batch, and {type(model).__name__} computes "
                "the loss of a batch by itself",
                "Leave general_dataset out, or use a stock class of transformers",
            )
        return objective

    def _on_any_process(self, value: bool) -> bool:
        flag = torch.tensor([int(value)], device=self.args.device)
        return bool(self.accelerator.gather(flag).any())  # pyright: ignore

    def _choose_objective(self, inputs: dict[str, Any]) -> LossPlan:
        """Return how to compute the loss; the first batch of a training or evaluation decides."""
        if self._objective is None:
            self._objective = self._objective_of(inputs)
        if not self._objective.asks_model and not isinstance(inputs.get("labels"), Tensor):
            raise RecipeError(
                f"the rows hold {', '.join(map(str, inputs))}, and no labels",
                "Name their labels `labels`",
            )
        return self._objective

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """As transformers'; a loss that is not finite stops before the optimizer's step."""
        loss = super().training_step(model, inputs, *args)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            # Once a step, not a micro-batch: it waits for the device. All processes see one sum.
            total = self.accelerator.gather(self._step_loss).mean().item()  # pyright: ignore
            self._step_loss = 0.0
            step.check_finite_loss(total, self.state.global_step)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """As transformers'; rows that only fill up the last batch count for nothing.

        Of a loss that the model computes itself, transformers' mean over batches is left.
        """
        if "labels" not in inputs or self._choose_objective(inputs).asks_model:
            return super().prediction_step(model, inputs, *args, **kwargs)
        last = step.count_real_rows(len(inputs["labels"]), self.accelerator)
        labels = self._choose_objective(inputs).read_labels(inputs["labels"])
        labels = ignore_rows(labels, slice(last, None))
        found = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        loss, items = found[0], count_labels(labels)
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
            loss, items = (sum(column) for column in zip(*gather_values(mine), strict=True))
            output.metrics[name] = loss / max(1.0, items)
        return output

    def save_weights(self, output_dir: str | None, state_dict: Any) -> None:
        """Save as transformers does; a checkpoint of hftl's own modules holds what trains."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, (PreTrainedModel, PeftModel)):
            super().save_weights(output_dir, state_dict)
        elif not (self.is_saving_checkpoint and is_hftl_module(model)):
            state = collect_full_state(model) if state_dict is None else state_dict
            super().save_weights(output_dir, state)
        elif self.args.should_save:
            save_trainable(model, Path(output_dir or str(self.args.output_dir)))

    def load_checkpoint_weights(self, folder: str, model: Any) -> None:
        """Load as transformers does; of hftl's own modules, what `save_weights` has written."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        if is_hftl_module(unwrapped) and not self.is_fsdp_enabled:
            load_trainable(unwrapped, Path(folder))
        else:
            super().load_checkpoint_weights(folder, model)

    @property
    def _own_model(self) -> Any:
        """The model as it was handed over; transformers has refused to do without one."""
        return self.model

    def build_train_sampler(self, dataset: Any = None) -> Any:
        """Return an order of rows that depends on seed and epoch alone, for random sampling.

        Raises:
            RecipeError: if there are no rows.
        """
        rows = self.train_dataset if dataset is None else dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(rows, "__len__"):
            return super().build_train_sampler(dataset)
        if not len(rows):  # pyright: ignore[reportArgumentType]
            raise RecipeError("train_dataset holds no rows", "Give it some, or skip train()")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededSampler(len(rows), seed)  # pyright: ignore[reportArgumentType]

    @property
    def _numbers_rows(self) -> bool:
        """Whether rows carry their numbers: for terms, or for general data."""
        return bool(self.retention.regularizers) or self._general is not None

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision that training multiplies in."""
        return self.accelerator.autocast()

    def _training_rows(self) -> tuple[Any, Any]:
        """The rows of training, and what makes a batch of them."""
        dataset, general = (
            hf_compat.drop_unused_columns(self, part)
            if isinstance(part, datasets.Dataset)
            else part
            for part in (self.train_dataset, self._general)
        )
        collate = self.data_collator
        if not isinstance(dataset, datasets.Dataset):
            collate = hf_compat.wrap_collator(self, collate)
        if not self._numbers_rows:
            return dataset, collate
        rows: Any = IndexedDataset(dataset, general)
        return rows, IndexedCollator(collate, len(rows))

    def _hold_frozen_in_eval(self) -> None:
        if self._modes is None:
            self._modes = list_training_modes(self.accelerator.unwrap_model(self.model))
        for module, live in self._modes:
            module.training = live
