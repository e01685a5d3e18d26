"""The levels between black and white that pictures reach: 12 bits in a 16-bit file are 0 to 15 of
255, which no encoder has seen and which loses most of what they show.

What is looked at are the 8 bits that the encoder gets, so that every depth counts alike: grey,
colour and floats, deep files and ones whose values are few.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from hftl.errors import DataWarning

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


def read_levels(image: Image) -> Levels:
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
