"""Pictures as a table or folder holds them, read safely into 8-bit RGB.

Content decides the format, never the suffix, and the header decides on the size before a pixel is
decoded. A picture that cannot be read faithfully is refused with a reason, never guessed at.
"""

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

from hftl.data.near_duplicates import compute_perceptual_hash
from hftl.data.tables import RawRow
from hftl.errors import DataError, DataWarning
from hftl.runtime.progress import open_bar

BACKGROUND = (255, 255, 255)
"""What shows through where a picture is transparent."""

# The readers themselves, not `Image.open`: that warns of large pictures through the process-wide
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

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's readers raise on bytes they cannot make sense of."""

BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
EIGHT_BIT_MODES = (
    "1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa",
)  # fmt: skip

PNG_TRANSPARENCY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""From a PNG's own scale to Pillow's, which scales the pixels but not the transparent colour."""


class ImageDecodeError(ValueError):
    """A picture that cannot be used; the message is the reason, without the file's name."""


def decode_image(value: Any, folder: Path | None, max_pixels: int) -> Image.Image:
    """A picture in RGB, 8 bits, upright; the first frame, and white behind transparency.

    Sixteen bits of grey are scaled to eight. Colour profiles are not applied. Safe in threads.

    Args:
        value: what a cell holds: a path, bytes, {"bytes": ..., "path": ...}, or a PIL image.
        folder: what relative paths are relative to; None for the current directory.
        max_pixels: the most pixels a picture may have, by its header.

    Raises:
        BadImage: if there is no picture, it is damaged or too large, or its mode has no one
            meaning in 8 bits.
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
    empty = value is None or isinstance(value, str)
    raise ImageDecodeError(
        "no picture is given" if empty else f"a {type(value).__name__} is no picture"
    )


def is_too_small(image: Image.Image, patch: int) -> bool:
    """Whether both sides are below one patch of the encoder, in pixels."""
    return max(image.size) < patch


def hash_pixels(image: Image.Image) -> str:
    """A hash of the size and RGB bytes: two files of the same picture are one item."""
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
    try:
        image = _find_reader(start)(file)
    except ImageDecodeError:
        raise
    except BOMB_ERRORS as error:
        raise ImageDecodeError(f"more than the {max_pixels:,} pixels of data.max_pixels") from error
    except DECODE_ERRORS as error:
        raise ImageDecodeError(
            f"its header is damaged or truncated ({_shorten_error(error)})"
        ) from error
    return _convert_checked(image, max_pixels)


def _find_reader(start: bytes) -> type[ImageFile.ImageFile]:
    """The reader of the format that a file's first bytes say."""
    for signature, reader in IMAGE_READERS:
        if re.match(signature, start, re.DOTALL):
            return reader
    raise ImageDecodeError("not an image, or of a format that is not read")


def _convert_checked(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image in RGB, its size checked before its pixels are decoded."""
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
    """The first frame, upright, in RGB on the background."""
    _refuse_unusual_tiff(image)
    named, scale = image.format, _find_transparency_scale(image)
    upright = ImageOps.exif_transpose(image)
    key = upright.info.get("transparency")
    if upright.mode in SIXTEEN_BIT_MODES or (upright.mode == "I" and named == "PPM"):
        values = np.asarray(upright).astype(np.uint32)
        return _convert_grey_to_rgb((values * 255 + 32767) // 65535, transparent=values == key)
    if upright.mode == "F":
        values = np.asarray(upright)
        if not ((values >= 0) & (values <= 1)).all():
            raise ImageDecodeError("its floats are not within 0 and 1; save it with 8 bits")
        return _convert_grey_to_rgb(np.rint(values * 255), transparent=values == key)
    if upright.mode not in EIGHT_BIT_MODES:
        raise ImageDecodeError(f"pixels of mode {upright.mode} have no one meaning in 8 bits")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    if isinstance(key, int) and scale:
        upright.info["transparency"] = int(key * scale)
    elif isinstance(key, tuple) and scale:
        upright.info["transparency"] = tuple(int(part * scale) for part in key)
    ground = Image.new("RGBA", upright.size, (*BACKGROUND, 255))
    return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")


def _convert_grey_to_rgb(values: np.ndarray, transparent: np.ndarray) -> Image.Image:
    colours = np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)
    colours[transparent] = BACKGROUND
    return Image.fromarray(colours)


def _find_transparency_scale(image: Image.Image) -> float | None:
    """What a PNG's transparent colour is multiplied by, known only before its pixels are read."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return None
    return PNG_TRANSPARENCY_SCALE.get(str(image.tile[0].args))


def _refuse_unusual_tiff(image: Image.Image) -> None:
    """Pillow reads 12 bits as 16, and deep pixels with white as zero as if black were."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    if image.mode not in (*SIXTEEN_BIT_MODES, "F"):
        return
    bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
    if bits not in ((16,), (32,)) or photometric != 1:
        raise ImageDecodeError("a TIFF of 12 bits or with white as zero; save it with 8 bits")


def _shorten_error(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


# The levels between black and white that pictures reach: 12 bits in a 16-bit file are 0 to 15 of
# 255, which no encoder has seen and which loses most of what they show.
#
# What is looked at are the 8 bits that the encoder gets, so that every depth counts alike: grey,
# colour and floats, deep files and ones whose values are few.


NARROW_RANGE = 0.1
"""The share of the range from black to white below which a picture's own is called narrow."""

Levels = tuple[int, int]
"""The darkest and the brightest value of a picture in 8 bits, of all channels."""


@dataclass(frozen=True, slots=True)
class NarrowCount:
    """Pictures of a narrow range, of how many, and the levels from the least to the greatest."""

    count: int
    pictures: int
    low: int
    high: int


def read_levels(image: Image.Image) -> Levels:
    """Return the levels that a picture in RGB reaches."""
    values = np.asarray(image)
    return int(values.min()), int(values.max())


def count_narrow_images(levels: Iterable[Levels | None]) -> NarrowCount | None:
    """Count the pictures of a narrow range; None where there is none. None among the levels is of
    a row without a picture, or of one that was not opened this time."""
    known = [one for one in levels if one is not None]
    narrow = [(low, high) for low, high in known if high - low < NARROW_RANGE * 255]
    if not narrow:
        return None
    lows, highs = zip(*narrow, strict=True)
    return NarrowCount(len(narrow), len(known), min(lows), max(highs))


def describe_narrow_images(narrow: NarrowCount) -> str:
    """Return a sentence with what to do."""
    return (
        f"{narrow.count} of {narrow.pictures} pictures use less than {NARROW_RANGE:.0%} of the range "
        f"from black to white, as 12 bits in a 16-bit file do: they reach the model within "
        f"{narrow.low} to {narrow.high} of 255; scale what they hold to the full range before "
        "they are saved"
    )


def warn_of_narrow_images(levels: Iterable[Levels | None], name: str) -> None:
    """Issue a `DataWarning` where pictures have a narrow range; `name` says where they stand."""
    narrow = count_narrow_images(levels)
    if narrow is not None:
        warnings.warn(f"{name}: {describe_narrow_images(narrow)}", DataWarning, stacklevel=3)


# The pictures of a table, decoded side by side: what each says, or why it cannot be used.


MAX_DECODED_AHEAD = 64
"""Rows in work at once: what they decode to stands in memory."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Hold what a picture says, as a hash of its pixels; its (width, height) in pixels; the levels
    it reaches; and its perceptual hash, None for a flat picture."""

    content: str
    size: tuple[int, int]
    levels: Levels
    perceptual_hash: int | None = None


def inspect_images(
    raws: Iterable[RawRow], column: str, folder: Path | None, max_pixels: int, patch: int
) -> Iterator[tuple[RawRow, ImageInfo | str]]:
    """Every row with what its picture says, or why the picture cannot be used.

    Args:
        raws: the rows.
        column: where the picture stands.
        folder: what its path is relative to.
        max_pixels: more than that is not decoded.
        patch: the side of the encoder's patch; a picture within one patch says nothing.
    """

    def see(raw: RawRow) -> tuple[RawRow, ImageInfo | str]:
        if raw.fault:
            return raw, raw.fault
        try:
            image = decode_image(raw.values[column], folder, max_pixels)
        except ImageDecodeError as error:
            return raw, str(error)
        if is_too_small(image, patch):
            return raw, f"its {image.width}x{image.height} pixels are within one patch of {patch}"
        return raw, ImageInfo(
            hash_pixels(image), image.size, read_levels(image), compute_perceptual_hash(image)
        )

    with open_bar("reading pictures", None) as advance:
        for number, result in enumerate(map_in_threads(see, raws), 1):
            yield result
            advance(number)


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in their order, on all cores; few items are held at a time."""
    waiting = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(waiting, MAX_DECODED_AHEAD)):
            yield from pool.map(work, some)


def map_images(
    raws: Iterable[RawRow], column: str, folder: Path | None, max_pixels: int,
    work: Callable[[Image.Image], Result],
) -> Iterator[tuple[RawRow, Result]]:  # fmt: skip
    """What `work` makes of each row's picture; the rows were sound when they were looked at.

    Raises:
        DataError: if a picture cannot be read any more.
    """

    def see(raw: RawRow) -> tuple[RawRow, Result]:
        try:
            return raw, work(decode_image(raw.values[column], folder, max_pixels))
        except ImageDecodeError as error:
            raise DataError(f"{raw.where}: {error}", "Put the data back") from error

    return map_in_threads(see, raws)
