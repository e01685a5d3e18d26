"""Train with frozen modules in eval mode, exact steps, general rows and regularizers.

`TransferTrainer` serves adaptation, fine-tuning and a user's own script.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import EvalLoopOutput

from hftl.retain.regularizer import Batch, LossTerm, Retention, Step
from hftl.runtime import watchdog
from hftl.runtime.interruption import defer_signals
from hftl.train import checkpoint, hf_compat, objective, optimizer, samplers, step_checkpoint
from hftl.train import loss as losses
from hftl.train.callbacks import RetentionCallback
from hftl.train.checkpoint import list_training_modes
from hftl.train.memory import MicroBatches, find_batch_dependence
from hftl.train.numbers import NumberWatch
from hftl.train.objective import LossPlan
from hftl.train.step_checkpoint import CheckpointWriter
from hftl.train.step_costs import StepCosts, set_training_modes
from hftl.train.weight_arguments import build_weighting


class TransferTrainer(StepCosts, Trainer):
    """Extend transformers' Trainer by what transfer needs.

    Frozen modules run in eval mode, so that their outputs are a function of the input alone; the
    loss is a mean over the labelled elements of the whole step, however it is cut into
    micro-batches and processes; the order of rows is a function of seed and epoch, and every row is
    used once an epoch on any number of processes; evaluation counts every row once; a loss that is
    not finite stops.

    Args:
        retain: regularizers toward the original: `KLToOriginal`, `L2SP`, `EWC`, or your own
            `LossTerm`; or a `Retention`, which holds the next four arguments, too. The original is
            the model as it is handed over.
        reference: another original, for KL.
        general_dataset: rows of what the original was good at, mixed into every step: for
            regularizers, and where they have labels of the task, for its loss (replay).
        general_ratio: rows of general data for each row of the target.
        general_weight: of the mean loss over labelled general rows, beside the target's mean.
        class_weight: `balanced`, by the labels of train_dataset; or a weight by label, or for each
            class in order. The loss is the weighted mean over the whole step.
        focal_gamma: exponent of focal loss.
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
        retain: LossTerm | Sequence[LossTerm] | Retention | None = None,
        reference: nn.Module | None = None,
        general_dataset: Any | None = None,
        general_ratio: float = 0.5,
        general_weight: float = 1.0,
        class_weight: Any = None,
        focal_gamma: float = 0.0,
        layer_decay: float | None = None,
        rates: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Some settings change below; the caller's object does not.
        args = None if args is None else copy(args)
        smoothing = 0.0 if args is None else args.label_smoothing_factor
        if args is not None:
            # transformers reads the config of a model to smooth, and a plain module has none.
            args.label_smoothing_factor = 0.0
        super().__init__(model, args, *more, **kwargs)
        objective.check_trainable_dtype(self._own_model)
        if smoothing:
            objective.check_label_smoothing(self._own_model, self.compute_loss_func is not None)
            self.args.label_smoothing_factor = smoothing
            self.label_smoother = LabelSmoother(epsilon=smoothing)
        if not isinstance(retain, Retention):
            terms = retain if isinstance(retain, Sequence) else [] if retain is None else [retain]
            retain = Retention(terms, reference, general_dataset, general_ratio, general_weight)
        self.retention = retain
        losses.check_general_ratio(retain.ratio)
        self._rates = optimizer.build_layer_rates(layer_decay, rates)
        self._weighting = build_weighting(
            class_weight, focal_gamma, self.train_dataset, self._own_model
        )
        self._mean_weight: Tensor | float = 1.0
        self._general = retain.general
        self._general_share = retain.general_weight / retain.ratio
        if self.retention.regularizers:
            self.add_callback(RetentionCallback(self.retention))
        checkpoint.check_unsharded(self._numbers_rows and self.is_fsdp_enabled)
        if not self.label_names and not objective.can_compute_loss(self._own_model):
            self.label_names = ["labels"]
        self._modes: list[tuple[nn.Module, bool]] | None = None
        self._loss_plan: LossPlan | None = None
        self._batches: samplers.RankBatchSampler | None = None
        self._has_filler = False
        self._numbers = NumberWatch()
        self._micro_batches = self._build_micro_batches()
        # After transformers' own, which says what follows a step, and before all that act on it.
        self.callback_handler.callbacks.insert(1, self._numbers)
        self._rows = torch.tensor(1)
        self._evaluated: list[Tensor] = []
        self.checkpoints: CheckpointWriter | None = None
        """Writes checkpoints where it is set, and ends the training by a signal."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator without what costs time at every step; FSDP shards by block.

        Raises:
            RecipeError: where the launcher asked for FSDP and this device has none.
        """
        model = self._own_model  # None until a model_init has been called
        is_known = model is not None and objective.has_known_loss(model)
        if self.args.ddp_find_unused_parameters is None and is_known:
            # All that trains is on the path to the loss, so the search would only cost.
            self.args.ddp_find_unused_parameters = False
        # It waits for the device at every micro-batch, and what it hides stops the training here.
        self.args.logging_nan_inf_filter = False
        super().create_accelerator_and_postprocess()
        checkpoint.check_fsdp_available(self.is_fsdp_enabled, self.args)
        if self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            checkpoint.set_fsdp_blocks(plugin, self._own_model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, with modes and loss planned anew."""
        self._modes = self._loss_plan = self._parameters = None
        self._numbers.reset()
        self._micro_batches = self._build_micro_batches()
        # A checkpoint is loaded later: the model is still what it starts from.
        self.prepare_regularizers()
        if self.args.world_size > 1:
            # With one seed, dropout would hit the same units in every process's rows.
            torch.manual_seed(self.args.seed + self.args.process_index)
        with watchdog.expect_beats():
            if self.checkpoints is None:
                return super().train(*args, **kwargs)
            last = self.checkpoints.last
            with defer_signals() as self.checkpoints.flag:
                result = super().train(resume_from_checkpoint=None if last is None else str(last))
        self.checkpoints.end()
        return result

    def prepare_regularizers(self) -> None:
        """Let regularizers read the original's outputs, once; `train` calls it. Collective."""
        if self._numbers_rows:
            rows = samplers.build_training_data(self, self._general, self._numbers_rows)
            self.retention.prepare(
                self.accelerator.unwrap_model(self.model), samplers.build_training_rows(*rows),
                self.args.device, lambda: self.accelerator.autocast(), self.args.seed,
            )  # fmt: skip

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, with a learning rate for each part of the model if rates are set.

        Raises:
            RecipeError: for an optimizer that groups parameters in its own way.
        """
        if self.optimizer is None and self._rates is not None:
            inside: Any = self.accelerator.unwrap_model(self.model if model is None else model)
            choice = self.optimizer_cls_and_kwargs
            kind, settings = choice or self.get_optimizer_cls_and_kwargs(self.args, inside)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = optimizer.build_parameter_groups(inside, rate, decay, self._rates)
            self.optimizer = optimizer.build_optimizer(kind, settings, groups)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> Any:
        """Return this process's share of every step, or transformers' loader."""
        order = hf_compat.get_train_sampler(self)
        if not isinstance(order, samplers.SeededSampler):
            self._batches = None
            if self._numbers_rows:
                raise samplers.build_unseeded_error(self.args)
            return super().get_train_dataloader()
        self._batches = samplers.build_batch_sampler(
            order, None if self._general is None else len(self._general), self.retention.ratio,
            hf_compat.get_train_batch_size(self), self.args.dataloader_drop_last, self.accelerator,
        )  # fmt: skip
        rows = samplers.build_training_data(self, self._general, self._numbers_rows)
        return samplers.build_dataloader(*rows, self._batches, self.args, self.accelerator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return a step's micro-batches, and what its loss is divided by on all processes.

        That is the number of labelled elements or, of a mean that the model computes, of rows.
        """
        batches = list(islice(epoch_iterator, num_batches))
        watchdog.beat()
        if not batches:
            return batches, None
        plan = self._get_loss_plan(batches[0])
        last = self.accelerator.gradient_state.end_of_dataloader
        self._has_filler = bool(last and self._batches and self._batches.is_idle)
        if not plan.uses_model_loss:
            for batch in batches:
                batch["labels"] = plan.read_labels(batch["labels"])
            if self._has_filler:
                batches[-1]["labels"] = losses.ignore_rows(batches[-1]["labels"], slice(0, 1))
        here = losses.count_step_items(batches[:-1] if self._has_filler else batches, device)
        items, self._rows = self.accelerator.gather(here).reshape(-1, 2).sum(0)  # pyright: ignore
        if not plan.uses_model_loss:
            return batches, self._sum_step_items(batches, items, device)
        count = None
        if plan.counts_items:
            labelled = losses.blank_filler(batches, self._has_filler)
            count = hf_compat.count_items(self, labelled, device)
        return batches, self._rows if count is None else count

    def _sum_step_items(self, batches: list[Any], items: Tensor, device: torch.device) -> Tensor:
        """Return the target's labelled elements in a step, or the sum of their weights."""
        if self._weighting is None:
            return items
        here = losses.sum_step_weights(batches, self._weighting, device)
        total = self.accelerator.gather(here).sum()  # pyright: ignore
        self._mean_weight = total / items.clamp(min=1)
        return total

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Return the task's loss, summed over the batch and divided by the items of the whole step.

        Without a count, as in evaluation, it is divided by the items of the batch. Outputs may have
        `slots`, the labels that their logits are for, and `penalty` (batch,), added in training as
        the mean over the step's rows. See `LossPlan` for who computes it.
        """
        plan = self._get_loss_plan(inputs)
        # Holding a frozen model in eval clears `model.training`: smoothing is read first.
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if model.training:
            self._hold_frozen_in_eval()
        # What a subclass computes without coming here is scaled as transformers decides.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if plan.uses_model_loss:
            loss, outputs = self._compute_model_loss(model, inputs, num_items_in_batch, plan)
        else:
            count = num_items_in_batch
            loss, outputs = self._compute_logits_loss(model, inputs, count, plan, smoothing)
        if num_items_in_batch is not None and "row" in inputs:
            current = Step(
                self.accelerator.unwrap_model(model), inputs,
                objective.name_logits(outputs, self._own_model),
                counts=self._find_counted_rows(inputs), target_rows=self._rows,
                ratio=self.retention.ratio, epoch=int(self.state.epoch or 0),
            )  # fmt: skip
            # The gradients of processes are averaged, and the counts are those of all.
            added = self.accelerator.num_processes * self.retention.compute_loss(current)
            self._numbers.add_regularization(added)
            loss = loss + added
        watchdog.beat()
        if not return_outputs:
            return loss
        return loss, outputs if plan.uses_model_loss else losses.prepend_loss(outputs, loss)

    def _compute_logits_loss(
        self, model: nn.Module, inputs: Batch, count: Any, plan: LossPlan,
        smoothing: float,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Return the loss that hftl computes, and the outputs; see `compute_loss`."""
        inputs = {**inputs, "labels": plan.read_labels(inputs["labels"])}
        labels = inputs["labels"]
        outputs = model(**losses.select_model_inputs(inputs))
        logits = objective.find_logits(outputs, self._own_model)
        # The mean over general rows stays what it is: dividing by weights cancels.
        share = self._general_share * self._mean_weight
        loss = losses.compute_task_loss(
            outputs, logits, inputs, share, smoothing, plan.problem, self._weighting
        )
        if count is None:
            items = losses.sum_items(labels, self._weighting)
            return loss / losses.replace_zero(items), outputs
        # The gradients of processes are averaged, and the counts are those of all.
        processes = self.accelerator.num_processes
        loss = loss / losses.replace_zero(torch.as_tensor(count)) * processes
        penalty = losses.sum_penalty(outputs, labels) / self._rows.clamp(min=1)
        return loss + penalty * processes, outputs

    def _compute_model_loss(
        self, model: nn.Module, inputs: Batch, count: Any, plan: LossPlan
    ) -> tuple[Tensor, Any]:
        """Return the loss that the model computes, or compute_loss_func, and the outputs.

        A mean over the rows of a batch counts for as many rows of the step as the batch holds.
        """
        batch = losses.drop_retention_keys(inputs)
        items = count if plan.counts_items else None
        loss, outputs = super().compute_loss(model, batch, True, items)
        objective.check_scalar_loss(self._own_model, loss)
        if count is None:
            return loss, outputs
        rows = self._find_counted_rows(inputs).sum().to(loss.device)
        share = 1.0
        if not plan.counts_items:
            share = rows / self._rows.to(loss.device).clamp(min=1) * self.accelerator.num_processes
        return torch.where(rows > 0, loss * share, torch.zeros_like(loss)), outputs

    def _find_counted_rows(self, inputs: Batch) -> Tensor:
        """Return which rows of a batch count in training: (batch,) bool; none of a filler."""
        rows = losses.find_target_rows(inputs)
        is_filler = self._has_filler and self.accelerator.sync_gradients
        return torch.zeros_like(rows) if is_filler else rows

    def _get_loss_plan(self, inputs: Batch) -> LossPlan:
        """Return how to compute the loss; the first batch decides, on which it is collective."""
        if self._loss_plan is None:
            self._loss_plan = self._build_loss_plan(inputs)
        objective.check_has_labels(inputs, self._loss_plan)
        return self._loss_plan

    def _build_loss_plan(self, inputs: Batch) -> LossPlan:
        model = self.accelerator.unwrap_model(self.model)
        batch = losses.drop_retention_keys(hf_compat.move_inputs(self, inputs))
        if self.compute_loss_func is not None:
            plan = LossPlan(True, counts_items=isinstance(batch.get("labels"), Tensor))
        elif self.args.parallelism_config is not None:
            plan = LossPlan(True, counts_items=self.model_accepts_loss_kwargs)
        else:
            accepts_count = self.model_accepts_loss_kwargs
            plan = objective.plan_loss(model, batch, accepts_count, self.accelerator)
        if self.args.label_smoothing_factor:
            objective.check_smoothing_targets(model, batch.get("labels"), plan)
        if self._weighting is not None:
            objective.check_weighting_targets(model, batch.get("labels"), plan)
        if self._general is not None:
            objective.check_mixes_rows(model, plan)
        return plan

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any) -> Tensor:
        """Run a micro-batch forward and backward, in parts where memory ran out."""
        step = super().training_step

        def train(model: nn.Module, piece: Batch) -> Tensor:
            loss = step(model, piece, *args)
            watchdog.beat()
            self._numbers.add_loss(loss)
            return loss

        is_last = self.accelerator.sync_gradients
        step_number = self.state.global_step
        return self._micro_batches.run(model, self._own_model, inputs, is_last, step_number, train)

    def _build_micro_batches(self) -> MicroBatches:
        def find_dependence() -> tuple[str, str] | None:
            return find_batch_dependence(self._own_model, self.retention.regularizers)

        return MicroBatches(self.accelerator, self._numbers.begin_step, find_dependence)

    @property
    def micro_batch(self) -> int | None:
        """Return the rows that run at once since memory ran out; None where it never did."""
        return self._micro_batches.count_rows(hf_compat.get_train_batch_size(self))

    @property
    def pieces(self) -> int:
        """Hold into how many parts a micro-batch is cut since memory ran out."""
        return self._micro_batches.pieces

    @pieces.setter
    def pieces(self, pieces: int) -> None:
        self._micro_batches.pieces = pieces

    def review_gradients(self, norm: Any) -> None:
        """Stop the training if the numbers of the step are not finite. Collective.

        Raises:
            NumericError: naming the rows of the step.
        """
        # The scaler of fp16 skips a step whose gradients are infinite, and scales less.
        watched = None if self.accelerator.scaler is not None else norm
        list_rows = partial(self._list_step_rows, float(self.state.epoch or 0.0))
        self._numbers.finish_step(self.state.global_step, watched, self.accelerator, list_rows)
        if self.checkpoints is not None:
            self.checkpoints.agree(self.state.global_step + 1, self._own_model)

    def _list_step_rows(self, epoch: float) -> list[str]:
        """Return names of the target's rows in the step that begins at a part of an epoch."""
        if self._batches is None:
            return ["those of a dataset without a seeded order"]
        steps = self.args.gradient_accumulation_steps
        numbers = samplers.list_step_rows(self._batches, epoch, steps)
        places = getattr(self.train_dataset, "places", None)
        return [f"row {number}" if places is None else places[number] for number in numbers]

    def finish_step(self, *args: Any, **kwargs: Any) -> None:
        """Log and evaluate as transformers does, then write a checkpoint if one is asked for."""
        super().finish_step(*args, **kwargs)
        if self.checkpoints is not None:
            if self.checkpoints.request:
                self._numbers.check_pending()
            self.checkpoints.visit(self)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Predict a batch; rows that only fill up the last batch count for nothing.

        Of a loss that the model computes itself, transformers' mean over batches is left.
        """
        watchdog.beat()
        if "labels" not in inputs or self._get_loss_plan(inputs).uses_model_loss:
            return super().prediction_step(model, inputs, *args, **kwargs)
        last = losses.count_real_rows(len(inputs["labels"]), self.accelerator)
        labels = self._get_loss_plan(inputs).read_labels(inputs["labels"])
        labels = losses.ignore_rows(labels, slice(last, None))
        prediction = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        loss, items = prediction[0], losses.sum_items(labels, self._weighting)
        if loss is not None:
            self._evaluated.append(torch.stack([loss * items, items.to(loss)]))
        return prediction

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the (weighted) mean over labelled elements, not over batches."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated and output.metrics is not None:
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
            output.metrics[name] = losses.average_evaluated_loss(self._evaluated)
        return output

    def count_labels(self, batches: Any, device: Any) -> Any:
        """Return transformers' count where the model divides by it; None where hftl counts.

        transformers counts in evaluation too, over all processes, and would scale the loss by it.
        """
        plan = self._get_loss_plan(batches[0]) if batches else None
        if plan is None or not plan.uses_model_loss or not plan.counts_items:
            return None
        return super().count_labels(batches, device)

    def save_weights(self, output_dir: str | None, state_dict: Any) -> None:
        """Save as transformers does; a checkpoint of hftl's own modules holds what trains."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, (PreTrainedModel, PeftModel)):
            super().save_weights(output_dir, state_dict)
        elif not (self.is_saving_checkpoint and objective.is_hftl_module(model)):
            state = checkpoint.collect_full_state(model) if state_dict is None else state_dict
            super().save_weights(output_dir, state)
        elif self.args.should_save:
            checkpoint.save_trainable(model, Path(output_dir or str(self.args.output_dir)))

    def load_checkpoint_weights(self, folder: str, model: Any) -> None:
        """Load as transformers does; of hftl's own modules, what `save_weights` has written."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        if step_checkpoint.is_step_checkpoint(folder):
            step_checkpoint.load_weights(Path(folder), self)
        elif objective.is_hftl_module(unwrapped) and not self.is_fsdp_enabled:
            checkpoint.load_trainable(unwrapped, Path(folder))
        else:
            super().load_checkpoint_weights(folder, model)

    def load_checkpoint_optimizer(self, folder: str | None) -> None:
        """Load as transformers does, or from a checkpoint of hftl's."""
        if folder is not None and step_checkpoint.is_step_checkpoint(folder):
            step_checkpoint.load_optimizer_and_schedule(Path(folder), self)
        else:
            super().load_checkpoint_optimizer(folder)

    def load_checkpoint_random_state(self, folder: str | None) -> None:
        """Load as transformers does, or from a checkpoint of hftl's."""
        if folder is not None and step_checkpoint.is_step_checkpoint(folder):
            step_checkpoint.load_random_state(Path(folder), self)
        else:
            super().load_checkpoint_random_state(folder)

    @property
    def _own_model(self) -> Any:
        """Return the model as it was handed over; transformers requires one."""
        return self.model

    def build_train_sampler(self, dataset: Any = None) -> Any:
        """Return an order of rows that depends on seed and epoch alone, for random sampling.

        Raises:
            RecipeError: if there are no rows.
        """
        rows = self.train_dataset if dataset is None else dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(rows, "__len__"):
            return super().build_train_sampler(dataset)
        return samplers.build_seeded_sampler(rows, self.args)

    @property
    def _numbers_rows(self) -> bool:
        """Return whether rows carry their numbers: for regularizers, or for general data."""
        return bool(self.retention.regularizers) or self._general is not None

    def _hold_frozen_in_eval(self) -> None:
        if self._modes is None:
            self._modes = list_training_modes(self.accelerator.unwrap_model(self.model))
        set_training_modes(self._modes)
