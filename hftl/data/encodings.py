"""Say which encoding or format a file is in that is not text in UTF-8, and how to convert it.

A mark at the beginning decides between UTF-8 and UTF-16; nothing else is guessed when rows are
read. A text may begin with any letters: the signature of a format that is made of letters alone
counts only with bytes after it that no text has there.
"""

import re
import shlex
from pathlib import Path

SURROGATES = re.compile("[\ud800-\udfff]")
"""What bytes that are not UTF-8 are read as, and what half a character of UTF-16 is."""
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What a byte that is not UTF-8 is read as."""
HALF_CHARACTER = "not valid UTF-8: half a character"
BAD_BYTE = "not valid UTF-8: byte"
"""Begins the fault of a row with a byte that could not be decoded."""
WINDOWS, DOS = "cp1252", "cp850"
START_BYTES = 512
"""Bytes at the beginning of a file that are looked at."""
END_BYTES = 16384
"""Bytes at the end of an archive that are looked at: most names of its files are there."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Begins what a checkout holds of a file whose content was not fetched."""
LFS_KEY = b"\noid "
"""Begins the line of a pointer that names the content."""
CONTROL = re.compile(rb"[\x00\x02-\x08\x0e-\x1a\x1c\x1d\x7f]")
"""Bytes that no text holds; 0x01, 0x1E and 0x1F separate the fields of some tables."""
MAX_CONTROL = 0.05
MIN_BYTES = 64
"""Of fewer no share is taken: their line is refused, and may be skipped."""
PARQUET = re.compile(rb"PAR1" + CONTROL.pattern)
"""The beginning of a Parquet file; of the letters alone a gene's name begins, too."""
OLD_OFFICE = b"\xd0\xcf\x11\xe0"
"""Begins a document, or a spreadsheet, of an Office before 2007."""
ZIP = "zip"
PACKED = {
    rb"\x1f\x8b\x08": "gzip", rb"PK\x03\x04": ZIP, rb"BZh[1-9]1AY&SY.{,16}[^\t-\r -~]": "bzip2",
    rb"\xfd7zXZ\0": "xz", rb"\(\xb5/\xfd": "zstd", rb"7z\xbc\xaf\x27\x1c": "7-Zip",
}  # fmt: skip
"""Formats of packed files by a pattern of their beginning."""
SIGNATURES = {
    rb"%PDF-\d\.\d\s+(%|\d+ \d+ obj)": "a PDF", rb"\x89PNG\r\n": "a PNG picture",
    rb"\xff\xd8\xff": "a JPEG picture", rb"ARROW1\0\0": "an Arrow file",
    rb"SQLite format 3\0": "an SQLite database", rb"\x93NUMPY": "an array of NumPy",
    rb"\x80[\x04\x05]\x95": "a pickle", rb"\x7fELF": "a program",
}  # fmt: skip
"""Other formats by a pattern of their beginning."""
SPREADSHEET_ADVICE = (
    "Open it and save the sheet as CSV UTF-8 (.csv), one header line above the rows"
)
TEXT_ADVICE = "Open it and save it as plain text in UTF-8 (.txt)"
OFFICE_FILES = {
    b"xl/workbook": ("is a spreadsheet", SPREADSHEET_ADVICE),
    b"opendocument.spreadsheet": ("is a spreadsheet", SPREADSHEET_ADVICE),
    b"word/document": ("is a document of a word processor", TEXT_ADVICE),
    b"opendocument.text": ("is a document of a word processor", TEXT_ADVICE),
}
"""Archives of office programs by what they name, packed or not: what they are, and what to do."""
MAX_SHOWN = 40
"""Characters of a word that are shown."""


def describe_undecodable(text: str) -> str:
    """Return what is wrong with a text that holds surrogates: the first byte, and its word as it
    reads in the usual encoding of Windows."""
    match = ESCAPED_BYTE.search(text)
    if match is None:
        return HALF_CHARACTER
    word = next(word for word in text.split() if ESCAPED_BYTE.search(word))
    shown = ESCAPED_BYTE.sub(lambda one: _decode_byte(_get_byte(one[0])), word[:MAX_SHOWN])
    byte = f"{BAD_BYTE} 0x{_get_byte(match[0]):02X}"
    # A word that is cut may end before the byte, and control characters say nothing.
    return f"{byte}, in {WINDOWS} {shown!r}" if shown.isprintable() else byte


def _get_byte(character: str) -> int:
    return ord(character) - 0xDC00


def _decode_byte(byte: int) -> str:
    return bytes([byte]).decode(WINDOWS, "replace")


def describe_other_format(path: Path) -> tuple[str, str] | None:
    """Return what a file is by its content, and what to do; None where that says nothing."""
    start = read_start(path)
    if start.startswith(LFS_POINTER) and LFS_KEY in start:
        return "is a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull"
    if start.startswith(OLD_OFFICE):
        return "is a document of an old Office", "Open it and save it as CSV or text in UTF-8"
    for signature, kind in PACKED.items():
        if re.match(signature, start, re.DOTALL):
            office = _find_office_file(path, start) if kind == ZIP else None
            return office or (f"is packed by {kind}", "Unpack it")
    for signature, kind in SIGNATURES.items():
        if re.match(signature, start):
            return f"is {kind}", "Name it by what it is, or give another file"
    return None


def _find_office_file(path: Path, start: bytes) -> tuple[str, str] | None:
    """Return what an archive of an office program is, and what to do; None of another archive."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        looked_at = start + file.read()
    return next((said for name, said in OFFICE_FILES.items() if name in looked_at), None)


def advise_on_encoding(path: Path) -> str:
    """Return what to do about a file in which a row could not be decoded.

    It is never to skip such rows: they are the ones with letters beyond ASCII. Where other lines
    have such letters in UTF-8, the file is damaged, and a conversion would damage those lines.
    """
    if not path.is_file():
        return "Correct it"
    other = describe_other_format(path)
    if other is not None:
        return f"Remove or replace {path.name}, which {other[0]}"
    if is_binary(read_start(path)):
        return f"Remove or replace {path.name}, which holds binary data"
    encoding = _guess_encoding(path)
    return "Correct it" if encoding is None else format_conversion(path, encoding)


def _guess_encoding(path: Path) -> str | None:
    """Return the likely encoding of a file that is not UTF-8; None where some of its lines are."""
    encoding = None
    with open(path, "rb") as file:
        for line in file:
            if line.isascii():
                continue
            if _is_in(line, "utf-8"):
                return None
            if encoding != DOS:
                encoding = WINDOWS if _is_in(line, WINDOWS) else DOS
    return encoding


def _is_in(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def is_binary(start: bytes) -> bool:
    """Return whether the first bytes of a file hold too many that no text holds."""
    return len(start) >= MIN_BYTES and len(CONTROL.findall(start)) > MAX_CONTROL * len(start)


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(START_BYTES)


def format_conversion(path: Path, encoding: str) -> str:
    """Return the command that writes a file anew in UTF-8, beside it."""
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    names = (shlex.quote(str(name)) for name in (path, new))
    likely = "" if encoding.startswith("UTF") else f"; it is likely {encoding}"
    return f"Save it as UTF-8{likely}: iconv -f {encoding} -t UTF-8 {' > '.join(names)}"
