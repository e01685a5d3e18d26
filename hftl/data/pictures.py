"""The pictures of a table, decoded side by side: what each says, or why it cannot be used."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL.Image import Image

from hftl.data.decode import BadImage, content, decode, too_small
from hftl.data.files import Raw
from hftl.data.levels import Levels, read_levels
from hftl.data.near import perceptual_hash
from hftl.errors import DataError
from hftl.progress import open_bar

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
    work: Callable[[Image], Found],
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
