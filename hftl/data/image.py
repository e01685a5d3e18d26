"""Pictures as the encoder sees them: its own processor's resize and crop, kept as 8-bit canvases.

A canvas is what is cached; the processor's arithmetic on it and random crops come after, so that
one decoded copy serves every arm, seed and epoch.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hftl.errors import RecipeError

AREA = (0.7, 1.0)
"""The share of the picture that a light crop keeps."""
RATIO = 4 / 3
"""The widest a light crop is, and the tallest."""

SIDE = 32
"""The side of the picture that the classical baseline sees, in pixels.

Measured against 16, logistic regression on it is better by .7 to 4 points of accuracy: the
baseline must be the stronger one to be fair, though it takes about five times as long.
"""

ARITHMETIC = ("do_rescale", "do_normalize", "include_top")
"""A processor's switches of what comes after resize and crop, in transformers' names."""


def target_size(processor: Any) -> int:
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
            f"{_name(processor)} makes no squares of one size: {sizes or 'it does not resize'}",
            "Set data.image_size, in pixels, or choose another source",
        )
    return height


def resized(processor: Any, image_size: int | None) -> Any:
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
                size = _sides(processor)
                settings["size"] = {side: round(pixels * scale) for side, pixels in size.items()}
        else:
            _sides(processor)
            settings |= {"do_resize": True, "size": square}
    return type(processor).from_dict(settings)


def canvas(processor: Any, image: Image.Image) -> np.ndarray:
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
    off = {switch: False for switch in ARITHMETIC if switch in known}
    pixels = np.asarray(processor(image, return_tensors="np", **off)["pixel_values"][0])
    side = target_size(processor)
    if pixels.dtype != np.uint8 or pixels.shape != (3, side, side):
        raise RecipeError(
            f"{_name(processor)} makes {pixels.dtype} {pixels.shape} of a picture, not uint8 "
            f"{(3, side, side)}",
            "Choose a source whose processor only resizes, crops and normalises",
        )
    return np.ascontiguousarray(pixels)


def normaliser(processor: Any) -> Callable[[Tensor], Tensor]:
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
        raise _not_affine(processor)
    low, high = wanted[ramp == 0], wanted[ramp == 255]
    scale = torch.tensor((high - low) / 255).float().view(3, 1, 1)
    shift = torch.tensor(low).float().view(3, 1, 1)

    def normalise(pixels: Tensor) -> Tensor:
        return pixels.float().mul_(scale.to(pixels.device)).add_(shift.to(pixels.device))

    given = normalise(torch.from_numpy(ramp)).double().numpy()
    if np.abs(given - wanted).max() > 1e-6 * max(1, np.abs(wanted).max()):
        raise _not_affine(processor)
    return normalise


def light(pixels: Tensor, seed: int, epoch: int, key: bytes) -> Tensor:
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
    area = AREA[0] + draw[0] * (AREA[1] - AREA[0])
    ratio = min(RATIO, 1 / area) ** (2 * draw[1] - 1)
    height = min(side, round(side * math.sqrt(area / ratio)))
    width = min(side, round(side * math.sqrt(area * ratio)))
    top = int(draw[2] * (side - height + 1))
    left = int(draw[3] * (side - width + 1))
    crop = pixels[None, :, top : top + height, left : left + width]
    found = functional.interpolate(crop, (side, side), mode="bilinear", antialias=True)[0]
    return found.flip(-1) if draw[4] < 0.5 else found


def pixel_features(canvases: Tensor, side: int = SIDE) -> Tensor:
    """The pictures at side x side, for the classical baseline; each pixel averages an area.

    Args:
        canvases: (pictures, 3, height, width) uint8.
        side: in pixels.

    Returns:
        (pictures, 3 * side * side) float32 in 0..1.
    """
    parts = [functional.adaptive_avg_pool2d(part.float(), side) for part in canvases.split(256)]
    return torch.cat(parts).flatten(1) / 255


def _sides(processor: Any) -> dict[str, int]:
    """The processor's own resize target, of a kind that an image size can replace."""
    size = dict(processor.size or {})
    if (
        set(size) not in ({"height", "width"}, {"shortest_edge"})
        or "crop_pct" in processor.to_dict()
    ):
        raise RecipeError(
            f"{_name(processor)} resizes to {size}, which data.image_size cannot replace",
            "Leave data.image_size out, or choose another source",
        )
    return size


def _not_affine(processor: Any) -> RecipeError:
    return RecipeError(
        f"{_name(processor)} does more to pixels than scale and shift each channel",
        "Choose a source whose processor only resizes, crops and normalises",
    )


def _name(processor: Any) -> str:
    return f"the source's {processor.to_dict().get('image_processor_type', 'image processor')}"
