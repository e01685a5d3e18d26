"""Use private members of transformers, accelerate and torch, here and nowhere else.

Each function names the public API that is missing, so that it goes when that API comes; a test
walks the package and lists every private member. A release of a library that renames one breaks
this module alone. Nothing heavy is imported at the top: light modules import this one too.
"""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer, TrainingArguments
else:
    Trainer = object  # Importing the Trainer takes seconds; its mixin needs it for types alone.


def use_one_device(args: "TrainingArguments") -> None:
    """Make a Trainer use one device of this process where several are visible.

    Missing: a setting of TrainingArguments that switches DataParallel off. The Trainer wraps the
    model whenever `_n_gpu`, which follows from the visible devices alone, is above 1.
    """
    args._n_gpu = min(1, args.n_gpu)


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bfloat16.

    Missing: `torch.cpu.is_bf16_supported`, the counterpart of `torch.cuda.is_bf16_supported`.
    """
    import torch

    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def count_changes(tensor: "Tensor") -> int:
    """Return how often a tensor was changed in place.

    Missing: a public name of `Tensor._version`, which autograd checks saved tensors by.
    """
    return tensor._version


def get_attention_implementation(config: Any) -> str | None:
    """Return which attention a model of the config computes by.

    Missing: a getter beside `PreTrainedModel.set_attn_implementation`.
    """
    return config._attn_implementation


def has_hooks(module: "nn.Module") -> bool:
    """Return whether a module has hooks, of its forward pass or the backward pass.

    Missing: a public list of a module's hooks.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def set_backend_tokenizer(tokenizer: Any, state: str) -> None:
    """Replace the backend of a fast tokenizer by one that is built from a serialised state.

    Missing: a setter of `PreTrainedTokenizerFast.backend_tokenizer`, which reads `_tokenizer`.
    """
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(state)


def has_replaced_loss(model: "nn.Module") -> bool:
    """Return whether somebody has set `loss_function` of a transformers model.

    Missing: a getter that tells a set loss from the class's own; the setter of
    `PreTrainedModel.loss_function` leaves `_loss_function` on the instance.
    """
    return "_loss_function" in vars(model)


def unwrap_forward(model: "nn.Module") -> Any:
    """Return the function that runs as a model's forward, without accelerate's and decorators'.

    Missing: `Accelerator.unwrap_model` for the forward alone; mixed precision wraps `forward` and
    keeps the former one as `_original_forward`.
    """
    forward = vars(model).get("_original_forward", model.forward)
    return inspect.unwrap(getattr(forward, "__func__", forward))


def release_model(accelerator: Any, model: "nn.Module") -> None:
    """Leave a model as it was before accelerate prepared it, its weights apart.

    Missing: an `unwrap_model` that undoes all of `prepare`. Without the mark a next trainer
    prepares the model again; with it, that would train in fp32 whatever its precision, as
    `unwrap_model` has taken the autocast off `forward`.
    """
    whole = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(whole).pop("_is_accelerate_prepared", None)


def move_inputs(trainer: "Trainer", inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return a batch on the Trainer's device.

    Missing: a public form of `_prepare_inputs`.
    """
    return trainer._prepare_inputs(inputs)


def get_train_sampler(trainer: "Trainer") -> Any:
    """Return the sampler of training rows, also where a user's subclass overrides it.

    Missing: a public form of `_get_train_sampler`.
    """
    return trainer._get_train_sampler()


def get_train_batch_size(trainer: "Trainer") -> int:
    """Return the rows of a batch of this process as training runs.

    Missing: a public form of `_train_batch_size`, which `auto_find_batch_size` lowers.
    """
    return trainer._train_batch_size


def drop_unused_columns(trainer: "Trainer", dataset: Any) -> Any:
    """Return a `datasets.Dataset` without the columns that the model's forward does not take.

    Missing: a public form of `_remove_unused_columns`, to build a DataLoader of one's own.
    """
    return trainer._remove_unused_columns(dataset, description="Training")


def wrap_collator(trainer: "Trainer", collate: Any) -> Any:
    """Return a collator that leaves out what the model's forward does not take.

    Missing: a public form of `_get_collator_with_removed_columns`.
    """
    return trainer._get_collator_with_removed_columns(collate, "Training")


def count_items(trainer: "Trainer", batches: list[Any], device: Any) -> Any:
    """Return by how many items a model's own loss is divided in a step, over all processes.

    Missing: a public form of `_get_num_items_in_batch`, for a subclass with batches of its own.
    """
    return trainer._get_num_items_in_batch(batches, device)


def get_logged_loss(trainer: "Trainer") -> tuple[float, float, int]:
    """Return this process's loss since the last log, that of all logs, and the last log's step.

    Missing: these in `TrainerState`, without which a resumed epoch logs the loss of its rest.
    """
    loss = trainer._tr_loss
    return float(loss), trainer._total_loss_scalar, trainer._globalstep_last_logged


def set_logged_loss(trainer: "Trainer", loss: float, total: float, step: int) -> None:
    """Set what `get_logged_loss` returned, once the training loop has begun.

    Missing: these in `TrainerState`.
    """
    trainer._tr_loss.fill_(loss)
    trainer._total_loss_scalar, trainer._globalstep_last_logged = total, step


class TrainerHooks(Trainer):
    """Give the private hooks of transformers' Trainer public names that a subclass can override.

    Missing: documented hooks for what a checkpoint holds, for the sampler and for the norm of the
    gradients. To be mixed in before the Trainer: `class MyTrainer(TrainerHooks, Trainer)`.
    """

    is_saving_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; `_internal_call` says that the Trainer writes a checkpoint."""
        self.is_saving_checkpoint = _internal_call
        super().save_model(output_dir, _internal_call)

    def save_weights(self, output_dir: str | None, state_dict: Any) -> None:
        """Write the weights of a model that is saved, on the processes that save."""
        super()._save(output_dir, state_dict)

    def load_checkpoint_weights(self, folder: str, model: Any) -> None:
        """Load the weights of a checkpoint that training is resumed from."""
        super()._load_from_checkpoint(folder, model)

    def load_checkpoint_optimizer(self, folder: str | None) -> None:
        """Load optimizer and schedule of a checkpoint that training is resumed from."""
        super()._load_optimizer_and_scheduler(folder)

    def load_checkpoint_random_state(self, folder: str | None) -> None:
        """Load the random states of a checkpoint, after the first batches have been fetched."""
        super()._load_rng_state(folder)

    def finish_step(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the step or the epoch that has ended asks for."""
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def build_train_sampler(self, dataset: Any = None) -> Any:
        """Return the sampler of training rows; None where there is none."""
        return super()._get_train_sampler(dataset)

    def count_labels(self, batches: Any, device: Any) -> Any:
        """Count the labels that a loss is divided by, in training and in evaluation."""
        return super()._get_num_items_in_batch(batches, device)

    def clip_gradients(self, model: Any) -> Any:
        """Scale a step's gradients down to `max_grad_norm`, and return their norm before."""
        return super()._clip_grad_norm(model)

    def review_gradients(self, norm: Any) -> None:
        """Look at the norm of a step's gradients before the optimizer uses them."""

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.clip_gradients(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.review_gradients(norm)
        return norm

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return self.count_labels(batch_samples, device)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.save_weights(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_checkpoint_weights(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_checkpoint_optimizer(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_checkpoint_random_state(checkpoint)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.finish_step(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.build_train_sampler(train_dataset)
