"""Predictions with a finished run or a published folder, local or on a hub."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import nn

from hftl.config.data import Data, Table
from hftl.config.upstream_args import BASE_PRESERVING_INITS
from hftl.data import labels as answers
from hftl.data.image_inputs import ImageInputs, get_image_size, resize_and_crop
from hftl.data.images import (
    ImageDecodeError,
    decode_image,
    is_too_small,
    read_levels,
    warn_of_narrow_images,
)
from hftl.data.load import find_text_fault
from hftl.data.rows import Levels, Row, normalize_newlines
from hftl.data.text_inputs import EncodedRow, TextInputs, WordInputs
from hftl.errors import DataError, RecipeError, format_error_line
from hftl.finetune.context import build_position_arguments
from hftl.inference.find_model import (
    PublishedInputs,
    PublishedMetadata,
    check_trained_head,
    find_base_folder,
    find_published_folder,
    read_json_mapping,
    wrap_loading_errors,
)
from hftl.inference.load import (
    add_adapter,
    add_head,
    brings_own_tensors,
    find_inputs_folder,
    load_incomplete_base,
    load_published,
    read_model_config,
)
from hftl.models.architectures import get_architecture, get_max_tokens, get_patch_size
from hftl.models.encoders import hide_padding
from hftl.models.features import predict_logits
from hftl.runtime import paths
from hftl.runtime.hardware import get_device

NUMBERED_LABEL = re.compile(r"LABEL_\d+")
"""What transformers calls a class that has no name."""
Input = str | Sequence[str] | Path | bytes | Image
"""A text, a pair of texts, the words of one, or a picture: a path, its bytes, or itself."""


@dataclass(frozen=True)
class Predictor:
    """A loaded model.

    `names` are the classes, empty for regression; `columns` the input columns of a table;
    `label_type` is the type that the classes had in the training table.
    """

    model: nn.Module
    inputs: TextInputs | ImageInputs
    task: str
    class_names: list[str]
    columns: list[str]
    device: str
    label_type: str = "text"

    @property
    def modality(self) -> str:
        """`text` or `image`."""
        return "image" if isinstance(self.inputs, ImageInputs) else "text"

    def predict(self, inputs: Iterable[Input]) -> list[dict[str, Any]]:
        """Predicts each input.

        Returns:
            A mapping for each: `label`, of the type it had in training; for classes also `score`
            and `scores` by class name; for multi-label `label` is a list and there is no `score`;
            for words `label` and `score` are lists, the score None for a word beyond the model's
            length.

        Raises:
            DataError: for an input that is no text, not so many texts, no words, or no picture.
        """
        if isinstance(inputs, (str, bytes, Path, Image)):
            raise DataError(f"predict takes a list, got one {type(inputs).__name__}", "Write [it]")
        return self.predict_encoded(self.encode(inputs))

    def encode(
        self, inputs: Iterable[Input], places: Sequence[str] = (), folder: Path | None = None
    ) -> list[tuple[EncodedRow, int]]:
        """What the encoder takes of each input, and how many answers it gets.

        Args:
            inputs: as in `predict`.
            places: what to call each in a message; by default its number.
            folder: what the paths of pictures are relative to; None: the current directory.

        Raises:
            DataError: see `predict`.
        """
        named = ((places[n] if places else f"input {n + 1}", one) for n, one in enumerate(inputs))
        if isinstance(self.inputs, ImageInputs):
            pairs = [encode_image(self.inputs, *pair, folder or Path.cwd()) for pair in named]
            warn_of_narrow_images((levels for _, levels in pairs), "the input")
            return [(encoded, 1) for encoded, _ in pairs]
        rows = [self._row(place, given) for place, given in named]
        tokens = self.task == "token-classification"
        words = [len(row.content) if tokens else 1 for row in rows]
        return list(zip(self.inputs.encode(rows), words, strict=True))

    def predict_encoded(self, encoded: list[tuple[EncodedRow, int]]) -> list[dict[str, Any]]:
        """The answers for what `encode` gave; the forms of `predict`."""
        if not encoded:
            return []
        found = predict_logits(self.model, [row for row, _ in encoded], self.inputs, self.device)
        words = [count for _, count in encoded]
        labels, scores = answers.decode_logits(found, self.task, self.class_names, words)
        return [self._told(*pair) for pair in zip(labels, scores, strict=True)]

    def _row(self, place: str, given: Any) -> Row:
        given = normalize_newlines(given)
        if self.task == "token-classification":
            why = find_text_fault("it", given, self.task)
            content = () if why else tuple(given)
        else:
            content = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            why = next(
                (w for text in content if (w := find_text_fault("it", text, self.task))), None
            )
            if len(content) != len(self.columns):
                why = f"{len(content)} text(s)"
        if why:
            wanted = "a list of words" if self.task == "token-classification" else (
                f"{len(self.columns)} text(s), not empty")  # fmt: skip
            raise DataError(f"{place} is {given!r}, expected {wanted}", "Correct it")
        return Row(content, "", None, 0, place)

    def _told(self, label: Any, scores: list[Any]) -> dict[str, Any]:
        if self.task == "regression":
            return {"label": label}
        if self.task == "token-classification":
            return {"label": list(label), "score": [word and max(word) for word in scores]}
        by_name = dict(zip(self.class_names, scores, strict=True))
        if self.task == "multi-label":
            return {"label": [self._typed(name) for name in label], "scores": by_name}
        return {"label": self._typed(label), "score": by_name[label], "scores": by_name}

    def _typed(self, name: str) -> str | int | bool:
        """A class name as the training table had it."""
        if self.label_type == "integer":
            return int(name)
        return name == "True" if self.label_type == "boolean" else name


def encode_image(
    inputs: ImageInputs, place: str, given: Any, folder: Path
) -> tuple[EncodedRow, Levels]:
    """Return a picture as the encoder takes it, and the levels it reaches.

    Raises:
        DataError: naming the place, if there is none to be read.
    """
    try:
        image = decode_image(given, folder, inputs.data.max_pixels)
        if is_too_small(image, inputs.patch_size):
            raise ImageDecodeError(f"its pixels are within one patch of {inputs.patch_size}")
    except ImageDecodeError as error:
        shown = f" ({given})" if isinstance(given, (str, Path)) and str(given) != place else ""
        raise DataError(f"{place}{shown}: {error}", "Correct it") from error
    return {"pixel_values": resize_and_crop(inputs.processor, image)}, read_levels(image)


def load(path: str | Path, base: str | Path | None = None) -> Predictor:
    """Loads a run folder, a published folder, or a published hub id.

    Args:
        path: where it is.
        base: an adapter's base model, where it is not the one the folder names.

    Raises:
        RecipeError: if there is nothing to load, or the base cannot be told.
        RunFolderError: if a run has no publish folder yet, the base has other weights, or the
            folder's own files do not load.
        HubError: if a hub id cannot be had.
    """
    folder = find_published_folder(path)
    check_trained_head(folder, path)
    notes = PublishedMetadata.read(folder)
    adapter = (folder / "adapter_config.json").exists()
    base_at = find_base_folder(folder, notes, base) if adapter else None
    config = read_model_config(folder, base_at)
    return build_predictor(folder, base_at, config, load_published(folder, base_at, config))


def build_predictor(folder: Path, base: Path | None, config: Any, model: nn.Module) -> Predictor:
    """A published folder's model with what the folder says of its task, names and inputs.

    Args:
        folder: of the adapter or whole model.
        base: the folder of the adapter's base.
        config: of the model.
        model: loaded.

    Raises:
        RecipeError: if the folder has no usable tokenizer or processor.
        RunFolderError: if what it says makes no sense.
    """
    notes = PublishedMetadata.read(folder)
    with wrap_loading_errors(folder):
        task = _infer_task(notes, config)
        names = [] if task == "regression" else _read_class_names(notes, config)
        images = get_architecture(config).modality == "image"
        files = find_inputs_folder(folder, base, images)
        inputs, columns = _build_inputs(files, config, task, notes.recipe.data)
    hide_padding(model)
    where = get_device()
    label_type = notes.data.label_type if notes.data is not None else "text"
    return Predictor(model.to(where), inputs, task, names, columns, where, label_type)


def _infer_task(notes: PublishedMetadata, config: Any) -> str:
    """The task, from the notes or the config of a folder that has none."""
    if notes.data is not None:
        return notes.data.task
    if (config.architectures or [""])[0].endswith("ForTokenClassification"):
        return "token-classification"
    if config.problem_type is None and config.num_labels == 1:
        return "regression"  # as transformers takes it
    known = {"regression": "regression", "multi_label_classification": "multi-label"}
    return known.get(str(config.problem_type), "classification")


def _read_class_names(notes: PublishedMetadata, config: Any) -> list[str]:
    """The classes in the order of the outputs, which notes and config must agree on.

    Raises:
        ValueError: if they do not: nobody can tell which of them is right.
    """
    shown = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if notes.data is None:
        return shown
    names = notes.data.labels or []
    unnamed = len(names) == len(shown) and all(map(NUMBERED_LABEL.fullmatch, shown))
    if names != shown and not unnamed:
        raise ValueError(
            f"the labels are {', '.join(shown)} in config.json, and {', '.join(names)} in hftl.json"
        )
    return names


def _build_inputs(
    folder: Path, config: Any, task: str, noted: PublishedInputs
) -> tuple[TextInputs | ImageInputs, list[str]]:
    """How the folder's model takes inputs, and the columns of a table that hold them."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if get_architecture(config).modality == "image":
        processor: Any = _load_processor(AutoImageProcessor, folder, backend="pil")
        reading = Data(train=Table(path="."), max_pixels=noted.max_pixels)
        side = get_image_size(processor)
        inputs = ImageInputs(
            reading, processor, build_position_arguments(config, side), get_patch_size(config)
        )
        return inputs, [noted.train.image]
    kind = WordInputs if task == "token-classification" else TextInputs
    tokenizer: Any = _load_processor(AutoTokenizer, folder)
    text = noted.train.text
    columns = [text] if isinstance(text, str) else text
    return kind(tokenizer, min(noted.max_length, get_max_tokens(config))), columns


def _load_processor(kind: Any, folder: Path, **more: Any) -> Any:
    """The folder's own tokenizer or processor.

    Raises:
        RecipeError: if it has none.
    """
    try:
        return kind.from_pretrained(folder, **more)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"{paths.get_display_name(folder)} has no usable {kind.__name__.removeprefix('Auto')}: "
            f"{format_error_line(error)}",
            "Give a folder that hftl published, or save it beside the model",
        ) from error


# Several published models one after another, every base loaded once.


def load_predictors(
    folders: Sequence[Path], base: str | None = None
) -> Iterator[tuple[int, Predictor]]:
    """Every model in turn, ready to predict until the next is asked for.

    Adapters of one base are put on it together and switched; where two cannot share a model, as
    when they save other modules, the second takes a copy in memory.

    Args:
        folders: of adapters and whole models.
        base: of every adapter, where it is not the one each names.

    Raises:
        RunFolderError: if one of them does not load.
    """
    waiting = list(range(len(folders)))
    bases = [_find_base(folder, base) for folder in folders]
    configs = [read_model_config(*pair) for pair in zip(folders, bases, strict=True)]
    keys = [_build_model_key(*one) for one in zip(folders, bases, configs, strict=True)]
    while waiting:
        together = [n for n in waiting if keys[n] == keys[waiting[0]]]
        waiting = [n for n in waiting if n not in together]
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


def _find_base(folder: Path, base: str | None) -> Path | None:
    if not (folder / "adapter_config.json").exists():
        return None
    return find_base_folder(folder, PublishedMetadata.read(folder), base).resolve()


def _build_model_key(folder: Path, base: Path | None, config: Any) -> tuple[Any, ...]:
    """Equal for folders whose adapters go on the same model: base, class, outputs and sizes."""
    pooled = (folder / "head.safetensors").exists()
    if base is None or pooled:
        return base or folder, pooled
    names = ("id2label", "label2id", "problem_type", "transformers_version", "dtype")
    sizes = {k: v for k, v in config.to_dict().items() if k not in names and k[0] != "_"}
    return base, pooled, config.num_labels, json.dumps(sizes, sort_keys=True, default=str)


def _build_adapter_key(folder: Path, number: int) -> str:
    """Equal for adapters that may stand in one model side by side."""
    settings = read_json_mapping(folder / "adapter_config.json")
    alone = settings.get("bias", "none") != "none"
    alone = alone or bool(settings and brings_own_tensors(folder))
    alone = alone or settings.get("init_lora_weights", True) not in BASE_PRESERVING_INITS
    kept = ("peft_type", "task_type", "trainable_token_indices")
    told = {key: settings.get(key) for key in kept}
    told["modules_to_save"] = sorted(settings.get("modules_to_save") or [])
    return json.dumps(told | {"alone": number if alone else None}, sort_keys=True)
