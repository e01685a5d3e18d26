"""Hold the rows of a table: as a reader yields them, as later stages use them, and as a file.

Text files are opened here too, for a `RawRow` relies on how: bytes that are not UTF-8 survive as
surrogates, so that the row which holds them can be named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hftl.data.encodings import (
    BAD_BYTE,
    SURROGATES,
    advise_on_encoding,
    describe_undecodable,
    format_conversion,
)
from hftl.data.facts import BadRow, Modality
from hftl.errors import DataError
from hftl.plurals import count_noun

MAX_LISTED_ROWS = 10_000
"""Bad rows that are listed, at most; all are counted."""
ROWS_FILE = "rows.parquet"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF32_MARKS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
MAX_NAMED_ROWS = 3
"""Bad rows that a message names, at most."""

Label = str | float | tuple[str, ...]
"""A class name, a regression target, the sorted names that hold, or a tag for each word."""
Levels = tuple[int, int]
"""The darkest and the brightest value of an image in 8 bits, over all channels."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """Describe a row as the file has it, with every line ending as a line feed.

    `where` names the file and line for messages; `fault` says why the row cannot be read, if so.
    """

    values: Mapping[str, object]
    index: int
    where: str
    fault: str | None = None

    def __post_init__(self) -> None:
        # Byte-level tokenizers see other tokens where a carriage return stands, and csv readers end
        # a row at one that is not quoted: the same text must not depend on who saved it.
        values = {name: normalize_newlines(value) for name, value in self.values.items()}
        object.__setattr__(self, "values", values)
        # The name of a file may be no UTF-8, and what names its row is stored and printed.
        where = self.where.encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, "where", where)


@dataclass(frozen=True, slots=True)
class Row:
    """Describe one example.

    `content` is its texts, its words, or the hash of its image. `index` is its place in its table,
    counted from 0, and `table` is the recipe's name of that table. `size` is an image's width and
    height in pixels.
    """

    content: tuple[str, ...]
    label: Label
    group: str | None
    index: int
    where: str
    table: str = "train"
    size: tuple[int, int] | None = None
    perceptual_hash: int | None = field(default=None, compare=False)
    thumbnail: bytes | None = field(default=None, compare=False)
    # Known only while the data are prepared, and not stored.
    levels: Levels | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Describe an image: a hash of its pixels, its (width, height), levels, perceptual hash and
    grey thumbnail.

    The last two are None for a flat image.
    """

    content: str
    size: tuple[int, int]
    levels: Levels
    perceptual_hash: int | None = None
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class InputSpec:
    """Describe what the encoder reads: `text` or `image`, and the side of a patch in pixels."""

    modality: Modality = "text"
    patch_size: int = 1


@dataclass
class BadRows:
    """Collect rows that cannot be used: they stop the run, unless they are skipped.

    `fix` tells the user what to do about those that stop the run.
    """

    skip: bool = False
    fix: str = "Correct it, or set data.bad_rows=skip"
    count: int = 0
    dropped: list[BadRow] = field(default_factory=list)

    def note(self, where: str, why: str) -> None:
        """Drop a row and list it."""
        self.count += 1
        if self.count <= MAX_LISTED_ROWS:
            self.dropped.append(BadRow(where=where, why=why))

    def reject(self, where: str, why: str, path: Path | None = None) -> None:
        """Drop a row and list it; without skipping it is the only one.

        Args:
            where: its file and line.
            why: it cannot be used.
            path: of its table, which is read again where a row could not be decoded.

        Raises:
            DataError: unless bad rows are skipped.
        """
        self.note(where, why)
        self.refuse(path)

    def refuse(self, path: Path | None = None) -> None:
        """Stop where rows were dropped, and are not to be skipped.

        Raises:
            DataError: naming the first few, and how many there are.
        """
        if self.skip or not self.count:
            return
        first, *others = self.dropped[:MAX_NAMED_ROWS]
        what = f"{first.where}: {first.why}"
        if others:
            named = ", ".join(f"{row.where} ({row.why})" for row in others)
            these = ", such as" if self.count > MAX_NAMED_ROWS else ":"
            what += f"; and {count_noun(self.count - 1, 'more bad row')}{these} {named}"
        raise DataError(what, self.choose_fix(path))

    def choose_fix(self, path: Path | None = None) -> str:
        """Return what to do: about rows that could not be decoded never to skip them."""
        row = next((row for row in self.dropped if BAD_BYTE in row.why), None)
        if row is None:
            return self.fix if self.count < 2 else self.fix.replace("Correct it", "Correct them")
        if path is None:
            return "Correct it"
        return advise_on_encoding(path / row.where if path.is_dir() else path)


def normalize_newlines(value: Any) -> Any:
    """Return a text, or a list of texts, with CRLF and CR replaced by line feeds."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    # Long lists of numbers, such as embeddings, are left alone: they would take most of the time.
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, list, tuple)):
        texts = [normalize_newlines(item) for item in value]
        return texts if isinstance(value, list) else tuple(texts)
    return value


def list_words(cell: object) -> list[str]:
    """Return a cell that is known to hold a list of words, as its words."""
    assert isinstance(cell, (list, tuple))
    return [str(word) for word in cell]


def open_text(path: Path) -> TextIO:
    """Open a text file in UTF-8, or in UTF-16 with a mark of its byte order; line ends stay.

    Raises:
        DataError: if the file is UTF-32, or UTF-16 that ends within a character.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start in UTF32_MARKS:
        raise DataError(f"{path.name} is UTF-32", format_conversion(path, "UTF-32"))
    if start[:2] not in UTF16_MARKS:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    if path.stat().st_size % 2:
        raise DataError(
            f"{path.name} is UTF-16 and ends within a character", "Save it again, as UTF-8"
        )
    return open(path, encoding="utf-16", errors="surrogatepass", newline="")


def find_encoding_fault(*cells: object) -> str | None:
    """Return what is wrong with the first text in cells that could not be decoded, if any."""
    texts = (leaf for leaf in iterate_leaves(cells) if isinstance(leaf, str))
    text = next(filter(SURROGATES.search, texts), None)
    return None if text is None else describe_undecodable(text)


def find_reading_fault(raw: RawRow) -> str | None:
    """Return why a row cannot be read whatever its columns mean, if so."""
    return raw.fault or find_encoding_fault(*raw.values.values())


def has_invalid_utf8(cell: object) -> bool:
    """Return whether a text in a cell holds bytes that were not UTF-8, or half a character."""
    return any(isinstance(leaf, str) and SURROGATES.search(leaf) for leaf in iterate_leaves(cell))


def iterate_leaves(cell: object) -> Iterator[object]:
    """Yield what a cell holds at any depth, the keys of objects too."""
    if isinstance(cell, dict):
        yield from cell
        cell = list(cell.values())
    if isinstance(cell, (list, tuple)):
        for item in cell:
            yield from iterate_leaves(item)
    else:
        yield cell


def write_rows(splits: Mapping[str, list[Row]], folder: Path) -> None:
    """Write the rows of each split, in their order, as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = [(split, row) for split, rows in splits.items() for row in rows]
    columns: dict[str, list[Any]] = {
        "split": [split for split, _ in pairs],
        "row": [row.index for _, row in pairs],
        "where": [row.where for _, row in pairs],
        "content": [list(row.content) for _, row in pairs],
        "label": [row.label for _, row in pairs],
        "group": [row.group for _, row in pairs],
        "table": [row.table for _, row in pairs],
        "size": [row.size for _, row in pairs],
        # Numbers of 64 bits without a sign, a type that is not inferred of Python's.
        "perceptual_hash": pa.array([row.perceptual_hash for _, row in pairs], pa.uint64()),
        "thumbnail": pa.array([row.thumbnail for _, row in pairs], pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / ROWS_FILE)


def read_rows(folder: Path, splits: Sequence[str]) -> dict[str, list[Row]]:
    """Return the rows that `write_rows` wrote, by split."""
    import pyarrow.parquet as pq

    rows: dict[str, list[Row]] = {split: [] for split in splits}
    for entry in pq.read_table(folder / ROWS_FILE).to_pylist():
        label = tuple(entry["label"]) if isinstance(entry["label"], list) else entry["label"]
        size = tuple(entry["size"]) if entry["size"] else None
        rows[entry["split"]].append(
            Row(tuple(entry["content"]), label, entry["group"], entry["row"], entry["where"],
                entry["table"], size, entry.get("perceptual_hash"),
                thumbnail=entry.get("thumbnail"))
        )  # fmt: skip
    return rows
