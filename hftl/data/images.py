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

from hftl.data.near_duplicates import perceptual_hash
from hftl.data.tables import Raw
from hftl.errors import DataError, DataWarning
from hftl.runtime.progress import open_bar

BACKGROUND = (255, 255, 255)
"""What shows through where a picture is transparent."""

# The readers themselves, not `Image.open`: that warns of large pictures through the process-wide
# filters, which no thread can change for itself, and has formats that start other programs.
FORMATS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    (rb"BM", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    (rb"....ftypavi[fs]", AvifImagePlugin.AvifImageFile),
    (rb"P[1-6f]\s", PpmImagePlugin.PpmImageFile),
)

DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's readers raise on bytes they cannot make sense of."""

BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
EIGHT_BITS = (
    "1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa",
)  # fmt: skip

PNG_KEY = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""From a PNG's own scale to Pillow's, which scales the pixels but not the transparent colour."""


class BadImage(ValueError):
    """A picture that cannot be used; the message is the reason, without the file's name."""


def decode(value: Any, folder: Path | None, max_pixels: int) -> Image.Image:
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
        return _picture(value, max_pixels)
    if isinstance(value, (bytes, bytearray)):
        return _read(io.BytesIO(value), max_pixels)
    if isinstance(value, (str, Path)) and str(value).strip():
        with _open(Path(folder or ".") / value) as file:
            return _read(file, max_pixels)
    empty = value is None or isinstance(value, str)
    raise BadImage("no picture is given" if empty else f"a {type(value).__name__} is no picture")


def too_small(image: Image.Image, patch: int) -> bool:
    """Whether both sides are below one patch of the encoder, in pixels."""
    return max(image.size) < patch


def content(image: Image.Image) -> str:
    """A hash of the size and RGB bytes: two files of the same picture are one item."""
    digest = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    try:
        if not path.exists():
            raise BadImage("the file is missing")
        if not path.is_file():
            raise BadImage("not a file")
        return open(path, "rb")
    except OSError as error:
        raise BadImage(f"the file cannot be opened ({error.strerror})") from error


def _read(file: IO[bytes], max_pixels: int) -> Image.Image:
    start = file.read(16)
    file.seek(0)
    if not start:
        raise BadImage("the file is empty (0 bytes)")
    try:
        image = _reader(start)(file)
    except BadImage:
        raise
    except BOMB as error:
        raise BadImage(f"more than the {max_pixels:,} pixels of data.max_pixels") from error
    except DAMAGED as error:
        raise BadImage(f"its header is damaged or truncated ({_short(error)})") from error
    return _picture(image, max_pixels)


def _reader(start: bytes) -> type[ImageFile.ImageFile]:
    """The reader of the format that a file's first bytes say."""
    for signature, reader in FORMATS:
        if re.match(signature, start, re.DOTALL):
            return reader
    raise BadImage("not an image, or of a format that is not read")


def _picture(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image in RGB, its size checked before its pixels are decoded."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BadImage(f"{pixels:,} pixels, more than the {max_pixels:,} of data.max_pixels")
    if not pixels:
        raise BadImage("it has no pixels")
    try:
        return _rgb(image)
    except BadImage:
        raise
    except BOMB as error:
        raise BadImage(f"{pixels:,} pixels, more than Pillow decodes") from error
    except DAMAGED as error:
        raise BadImage(f"damaged or truncated ({_short(error)})") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The first frame, upright, in RGB on the background."""
    _refuse_unusual_tiff(image)
    named, scale = image.format, _key_scale(image)
    upright = ImageOps.exif_transpose(image)
    key = upright.info.get("transparency")
    if upright.mode in SIXTEEN_BITS or (upright.mode == "I" and named == "PPM"):
        values = np.asarray(upright).astype(np.uint32)
        return _grey((values * 255 + 32767) // 65535, transparent=values == key)
    if upright.mode == "F":
        values = np.asarray(upright)
        if not ((values >= 0) & (values <= 1)).all():
            raise BadImage("its floats are not within 0 and 1; save it with 8 bits")
        return _grey(np.rint(values * 255), transparent=values == key)
    if upright.mode not in EIGHT_BITS:
        raise BadImage(f"pixels of mode {upright.mode} have no one meaning in 8 bits")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    if isinstance(key, int) and scale:
        upright.info["transparency"] = int(key * scale)
    elif isinstance(key, tuple) and scale:
        upright.info["transparency"] = tuple(int(part * scale) for part in key)
    ground = Image.new("RGBA", upright.size, (*BACKGROUND, 255))
    return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")


def _grey(values: np.ndarray, transparent: np.ndarray) -> Image.Image:
    colours = np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)
    colours[transparent] = BACKGROUND
    return Image.fromarray(colours)


def _key_scale(image: Image.Image) -> float | None:
    """What a PNG's transparent colour is multiplied by, known only before its pixels are read."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return None
    return PNG_KEY.get(str(image.tile[0].args))


def _refuse_unusual_tiff(image: Image.Image) -> None:
    """Pillow reads 12 bits as 16, and deep pixels with white as zero as if black were."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    if image.mode not in (*SIXTEEN_BITS, "F"):
        return
    bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
    if bits not in ((16,), (32,)) or photometric != 1:
        raise BadImage("a TIFF of 12 bits or with white as zero; save it with 8 bits")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


# The levels between black and white that pictures reach: 12 bits in a 16-bit file are 0 to 15 of
# 255, which no encoder has seen and which loses most of what they show.
#
# What is looked at are the 8 bits that the encoder gets, so that every depth counts alike: grey,
# colour and floats, deep files and ones whose values are few.


NARROW = 0.1
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


def count_narrow(levels: Iterable[Levels | None]) -> NarrowCount | None:
    """Count the pictures of a narrow range; None where there is none. None among the levels is of
    a row without a picture, or of one that was not opened this time."""
    known = [one for one in levels if one is not None]
    narrow = [(low, high) for low, high in known if high - low < NARROW * 255]
    if not narrow:
        return None
    lows, highs = zip(*narrow, strict=True)
    return NarrowCount(len(narrow), len(known), min(lows), max(highs))


def describe_narrow(narrow: NarrowCount) -> str:
    """Return a sentence with what to do."""
    return (
        f"{narrow.count} of {narrow.pictures} pictures use less than {NARROW:.0%} of the range "
        f"from black to white, as 12 bits in a 16-bit file do: they reach the model within "
        f"{narrow.low} to {narrow.high} of 255; scale what they hold to the full range before "
        "they are saved"
    )


def warn_narrow(levels: Iterable[Levels | None], name: str) -> None:
    """Issue a `DataWarning` where pictures have a narrow range; `name` says where they stand."""
    narrow = count_narrow(levels)
    if narrow is not None:
        warnings.warn(f"{name}: {describe_narrow(narrow)}", DataWarning, stacklevel=3)


# The pictures of a table, decoded side by side: what each says, or why it cannot be used.


AHEAD = 64
"""Rows in work at once: what they decode to stands in memory."""
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold what a picture says, as a hash of its pixels; its (width, height) in pixels; the levels
    it reaches; and its perceptual hash, None for a flat picture."""

    content: str
    size: tuple[int, int]
    levels: Levels
    perceptual: int | None = None


def look(
    raws: Iterable[Raw], column: str, folder: Path | None, max_pixels: int, patch: int
) -> Iterator[tuple[Raw, Seen | str]]:
    """Every row with what its picture says, or why the picture cannot be used.

    Args:
        raws: the rows.
        column: where the picture stands.
        folder: what its path is relative to.
        max_pixels: more than that is not decoded.
        patch: the side of the encoder's patch; a picture within one patch says nothing.
    """

    def see(raw: Raw) -> tuple[Raw, Seen | str]:
        if raw.fault:
            return raw, raw.fault
        try:
            image = decode(raw.values[column], folder, max_pixels)
        except BadImage as error:
            return raw, str(error)
        if too_small(image, patch):
            return raw, f"its {image.width}x{image.height} pixels are within one patch of {patch}"
        return raw, Seen(content(image), image.size, read_levels(image), perceptual_hash(image))

    with open_bar("reading pictures", None) as advance:
        for number, result in enumerate(side_by_side(see, raws), 1):
            yield result
            advance(number)


def side_by_side(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """`work` of each item, in their order, on all cores; few items are held at a time."""
    waiting = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(waiting, AHEAD)):
            yield from pool.map(work, some)


def opened(
    raws: Iterable[Raw], column: str, folder: Path | None, max_pixels: int,
    work: Callable[[Image.Image], Found],
) -> Iterator[tuple[Raw, Found]]:  # fmt: skip
    """What `work` makes of each row's picture; the rows were sound when they were looked at.

    Raises:
        DataError: if a picture cannot be read any more.
    """

    def see(raw: Raw) -> tuple[Raw, Found]:
        try:
            return raw, work(decode(raw.values[column], folder, max_pixels))
        except BadImage as error:
            raise DataError(f"{raw.where}: {error}", "Put the data back") from error

    return side_by_side(see, raws)
