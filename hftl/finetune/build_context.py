"""Build the context of a run's arms: how the encoder of a source takes the recipe's rows."""

from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data.class_weights import check_class_weight
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size, resize_processor
from hftl.data.labels import check_label_keys
from hftl.data.patched_inputs import PatchedInputs, limit_patches
from hftl.data.prepare import PreparedData
from hftl.data.rows import InputSpec
from hftl.data.text_inputs import TextInputs, WordInputs, build_word_tokenizer
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.models.architectures import (
    build_position_arguments,
    count_shared_layers,
    get_encoder_config,
    get_max_tokens,
    get_native_image_size,
    get_patch_size,
)
from hftl.models.encoders import check_block_count, count_blocks
from hftl.models.prompt_processor import build_prompted_inputs
from hftl.models.source import (
    SourceModel,
    hash_source_config,
    hash_source_weights,
    load_image_processor,
    load_tokenizer,
    match_padding,
)
from hftl.runtime.hardware import get_device
from hftl.train.optimizer import check_block_rates


def infer_input_spec(source: SourceModel, task: str) -> InputSpec:
    """Return the kind of inputs that the source's encoder reads.

    Raises:
        RecipeError: if the task is about words and the source reads images.
    """
    if source.architecture_spec.modality == "text":
        return InputSpec()
    if task == "token-classification":
        raise RecipeError(
            f"data.task={task} needs a source that reads text, and source.model reads images",
            "Change one of them",
        )
    return InputSpec("image", get_patch_size(source.config))


def build_context(recipe: Recipe, source: SourceModel, prepared: PreparedData) -> ExperimentContext:
    """Build the context of a recipe from its source and rows.

    Raises:
        RecipeError: if the recipe asks for more blocks, or rates of blocks, than there are, for a
            size that does not fit the source's patches, or for what the source's modality has not.
    """
    for arm in recipe.arms:
        check_class_weight(arm.finetune.class_weight, prepared.names, "finetune.class_weight")
        rates, counts_blocks = arm.finetune.lr, "finetune.blocks" in arm.spec.own_keys
        if counts_blocks or rates is not None:
            present = count_blocks(source.config)
            check_block_rates("finetune.lr", rates and rates.blocks, present)
        if counts_blocks:
            check_block_count(
                "finetune", arm.finetune.blocks, present, count_shared_layers(source.config)
            )
    if source.architecture_spec.reads_prompt:
        data = pin_revisions(recipe.data, prepared.facts.hub_revisions)
        inputs = build_prompted_inputs(data, source)
        source = match_padding(source, inputs.tokenizer)
    elif prepared.modality == "image":
        inputs = build_image_inputs(recipe.data, source, prepared.facts.hub_revisions)
    else:
        inputs = build_text_inputs(recipe.data, source)
        source = match_padding(source, inputs.tokenizer)
    if recipe.data.prompt is not None and not source.architecture_spec.reads_prompt:
        raise RecipeError(
            f"data.prompt is for vision-language sources, and {source.name} "
            f"({source.architecture}) is none",
            "Remove it",
        )
    check_label_keys(recipe.data.label_names or (), prepared.names, "data.label_names")
    return ExperimentContext(
        source, hash_source_weights(source), hash_source_config(source),
        inputs.hash_preprocessing(), inputs, prepared, recipe.data.shots, get_device(),
        augment=recipe.data.augment == "light", label_column=str(recipe.data.train.label),
        label_words={name: recipe.data.get_label_words(name) for name in prepared.names},
    )  # fmt: skip


def build_text_inputs(data: Data, source: SourceModel) -> TextInputs:
    """Build the encoding of texts for a source that reads text.

    Raises:
        RecipeError: for keys that are about images, or a length that holds no token of a text.
    """
    for key, given in (("image_size", data.image_size), ("augment", data.augment != "none")):
        if given:
            raise RecipeError(
                f"data.{key} is about images, but source.model reads text", "Remove it"
            )
    longest = min(data.max_length, get_max_tokens(source.config))
    kind = WordInputs if data.task == "token-classification" else TextInputs
    tokenizer = load_tokenizer(source)
    if longest <= tokenizer.num_special_tokens_to_add():
        raise RecipeError(
            f"data.max_length={data.max_length} leaves no room for a token of the text",
            f"Use more than {tokenizer.num_special_tokens_to_add()}",
        )
    if kind is WordInputs:
        tokenizer = build_word_tokenizer(tokenizer, source.folder)
    return kind(tokenizer, longest)


def build_image_inputs(
    data: Data, source: SourceModel, revisions: dict[str, str | None]
) -> ImageInputs:
    """Build the encoding of images for a source that reads images.

    Raises:
        RecipeError: if the size is no multiple of the patch, the encoder takes one size only, or
            pictures of another number of channels.
    """
    channels = getattr(get_encoder_config(source.config), "num_channels", 3)
    if channels != 3:
        raise RecipeError(
            f"source.model: {source.name} takes pictures of {channels} channel(s), and hftl reads "
            "pictures of 3, in red, green and blue",
            "Use a source model of 3 channels",
        )
    patch = get_patch_size(source.config)
    pinned = pin_revisions(data, revisions)
    processor = load_image_processor(source, data.image_size)
    if source.architecture_spec.image_sizes == "patches":
        _check_whole_patches(data.image_size or patch, patch)
        return PatchedInputs(pinned, limit_patches(processor, data.image_size), {}, patch)
    processor = resize_processor(processor, data.image_size)
    side = get_image_size(processor)
    _check_whole_patches(side, patch)
    arguments = build_position_arguments(source.config, side)
    _check_native_size(source, side)
    return ImageInputs(pinned, processor, arguments, patch)


def _check_whole_patches(side: int, patch: int) -> None:
    """Refuse a side of pictures, in pixels, that is no multiple of the source's patch."""
    if side % patch:
        below = side // patch * patch
        near = f"{below} or {below + patch}" if below else str(patch)
        raise RecipeError(
            f"data.image_size={side} is no multiple of the source's patch of {patch} pixels",
            f"Use {near}",
        )


def pin_revisions(data: Data, revisions: dict[str, str | None]) -> Data:
    """Return the data section with every hub table at the commit that its rows were read from."""
    tables = {
        name: getattr(data, name).model_copy(update={"revision": commit})
        for name, commit in revisions.items()
    }
    return data.model_copy(update=tables)


def _check_native_size(source: SourceModel, side: int) -> None:
    """Refuse another size than the config's for an encoder that takes no other."""
    native = get_native_image_size(source.config)
    if source.architecture_spec.image_sizes == "fixed" and side != native:
        raise RecipeError(
            f"the architecture {source.architecture!r} takes pictures of {native} pixels only, "
            f"got {side}",
            "Leave data.image_size out, or choose another source",
        )
