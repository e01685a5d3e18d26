"""TrainingArguments: what the recipe says, and what hftl decides."""

from typing import Any

from transformers import TrainingArguments

from hftl.errors import RecipeError, message_line
from hftl.train.hardware import precision

EVAL_BATCH = 64


def arguments(
    section: str, training: dict[str, Any], defaults: dict[str, Any], folder: str, seed: int,
    device: str,
) -> TrainingArguments:  # fmt: skip
    """TrainingArguments of a recipe's `training`.

    Args:
        section: where it stands in the recipe: `finetune` or `adapt`.
        training: what the recipe says; it goes before `defaults`.
        defaults: what this kind of training does where the recipe says nothing.
        folder: where checkpoints go.
        seed: of the order of rows, and of all that is drawn.
        device: cuda, mps or cpu.

    Raises:
        RecipeError: if transformers refuses the values.
    """
    decided = {
        "output_dir": folder,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **precision(training),
    }
    common = {
        "per_device_eval_batch_size": EVAL_BATCH,
        "dataloader_pin_memory": device == "cuda",
        # All that trains is on the path to the loss, so the search for what is not would only cost.
        "ddp_find_unused_parameters": False,
    }
    try:
        args = TrainingArguments(**(common | defaults | training | decided))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(
            f"{section}.training: transformers refuses it: {message_line(error)}",
            "Correct the section",
        ) from error
    # transformers would split a batch over all visible devices by itself (DataParallel).
    args._n_gpu = min(1, args.n_gpu)
    return args
