"""The texts that adaptation reads, one after the other: a corpus never stands in memory."""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.data import Data, Table
from hftl.config.errors import suggest_closest
from hftl.data.load import BadRows, read_table
from hftl.data.normalization import find_text_fault
from hftl.data.tables import RawRow
from hftl.errors import DataError, RecipeError
from hftl.runtime.progress import open_bar

SURROGATES = re.compile("[\ud800-\udfff]")
"""What bytes that are not UTF-8 were read as."""
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters but for tab, line feed, form feed and carriage return; and what stands for
bytes that could not be decoded."""
MAX_CONTROL_SHARE = 0.1
"""A larger share of such characters is no text."""
BATCH_TEXTS, BATCH_CHARACTERS = 1000, 1_000_000
"""What is worked on at once; a longer document comes in pieces."""


def read_documents(data: Data, part: str, bad: BadRows) -> Iterator[str]:
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
            _require_text_columns(name, part, table.text_columns, raw)
        # Blank lines part the texts of a file, and say nothing of their own.
        if raw.fault is None and all(raw.values[column] == "" for column in table.text_columns):
            continue
        faults = (find_document_fault(column, raw.values[column]) for column in table.text_columns)
        why = raw.fault or next((why for why in faults if why), None)
        if why:
            bad.reject(raw.where, why)
            continue
        some = True
        yield from (_join_words(raw.values[column]) for column in table.text_columns)
    if not some:
        kind = "usable documents" if bad.count > before else "documents"
        raise DataError(f"data.{part}: {name} has no {kind}", "Check the file")


def batch_documents(texts: Iterable[str]) -> Iterator[list[tuple[int | None, str]]]:
    """Pieces of documents, some at a time: a few documents, or a part of a very long one.

    Each piece comes with the hash of its document's whole text, 64 bits, if it is the first of
    that document, else with None. A long text is cut before white space.
    """
    batch: list[tuple[int | None, str]] = []
    characters = 0
    for text in texts:
        content: int | None = _hash_document(text)
        for piece in _split_long_text(text):
            if len(batch) == BATCH_TEXTS or (batch and characters + len(piece) > BATCH_CHARACTERS):
                yield batch
                batch, characters = [], 0
            batch.append((content, piece))
            characters += len(piece)
            content = None
    if batch:
        yield batch


def _hash_document(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _split_long_text(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        stop = start + BATCH_CHARACTERS
        space = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
        stop = space if space > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _require_text_columns(name: str, part: str, columns: list[str], raw: RawRow) -> None:
    for column in columns:
        if column not in raw.values:
            has = [str(known) for known in raw.values]
            raise DataError(
                f"{name}: no column {column!r}{suggest_closest(column, has).replace('?', '')}"
                f"; it has {', '.join(has)}",
                f"Name the column of the texts: data.{part}.text=...",
            )


def _join_words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def find_document_fault(column: str, value: Any) -> str | None:
    """What makes a cell no text and no list of words, if anything."""
    words = isinstance(value, (list, tuple))
    why = find_text_fault(column, value, "token-classification" if words else "")
    if why:
        return why
    text = _join_words(value)
    if text.isascii() and text.isprintable():
        return None
    if SURROGATES.search(text):
        return "not valid UTF-8"
    if "\0" in text or len(CONTROL_CHARACTERS.findall(text)) > MAX_CONTROL_SHARE * len(text):
        return f"{column} is binary, not text"
    return None


# A corpus as blocks of token ids: tokenised once into files, read by memory mapping.
#
# Two passes, each over a bounded piece of the corpus at a time. The first tokenises every document
# into one stream. Then it is known which documents are copies and which are held out, and the
# second copies what is kept into a stream of its own for either side.


CORPUS_SPLITS = ("train", "held_out")
SPECIAL_TOKENS_FILE = "frame.json"
CONTINUES_WORD, STARTS_WORD, SEPARATOR = 0, 1, 2
"""What a token does: goes on with a word, starts one, or stands between two documents."""

CHUNK_TOKENS = 1 << 22
"""Tokens copied at once."""
DROPPED = -1
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples spread evenly, so few seeds hold out the same texts."""


@dataclass(frozen=True)
class BlockSpec:
    """How documents become blocks.

    Args:
        length: tokens of a block, special tokens included.
        pack: documents side by side in a block, or each on its own.
        held_out: share of the documents kept for the held-out loss.
        seed: which documents these are.
    """

    length: int
    pack: bool
    held_out: float
    seed: int


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens around every block, and the numpy type that holds a token id."""

    prefix: list[int]
    suffix: list[int]
    dtype: str


class TokenBlocks:
    """The blocks of one side, `train` or `held_out`, of a folder that `write_blocks` filled."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        self._frame = SpecialTokens(
            **json.loads((folder / SPECIAL_TOKENS_FILE).read_text(encoding="utf-8"))
        )
        # As plain arrays, for a slice of numpy's own memory-map class is slow.
        self._offsets = np.asarray(np.load(folder / f"{part}.npy", mmap_mode="r"))
        self._ids = np.asarray(np.memmap(folder / f"{part}.ids", self._frame.dtype, "r"))
        self._flags = np.asarray(np.memmap(folder / f"{part}.flags", np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of being sent what they hold.
        return TokenBlocks, (self.folder, self.part)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a block with its special tokens, and the number of each token's word.

        Both int64 (tokens,); words are counted inside the block, -1 for special tokens. A word
        that two blocks share is a word of each.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        text = slice(self._offsets[i], self._offsets[i + 1])
        flags = self._flags[text]
        before, after = self._frame.prefix, self._frame.suffix
        inside = slice(len(before), len(before) + len(flags))
        ids = np.empty(inside.stop + len(after), dtype=np.int64)
        ids[: inside.start], ids[inside], ids[inside.stop :] = before, self._ids[text], after
        words = np.full(len(ids), -1)
        numbers = np.cumsum(flags == STARTS_WORD) - (flags[0] != CONTINUES_WORD)
        words[inside] = np.where(flags == SEPARATOR, -1, numbers)
        return ids, words


def write_blocks(
    texts: Iterable[str], tokenizer: Any, cut: BlockSpec, drop: Callable[[str], bool], folder: Path
) -> dict[str, Any]:
    """Tokenises a corpus and writes its blocks into a folder, for `TokenBlocks` to read.

    Exact copies of an earlier document are dropped. Whether a document is held out is a function
    of its text and the seed, not of the order; at least one is, and one is not. Packed documents
    stand side by side with the special tokens between them that end a text.

    Args:
        texts: the documents; read once.
        tokenizer: a fast tokenizer of transformers.
        cut: how documents become blocks.
        drop: says of a text that it stands in validation or test, and must not be learnt from.
        folder: an empty folder.

    Returns:
        What is kept to train on: `read_documents`, `tokens` (of their texts) and `blocks`; the same with
        `held_out_` before the name; the documents dropped: `duplicates`, `leaked` and `empty` (of
        no token); and `fingerprint`, a hash of the set of kept documents.

    Raises:
        DataError: if there are fewer than two documents, or packed ones fill no block.
        RecipeError: if the tokenizer is not a fast one, or a block has no room for text.
    """
    frame = _find_special_tokens(tokenizer)
    payload = cut.length - len(frame.prefix) - len(frame.suffix)
    if payload < 1:
        raise RecipeError(
            f"data.max_length={cut.length} leaves no room beside the special tokens of a block",
            "Set it to 128, for instance",
        )
    gap = frame.suffix if cut.pack else []
    lengths, contents, leaked = _tokenize_documents(
        texts, tokenizer, drop, gap, frame.dtype, folder
    )
    sides, dropped = _split_documents(lengths, contents, cut, leaked)
    facts: dict[str, Any] = {**dropped, "fingerprint": _fingerprint_documents(contents[sides >= 0])}
    for side, part in enumerate(CORPUS_SPLITS):
        mine = lengths[sides == side]
        offsets = (
            _compute_packed_offsets(mine, payload, len(gap))
            if cut.pack
            else _compute_offsets(mine, payload)
        )
        if cut.pack and part == "train" and offsets[-1] - offsets[0] < payload:
            raise DataError(
                f"the corpus holds {mine.sum()} tokens, fewer than one block of {cut.length}",
                "Give more text, or set adapt.pack=false or a smaller data.max_length",
            )
        np.save(folder / f"{part}.npy", offsets)
        before = "" if part == "train" else f"{part}_"
        facts[f"{before}documents"] = len(mine)
        facts[f"{before}tokens"] = int(mine.sum())
        facts[f"{before}blocks"] = len(offsets) - 1
    _copy_splits(lengths + len(gap), sides, frame.dtype, folder)
    (folder / SPECIAL_TOKENS_FILE).write_text(json.dumps(vars(frame)), encoding="utf-8")
    return facts


def _find_special_tokens(tokenizer: Any) -> SpecialTokens:
    """What the tokenizer puts around a text.

    Raises:
        RecipeError: if the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise RecipeError(
            "the source model's tokenizer is not a fast one, so it does not say where words begin",
            "Give a source model with a tokenizer.json",
        )
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    return SpecialTokens(whole[:at], whole[at + len(bare) :], dtype)


def _tokenize_documents(
    texts: Iterable[str], tokenizer: Any, drop: Callable[[str], bool], gap: list[int], dtype: str,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """The first pass: writes every document as `gap` and its tokens, with a flag for each token.

    Returns:
        Each document's tokens without the gap, int64; the hash of its text, uint64; and how
        many were not written because `drop` said so.
    """
    lengths, contents, leaked = array("q"), array("Q"), 0

    def kept() -> Iterator[str]:
        nonlocal leaked
        for text in texts:
            if drop(text):
                leaked += 1
            else:
                yield text

    with (
        open(folder / "stream.ids", "wb") as ids,
        open(folder / "stream.flags", "wb") as flags,
        open_bar("corpus: documents", None) as advance,
    ):
        for batch in batch_documents(kept()):
            found = tokenizer(
                [piece for _, piece in batch], add_special_tokens=False, truncation=False,
                padding=False, return_attention_mask=False, return_token_type_ids=False,
                verbose=False,
            )  # fmt: skip
            rows = zip(batch, found["input_ids"], found.encodings, strict=True)
            for (content, _), tokens, encoding in rows:
                if content is not None:
                    contents.append(content)
                    lengths.append(0)
                    ids.write(np.array(gap, dtype).tobytes())
                    flags.write(bytes([SEPARATOR] * len(gap)))
                lengths[-1] += len(tokens)
                ids.write(np.array(tokens, dtype).tobytes())
                flags.write(_flag_word_starts(encoding.word_ids))
            advance(len(lengths))
    return np.array(lengths), np.array(contents), leaked


def _flag_word_starts(words: list[int | None]) -> bytes:
    """A flag for each token: whether its word is another than that of the token before."""
    numbers = np.array([-1 if word is None else word for word in words], dtype=np.int64)
    flags = np.full(len(numbers), STARTS_WORD, dtype=np.uint8)
    flags[1:][numbers[1:] == numbers[:-1]] = CONTINUES_WORD
    return flags.tobytes()


def _split_documents(
    lengths: np.ndarray, contents: np.ndarray, cut: BlockSpec, leaked: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which side each document is on, as an index of `CORPUS_SPLITS` or -1, and what was dropped.

    Raises:
        DataError: if there is not a document for either side.
    """
    _, first = np.unique(contents, return_index=True)
    distinct = np.zeros(len(contents), dtype=bool)
    distinct[first] = True
    kept = np.flatnonzero(distinct & (lengths > 0))
    dropped = {
        "duplicates": len(contents) - len(first),
        "leaked": leaked,
        "empty": len(first) - len(kept),
    }
    if len(kept) < 2:
        documents = "1 document" if len(kept) else "no documents"
        besides = ", ".join(f"{count} {why}" for why, count in dropped.items() if count)
        raise DataError(
            f"the corpus has {documents}{f' (dropped: {besides})' if besides else ''}, at least 2 "
            "are needed: one is held out",
            "Give more text",
        )
    # The hashes are uniform, so turning them all by one step makes another uniform order.
    order = contents[kept] + np.uint64(cut.seed * GOLDEN_RATIO_64 % 2**64)
    held_out = order < np.uint64(int(cut.held_out * 2**64))
    held_out[order.argmin()], held_out[order.argmax()] = True, False
    sides = np.full(len(contents), DROPPED, dtype=np.int8)
    sides[kept] = held_out
    return sides, dropped


def _fingerprint_documents(contents: np.ndarray) -> str:
    """A hash of a set of hashes, whatever their order."""
    return hashlib.sha256(np.sort(contents).astype("<u8").tobytes()).hexdigest()


def _compute_packed_offsets(lengths: np.ndarray, payload: int, gap: int) -> np.ndarray:
    """The bounds of blocks of documents side by side; the gap before the first belongs to none."""
    total = lengths.sum() + (len(lengths) - 1) * gap
    return gap + _compute_offsets(np.array([total]), payload)


def _compute_offsets(lengths: np.ndarray, payload: int) -> np.ndarray:
    """Where each block begins, and the last ends, if every text is cut on its own; int64."""
    blocks = -(-lengths // payload)
    number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    begins = np.repeat(np.cumsum(lengths) - lengths, blocks) + number * payload
    return np.append(begins, lengths.sum())


def _copy_splits(spans: np.ndarray, sides: np.ndarray, dtype: str, folder: Path) -> None:
    """The second pass: gives each side the documents that are its own; removes the stream.

    Args:
        spans: tokens of each document in the stream, gap included.
        sides: the side of each document.
        dtype: of a token id.
        folder: where the stream lies.
    """
    ends = np.cumsum(spans)
    for kind, item in (("ids", dtype), ("flags", "uint8")):
        source = folder / f"stream.{kind}"
        outs = [open(folder / f"{part}.{kind}", "wb") for part in CORPUS_SPLITS]
        with open(source, "rb") as stream, outs[0], outs[1]:
            for start in range(0, int(ends[-1]), CHUNK_TOKENS):
                values = np.fromfile(stream, item, CHUNK_TOKENS)
                side = _split_tokens(ends, sides, start, start + len(values))
                for number, out in enumerate(outs):
                    values[side == number].tofile(out)
        source.unlink()


def _split_tokens(ends: np.ndarray, sides: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The side of each of the stream's tokens from start to stop."""
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    bounds = np.minimum(ends[first : last + 1], stop)
    return np.repeat(sides[first : last + 1], np.diff(bounds, prepend=start))
