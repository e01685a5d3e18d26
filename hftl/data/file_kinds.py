"""Say what a file is where its content is not of the format that its name says."""

import re
from pathlib import Path

from hftl.data.encodings import format_conversion
from hftl.errors import DataError

START_BYTES = 512
"""Bytes at the beginning of a file that are looked at."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Begins what a checkout holds of a file whose content was not fetched."""
PACKED = {
    b"\x1f\x8b\x08": "gzip", b"PK\x03\x04": "zip", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7-Zip",
}  # fmt: skip
SIGNATURES = {
    b"%PDF-": "a PDF", b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture",
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database", b"\x93NUMPY": "an array of NumPy",
    b"\x80\x04\x95": "a pickle", b"\x80\x05\x95": "a pickle", b"\x7fELF": "a program",
    b"\xd0\xcf\x11\xe0": "a document of an old Office",
}  # fmt: skip
MARKS = re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff")
"""Of UTF-16 and UTF-32, which `open_text` reads or refuses."""
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
CONTROL = re.compile(rb"[\x00\x02-\x08\x0e-\x1a\x1c\x1d\x7f]")
"""Bytes that no text holds; 0x01, 0x1E and 0x1F separate the fields of some tables."""
MAX_CONTROL = 0.05
MIN_BYTES = 64
"""Of fewer no share is taken: their line is refused, and may be skipped."""
MIN_NULS = 0.4
"""Share of the high bytes of UTF-16 that are 0 in a text of Latin letters."""


def refuse_other_format(path: Path, is_table: bool = True) -> None:
    """Refuse a file of text that is a pointer, packed, or binary.

    Args:
        path: the file.
        is_table: a web page is no table either; a text may be one.

    Raises:
        DataError: saying what it is, and what to do.
    """
    start = _read_start(path)
    other = describe_start(start)
    if other is not None:
        raise DataError(f"{path.name} {other[0]}", other[1])
    if start.startswith(b"PAR1"):
        raise DataError(f"{path.name} is a Parquet file", f"Name it {path.stem}.parquet")
    if is_table and WEB_PAGE.match(start):
        raise DataError(f"{path.name} is a web page, not a table", "Fetch the file itself")
    if len(start) < MIN_BYTES or MARKS.match(start):
        return
    for encoding, high, low in (("UTF-16LE", 1, 0), ("UTF-16BE", 0, 1)):
        nulls = start[high::2].count(0)
        if nulls > MIN_NULS * len(start[high::2]) and not start[low::2].count(0):
            raise DataError(
                f"{path.name} is {encoding} without a mark of its byte order",
                format_conversion(path, encoding),
            )
    if len(CONTROL.findall(start)) > MAX_CONTROL * len(start):
        raise DataError(f"{path.name} holds binary data, not text", "Check the file")


def describe_other_format(path: Path) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and what to do; None where they say nothing."""
    return describe_start(_read_start(path))


def describe_start(start: bytes) -> tuple[str, str] | None:
    """Return what a file with these first bytes is, and what to do; None where they say nothing."""
    if start.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull"
    for signature, kind in PACKED.items():
        if start.startswith(signature):
            return f"is packed by {kind}", "Unpack it"
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            return f"is {kind}", "Name it by what it is, or give another file"
    return None


def _read_start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(START_BYTES)
