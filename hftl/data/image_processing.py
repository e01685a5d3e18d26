"""Pictures as the encoder sees them: its own processor's resize and crop, kept as 8-bit canvases.

A canvas is what is cached; the processor's arithmetic on it and random crops come after, so that
one decoded copy serves every arm, seed and epoch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hftl.config.data import Data
from hftl.data.images import hash_pixels, map_images
from hftl.data.load import Row, get_table_folder, read_table
from hftl.data.text import EncodedRow, add_labels
from hftl.errors import DataError, RecipeError
from hftl.runtime.fingerprints import fingerprint
from hftl.runtime.progress import open_bar

CROP_AREA = (0.7, 1.0)
"""The share of the picture that a light crop keeps."""
MAX_ASPECT_RATIO = 4 / 3
"""The widest a light crop is, and the tallest."""

BASELINE_IMAGE_SIZE = 32
"""The side of the picture that the classical baseline sees, in pixels.

Measured against 16, logistic regression on it is better by .7 to 4 points of accuracy: the
baseline must be the stronger one to be fair, though it takes about five times as long.
"""

ARITHMETIC_SWITCHES = ("do_rescale", "do_normalize", "include_top")
"""A processor's switches of what comes after resize and crop, in transformers' names."""


def get_image_size(processor: Any) -> int:
    """The side of the square that the processor makes of every picture, in pixels.

    Raises:
        RecipeError: if it makes no square, or none of one size.
    """
    sizes = dict(processor.crop_size if processor.do_center_crop else processor.size or {})
    if not (processor.do_center_crop or processor.do_resize):
        sizes = {}
    height, width = sizes.get("height"), sizes.get("width")
    if height is None or height != width:
        raise RecipeError(
            f"{_describe_processor(processor)} makes no squares of one size: {sizes or 'it does not resize'}",
            "Set data.image_size, in pixels, or choose another source",
        )
    return height


def resize_processor(processor: Any, image_size: int | None) -> Any:
    """A copy whose target is image_size x image_size pixels; None copies without a change.

    Where the processor crops, what is cropped from grows in proportion.

    Raises:
        RecipeError: if the processor's sizes are of a kind that is not known.
    """
    settings = processor.to_dict()
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        if processor.do_center_crop:
            crop = dict(processor.crop_size)
            settings["crop_size"] = square
            scale = image_size / min(crop["height"], crop["width"])
            if processor.do_resize:
                size = _read_resize_target(processor)
                settings["size"] = {side: round(pixels * scale) for side, pixels in size.items()}
        else:
            _read_resize_target(processor)
            settings |= {"do_resize": True, "size": square}
    return type(processor).from_dict(settings)


def resize_and_crop(processor: Any, image: Image.Image) -> np.ndarray:
    """The picture resized and cropped by the processor itself, not yet normalised.

    Args:
        processor: transformers' image processor, of the PIL backend.
        image: in RGB.

    Returns:
        (3, side, side) uint8.

    Raises:
        RecipeError: if the processor does more than resize and crop.
    """
    known = processor.to_dict()
    off = {switch: False for switch in ARITHMETIC_SWITCHES if switch in known}
    pixels = np.asarray(processor(image, return_tensors="np", **off)["pixel_values"][0])
    side = get_image_size(processor)
    if pixels.dtype != np.uint8 or pixels.shape != (3, side, side):
        raise RecipeError(
            f"{_describe_processor(processor)} makes {pixels.dtype} {pixels.shape} of a picture, not uint8 "
            f"{(3, side, side)}",
            "Choose a source whose processor only resizes, crops and normalises",
        )
    return np.ascontiguousarray(pixels)


def build_normalizer(processor: Any) -> Callable[[Tensor], Tensor]:
    """What the processor does to a canvas, as a scale and a shift of each channel.

    They are fitted to the processor's own answer on all 256 values and checked on each, so that
    every switch it has counts, those of no known name too.

    Returns:
        Of uint8 (batch, 3, height, width), on any device, the same shape in float32.

    Raises:
        RecipeError: if a scale and a shift of each channel do not give what the processor gives.
    """
    # Each channel holds its values in another place, so that swapped channels are noticed.
    ramp = np.stack([np.roll(np.arange(256), 85 * channel) for channel in range(3)])
    ramp = ramp.reshape(3, 16, 16).astype(np.uint8)
    known = processor.to_dict()
    off = {switch: False for switch in ("do_resize", "do_center_crop") if switch in known}
    told = processor(ramp, input_data_format="channels_first", return_tensors="np", **off)
    wanted = np.asarray(told["pixel_values"][0], dtype=np.float64)
    if wanted.shape != ramp.shape:
        raise _build_affine_error(processor)
    low, high = wanted[ramp == 0], wanted[ramp == 255]
    scale = torch.tensor((high - low) / 255).float().view(3, 1, 1)
    shift = torch.tensor(low).float().view(3, 1, 1)

    def normalise(pixels: Tensor) -> Tensor:
        return pixels.float().mul_(scale.to(pixels.device)).add_(shift.to(pixels.device))

    given = normalise(torch.from_numpy(ramp)).double().numpy()
    if np.abs(given - wanted).max() > 1e-6 * max(1, np.abs(wanted).max()):
        raise _build_affine_error(processor)
    return normalise


def random_crop_and_flip(pixels: Tensor, seed: int, epoch: int, key: bytes) -> Tensor:
    """A random crop, resized back, and a mirroring of every second picture on average.

    A function of its arguments alone: workers, processes and the global generator do not count.
    The area is uniform, and the ratio's logarithm uniform among what fits into the square, where
    `torchvision.transforms.RandomResizedCrop` draws again until a crop fits.

    Args:
        pixels: (3, side, side) uint8, on the CPU.
        seed: the arm's seed.
        epoch: from 0.
        key: which picture it is.

    Returns:
        The same shape and dtype.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} ".encode() + key, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    side = pixels.shape[-1]
    area = CROP_AREA[0] + draw[0] * (CROP_AREA[1] - CROP_AREA[0])
    ratio = min(MAX_ASPECT_RATIO, 1 / area) ** (2 * draw[1] - 1)
    height = min(side, round(side * math.sqrt(area / ratio)))
    width = min(side, round(side * math.sqrt(area * ratio)))
    top = int(draw[2] * (side - height + 1))
    left = int(draw[3] * (side - width + 1))
    crop = pixels[None, :, top : top + height, left : left + width]
    found = functional.interpolate(crop, (side, side), mode="bilinear", antialias=True)[0]
    return found.flip(-1) if draw[4] < 0.5 else found


def compute_pixel_features(canvases: Tensor, side: int = BASELINE_IMAGE_SIZE) -> Tensor:
    """The pictures at side x side, for the classical baseline; each pixel averages an area.

    Args:
        canvases: (pictures, 3, height, width) uint8.
        side: in pixels.

    Returns:
        (pictures, 3 * side * side) float32 in 0..1.
    """
    parts = [functional.adaptive_avg_pool2d(part.float(), side) for part in canvases.split(256)]
    return torch.cat(parts).flatten(1) / 255


def _read_resize_target(processor: Any) -> dict[str, int]:
    """The processor's own resize target, of a kind that an image size can replace."""
    size = dict(processor.size or {})
    if (
        set(size) not in ({"height", "width"}, {"shortest_edge"})
        or "crop_pct" in processor.to_dict()
    ):
        raise RecipeError(
            f"{_describe_processor(processor)} resizes to {size}, which data.image_size cannot replace",
            "Leave data.image_size out, or choose another source",
        )
    return size


def _build_affine_error(processor: Any) -> RecipeError:
    return RecipeError(
        f"{_describe_processor(processor)} does more to pixels than scale and shift each channel",
        "Choose a source whose processor only resizes, crops and normalises",
    )


def _describe_processor(processor: Any) -> str:
    return f"the source's {processor.to_dict().get('image_processor_type', 'image processor')}"


# Pictures as the encoder sees them: resized and cropped once, kept as bytes in one file.


PIXELS_FILE = "pixels.npy"
KEYS_FILE = "keys.json"


@dataclass(frozen=True)
class ImageInputs:
    """What an encoder of images takes: pixels as the source's own processor makes them.

    Args:
        data: the recipe's section, where the pictures are found again.
        processor: the source's image processor, at the size asked.
        arguments: what the model's forward takes besides pixels.
        patch: the side of the encoder's patch, in pixels.
    """

    data: Data
    processor: Any
    arguments: dict[str, Any]
    patch_size: int
    _known: dict[str, np.ndarray] = field(default_factory=dict)
    _normalise: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_normalise", build_normalizer(self.processor))

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Each row's picture, resized and cropped: (3, height, width) uint8.

        Raises:
            DataError: if a picture that is not stored cannot be read any more.
        """
        missing = [row for row in rows if row.content[0] not in self._known]
        for row, found in self.map_images(
            missing, lambda image: resize_and_crop(self.processor, image)
        ):
            self._known[row.content[0]] = found
        return [{"pixel_values": self._known[row.content[0]]} for row in rows]

    def get_pixels(self, name: str) -> np.ndarray:
        """The stored pixels of the picture of this hash: (3, height, width) uint8."""
        return self._known[name]

    def length(self, encoded: EncodedRow) -> int:
        """Patches of a picture: what its forward pass costs."""
        return (get_image_size(self.processor) // self.patch_size) ** 2

    def collate(self, rows: list[EncodedRow]) -> dict[str, Any]:
        """float32 pixels (batch, 3, height, width), normalised; labels as in `TextInputs`."""
        stacked = torch.stack([pixels_to_tensor(row["pixel_values"]) for row in rows])
        return add_labels({"pixel_values": self._normalise(stacked), **self.arguments}, rows)

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """The values (batch, width) row by row, each (1, width)."""
        return list(values.split(1))

    def save(self, folder: Path) -> None:
        """Writes the processor, at the size asked."""
        self.processor.save_pretrained(folder)

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Median side in pixels, share of pictures enlarged, share of long narrow ones."""
        sizes = np.array([row.size for row in rows], dtype=float)
        side = get_image_size(self.processor)
        ratio = sizes.max(1) / sizes.min(1)
        return {
            "median_side": float(np.median(sizes.min(1))),
            "image_size": side,
            "enlarged": float(np.mean(sizes.max(1) < side)),
            "elongated": float(np.mean(ratio > 2)),
        }

    def decode_images(self, rows: list[Row]) -> list[Image.Image]:
        """The pictures themselves, as they were decoded.

        Raises:
            DataError: if one cannot be read any more.
        """
        found = {row.content[0]: image for row, image in self.map_images(rows, lambda image: image)}
        return [found[row.content[0]] for row in rows]

    def load_cache(self, folder: Path) -> None:
        """Takes the pixels that `write_image_cache` left in a folder; they stay on the disk until read."""
        self._known.update(load_image_cache(folder))

    def map_images(
        self, rows: list[Row], work: Callable[[Image.Image], Any]
    ) -> Iterator[tuple[Row, Any]]:
        """What `work` makes of each row's picture, table by table.

        Raises:
            DataError: if a row's table no longer holds its picture at its place.
        """
        for name in sorted({row.table for row in rows}):
            table = getattr(self.data, name)
            wanted = {row.index: row for row in rows if row.table == name}
            _, raws = read_table(table, name, "image")
            raws = (raw for raw in raws if raw.index in wanted)
            folder = get_table_folder(table, name)
            found = map_images(
                raws, table.image, folder, self.data.max_pixels,
                lambda image: (hash_pixels(image), work(image)),
            )  # fmt: skip
            for raw, (seen, made) in found:
                row = wanted.pop(raw.index)
                if seen != row.content[0]:
                    raise DataError(f"{raw.where} is another picture now", "Put the data back")
                yield row, made
            if wanted:
                gone = next(iter(wanted.values()))
                raise DataError(f"{gone.where} is no longer there", "Put the data back")


def fingerprint_image_cache(inputs: ImageInputs, rows: Iterable[Row]) -> dict[str, Any]:
    """What a folder of pixels depends on: the pictures, and how they are resized and cropped."""
    return {
        "pictures": fingerprint(sorted({row.content[0] for row in rows})),
        "processor": fingerprint(inputs.processor.to_dict()),
    }


def write_image_cache(inputs: ImageInputs, rows: list[Row], folder: Path) -> None:
    """Resizes every row's picture once and writes them as one array of bytes.

    Raises:
        DataError: if a picture cannot be read any more.
    """
    distinct = list({row.content[0]: row for row in rows}.values())
    side = get_image_size(inputs.processor)
    made = np.lib.format.open_memmap(
        folder / PIXELS_FILE, "w+", dtype=np.uint8, shape=(len(distinct), 3, side, side)
    )
    places = {row.content[0]: number for number, row in enumerate(distinct)}
    with open_bar("pictures", len(distinct)) as advance:
        found = inputs.map_images(distinct, lambda image: resize_and_crop(inputs.processor, image))
        for number, (row, pixels) in enumerate(found, 1):
            made[places[row.content[0]]] = pixels
            advance(number)
    made.flush()
    (folder / KEYS_FILE).write_text(json.dumps(list(places)), encoding="utf-8")


def load_image_cache(folder: Path) -> dict[str, np.ndarray]:
    """What `write_image_cache` left in a folder, by the pictures' hashes; it stays on the disk until read."""
    keys = json.loads((folder / KEYS_FILE).read_text(encoding="utf-8"))
    return dict(zip(keys, np.load(folder / PIXELS_FILE, mmap_mode="r"), strict=True))


def augment_image(encoded: EncodedRow, seed: int, epoch: int, key: bytes) -> EncodedRow:
    """The same picture, a little different in every epoch: a function of its arguments alone."""
    return encoded | {
        "pixel_values": random_crop_and_flip(
            pixels_to_tensor(encoded["pixel_values"]), seed, epoch, key
        )
    }


def pixels_to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """The pixels as a tensor; a copy where they are the store's, which is read only."""
    return pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
