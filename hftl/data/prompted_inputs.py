"""Encode pictures that a vision-language model sees among the tokens of a prompt.

The source's own processor cuts a picture, and expands its place in the prompt to as many tokens as
the model has vectors for it. What it returns is held in 8 bits a row, and scaled in batches.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available

from hftl.config.data import TEXT_PLACE
from hftl.data.image_inputs import ImageInputs, summarize_shapes
from hftl.data.image_processing import wrap_processor_errors
from hftl.data.rows import Row
from hftl.data.text_inputs import EncodedRow, add_labels
from hftl.errors import RecipeError
from hftl.runtime.run_folder import fingerprint

THUMBNAIL_SIDE = 96
"""The side of what is kept of a picture for the report and the classical baseline, in pixels."""
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKEN_NAMES = ("input_ids", "attention_mask", "mm_token_type_ids")
"""The processor's outputs with a value a token."""
RAW = {"do_rescale": False, "do_normalize": False}
"""Leave the pixels in 0 to 255."""


@dataclass(frozen=True)
class PromptedInputs(ImageInputs):
    """Encode a picture and perhaps a text as the tokens of a prompt and the picture's pixels.

    `processor` is the source's whole processor.

    Args:
        prompt: as the model reads it, in its chat format; `{}` is where the row's text stands.
        max_length: of that text, in tokens; the rest is cut off.
        folder: of the processor's files.
    """

    prompt: str = ""
    max_length: int = 128
    folder: Path = Path()
    _scale: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        image, part = Image.fromarray(draw), self.processor.image_processor
        words = [self.write_prompt()]
        with wrap_processor_errors(part):
            expected = self.processor(text=words, images=[image], return_tensors="np")
        factor = part.rescale_factor if part.do_rescale else 1.0
        mean = np.array(part.image_mean if part.do_normalize else [0.0] * 3)
        sd = np.array(part.image_std if part.do_normalize else [1.0] * 3)
        scale = (torch.tensor(factor / sd).float(), torch.tensor(-mean / sd).float())
        object.__setattr__(self, "_scale", scale)
        self._check_scale(image, expected["pixel_values"])

    @property
    def forward_facts(self) -> dict[str, bool | str] | None:
        """Return the prompt, without which the model's outputs mean nothing."""
        return {"prompt": self.prompt}

    @property
    def tokenizer(self) -> Any:
        """Return the processor's tokenizer."""
        return self.processor.tokenizer

    def normalize_levels(self) -> Tensor:
        """Return what black and white become in each channel, (2, 3) float32."""
        scale, shift = self._scale
        return torch.stack([shift, 255 * scale + shift])

    @property
    def canvas_side(self) -> int:
        """Return the side of a thumbnail."""
        return THUMBNAIL_SIDE

    def draw_canvas(self, image: Image.Image) -> np.ndarray:
        """Return a thumbnail, squeezed to a square: (3, side, side) uint8."""
        small = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Return each row's tokens and pixels, see `encode_picture`."""
        texts: dict[tuple[str, int], str] = {
            (row.table, row.index): row.content[1] if len(row.content) > 1 else "" for row in rows
        }
        encoded = {
            (row.table, row.index): self.encode_picture(image, texts[row.table, row.index])
            for row, image in self.map_images(rows, lambda image: image)
        }
        return [encoded[row.table, row.index] for row in rows]

    def encode_picture(self, image: Image.Image, text: str) -> EncodedRow:
        """Return the processor's outputs for one picture, the pixels uint8 and not normalized.

        Args:
            image: in RGB.
            text: what stands at `{}` in the prompt.
        """
        words = [self.write_prompt(text)]
        with wrap_processor_errors(self.processor.image_processor):
            outputs = self.processor(text=words, images=[image], return_tensors="np", **RAW)
        encoded: EncodedRow = {}
        for name, value in outputs.items():
            if name in TOKEN_NAMES:
                encoded[name] = np.asarray(value)[0].tolist()
            else:
                is_small = name in ("pixel_values", "pixel_attention_mask")
                encoded[name] = np.asarray(value, dtype=np.uint8 if is_small else None)
        return encoded

    @property
    def reads_text(self) -> bool:
        """Return whether a row is a picture and a text."""
        return TEXT_PLACE in self.prompt

    @property
    def lacks_video_package(self) -> bool:
        """Return whether `AutoProcessor` cannot build the processor here, its part for videos."""
        has_videos = "video_processor" in self.processor.get_attributes()
        return has_videos and not is_torchvision_available()

    def write_prompt(self, text: str = "") -> str:
        """Return the prompt with a text in its place, cut to `max_length` tokens."""
        if TEXT_PLACE not in self.prompt:
            return self.prompt
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = ends["offset_mapping"]
        if len(spans) > self.max_length:
            text = text[: spans[self.max_length - 1][1]]
        return self.prompt.replace(TEXT_PLACE, text)

    def length(self, encoded: EncodedRow) -> int:
        """Return the tokens of a row, those of its picture included."""
        return len(encoded["input_ids"])

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Return tokens (batch, longest row), padded on the right, and the pictures' tensors.

        Pictures of several parts or sizes are padded with 0 where the model masks what is beyond.
        """
        pad_id = self.tokenizer.pad_token_id
        batch: dict[str, Tensor] = {}
        longest = max(map(self.length, rows))
        for name in (name for name in TOKEN_NAMES if name in rows[0]):
            fill = pad_id if name == "input_ids" else 0
            padded = [[*row[name], *[fill] * (longest - len(row[name]))] for row in rows]
            batch[name] = torch.tensor(padded)
        for name in rows[0].keys() - batch.keys() - {"labels"}:
            batch[name] = _concatenate([np.asarray(row[name]) for row in rows])
        batch["pixel_values"] = self._normalize_pixels(batch)
        if "pixel_attention_mask" in batch:
            batch["pixel_attention_mask"] = batch["pixel_attention_mask"].long()
        return add_labels(batch, rows)

    def _normalize_pixels(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the processor's arithmetic on pixels of a batch, float32; 0 where masked."""
        pixels = batch["pixel_values"].float()
        # Qwen's patches are flat: (patches, channels * frames * height * width).
        channels = pixels.view(len(pixels), 3, -1) if pixels.ndim == 2 else pixels
        shape = (3, 1) if pixels.ndim == 2 else (3, 1, 1)
        scale, shift = (part.view(shape) for part in self._scale)
        normalized = (channels * scale + shift).view(pixels.shape)
        mask = batch.get("pixel_attention_mask")
        return normalized if mask is None else normalized * mask.unsqueeze(-3)

    def _check_scale(self, image: Image.Image, expected: np.ndarray) -> None:
        """Compare the arithmetic with the processor's own.

        Args:
            image: of random pixels.
            expected: what the processor makes of it.

        Raises:
            RecipeError: if the processor does more to pixels than scale and shift each channel.
        """
        actual = self.collate([self.encode_picture(image, "")])["pixel_values"].numpy()
        if actual.shape != expected.shape or not np.abs(actual - expected).max() <= 1e-5:
            raise RecipeError(
                f"the source's {type(self.processor.image_processor).__name__} does more to pixels "
                "than scale and shift each channel",
                "Choose a source whose processor only resizes, cuts and normalises",
            )

    def hash_preprocessing(self) -> str:
        """Return the hash of what makes tokens and pixels of a row."""
        files = [self.folder / name for name in (*PROCESSOR_FILES, "tokenizer.json")]
        contents = {file.name: file.read_text("utf-8") for file in files if file.exists()}
        return fingerprint({"files": contents, "prompt": self.prompt})

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Return the median side in pixels and the share of long narrow pictures."""
        return summarize_shapes(rows) | {"enlarged": 0.0}

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and the processor's settings as its source has them."""
        self.tokenizer.save_pretrained(folder)
        for name in PROCESSOR_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


def _concatenate(values: list[np.ndarray]) -> Tensor:
    """Return arrays of one dimensionality one after the other, padded with 0 to a common shape."""
    shape = np.max([value.shape[1:] for value in values], axis=0)
    padded = []
    for value in values:
        gaps = (shape - value.shape[1:]).astype(int).tolist()
        padded.append(np.pad(value, [(0, 0), *((0, gap) for gap in gaps)]))
    return torch.from_numpy(np.concatenate(padded))
