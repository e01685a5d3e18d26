"""From source model and rows to the workbench: how the encoder takes these rows."""

from typing import Any

from hftl.data.image import resized, target_size
from hftl.data.load import Reading
from hftl.data.pixels import ImageInputs
from hftl.data.prepare import Prepared
from hftl.data.text import TextInputs, WordInputs, of_words
from hftl.errors import RecipeError
from hftl.finetune.workbench import Workbench
from hftl.model.anatomy import (
    anatomy_of,
    check_blocks,
    count_blocks,
    encoder_config,
    layers,
    max_tokens,
    native_image_size,
    patch_size,
)
from hftl.model.source import SourceModel, load_processor, load_tokenizer, weights_sha256
from hftl.recipe import Recipe, arms
from hftl.sections.data import Data
from hftl.train.hardware import device
from hftl.train.optimizer import check_rates

INTERPOLATE_THEMSELVES = ("dinov2", "dinov2_with_registers", "swin")
"""Architectures whose forward takes pictures of any size unasked."""


def reading_of(source: SourceModel, task: str) -> Reading:
    """What the source's encoder reads.

    Raises:
        RecipeError: if the task is about words and the source reads images.
    """
    if source.anatomy.modality == "text":
        return Reading()
    if task == "token-classification":
        raise RecipeError(
            f"data.task={task} needs a source that reads text, and source.model reads images",
            "Change one of them",
        )
    return Reading("image", patch_size(source.config))


def new_bench(recipe: Recipe, source: SourceModel, prepared: Prepared) -> Workbench:
    """The workbench of a recipe.

    Raises:
        RecipeError: if the recipe asks for more blocks, or rates of blocks, than there are, for a
            size that does not fit the source's patches, or for what the source's modality has not.
    """
    for arm in arms(recipe):
        rates = arm.finetune.lr
        if arm.strategy == "partial" or rates is not None:
            present = count_blocks(source.config)
            check_rates("finetune.lr", rates and rates.blocks, present)
        if arm.strategy == "partial":
            check_blocks("finetune", arm.finetune.blocks, present, layers(source.config))
    if prepared.modality == "image":
        inputs = image_inputs(recipe.data, source, prepared.facts["hub_revisions"])
    else:
        inputs = text_inputs(recipe.data, source)
    return Workbench(
        source, weights_sha256(source), inputs, prepared, recipe.data.shots, device(),
        augment=recipe.data.augment == "light", label=str(recipe.data.train.label),
    )  # fmt: skip


def text_inputs(data: Data, source: SourceModel) -> TextInputs:
    """Texts for a source that reads text.

    Raises:
        RecipeError: for keys that are about images, or a length that holds no token of a text.
    """
    for key, given in (("image_size", data.image_size), ("augment", data.augment != "none")):
        if given:
            raise RecipeError(
                f"data.{key} is about images, but source.model reads text", "Remove it"
            )
    longest = min(data.max_length, max_tokens(source.config))
    kind = WordInputs if data.task == "token-classification" else TextInputs
    tokenizer = load_tokenizer(source)
    if longest <= tokenizer.num_special_tokens_to_add():
        raise RecipeError(
            f"data.max_length={data.max_length} leaves no room for a token of the text",
            f"Use more than {tokenizer.num_special_tokens_to_add()}",
        )
    if kind is WordInputs:
        tokenizer = of_words(tokenizer, source.folder)
    return kind(tokenizer, longest)


def image_inputs(data: Data, source: SourceModel, revisions: dict[str, str]) -> ImageInputs:
    """Images for a source that reads images.

    Raises:
        RecipeError: if the size is no multiple of the patch, the encoder takes one size only, or
            pictures of another number of channels.
    """
    channels = getattr(encoder_config(source.config), "num_channels", 3)
    if channels != 3:
        raise RecipeError(
            f"source.model: {source.spec} takes pictures of {channels} channel(s), and hftl reads "
            "pictures of 3, in red, green and blue",
            "Use a source model of 3 channels",
        )
    patch = patch_size(source.config)
    processor = resized(load_processor(source), data.image_size)
    side = target_size(processor)
    if side % patch:
        below = side // patch * patch
        near = f"{below} or {below + patch}" if below else str(patch)
        raise RecipeError(
            f"data.image_size={side} is no multiple of the source's patch of {patch} pixels",
            f"Use {near}",
        )
    arguments = position_arguments(source.config, side)
    if not arguments and side != native_image_size(source.config):
        _check_any_size(source, side)
    return ImageInputs(pinned(data, revisions), processor, arguments, patch)


def pinned(data: Data, revisions: dict[str, str]) -> Data:
    """The data section with every hub table at the commit that its rows were read from."""
    tables = {
        name: getattr(data, name).model_copy(update={"revision": commit})
        for name, commit in revisions.items()
    }
    return data.model_copy(update=tables)


def _check_any_size(source: SourceModel, side: int) -> None:
    """Refuses another size for an encoder that is not known to interpolate by itself."""
    if source.model_type not in INTERPOLATE_THEMSELVES:
        raise RecipeError(
            f"the architecture {source.architecture!r} takes pictures of "
            f"{native_image_size(source.config)} pixels only, got {side}",
            "Leave data.image_size out, or choose another source",
        )


def position_arguments(config: Any, side: int) -> dict[str, Any]:
    """What forward must be told where the pictures are not of the size of pre-training."""
    interpolates = anatomy_of(config).interpolate_pos_encoding and side != native_image_size(config)
    return {"interpolate_pos_encoding": True} if interpolates else {}
