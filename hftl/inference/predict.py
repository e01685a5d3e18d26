"""Predict with a finished run or a published folder, local or on a hub."""

import json
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL.Image import Image
from torch import nn

from hftl.config.data import TEXT_PLACE, Data, Table
from hftl.config.upstream_args import BASE_PRESERVING_INITS
from hftl.data.facts import Modality
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size, resize_and_crop
from hftl.data.images import (
    ImageDecodeError,
    decode_image,
    is_too_small,
    read_levels,
    warn_of_narrow_images,
)
from hftl.data.labels import decode_logits
from hftl.data.load import find_text_fault
from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.rows import Levels, Row, has_invalid_utf8, normalize_newlines
from hftl.data.text_inputs import EncodedRow, TextInputs, WordInputs
from hftl.doctor.file_checks import NUMBERED_LABEL
from hftl.errors import DataError, RecipeError, format_error_line
from hftl.inference.find_model import (
    check_trained_head,
    find_base_folder,
    find_published_folder,
    wrap_loading_errors,
)
from hftl.inference.load import (
    add_adapter,
    add_head,
    find_inputs_folder,
    load_incomplete_base,
    load_published,
    overwrites_base_tensors,
    read_model_config,
)
from hftl.inference.published_scores import (
    find_set_quantile,
    list_set_members,
    read_label_curves,
    read_thresholds,
)
from hftl.measure.facts import LabelCurve
from hftl.measure.label_calibration import compute_probabilities
from hftl.models.architectures import (
    build_position_arguments,
    get_config_spec,
    get_max_tokens,
    get_patch_size,
)
from hftl.models.encoders import hide_padding
from hftl.models.features import predict_logits
from hftl.models.model_parts import unwrap_adapter
from hftl.models.prompt_processor import load_prompt_processor
from hftl.models.source import SourceModel, complete_padding
from hftl.models.timm_architecture import TIMM_WRAPPER
from hftl.models.timm_processor import build_timm_processor
from hftl.publish.published_metadata import (
    ADAPTER_CONFIG,
    HEAD_WEIGHTS,
    THRESHOLDS_KEY,
    AdapterConfig,
    PublishedConformal,
    PublishedInputs,
    PublishedMetadata,
)
from hftl.publish.reload_check import PublishedModel
from hftl.runtime import paths
from hftl.runtime.hardware import get_device

SAME_SHARES = 0.05
"""Total variation between the shares of classes of two splits up to which they are the same."""

Input = str | Sequence[str] | Path | bytes | Image
"""A text, a pair of texts, the words of one, or an image: a path, its bytes, or itself."""


ClassName = str | int | bool
"""A class in the type that it had in the training table."""


class Prediction(TypedDict):
    """Hold what is predicted of one input.

    `label` is a class, for multi-label the list of those that hold, for words a tag each, or a
    number. `score` is the probability of the class, calibrated where the run gave a temperature,
    for words of each tag, None for a word beyond the model's length; multi-label has none.
    `scores` are those of all classes, of whole inputs. With a coverage, `set` are the classes that
    hold the true one, or all true ones, as often as it says, and `interval` the same of a number;
    a set is empty where no class is likely enough.
    """

    label: ClassName | list[ClassName] | float
    score: NotRequired[float | list[float | None]]
    scores: NotRequired[dict[str, float]]
    set: NotRequired[list[ClassName]]
    interval: NotRequired[tuple[float, float]]


@dataclass(frozen=True)
class Predictor:
    """Hold a loaded model, which predicts."""

    model: nn.Module
    inputs: TextInputs | ImageInputs
    task: str
    class_names: list[str]
    """Empty for regression."""
    columns: list[str]
    """The input columns of a table."""
    device: str
    label_type: str = "text"
    """The type that the classes had in the training table."""
    temperature: float | None = None
    """Divides the logits of classification, for their scores; None for nothing."""
    confusion: np.ndarray | None = None
    """Rows of validation, (true, predicted); None where the model does not say."""
    label_curves: list[LabelCurve] | None = None
    """Make probabilities of multi-label logits; None for the sigmoid."""
    thresholds: np.ndarray | None = None
    """(classes,) of the sigmoid, above which a multi-label class is predicted; None for .5."""
    conformal: PublishedConformal | None = None
    """Makes prediction sets; None where the model does not say."""

    @property
    def modality(self) -> Modality:
        """Return `text` or `image`."""
        return "image" if isinstance(self.inputs, ImageInputs) else "text"

    def predict(self, inputs: Iterable[Input], coverage: float | None = None) -> list[Prediction]:
        """Predict each input.

        Args:
            inputs: texts, pairs, lists of words, or images.
            coverage: how often the sets of classes, or the intervals of numbers, that are then
                predicted too hold the truth: .9 of inputs like those of validation.

        Raises:
            DataError: for an input that is no text, not so many texts, no words, or no image.
            RecipeError: if there are no sets of that coverage, see `find_set_quantile`.
        """
        if isinstance(inputs, (str, bytes, Path, Image)):
            raise DataError(f"predict takes a list, got one {type(inputs).__name__}", "Write [it]")
        return self.predict_encoded(self.encode(inputs), coverage)

    def encode(
        self, inputs: Iterable[Input], places: Sequence[str] = (), folder: Path | None = None
    ) -> list[tuple[EncodedRow, int]]:
        """Return what the encoder takes of each input, and how many predictions it gets.

        Args:
            inputs: as in `predict`.
            places: what to call each in a message; by default its number.
            folder: what the paths of images are relative to; None: the current directory.

        Raises:
            DataError: see `predict`.
        """
        named = ((places[n] if places else f"input {n + 1}", one) for n, one in enumerate(inputs))
        if isinstance(self.inputs, ImageInputs):
            pairs = [encode_image(self.inputs, *pair, folder or Path.cwd()) for pair in named]
            warn_of_narrow_images((levels for _, levels in pairs), "the input")
            return [(encoded, 1) for encoded, _ in pairs]
        rows = [self._build_row(place, value) for place, value in named]
        tokens = self.task == "token-classification"
        words = [len(row.content) if tokens else 1 for row in rows]
        return list(zip(self.inputs.encode(rows), words, strict=True))

    def predict_encoded(
        self, encoded: list[tuple[EncodedRow, int]], coverage: float | None = None
    ) -> list[Prediction]:
        """Predict what `encode` returned; arguments and predictions are as `predict` says."""
        quantile = None
        if coverage is not None:
            quantile, _ = find_set_quantile(self.conformal, self.task, coverage)
        if not encoded:
            return []
        logits = predict_logits(self.model, [row for row, _ in encoded], self.inputs, self.device)
        words = [count for _, count in encoded]
        labels, scores = decode_logits(logits, self.task, self.class_names, words, self.thresholds)
        if self.temperature is not None and self.task == "classification":
            # Labels are those of the logits: rounding must not decide between two near ones.
            _, scores = decode_logits(
                logits.astype(np.float64) / self.temperature, self.task, self.class_names, words
            )
        if self.label_curves is not None:
            scores = compute_probabilities(logits, self.label_curves).tolist()
        predictions = [self._format_prediction(*pair) for pair in zip(labels, scores, strict=True)]
        if quantile is not None:
            self._add_sets(predictions, logits, quantile)
        return predictions

    def _add_sets(self, predictions: list[Prediction], logits: np.ndarray, quantile: float) -> None:
        if self.task == "regression":
            for prediction, value in zip(predictions, logits[:, 0].tolist(), strict=True):
                prediction["interval"] = value - quantile, value + quantile
            return
        members = list_set_members(logits, self.task, quantile)
        for prediction, classes in zip(predictions, members, strict=True):
            prediction["set"] = [self._convert_name(self.class_names[i]) for i in classes]

    def _build_row(self, place: str, value: Any) -> Row:
        value = normalize_newlines(value)
        if has_invalid_utf8(value):
            raise DataError(f"{place} is not valid UTF-8: {value!r}", "Correct it")
        if self.task == "token-classification":
            why = find_text_fault("it", value, self.task)
            content = () if why else tuple(value)
        else:
            content = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            why = next(
                (w for text in content if (w := find_text_fault("it", text, self.task))), None
            )
            if len(content) != len(self.columns):
                why = f"{len(content)} text(s)"
        if why:
            expected = f"{len(self.columns)} text(s), not empty"
            if self.task == "token-classification":
                expected = "a list of words, none of them empty"
            raise DataError(f"{place} is {value!r}, expected {expected}", "Correct it")
        return Row(content, "", None, 0, place)

    def _format_prediction(self, label: Any, scores: list[Any]) -> Prediction:
        if self.task == "regression":
            return {"label": label}
        if self.task == "token-classification":
            return {"label": list(label), "score": [word and max(word) for word in scores]}
        by_name = dict(zip(self.class_names, scores, strict=True))
        if self.task == "multi-label":
            return {"label": [self._convert_name(name) for name in label], "scores": by_name}
        return {"label": self._convert_name(label), "score": by_name[label], "scores": by_name}

    def format_scores(self, scores: list[float]) -> Prediction:
        """Return the prediction of a class by its probabilities, in the order of the classes."""
        label = self.class_names[int(np.argmax(scores))]
        return self._format_prediction(label, scores)

    def _convert_name(self, name: str) -> ClassName:
        """Return a class name in the type that the training table had."""
        if self.label_type == "integer":
            return int(name)
        return name == "True" if self.label_type == "boolean" else name


def encode_image(
    inputs: ImageInputs, place: str, value: Any, folder: Path
) -> tuple[EncodedRow, Levels]:
    """Return an image as the encoder takes it, and the levels that its pixels reach.

    Raises:
        DataError: naming the place, if no image can be read.
    """
    text = ""
    if isinstance(inputs, PromptedInputs) and inputs.reads_text:
        value, text = _split_pair(place, value)
    try:
        image = decode_image(value, folder, inputs.data.max_pixels)
        if is_too_small(image, inputs.patch_size):
            raise ImageDecodeError(f"its pixels are within one patch of {inputs.patch_size}")
    except ImageDecodeError as error:
        shown = f" ({value})" if isinstance(value, (str, Path)) and str(value) != place else ""
        raise DataError(f"{place}{shown}: {error}", "Correct it") from error
    if isinstance(inputs, PromptedInputs):
        return inputs.encode_picture(image, text), read_levels(image)
    return {"pixel_values": resize_and_crop(inputs.processor, image)}, read_levels(image)


def _split_pair(place: str, value: Any) -> tuple[Any, str]:
    """Return the picture and the text of a pair.

    Raises:
        DataError: naming the place, if it is none.
    """
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    why = find_text_fault("the text", value[1], "") if is_pair else "it is no pair"
    if why:
        raise DataError(f"{place}: {why}, and the model reads a picture and a text", "Correct it")
    return value[0], normalize_newlines(value[1])


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
    base_folder = _find_base(folder, base)
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
    with wrap_loading_errors(folder):
        task = _infer_task(metadata, config)
        names = [] if task == "regression" else _read_class_names(metadata, config)
        images = get_config_spec(config).modality == "image"
        files = find_inputs_folder(folder, base, images)
        if get_config_spec(config).reads_prompt:
            inputs, columns = _build_prompted_inputs(files, config, metadata)
        else:
            inputs, columns = _build_inputs(files, config, task, metadata.recipe.data)
        curves = read_label_curves(metadata, task, names)
        thresholds = read_thresholds(config, task, names)
    hide_padding(model)
    if isinstance(inputs, TextInputs) and get_config_spec(config).is_causal:
        # The class finds the last token by it, and an adapter's base may name another, or none.
        stock: Any = unwrap_adapter(model.model)
        stock.config.pad_token_id = inputs.tokenizer.pad_token_id
    device = get_device()
    label_type = metadata.data.label_type if metadata.data is not None else "text"
    temperature = metadata.calibration.temperature if metadata.calibration is not None else None
    confusion = _read_confusion(metadata, names)
    return Predictor(
        model.to(device), inputs, task, names, columns, device, label_type, temperature, confusion,
        curves, thresholds, metadata.conformal,
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


def _read_class_names(metadata: PublishedMetadata, config: Any) -> list[str]:
    """Return the classes in the order of the outputs; hftl.json and config.json must agree.

    Raises:
        ValueError: if they do not: nobody can tell which of them is right.
    """
    shown = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if metadata.data is None:
        return shown
    names = metadata.data.labels or []
    unnamed = len(names) == len(shown) and all(map(NUMBERED_LABEL.fullmatch, shown))
    if names != shown and not unnamed:
        raise ValueError(
            f"the labels are {', '.join(shown)} in config.json, and {', '.join(names)} in hftl.json"
        )
    return names


def _build_inputs(
    folder: Path, config: Any, task: str, published: PublishedInputs
) -> tuple[TextInputs | ImageInputs, list[str]]:
    """Build what encodes the model's inputs, and name the columns of a table that hold them."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if get_config_spec(config).modality == "image":
        processor: Any = (
            build_timm_processor(config)
            if config.model_type == TIMM_WRAPPER
            else _load_processor(AutoImageProcessor, folder, backend="pil")
        )
        data = Data(train=Table(path="."), max_pixels=published.max_pixels)
        side = get_image_size(processor)
        inputs = ImageInputs(
            data, processor, build_position_arguments(config, side), get_patch_size(config)
        )
        return inputs, [published.train.image]
    inputs_class = WordInputs if task == "token-classification" else TextInputs
    tokenizer: Any = _load_processor(AutoTokenizer, folder)
    complete_padding(tokenizer, config)
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


def _load_processor(auto_class: Any, folder: Path, **options: Any) -> Any:
    """Load the folder's own tokenizer or processor.

    Raises:
        RecipeError: if it has none.
    """
    try:
        return auto_class.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        # OSError for a file that is missing or no JSON, ValueError for an unknown class,
        # ImportError for a class that needs a package which is not installed.
        raise RecipeError(
            f"{paths.get_display_name(folder)} has no usable "
            f"{auto_class.__name__.removeprefix('Auto')}: "
            f"{format_error_line(error)}",
            "Give a folder that hftl published, or save it beside the model",
        ) from error


def iterate_predictors(
    folders: Sequence[Path], base: str | None = None
) -> Iterator[tuple[int, Predictor]]:
    """Yield the number and predictor of each model, usable until the next is taken.

    Every base is loaded once: its adapters are put on it together and switched. Where two cannot
    share a model, as when they save other modules, the second gets a copy in memory.

    Args:
        folders: of adapters and whole models.
        base: of every adapter, where it is not the one each names.

    Raises:
        RunFolderError: if one of them does not load.
    """
    remaining = list(range(len(folders)))
    bases = [_find_base(folder, base) for folder in folders]
    configs = [read_model_config(*pair) for pair in zip(folders, bases, strict=True)]
    keys = [_build_model_key(*one) for one in zip(folders, bases, configs, strict=True)]
    while remaining:
        together = [n for n in remaining if keys[n] == keys[remaining[0]]]
        remaining = [n for n in remaining if n not in together]
        number = together[0]
        loaded = load_incomplete_base(
            folders[number], bases[number] or folders[number], configs[number]
        )
        groups: dict[str, list[int]] = {}
        for number in together:
            groups.setdefault(_build_adapter_key(folders[number], number), []).append(number)
        for left, group in zip(range(len(groups) - 1, -1, -1), groups.values(), strict=True):
            model = deepcopy(loaded.model) if left else loaded.model
            for number in group:
                folder = folders[number]
                if not loaded.is_whole_model:
                    model = add_adapter(loaded, model, folder, f"model-{number}")
                headed = add_head(folder, model)
                yield number, build_predictor(folder, bases[number], configs[number], headed)


def _find_base(folder: Path, base: str | Path | None) -> Path | None:
    """Return the folder of an adapter's base; None for a whole model."""
    if not (folder / ADAPTER_CONFIG).exists():
        return None
    return find_base_folder(folder, PublishedMetadata.read(folder), base).resolve()


def _build_model_key(folder: Path, base: Path | None, config: Any) -> tuple[Any, ...]:
    """Return what is equal for adapters of the same model: base, class, outputs and sizes."""
    has_own_head = (folder / HEAD_WEIGHTS).exists()
    if base is None or has_own_head:
        return base or folder, has_own_head
    names = (
        "id2label", "label2id", "label_names", "problem_type", "transformers_version", "dtype",
        THRESHOLDS_KEY,
    )  # fmt: skip
    sizes = {k: v for k, v in config.to_dict().items() if k not in names and k[0] != "_"}
    return base, has_own_head, config.num_labels, json.dumps(sizes, sort_keys=True, default=str)


def _build_adapter_key(folder: Path, number: int) -> str:
    """Return what is equal for adapters that one model can hold side by side."""
    adapter = AdapterConfig.read(folder)
    settings = adapter.settings
    alone = (
        settings.get("bias", "none") != "none"
        or settings.get("init_lora_weights", True) not in BASE_PRESERVING_INITS
        or bool(settings and overwrites_base_tensors(folder))
    )
    shared = ("peft_type", "task_type", "trainable_token_indices")
    key: dict[str, object] = {name: settings.get(name) for name in shared}
    key["modules_to_save"] = sorted(adapter.modules_to_save)
    return json.dumps(key | {"alone": number if alone else None}, sort_keys=True)
