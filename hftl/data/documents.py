"""The texts that adaptation reads, one after the other: a corpus never stands in memory."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hftl.data.cells import text_fault
from hftl.data.files import Raw
from hftl.data.load import BadRows, read_table
from hftl.errors import DataError
from hftl.explain import closest
from hftl.sections.data import Data, Table

UNDECODED = re.compile("[\ud800-\udfff]")
"""What bytes that are not UTF-8 were read as."""
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters but for tab, line feed, form feed and carriage return; and what stands for
bytes that could not be decoded."""
MOST_CONTROL = 0.1
"""A larger share of such characters is no text."""
BATCH_TEXTS, BATCH_CHARACTERS = 1000, 1_000_000
"""What is worked on at once; a longer document comes in pieces."""


def documents(data: Data, part: str, bad: BadRows) -> Iterator[str]:
    """The texts of one table, streamed; labels are not looked at.

    Two text columns give two documents a row, a list of words is joined by spaces, and a folder
    given for `unlabeled` or `general` holds one document a file, at any depth.

    Args:
        data: the recipe's section.
        part: `unlabeled`, `general` or `train`, which has a table of its own.
        bad: what to do with a row that is empty, no text, or binary.

    Raises:
        DataError: if the file or a column is missing, or no document is left.
    """
    table: Table = getattr(data, part)
    name, raws = read_table(table, part, "text")
    some, before = False, bad.count
    for number, raw in enumerate(raws):
        if number == 0:
            _need_columns(name, part, table.texts, raw)
        # Blank lines part the texts of a file, and say nothing of their own.
        if raw.fault is None and all(raw.values[column] == "" for column in table.texts):
            continue
        faults = (document_fault(column, raw.values[column]) for column in table.texts)
        why = raw.fault or next((why for why in faults if why), None)
        if why:
            bad.reject(raw.where, why)
            continue
        some = True
        yield from (_text(raw.values[column]) for column in table.texts)
    if not some:
        kind = "usable documents" if bad.count > before else "documents"
        raise DataError(f"data.{part}: {name} has no {kind}", "Check the file")


def batches(texts: Iterable[str]) -> Iterator[list[tuple[int | None, str]]]:
    """Pieces of documents, some at a time: a few documents, or a part of a very long one.

    Each piece comes with the hash of its document's whole text, 64 bits, if it is the first of
    that document, else with None. A long text is cut before white space.
    """
    batch: list[tuple[int | None, str]] = []
    characters = 0
    for text in texts:
        content: int | None = _content(text)
        for piece in _pieces(text):
            if len(batch) == BATCH_TEXTS or (batch and characters + len(piece) > BATCH_CHARACTERS):
                yield batch
                batch, characters = [], 0
            batch.append((content, piece))
            characters += len(piece)
            content = None
    if batch:
        yield batch


def _content(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        stop = start + BATCH_CHARACTERS
        space = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
        stop = space if space > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _need_columns(name: str, part: str, columns: list[str], raw: Raw) -> None:
    for column in columns:
        if column not in raw.values:
            has = [str(known) for known in raw.values]
            raise DataError(
                f"{name}: no column {column!r}{closest(column, has).replace('?', '')}"
                f"; it has {', '.join(has)}",
                f"Name the column of the texts: data.{part}.text=...",
            )


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def document_fault(column: str, value: Any) -> str | None:
    """What makes a cell no text and no list of words, if anything."""
    words = isinstance(value, (list, tuple))
    why = text_fault(column, value, "token-classification" if words else "")
    if why:
        return why
    text = _text(value)
    if text.isascii() and text.isprintable():
        return None
    if UNDECODED.search(text):
        return "not valid UTF-8"
    if "\0" in text or len(CONTROL.findall(text)) > MOST_CONTROL * len(text):
        return f"{column} is binary, not text"
    return None
