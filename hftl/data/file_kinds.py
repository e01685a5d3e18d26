"""Refuse a file whose content is not text, or not of the format that its name says."""

import re
from pathlib import Path

from hftl.data.encodings import (
    MIN_BYTES,
    PARQUET,
    describe_other_format,
    format_conversion,
    is_binary,
    read_start,
)
from hftl.errors import DataError

MARKS = re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff")
"""Of UTF-16 and UTF-32, which `open_text` reads or refuses."""
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
MIN_ZEROS = 0.4
"""Share of the high bytes of UTF-16 that are 0 in a text of Latin letters."""


def refuse_other_format(path: Path, is_table: bool = True) -> None:
    """Refuse a file of text that is a pointer, packed, or binary.

    Args:
        path: the file.
        is_table: a web page is no table either; a text may be one.

    Raises:
        DataError: saying what it is, and what to do.
    """
    start = read_start(path)
    other = describe_other_format(path)
    if other is not None:
        raise DataError(f"{path.name} {other[0]}", other[1])
    if PARQUET.match(start):
        raise DataError(f"{path.name} is a Parquet file", f"Name it {path.stem}.parquet")
    if is_table and WEB_PAGE.match(start):
        raise DataError(f"{path.name} is a web page, not a table", "Fetch the file itself")
    if len(start) < MIN_BYTES or MARKS.match(start):
        return
    for encoding, high, low in (("UTF-16LE", 1, 0), ("UTF-16BE", 0, 1)):
        zeros = start[high::2].count(0)
        if zeros > MIN_ZEROS * len(start[high::2]) and not start[low::2].count(0):
            raise DataError(
                f"{path.name} is {encoding} without a mark of its byte order",
                format_conversion(path, encoding),
            )
    if is_binary(start):
        raise DataError(f"{path.name} holds binary data, not text", "Check the file")
