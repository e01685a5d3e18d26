"""Build the predictor of a finished run or a published folder, local or on a hub."""

from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.data import TEXT_PLACE, Data, Table
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size
from hftl.data.patched_inputs import PatchedInputs
from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.text_inputs import TextInputs, WordInputs
from hftl.doctor.file_checks import NUMBERED_LABEL
from hftl.errors import RecipeError, format_error_line
from hftl.inference.find_model import (
    build_loading_error,
    check_trained_head,
    find_adapter_base,
    find_published_folder,
    wrap_loading_errors,
)
from hftl.inference.load import find_inputs_folder, load_published, read_model_config
from hftl.inference.predict import Predictor
from hftl.inference.published_scores import read_label_curves, read_thresholds
from hftl.models.architectures import (
    build_position_arguments,
    get_config_spec,
    get_max_tokens,
    get_patch_size,
)
from hftl.models.encoders import hide_padding
from hftl.models.model_parts import count_embedded_tokens, unwrap_adapter
from hftl.models.prompt_processor import load_prompt_processor
from hftl.models.source import (
    BUILD_ERRORS,
    SourceModel,
    TokenizerError,
    check_image_processor,
    complete_padding,
    find_padding_fault,
    open_tokenizer,
)
from hftl.models.timm_architecture import TIMM_WRAPPER
from hftl.models.timm_processor import build_timm_processor
from hftl.publish.published_metadata import PublishedInputs, PublishedMetadata
from hftl.publish.reload_check import PublishedModel
from hftl.runtime import paths
from hftl.runtime.hardware import get_device

SAME_SHARES = 0.05
"""Total variation between the shares of classes of two splits up to which they are the same."""


def load(path: str | Path, base: str | Path | None = None) -> Predictor:
    """Load a run folder, a published folder, or a published hub id.

    Args:
        path: where it is.
        base: an adapter's base model, where it is not the one the folder names.

    Raises:
        RecipeError: if there is nothing to load, or no base is named.
        RunFolderError: if a run has no publish folder yet, the base has other weights, or the
            folder's own files do not load.
        HubError: if a hub id cannot be had.
    """
    folder = find_published_folder(path)
    check_trained_head(folder, path)
    base_folder = find_adapter_base(folder, base)
    config = read_model_config(folder, base_folder)
    model = load_published(folder, base_folder, config)
    return build_predictor(folder, base_folder, config, model)


def build_predictor(
    folder: Path, base: Path | None, config: Any, model: PublishedModel
) -> Predictor:
    """Build a predictor of a published folder's model from what the folder says of its use.

    Args:
        folder: of the adapter or whole model.
        base: the folder of the adapter's base.
        config: of the model.
        model: loaded.

    Raises:
        RecipeError: if the folder has no usable tokenizer or processor.
        RunFolderError: if what it says makes no sense.
    """
    metadata = PublishedMetadata.read(folder)
    task = _infer_task(metadata, config)
    names = [] if task == "regression" else _read_class_names(folder, metadata, config)
    files = find_inputs_folder(folder, base, get_config_spec(config).modality == "image")
    if get_config_spec(config).reads_prompt:
        inputs, columns = _build_prompted_inputs(files, config, metadata)
    else:
        inputs, columns = _build_inputs(files, config, task, metadata.recipe.data)
    curves = read_label_curves(folder, metadata, task, names)
    thresholds = read_thresholds(folder, config, task, names)
    hide_padding(model)
    embedded = None
    if isinstance(inputs, TextInputs):
        stock: Any = unwrap_adapter(model.model)
        embedded = count_embedded_tokens(stock)
        if get_config_spec(config).is_causal:
            # The class finds the last token by it, and an adapter's base may name another, or none.
            stock.config.pad_token_id = inputs.tokenizer.pad_token_id
    device = get_device()
    label_type = metadata.data.label_type if metadata.data is not None else "text"
    temperature = metadata.calibration.temperature if metadata.calibration is not None else None
    confusion = _read_confusion(metadata, names)
    return Predictor(
        model.to(device), inputs, task, names, columns, device, label_type, temperature, confusion,
        curves, thresholds, metadata.conformal, metadata.recipe.data.bad_rows, embedded,
    )  # fmt: skip


def _read_confusion(metadata: PublishedMetadata, names: list[str]) -> np.ndarray | None:
    """Return the counts of validation by true and predicted class; None where there are none.

    None, too, of a model that was trained under other shares of classes than validation's: by
    weights, by as many rows of each class, or on such a table. Its probabilities are not calibrated
    under validation's, which a correction divides by.
    """
    if metadata.calibration is None or metadata.calibration.confusion is None:
        return None
    confusion = np.array(metadata.calibration.confusion)
    if confusion.shape != (len(names),) * 2 or metadata.recipe.finetune.class_weight is not None:
        return None
    counts = (metadata.data and metadata.data.label_counts or {}).get("train", {})
    trained = np.array([1.0 if metadata.recipe.data.shots else counts.get(n, 0) for n in names])
    if not trained.any():
        return None
    measured = confusion.sum(1)
    distance = np.abs(trained / trained.sum() - measured / measured.sum()).sum() / 2
    return confusion if distance <= SAME_SHARES else None


def _infer_task(metadata: PublishedMetadata, config: Any) -> str:
    """Return the task, from hftl.json or, in a folder without it, from the config."""
    if metadata.data is not None:
        return metadata.data.task
    if (config.architectures or [""])[0].endswith("ForTokenClassification"):
        return "token-classification"
    if config.problem_type is None and config.num_labels == 1:
        return "regression"  # as transformers takes it
    tasks = {"regression": "regression", "multi_label_classification": "multi-label"}
    return tasks.get(str(config.problem_type), "classification")


def _read_class_names(folder: Path, metadata: PublishedMetadata, config: Any) -> list[str]:
    """Return the classes in the order of the outputs; hftl.json and config.json must agree.

    Raises:
        RunFolderError: if they do not: nobody can tell which of them is right.
    """
    shown = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if metadata.data is None:
        return shown
    names = metadata.data.labels or []
    unnamed = len(names) == len(shown) and all(map(NUMBERED_LABEL.fullmatch, shown))
    if names != shown and not unnamed:
        raise build_loading_error(
            folder,
            f"the labels are {', '.join(shown)} in config.json, and {', '.join(names)} in "
            "hftl.json",
        )
    return names


def _build_inputs(
    folder: Path, config: Any, task: str, published: PublishedInputs
) -> tuple[TextInputs | ImageInputs, list[str]]:
    """Build what encodes the model's inputs, and name the columns of a table that hold them."""
    if get_config_spec(config).modality == "image":
        if config.model_type == TIMM_WRAPPER:
            with wrap_loading_errors(folder, BUILD_ERRORS):
                processor: Any = build_timm_processor(config)
        else:
            processor = _load_image_processor(folder)
        data = Data(train=Table(path="."), max_pixels=published.max_pixels)
        columns, patch = [published.train.image], get_patch_size(config)
        if get_config_spec(config).image_sizes == "patches":
            return PatchedInputs(data, processor, {}, patch), columns
        arguments = build_position_arguments(config, get_image_size(processor))
        return ImageInputs(data, processor, arguments, patch), columns
    inputs_class = WordInputs if task == "token-classification" else TextInputs
    tokenizer = _load_tokenizer(folder)
    complete_padding(tokenizer, config)
    why = find_padding_fault(tokenizer, config)
    if why is not None:
        raise build_loading_error(
            folder, f"its tokenizer {why} (pad_token in tokenizer_config.json)"
        )
    text = published.train.text
    columns = [text] if isinstance(text, str) else text
    return inputs_class(tokenizer, min(published.max_length, get_max_tokens(config))), columns


def _build_prompted_inputs(
    folder: Path, config: Any, metadata: PublishedMetadata
) -> tuple[PromptedInputs, list[str]]:
    """Build what encodes pictures with the prompt that a vision-language model was trained on.

    Raises:
        RecipeError: if hftl.json does not say the prompt.
    """
    prompt = metadata.forward.prompt if metadata.forward is not None else None
    if prompt is None:
        raise RecipeError(
            f"{paths.get_display_name(folder)} does not say the prompt that it was trained on "
            "(hftl.json, forward.prompt)",
            "Give a folder that hftl published",
        )
    published = metadata.recipe.data
    name = paths.get_display_name(folder)
    source = SourceModel(name, folder, None, None, True, config, config.model_type)
    data = Data(train=Table(path="."), max_pixels=published.max_pixels)
    inputs = PromptedInputs(
        data, load_prompt_processor(source), {}, 1, prompt=prompt,
        max_length=published.max_length, folder=folder,
    )  # fmt: skip
    text = published.train.text
    return inputs, [published.train.image, *([str(text)] if TEXT_PLACE in prompt else [])]


def _load_image_processor(folder: Path) -> Any:
    """Load the folder's own image processor.

    Raises:
        RecipeError: if it has none.
        RunFolderError: if its settings are of another shape.
    """
    from transformers import AutoImageProcessor

    with wrap_loading_errors(folder, BUILD_ERRORS):
        try:
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
            return check_image_processor(processor)
        except (ImportError, OSError, ValueError) as error:
            # OSError for a file that is missing or no JSON, ValueError for an unknown class,
            # ImportError for a class that needs a package which is not installed.
            raise _build_missing_error(folder, "image processor", error) from error


def _load_tokenizer(folder: Path) -> Any:
    """Load the folder's own tokenizer.

    Raises:
        RecipeError: if it has none.
        RunFolderError: if its files make no sense.
    """
    try:
        return open_tokenizer(folder)
    except TokenizerError as error:
        # As for processors: of a missing file, an unknown class, and a missing package.
        if isinstance(error.__cause__, (ImportError, OSError, ValueError)):
            raise _build_missing_error(folder, "tokenizer", error) from error
        raise build_loading_error(folder, str(error)) from error


def _build_missing_error(folder: Path, kind: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"{paths.get_display_name(folder)} has no usable {kind}: {format_error_line(error)}",
        "Give a folder that hftl published, or save it beside the model",
    )
