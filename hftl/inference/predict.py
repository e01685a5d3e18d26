"""Predict labels, scores and sets of single inputs with a loaded model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL.Image import Image
from torch import nn

from hftl.config.data import BadRowsRule
from hftl.data.facts import Modality
from hftl.data.image_inputs import ImageInputs
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
from hftl.data.text_inputs import EncodedRow, TextInputs, check_embedded
from hftl.errors import DataError
from hftl.inference.published_scores import find_set_quantile, list_set_members
from hftl.measure.facts import LabelCurve
from hftl.measure.label_calibration import compute_probabilities
from hftl.models.features import predict_logits
from hftl.publish.published_metadata import PublishedConformal

Input = str | Sequence[str] | Path | bytes | Image
"""A text, a pair of texts, the words of one, or an image: a path, its bytes, or itself."""


Encoded = tuple[EncodedRow, int]
"""What the encoder takes of an input, and how many predictions it gets."""

ClassName = str | int | bool
"""A class in the type that it had in the training table."""


class Prediction(TypedDict):
    """Hold what is predicted of one input.

    `label` is a class, for multi-label the list of those that hold, for words a tag each, or a
    number. `score` is the probability of the class, calibrated where the run gave a temperature,
    for words of each tag, None for a word beyond the model's length; multi-label has none.
    `scores` are those of all classes, of whole inputs. With a coverage, `set` are the classes that
    hold the true one, or all true ones, as often as it says, and `interval` the same of a number;
    a multi-label set is empty where no label is likely enough.
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
    bad_rows: BadRowsRule = "refuse"
    """What its training did with rows that could not be read."""
    embedded_tokens: int | None = None
    """The number of tokens that the model embeds; None for images."""

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
        # A mapping and a table would give their keys and columns.
        if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping) or is_table(inputs):
            raise DataError(
                f"predict takes a list of inputs, got a {type(inputs).__name__}",
                "Give a list of texts, pairs, lists of words, or pictures, such as one column",
            )
        return self.predict_encoded(self.encode(inputs), coverage)

    def encode(
        self, inputs: Iterable[Input], places: Sequence[str] = (), folder: Path | None = None,
        reject: Callable[[int, str], None] | None = None,
    ) -> list[Encoded]:  # fmt: skip
        """Return what the encoder takes of each input, and how many predictions it gets.

        Args:
            inputs: as in `predict`.
            places: what to call each in a message; by default its number.
            folder: what the paths of images are relative to; None: the current directory.
            reject: receives the number of each image that cannot be read, and what the error would
                say; it is then left out. None: it raises.

        Raises:
            DataError: see `predict`.
        """
        named = ((places[n] if places else f"input {n + 1}", one) for n, one in enumerate(inputs))
        if isinstance(self.inputs, ImageInputs):
            pairs = list(_encode_images(self.inputs, named, folder or Path.cwd(), reject))
            warn_of_narrow_images((levels for _, levels in pairs), "the input")
            return [(encoded, 1) for encoded, _ in pairs]
        rows = [self._build_row(place, value) for place, value in named]
        tokens = self.task == "token-classification"
        words = [len(row.content) if tokens else 1 for row in rows]
        encoded = self.inputs.encode(rows)
        if self.embedded_tokens is not None:
            check_embedded(rows, encoded, self.inputs.tokenizer, self.embedded_tokens)
        return list(zip(encoded, words, strict=True))

    def predict_encoded(
        self, encoded: list[Encoded], coverage: float | None = None
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


def is_table(inputs: object) -> bool:
    """Return whether an object is a table of pandas, polars or pyarrow."""
    return hasattr(inputs, "columns")


def _encode_images(
    inputs: ImageInputs, named: Iterable[tuple[str, Any]], folder: Path,
    reject: Callable[[int, str], None] | None,
) -> Iterator[tuple[EncodedRow, Levels]]:  # fmt: skip
    """Yield what `encode_image` returns of each image, or give what it says of one to `reject`."""
    for number, (place, value) in enumerate(named):
        try:
            yield encode_image(inputs, place, value, folder)
        except DataError as error:
            if reject is None:
                raise
            reject(number, error.what)


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
    return {"pixel_values": inputs.draw_canvas(image)}, read_levels(image)


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
