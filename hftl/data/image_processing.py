"""Split what the source's own image processor does into a canvas and the arithmetic after it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hftl.errors import RecipeError, format_error_line

ARITHMETIC_SWITCHES = ("do_rescale", "do_normalize", "include_top")
"""A processor's switches of what comes after resize and crop, in transformers' names."""
CANVAS_SWITCHES = ("do_resize", "do_center_crop", "do_flip_channel_order")
"""Its switches of what the canvas is the result of; MobileViT reads blue, green and red."""
SIDES = ("height", "width", "shortest_edge", "longest_edge")
MAX_SIDE = 16384
"""Pixels of a picture's side after resizing, at most."""


@contextmanager
def wrap_processor_errors(processor: Any) -> Iterator[None]:
    """Turn what a processor raises on a picture, by settings that make no sense, into one line.

    Args:
        processor: of images.

    Raises:
        RecipeError: with the library's own words.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # A mean of two channels, a word for a number, a filter of an unknown name, a size without a
        # height.
        raise RecipeError(
            f"{_describe_processor(processor)} cannot read a picture: {format_error_line(error)}",
            "Save the model's own processor beside it",
        ) from error


def get_image_size(processor: Any) -> int:
    """Return the side of the square that the processor makes of every image, in pixels.

    Raises:
        RecipeError: if it makes no square, or none of one size.
    """
    sizes = dict(processor.crop_size if processor.do_center_crop else processor.size or {})
    if not (processor.do_center_crop or processor.do_resize):
        sizes = {}
    elif _crops_by_share(processor):
        sizes = dict.fromkeys(("height", "width"), sizes["shortest_edge"])
    height, width = sizes.get("height"), sizes.get("width")
    _check_target(processor)
    if height is None or height != width:
        raise RecipeError(
            f"{_describe_processor(processor)} makes no squares of one size: "
            f"{sizes or 'it does not resize'}",
            "Set data.image_size, in pixels, or choose another source",
        )
    return height


def _check_target(processor: Any) -> None:
    """Refuse to resize to what no memory holds, or to no picture at all."""
    for sizes in (processor.size, processor.crop_size if processor.do_center_crop else None):
        for name, side in dict(sizes or {}).items():
            if name not in SIDES or side is None:
                continue
            if not isinstance(side, (int, float)) or not 0 < side <= MAX_SIDE:
                raise RecipeError(
                    f"{_describe_processor(processor)} has {name}={side}, expected 1 to {MAX_SIDE} "
                    "pixels",
                    "Correct size and crop_size in preprocessor_config.json",
                )


def resize_processor(processor: Any, image_size: int | None) -> Any:
    """Return a copy whose target is image_size x image_size pixels; None changes nothing.

    Where the processor crops, the size before the crop grows in proportion.

    Raises:
        RecipeError: if the processor's sizes are of an unknown kind.
    """
    settings = processor.to_dict()
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        if _crops_by_share(processor):
            settings |= {"do_resize": True, "size": {"shortest_edge": image_size}}
        elif processor.do_center_crop:
            crop = dict(processor.crop_size)
            settings["crop_size"] = square
            scale = image_size / min(crop["height"], crop["width"])
            if processor.do_resize:
                size = _read_resize_target(processor)
                settings["size"] = {side: round(pixels * scale) for side, pixels in size.items()}
        else:
            _read_resize_target(processor)
            settings |= {"do_resize": True, "size": square}
    return rebuild_processor(processor, settings)


def rebuild_processor(processor: Any, settings: dict[str, Any]) -> Any:
    """Return a processor of the same class with other settings.

    Raises:
        RecipeError: if they make no sense.
    """
    with wrap_processor_errors(processor):
        return type(processor).from_dict(settings)


def resize_and_crop(processor: Any, image: Image.Image) -> np.ndarray:
    """Return the image resized and cropped by the processor itself, not yet normalized.

    Args:
        processor: transformers' image processor, of the PIL backend.
        image: in RGB.

    Returns:
        A canvas, (3, side, side) uint8.

    Raises:
        RecipeError: if the processor does more than resize and crop.
    """
    side = get_image_size(processor)
    return _check_canvas(processor, _run_without(ARITHMETIC_SWITCHES, processor, image), side, side)


def resize_to_patches(processor: Any, image: Image.Image) -> np.ndarray:
    """Return the image resized in its own shape to whole patches, not yet normalized.

    Args:
        processor: transformers' image processor that cuts pictures into patches.
        image: in RGB.

    Returns:
        A canvas, (3, height, width) uint8, of at most `max_num_patches` patches.

    Raises:
        RecipeError: if the processor does more than resize.
    """
    pixels = _run_without(ARITHMETIC_SWITCHES, processor, image)
    return _check_canvas(processor, pixels, *pixels.shape[1:])


def _run_without(switches: tuple[str, ...], processor: Any, image: Any, **more: Any) -> np.ndarray:
    """Return the processor's pixels of an image with some of its switches off, (3, height, width).

    Patches are put together again.
    """
    settings = processor.to_dict()
    off = {switch: False for switch in switches if switch in settings}
    with wrap_processor_errors(processor):
        outputs = processor(image, return_tensors="np", **off, **more)
    pixels = np.asarray(outputs["pixel_values"][0])
    if makes_patches(processor):
        return join_patches(pixels, outputs["spatial_shapes"][0])
    return pixels


def _check_canvas(processor: Any, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.shape != (3, height, width):
        raise RecipeError(
            f"{_describe_processor(processor)} makes {pixels.dtype} {pixels.shape} of a picture, "
            f"not uint8 {(3, height, width)}",
            "Choose a source whose processor only resizes, crops and normalises",
        )
    return np.ascontiguousarray(pixels)


def makes_patches(processor: Any) -> bool:
    """Return whether a processor cuts pictures of any shape into patches, as NaFlex's does."""
    return "max_num_patches" in processor.to_dict()


def join_patches(patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the picture that patches are of, (3, height, width).

    Args:
        patches: (at least rows * columns, side * side * 3), row by row.
        grid: rows and columns.
    """
    rows, columns = map(int, grid)
    side = math.isqrt(patches.shape[1] // 3)
    parts = patches[: rows * columns].reshape(rows, columns, side, side, 3)
    return parts.transpose(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def build_normalizer(processor: Any) -> Callable[[Tensor], Tensor]:
    """Return the processor's arithmetic on a canvas, as a scale and a shift of each channel.

    They are fitted to the processor's own result on all 256 values and checked on each, so that
    every switch counts, also those of unknown names.

    Returns:
        A function of uint8 (batch, 3, height, width), on any device, to the same shape in float32.

    Raises:
        RecipeError: if a scale and a shift of each channel do not reproduce the processor, or it
            makes anything but finite numbers.
    """
    # Each channel holds its values in another place, so that swapped channels are noticed.
    ramp = np.stack([np.roll(np.arange(256), 85 * channel) for channel in range(3)])
    ramp = ramp.reshape(3, 16, 16).astype(np.uint8)
    more: dict[str, Any] = {"patch_size": 1} if makes_patches(processor) else {}
    expected = _run_without(
        CANVAS_SWITCHES, processor, ramp, input_data_format="channels_first", **more
    ).astype(np.float64)
    if expected.shape != ramp.shape:
        raise _build_affine_error(processor)
    low, high = expected[ramp == 0], expected[ramp == 255]
    scale = torch.tensor((high - low) / 255).float().view(3, 1, 1)
    shift = torch.tensor(low).float().view(3, 1, 1)

    def normalize(pixels: Tensor) -> Tensor:
        return pixels.float().mul_(scale.to(pixels.device)).add_(shift.to(pixels.device))

    actual = normalize(torch.from_numpy(ramp)).double().numpy()
    # Infinite numbers, as of a deviation of 0, are within no tolerance.
    if not np.abs(actual - expected).max() <= 1e-6 * max(1, np.abs(expected).max()):
        raise _build_affine_error(processor)
    return normalize


def _read_resize_target(processor: Any) -> dict[str, int]:
    """Return the processor's own resize target, if an image size can replace it."""
    size = dict(processor.size or {})
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise RecipeError(
            f"{_describe_processor(processor)} resizes to {size}, which data.image_size cannot "
            "replace",
            "Leave data.image_size out, or choose another source",
        )
    return size


def _crops_by_share(processor: Any) -> bool:
    """Return whether a processor makes squares of the shortest edge itself, as ConvNeXt's does."""
    return "crop_pct" in processor.to_dict() and set(dict(processor.size or {})) == {
        "shortest_edge"
    }


def _build_affine_error(processor: Any) -> RecipeError:
    return RecipeError(
        f"{_describe_processor(processor)} does more to pixels than scale and shift each channel",
        "Choose a source whose processor only resizes, crops and normalises",
    )


def _describe_processor(processor: Any) -> str:
    return f"the source's {processor.to_dict().get('image_processor_type', 'image processor')}"
