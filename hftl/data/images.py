"""Read images, as a table or folder holds them, safely into 8-bit RGB.

The content decides the format, never the suffix, and the size in the header is checked before a
pixel is decoded. An image that cannot be read faithfully is refused with a reason, never guessed.
"""

import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from hftl.data.duplicates import compute_perceptual_hash
from hftl.data.encodings import LFS_POINTER
from hftl.data.facts import NarrowCount
from hftl.data.rows import ImageInfo, Levels, RawRow
from hftl.errors import DataError, DataWarning
from hftl.runtime.progress import open_bar

BACKGROUND = (255, 255, 255)
"""The colour behind transparent pixels."""

# The readers themselves, not `Image.open`: that warns of large images through the process-wide
# filters, which no thread can change for itself, and has formats that start other programs.
IMAGE_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    (rb"BM", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    (rb"....ftypavi[fs]", AvifImagePlugin.AvifImageFile),
    (rb"P[1-6f]\s", PpmImagePlugin.PpmImageFile),
)

DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, EOFError, struct.error)
"""Raised by Pillow's readers on damaged bytes: SyntaxError by headers, RuntimeError by AVIF,
TypeError and struct.error by TIFF and EXIF tags."""
BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
EIGHT_BIT_MODES = (
    "1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa",
)  # fmt: skip

PNG_TRANSPARENCY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""From a PNG's own scale to Pillow's, which scales the pixels but not the transparent colour."""

NARROW_RANGE = 0.1
"""Share of the range from black to white below which the range of an image is called narrow."""
MAX_DECODED_AHEAD = 64
"""Rows in work at once: their decoded images are in memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageDecodeError(ValueError):
    """Refuse an image; the message is the reason, without the file's name."""


def decode_image(value: Any, folder: Path | None, max_pixels: int) -> Image.Image:
    """Return an image in RGB, 8 bits, upright; the first frame, with white behind transparency.

    Sixteen bits of grey are scaled to eight. Colour profiles are not applied. Safe in threads.

    Args:
        value: the content of a cell: a path, bytes, {"bytes": ..., "path": ...}, or a PIL image.
        folder: what relative paths are relative to; None for the current directory.
        max_pixels: the most pixels an image may have, by its header.

    Raises:
        ImageDecodeError: if there is no image, it is damaged or too large, or its mode has no
            unique meaning in 8 bits.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        return _convert_checked(value, max_pixels)
    if isinstance(value, (bytes, bytearray)):
        return _decode_file(io.BytesIO(value), max_pixels)
    if isinstance(value, (str, Path)) and str(value).strip():
        with _open_image_file(Path(folder or ".") / value) as file:
            return _decode_file(file, max_pixels)
    is_empty = value is None or isinstance(value, str)
    raise ImageDecodeError(
        "no picture is given" if is_empty else f"a {type(value).__name__} is no picture"
    )


def is_too_small(image: Image.Image, patch_size: int) -> bool:
    """Return whether both sides are below one patch of the encoder, in pixels."""
    return max(image.size) < patch_size


def hash_pixels(image: Image.Image) -> str:
    """Return a hash of the size and RGB bytes: two files of the same image are one item."""
    digest = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _open_image_file(path: Path) -> IO[bytes]:
    try:
        if not path.exists():
            raise ImageDecodeError("the file is missing")
        if not path.is_file():
            raise ImageDecodeError("not a file")
        return open(path, "rb")
    except OSError as error:
        raise ImageDecodeError(f"the file cannot be opened ({error.strerror})") from error


def _decode_file(file: IO[bytes], max_pixels: int) -> Image.Image:
    start = file.read(16)
    file.seek(0)
    if not start:
        raise ImageDecodeError("the file is empty (0 bytes)")
    reader = _find_reader(start)
    try:
        image = reader(file)
    except BOMB_ERRORS as error:
        message = f"more than the {max_pixels:,} pixels of data.max_pixels"
        raise ImageDecodeError(message) from error
    except DECODE_ERRORS as error:
        message = f"its header is damaged or truncated ({_shorten_error(error)})"
        raise ImageDecodeError(message) from error
    return _convert_checked(image, max_pixels)


def _find_reader(start: bytes) -> type[ImageFile.ImageFile]:
    """Return the reader of the format that a file's first bytes show."""
    for signature, reader in IMAGE_READERS:
        if re.match(signature, start, re.DOTALL):
            return reader
    if LFS_POINTER.startswith(start):
        raise ImageDecodeError("not an image but a pointer of Git LFS: git lfs pull")
    raise ImageDecodeError("not an image, or of a format that is not read")


def _convert_checked(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return the image in RGB; its size is checked before its pixels are decoded."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageDecodeError(
            f"{pixels:,} pixels, more than the {max_pixels:,} of data.max_pixels"
        )
    if not pixels:
        raise ImageDecodeError("it has no pixels")
    try:
        return _convert_to_rgb(image)
    except ImageDecodeError:
        raise
    except BOMB_ERRORS as error:
        raise ImageDecodeError(f"{pixels:,} pixels, more than Pillow decodes") from error
    except DECODE_ERRORS as error:
        raise ImageDecodeError(f"damaged or truncated ({_shorten_error(error)})") from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame, upright, in RGB on the background."""
    _refuse_unusual_tiff(image)
    # Both are lost when the pixels are read.
    image_format, scale = image.format, _find_transparency_scale(image)
    upright = ImageOps.exif_transpose(image)
    transparent = upright.info.get("transparency")
    if upright.mode in SIXTEEN_BIT_MODES or (upright.mode == "I" and image_format == "PPM"):
        values = np.asarray(upright).astype(np.uint32)
        return _convert_grey_to_rgb((values * 255 + 32767) // 65535, values == transparent)
    if upright.mode == "F":
        values = np.asarray(upright)
        if not ((values >= 0) & (values <= 1)).all():
            raise ImageDecodeError("its floats are not within 0 and 1; save it with 8 bits")
        return _convert_grey_to_rgb(np.rint(values * 255), values == transparent)
    if upright.mode not in EIGHT_BIT_MODES:
        raise ImageDecodeError(f"pixels of mode {upright.mode} have no one meaning in 8 bits")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    if isinstance(transparent, int) and scale:
        upright.info["transparency"] = int(transparent * scale)
    elif isinstance(transparent, tuple) and scale:
        upright.info["transparency"] = tuple(int(channel * scale) for channel in transparent)
    ground = Image.new("RGBA", upright.size, (*BACKGROUND, 255))
    return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")


def _convert_grey_to_rgb(values: np.ndarray, is_transparent: np.ndarray) -> Image.Image:
    colours = np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)
    colours[is_transparent] = BACKGROUND
    return Image.fromarray(colours)


def _find_transparency_scale(image: Image.Image) -> float | None:
    """Return the factor for a PNG's transparent colour, known only before its pixels are read."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return None
    return PNG_TRANSPARENCY_SCALE.get(str(image.tile[0].args))


def _refuse_unusual_tiff(image: Image.Image) -> None:
    """Refuse a TIFF that Pillow misreads: 12 bits as 16, and deep white-is-zero as black-is-zero.

    Raises:
        ImageDecodeError: for such a TIFF.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    if image.mode not in (*SIXTEEN_BIT_MODES, "F"):
        return
    bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
    if bits not in ((16,), (32,)) or photometric != 1:
        raise ImageDecodeError("a TIFF of 12 bits or with white as zero; save it with 8 bits")


def _shorten_error(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


def read_levels(image: Image.Image) -> Levels:
    """Return the darkest and the brightest value of an image in RGB."""
    values = np.asarray(image)
    return int(values.min()), int(values.max())


def count_narrow_images(levels: Iterable[Levels | None]) -> NarrowCount | None:
    """Count the images of a narrow range; return None where there is none.

    Args:
        levels: those of each row; None for a row without an image, or not opened this time.
    """
    known = [pair for pair in levels if pair is not None]
    narrow = [(low, high) for low, high in known if high - low < NARROW_RANGE * 255]
    if not narrow:
        return None
    lows, highs = zip(*narrow, strict=True)
    return NarrowCount(count=len(narrow), pictures=len(known), low=min(lows), high=max(highs))


def describe_narrow_images(narrow: NarrowCount) -> str:
    """Return a sentence with what to do."""
    return (
        f"{narrow.count} of {narrow.pictures} pictures use less than {NARROW_RANGE:.0%} of the "
        f"range from black to white, as 12 bits in a 16-bit file do: they reach the model within "
        f"{narrow.low} to {narrow.high} of 255; scale them to the full range before they are saved"
    )


def warn_of_narrow_images(levels: Iterable[Levels | None], name: str) -> None:
    """Issue a `DataWarning` where images of the table of this name have a narrow range."""
    narrow = count_narrow_images(levels)
    if narrow is not None:
        warnings.warn(f"{name}: {describe_narrow_images(narrow)}", DataWarning, stacklevel=3)


def inspect_images(
    raws: Iterable[RawRow], column: str, folder: Path | None, max_pixels: int, patch_size: int
) -> Iterator[tuple[RawRow, ImageInfo | str]]:
    """Yield every row with a description of its image, or why the image cannot be used.

    Args:
        raws: the rows.
        column: the column of the image.
        folder: what its path is relative to.
        max_pixels: larger images are not decoded.
        patch_size: the side of the encoder's patch; an image within one patch is refused.
    """

    def inspect(raw: RawRow) -> tuple[RawRow, ImageInfo | str]:
        if raw.fault:
            return raw, raw.fault
        try:
            image = decode_image(raw.values[column], folder, max_pixels)
        except ImageDecodeError as error:
            return raw, str(error)
        if is_too_small(image, patch_size):
            size = f"{image.width}x{image.height}"
            return raw, f"its {size} pixels are within one patch of {patch_size}"
        code, thumbnail = compute_perceptual_hash(image) or (None, None)
        return raw, ImageInfo(hash_pixels(image), image.size, read_levels(image), code, thumbnail)

    with open_bar("reading pictures", None) as advance:
        for number, result in enumerate(map_in_threads(inspect, raws), 1):
            yield result
            advance(number)


def map_images(
    raws: Iterable[RawRow], column: str, folder: Path | None, max_pixels: int,
    function: Callable[[Image.Image], Result],
) -> Iterator[tuple[RawRow, Result]]:  # fmt: skip
    """Yield every row with the function of its image; the images were sound when inspected.

    Raises:
        DataError: if an image cannot be read any more.
    """

    def apply(raw: RawRow) -> tuple[RawRow, Result]:
        try:
            return raw, function(decode_image(raw.values[column], folder, max_pixels))
        except ImageDecodeError as error:
            raise DataError(f"{raw.where}: {error}", "Put the data back") from error

    return map_in_threads(apply, raws)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the function of each item, in their order, on all cores, a few items at a time."""
    iterator = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(iterator, MAX_DECODED_AHEAD)):
            yield from pool.map(function, chunk)
