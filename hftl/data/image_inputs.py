"""Encode images as the encoder sees them: resized and cropped by the source's own processor.

`ImageInputs` is what `TextInputs` is for texts. Its 8-bit canvases are what is cached; the
processor's arithmetic and random crops come after, so that one decoded copy serves every arm, seed
and epoch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hftl.config.data import Data
from hftl.data import images
from hftl.data.image_processing import build_normalizer, get_image_size, resize_and_crop
from hftl.data.images import hash_pixels
from hftl.data.rows import Row
from hftl.data.tables import get_table_folder, read_table
from hftl.data.text_inputs import EncodedRow, EncodedValue, TextInputs, add_labels
from hftl.errors import DataError
from hftl.runtime.progress import open_bar
from hftl.runtime.run_folder import fingerprint, reserve_space

CROP_AREA = (0.7, 1.0)
"""The share of the image that a random crop covers, least and most."""
MAX_ASPECT_RATIO = 4 / 3
"""The widest a random crop is, and the tallest."""
BASELINE_IMAGE_SIZE = 32
"""The side of the image that the classical baseline sees, in pixels.

Measured against 16, logistic regression on it is better by .7 to 4 points of accuracy: the
baseline must be the stronger one to be fair, though it takes about five times as long.
"""
STAGE_PATCH = 16
"""Patches of encoders that begin with smaller ones and merge them are counted as of this side."""
PIXELS_FILE, KEYS_FILE, SIZES_FILE = "pixels.npy", "keys.json", "sizes.npy"


def summarize_shapes(rows: list[Row]) -> dict[str, float]:
    """Return the median shorter side of images in pixels, and the share of long narrow ones."""
    sizes = np.array([row.size for row in rows], dtype=float)
    ratio = sizes.max(1) / sizes.min(1)
    return {
        "median_side": float(np.median(sizes.min(1))), "elongated": float(np.mean(ratio > 2))
    }  # fmt: skip


@dataclass(frozen=True)
class ImageInputs:
    """Encode images as pixels, as the source's own processor makes them.

    Args:
        data: the recipe's section, to find the images again.
        processor: the source's image processor, resized to `data.image_size`.
        arguments: what the model's forward takes besides pixels.
        patch_size: the side of the encoder's patch, in pixels.
    """

    data: Data
    processor: Any
    arguments: dict[str, bool]
    patch_size: int
    _canvases: dict[str, np.ndarray] = field(default_factory=dict)
    _normalize: Callable[[Tensor], Tensor] = field(init=False)
    keeps_shape: ClassVar[bool] = False
    """The processor neither crops pictures nor squeezes them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_normalize", build_normalizer(self.processor))

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Return each row's image, resized and cropped: (3, height, width) uint8.

        Raises:
            DataError: if an image that is not cached cannot be read any more.
        """
        self._fill_canvases(rows)
        return [{"pixel_values": self._canvases[row.content[0]]} for row in rows]

    def hash_preprocessing(self) -> str:
        """Return the hash of the processor that makes pixels of an image."""
        return fingerprint(self.processor.to_dict())

    def with_data(self, data: Data) -> "ImageInputs":
        """Return the same inputs for images of other tables, without a cache."""
        return replace(self, data=data, _canvases={})

    def with_processor(self, processor: Any) -> "ImageInputs":
        """Return the same inputs under a processor of other settings, without a cache."""
        return replace(self, processor=processor, _canvases={})

    @property
    def forward_facts(self) -> dict[str, bool | str] | None:
        """Return what a user must give the model besides pictures."""
        return {**self.arguments}

    def normalize_levels(self) -> Tensor:
        """Return what black and white become in each channel, (2, 3) float32."""
        levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        return self._normalize(levels.expand(2, 3, 1, 1))[:, :, 0, 0]

    @property
    def canvas_side(self) -> int:
        """Return the side of a canvas, in pixels; where they are no squares, of one as large."""
        return get_image_size(self.processor)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Return the shape of what is stored of an image: of its canvas, or of its bytes."""
        return 3, self.canvas_side, self.canvas_side

    def draw_canvas(self, image: Image.Image) -> np.ndarray:
        """Return what is cached of an image: (3, height, width) uint8."""
        return resize_and_crop(self.processor, image)

    def get_canvases(self, rows: list[Row]) -> list[np.ndarray]:
        """Return the canvases of rows, each (3, height, width) uint8."""
        self._fill_canvases(rows)
        return [self._canvases[row.content[0]] for row in rows]

    def _fill_canvases(self, rows: list[Row]) -> None:
        missing = [row for row in rows if row.content[0] not in self._canvases]
        for row, canvas in self.map_images(missing, self.draw_canvas):
            self._canvases[row.content[0]] = canvas

    def get_pixels(self, name: str) -> np.ndarray:
        """Return the cached pixels of the image of this hash: (3, height, width) uint8."""
        return self._canvases[name]

    def length(self, encoded: EncodedRow) -> int:
        """Return the patches of an image, the cost of its forward pass."""
        patch = self.patch_size if self.patch_size >= STAGE_PATCH // 2 else STAGE_PATCH
        return max(1, self.canvas_side // patch) ** 2

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Return normalized float32 pixels (batch, 3, height, width); labels as in `TextInputs`.

        The arguments of forward that are switches, not tensors, are among them.
        """
        pixels = torch.stack([to_tensor(row["pixel_values"]) for row in rows])
        batch = add_labels({"pixel_values": self._normalize(pixels)}, rows)
        batch.update(self.arguments)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return batch

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """Return the values (batch, width) row by row, each (1, width)."""
        return list(values.split(1))

    def save(self, folder: Path) -> None:
        """Write the processor, with its image size."""
        self.processor.save_pretrained(folder)

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Return median side in pixels, share of enlarged images and share of long narrow ones."""
        longest = np.array([row.size for row in rows]).max(1)
        enlarged = float(np.mean(longest < self.canvas_side))
        return summarize_shapes(rows) | {"image_size": self.canvas_side, "enlarged": enlarged}

    def decode_images(self, rows: list[Row]) -> list[Image.Image]:
        """Return the images themselves, in RGB.

        Raises:
            DataError: if one cannot be read any more.
        """
        decoded = {
            row.content[0]: image for row, image in self.map_images(rows, lambda image: image)
        }
        return [decoded[row.content[0]] for row in rows]

    def load_cache(self, folder: Path) -> None:
        """Use the pixels of a cache; they stay on the disk until read."""
        self._canvases.update(load_image_cache(folder))

    def map_images(
        self, rows: list[Row], function: Callable[[Image.Image], Any]
    ) -> Iterator[tuple[Row, Any]]:
        """Yield each row with the function of its image, table by table.

        Raises:
            DataError: if a row's table no longer holds its image at its place.
        """
        for part in sorted({row.table for row in rows}):
            table = getattr(self.data, part)
            missing = {row.index: row for row in rows if row.table == part}
            _, raws = read_table(table, part, "image")
            raws = (raw for raw in raws if raw.index in missing)
            folder = get_table_folder(table, part)
            results = images.map_images(
                raws, table.image, folder, self.data.max_pixels,
                lambda image: (hash_pixels(image), function(image)),
            )  # fmt: skip
            for raw, (content, result) in results:
                row = missing.pop(raw.index)
                if content != row.content[0]:
                    raise DataError(f"{raw.where} is another picture now", "Put the data back")
                yield row, result
            if missing:
                first = next(iter(missing.values()))
                raise DataError(f"{first.where} is no longer there", "Put the data back")


Inputs = TextInputs | ImageInputs
"""How rows are encoded for the encoder."""


def augment_image(encoded: EncodedRow, seed: int, epoch: int, key: bytes) -> EncodedRow:
    """Return the encoded row with a random crop of its image, see `random_crop_and_flip`."""
    pixels = to_tensor(encoded["pixel_values"])
    return encoded | {"pixel_values": random_crop_and_flip(pixels, seed, epoch, key)}


def random_crop_and_flip(pixels: Tensor, seed: int, epoch: int, key: bytes) -> Tensor:
    """Return a random crop, resized back, and mirrored with probability 1/2.

    It is a function of its arguments alone: workers, processes and the global generator do not
    matter. The area is uniform, and the logarithm of the ratio, as a share of the image's own, is
    uniform among what fits into the image, where `torchvision.transforms.RandomResizedCrop` draws
    again until a crop fits.

    Args:
        pixels: (3, height, width) uint8, on the CPU.
        seed: the arm's seed.
        epoch: from 0.
        key: identifies the image.

    Returns:
        The same shape and dtype.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} ".encode() + key, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    whole_height, whole_width = pixels.shape[-2:]
    area = CROP_AREA[0] + draw[0] * (CROP_AREA[1] - CROP_AREA[0])
    ratio = min(MAX_ASPECT_RATIO, 1 / area) ** (2 * draw[1] - 1)
    height = min(whole_height, round(whole_height * math.sqrt(area / ratio)))
    width = min(whole_width, round(whole_width * math.sqrt(area * ratio)))
    top = int(draw[2] * (whole_height - height + 1))
    left = int(draw[3] * (whole_width - width + 1))
    crop = pixels[None, :, top : top + height, left : left + width]
    size = whole_height, whole_width
    resized = functional.interpolate(crop, size, mode="bilinear", antialias=True)[0]
    return resized.flip(-1) if draw[4] < 0.5 else resized


def to_tensor(value: EncodedValue) -> Tensor:
    """Return a row's value as a tensor; a copy of pixels of the cache, which is read only."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def compute_pixel_features(
    canvases: Iterable[np.ndarray], side: int = BASELINE_IMAGE_SIZE
) -> np.ndarray:
    """Return the images at side x side for the classical baseline; each pixel averages an area.

    Args:
        canvases: each (3, height, width) uint8.
        side: in pixels.

    Returns:
        (images, 3 * side * side) float32 in 0..1.
    """
    pooled = [functional.adaptive_avg_pool2d(to_tensor(c).float(), side) for c in canvases]
    return (torch.stack(pooled).flatten(1) / 255).numpy()


def fingerprint_image_cache(inputs: ImageInputs, rows: Iterable[Row]) -> dict[str, str]:
    """Return what a cache depends on: the images, and how they are resized and cropped."""
    return {
        "pictures": fingerprint(sorted({row.content[0] for row in rows})),
        "processor": inputs.hash_preprocessing(),
    }


def write_image_cache(inputs: ImageInputs, rows: list[Row], folder: Path) -> None:
    """Resize every row's image once and write them as one array of bytes.

    Beside canvases of several shapes, padded to a common number of bytes, stand their sizes.

    Raises:
        DataError: if an image cannot be read any more.
    """
    distinct = list({row.content[0]: row for row in rows}.values())
    canvases = np.lib.format.open_memmap(
        folder / PIXELS_FILE, "w+", dtype=np.uint8, shape=(len(distinct), *inputs.cache_shape)
    )
    reserve_space(folder / PIXELS_FILE)
    sizes = np.zeros((len(distinct), 2), dtype=np.int64)
    places = {row.content[0]: number for number, row in enumerate(distinct)}
    with open_bar("pictures", len(distinct)) as advance:
        results = inputs.map_images(distinct, inputs.draw_canvas)
        for number, (row, pixels) in enumerate(results, 1):
            place = places[row.content[0]]
            canvases[place].reshape(-1)[: pixels.size] = pixels.reshape(-1)
            sizes[place] = pixels.shape[1:]
            advance(number)
    canvases.flush()
    if canvases.ndim == 2:
        np.save(folder / SIZES_FILE, sizes)
    (folder / KEYS_FILE).write_text(json.dumps(list(places)), encoding="utf-8")


def load_image_cache(folder: Path) -> dict[str, np.ndarray]:
    """Return the pixels of a cache by the images' hashes; they stay on the disk until read."""
    keys = json.loads((folder / KEYS_FILE).read_text(encoding="utf-8"))
    pixels = np.load(folder / PIXELS_FILE, mmap_mode="r")
    if pixels.ndim == 2:
        sizes = np.load(folder / SIZES_FILE).tolist()
        pairs = zip(pixels, sizes, strict=True)
        pixels = [flat[: 3 * h * w].reshape(3, h, w) for flat, (h, w) in pairs]
    return dict(zip(keys, pixels, strict=True))
