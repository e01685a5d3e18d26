"""Count the optimizer steps of a training, and warn of what would come after the last of them: the
end of a warm-up, or the first evaluation."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hftl.plurals import count_noun

TRAINER_BATCH = 8
"""Rows a process and step in TrainingArguments, where a recipe says nothing."""
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` that do not read `warmup_steps`."""


def count_training_steps(
    training: Mapping[str, Any], rows: int, epochs: float, batch: int = TRAINER_BATCH,
    processes: int = 1,
) -> int:  # fmt: skip
    """Return the number of optimizer steps of a training on so many rows, as Trainer counts them.

    Args:
        training: of the recipe; its `max_steps` goes before epochs.
        rows: that train.
        epochs: how often each is seen.
        batch: rows a process and step where `training` says nothing.
        processes: that share the training.
    """
    if training.get("max_steps", 0) > 0:
        return training["max_steps"]
    batches = math.ceil(rows / (training.get("per_device_train_batch_size", batch) * processes))
    an_epoch = math.ceil(batches / training.get("gradient_accumulation_steps", 1))
    return max(1, math.ceil(an_epoch * epochs))


def scale_length(training: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the arguments of a training that is so many times as long."""
    scaled = {**training, "num_train_epochs": float(training["num_train_epochs"]) * factor}
    if training.get("max_steps", 0) > 0:
        scaled["max_steps"] = max(1, round(training["max_steps"] * factor))
    return scaled


def warn_of_long_warmup(
    training: Mapping[str, Any], steps: int, section: str, what: str
) -> Iterator[str]:
    """Warn where the learning rate never reaches its peak.

    Args:
        training: of the recipe.
        steps: of the training, or of the shortest of several that share these settings.
        section: that holds `training`: finetune or adapt.
        what: trains so many steps: an arm, or a phase of it.
    """
    warmup = training.get("warmup_steps") or 0
    # Below 1 it is a share of the steps.
    if warmup <= max(1, steps) or training.get("lr_scheduler_type", "linear") in WITHOUT_WARMUP:
        return
    yield (
        f"{section}.training.warmup_steps={warmup:g} is more than {count_noun(steps, 'step')} of "
        f"{what}, whose learning rate never reaches its peak; give fewer, or a share such as 0.06"
    )


def warn_of_late_evaluation(
    training: Mapping[str, Any], steps: int, epochs: float, what: str
) -> Iterator[str]:
    """Warn where a training ends before its first evaluation.

    Args:
        training: of the recipe's `finetune`; its `eval_delay` counts what `eval_strategy` names.
        steps: of the training.
        epochs: of the training.
        what: trains so long: an arm, or a phase of it.
    """
    delay, unit = training.get("eval_delay") or 0, training.get("eval_strategy", "epoch")
    # transformers evaluates the last step, too, if it is not before the delay.
    length = epochs if unit == "epoch" else steps
    if delay > length:
        yield (
            f"finetune.training.eval_delay={delay:g} is more than the {length:g} "
            f"{unit.removesuffix('s')}s of {what}: nothing is chosen on validation, and the last "
            "weights are kept; lower it"
        )
