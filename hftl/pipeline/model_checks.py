"""Check settings and models before a run trains: constructed, run once, and some reloaded."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.adapt.encoder_io import set_trainable
from hftl.config.recipe import Arm, Recipe
from hftl.data.text_inputs import EncodedRow, TextInputs, check_embedded
from hftl.errors import HftlError, RecipeError, format_error_line, is_out_of_memory
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import apply_strategy
from hftl.finetune.zero_shot import check_zero_shot
from hftl.models.heads import LoadedModel
from hftl.models.lora import build_lora_config
from hftl.models.model_parts import count_embedded_tokens, get_encoder
from hftl.pipeline.objectives import build_objective
from hftl.publish import reload_check
from hftl.publish.export import describe_quantization, export_model
from hftl.train.arguments import (
    build_finetune_arguments,
    build_training_arguments,
    describe_missing_fp16,
)

SAMPLED_ROWS = 2000
"""Training rows among which the shortest and the longest are sought."""
LORA_KEYS_SAVED_ALIKE = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
"""Fields of `peft.LoraConfig` that change nothing in what is saved."""
LOGIT_TOLERANCE = 1e-4
"""How far a text's outputs may lie from those that it has alone; float32 leaves about 1e-6."""


def validate_upstream_arguments(recipe: Recipe, device: str) -> None:
    """Construct the `TrainingArguments` and `LoraConfig` of every arm and adaptation.

    Args:
        recipe: its arms and adaptations.
        device: cuda, mps or cpu.

    Raises:
        RecipeError: naming the section, if transformers or peft refuses it.
    """
    for arm in recipe.arms:
        if not arm.spec.is_solved:
            task = str(recipe.data.task)
            build_finetune_arguments(arm.finetune.training, task, "unused", 0, device)
        if arm.spec.trains_adapter:
            build_lora_config(arm.finetune.lora, "finetune.lora")
    for stage in recipe.all_stages:
        build_training_arguments("adapt", stage.training, {}, "unused", 0, device)
        if stage.method != "full":
            build_lora_config(stage.lora, "adapt.lora")


def list_missing_fp16(recipe: Recipe, device: str) -> list[str]:
    """Return what is wrong with the recipe's trainings in fp16 where the device has none."""
    trainings = [
        ("finetune", arm.finetune.training) for arm in recipe.arms if not arm.spec.is_solved
    ]
    trainings += [("adapt", stage.training) for stage in recipe.all_stages]
    faults = (describe_missing_fp16(section, training, device) for section, training in trainings)
    return list(dict.fromkeys(fault for fault in faults if fault is not None))


def refuse_missing_fp16(recipe: Recipe, device: str) -> None:
    """Refuse to train in fp16 where the device has none.

    Raises:
        RecipeError: naming the section.
    """
    for fault in list_missing_fp16(recipe, device):
        raise RecipeError(
            fault, "Leave it out: bf16 is used where the processor multiplies it fast, else fp32"
        )


def check_models(recipe: Recipe, context: ExperimentContext) -> None:
    """Run each kind of model of a recipe once, on the CPU, on two rows of train.

    Raises:
        RecipeError: if the source model cannot read these inputs, an arm's LoRA names no module, or
            what it trains does not survive saving; or zero-shot classification has no words.
        DataError: if a row holds a token that the source model does not embed.
    """
    check_zero_shot(recipe, context)
    seen: set[str] = set()
    for arm in recipe.arms:
        if arm.spec.is_baseline:
            continue
        finetune = arm.finetune
        lora = finetune.lora if arm.spec.trains_adapter else None
        key = json.dumps([finetune.pooling, lora], sort_keys=True)
        if key not in seen:
            seen.add(key)
            _check_arm_model(context, arm)
    for stage in recipe.stages:
        if stage.method.startswith("lora"):
            model, _ = build_objective(context, context, stage, recipe.data.seed, None)
            set_trainable(
                model, context.source.architecture_spec, stage.method, stage.blocks, stage.lora
            )


def _check_arm_model(context: ExperimentContext, arm: Arm) -> None:
    built = context.build_model(arm.finetune.pooling, 0)
    rows = _select_two_rows(context)
    if isinstance(context.inputs, TextInputs):
        check_tokens(context, built)
        _check_segments(context, rows)
    try:
        logits = _compute_logits(built.model, context, rows)
        alone = _compute_logits(built.model, context, rows[:1])
    except (RuntimeError, IndexError) as error:
        # What torch raises on shapes and indices that do not fit; too little memory is no such.
        if is_out_of_memory(error):
            raise
        raise RecipeError(
            f"source.model: {context.source.name} cannot read these inputs: "
            f"{format_error_line(error)}",
            "Give a source whose config, weights and tokenizer or processor belong together",
        ) from error
    _check_row_independence(context, logits, alone)
    if arm.spec.trains_adapter:
        finetune = arm.finetune
        model = apply_strategy(built.model, finetune, built.fresh)
        if set(finetune.lora) - set(LORA_KEYS_SAVED_ALIKE):
            _check_saving(
                context, LoadedModel(model, built.architecture, built.pooling, built.fresh), arm
            )


def _select_two_rows(context: ExperimentContext) -> list[EncodedRow]:
    """Return the shortest and the longest of the training rows, pictures in their order."""
    rows = context.prepared.rows["train"]
    if not isinstance(context.inputs, TextInputs):
        return context.encode_rows(rows[:2])
    ordered = sorted(context.encode_rows(rows[:SAMPLED_ROWS]), key=context.inputs.length)
    return [ordered[0], ordered[-1]]


def _compute_logits(model: nn.Module, context: ExperimentContext, rows: list[EncodedRow]) -> Tensor:
    """Return the logits, those of words by the rows' words."""
    model.eval()
    device = next(model.parameters()).device  # quantized weights lie where they are computed with
    batch = context.inputs.collate([dict(row) for row in rows])
    with torch.no_grad():
        logits = model(**{k: v.to(device) if isinstance(v, Tensor) else v
                          for k, v in batch.items()}).logits.cpu()  # fmt: skip
    return torch.cat(context.inputs.split_outputs(logits, rows)).nan_to_num()


def _check_row_independence(context: ExperimentContext, logits: Tensor, alone: Tensor) -> None:
    """Refuse a model by which a row's outputs depend on the rows beside it."""
    difference = float((logits[: len(alone)] - alone).abs().max())
    if difference > LOGIT_TOLERANCE * max(1.0, float(alone.abs().max())):
        raise RecipeError(
            f"source.model: under {context.source.name} the outputs of a row depend on the rows "
            f"beside it in the batch, by {difference:.2g}",
            "Use another source model",
        )


def check_tokens(context: ExperimentContext, built: LoadedModel) -> None:
    """Refuse rows with a token that the model does not embed.

    A tokenizer may have more tokens than the model: then all rows are read, for only a few may
    hold one.

    Raises:
        DataError: naming the first such row.
    """
    tokenizer: Any = context.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    embedded = count_embedded_tokens(get_encoder(built.model, built.architecture))
    if max(tokenizer.get_vocab().values()) < embedded:
        return
    for rows in context.prepared.rows.values():
        check_embedded(rows, context.encode_rows(rows), tokenizer, embedded)


def _check_segments(context: ExperimentContext, rows: list[EncodedRow]) -> None:
    """Refuse numbers of segments that the model does not embed; they are those of pairs."""
    segments = getattr(context.source.config, "type_vocab_size", None)
    numbers = [max(row["token_type_ids"]) for row in rows if "token_type_ids" in row]
    if segments and numbers and max(numbers) >= segments:
        raise RecipeError(
            f"source.model: the tokenizer of {context.source.name} numbers the texts of a pair up "
            f"to {max(numbers)}, and the model embeds {segments} segment(s)",
            "Remove token_type_ids from model_input_names in its tokenizer_config.json, or give "
            "one text column",
        )


def _check_saving(context: ExperimentContext, built: LoadedModel, arm: Arm) -> None:
    """Save and reload an adapter with other weights than it starts from, and compare its logits.

    Raises:
        RecipeError: if they differ, or it does not save.
    """
    rows = _select_two_rows(context)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    expected = _compute_logits(built.model, context, rows).numpy()
    fix = "Name only modules of blocks, head or pooler, or train everything (full)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_model(context, built.model, arm.finetune, Path(folder))
            again = reload_check.load_folder(
                Path(folder), context.public_base.folder, describe_quantization(context)
            )
            reloaded = _compute_logits(again, context, rows).numpy()
        except HftlError:
            raise
        except (ValueError, KeyError, RuntimeError) as error:
            # peft: KeyError for a module that was not saved; ValueError and RuntimeError for names
            # and shapes that the base does not have.
            raise RecipeError(
                f"finetune.lora of the arm {arm.name!r} cannot be saved and loaded again: "
                f"{format_error_line(error)}",
                fix,
            ) from error
    largest = max(1.0, float(np.abs(expected).max()))
    if np.abs(reloaded - expected).max() > LOGIT_TOLERANCE * largest:
        raise RecipeError(
            f"finetune.lora of the arm {arm.name!r} trains weights that are not saved with it",
            fix,
        )
