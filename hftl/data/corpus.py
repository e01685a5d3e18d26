"""Stream the texts of a corpus and store them as blocks of token ids: it is never in memory.

`write_blocks` passes twice over the corpus, a bounded piece at a time. The first pass tokenizes
every document into one stream. Then it is known which documents are copies and which are held out,
and the second pass copies the others into one stream for each split. `TokenBlocks` maps the files.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hftl.errors import DataError, RecipeError
from hftl.plurals import count_noun
from hftl.runtime.progress import open_bar

BATCH_TEXTS, BATCH_CHARACTERS = 1000, 1_000_000
"""Pieces that are tokenized at once; a longer document is split."""
CHUNK_TOKENS = 1 << 22
"""Tokens copied at once."""

CORPUS_SPLITS = ("train", "held_out")
SPECIAL_TOKENS_FILE = "frame.json"
CONTINUES_WORD, STARTS_WORD, SEPARATOR = 0, 1, 2
"""The flag of a token: it continues a word, starts one, or is between two documents."""
DROPPED = -1
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples spread evenly, so few seeds hold out the same texts."""


def batch_documents(texts: Iterable[str]) -> Iterator[list[tuple[int | None, str]]]:
    """Yield lists of pieces of documents: a few documents, or a part of a very long one.

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


@dataclass(frozen=True)
class BlockSpec:
    """Describe how documents become blocks.

    Args:
        length: tokens of a block, special tokens included.
        pack: put documents side by side in a block, or each in its own blocks.
        held_out: share of the documents kept for the held-out loss.
        seed: decides which documents these are.
        separator: token between packed documents; None: the special tokens that end a text.
    """

    length: int
    pack: bool
    held_out: float
    seed: int
    separator: int | None = None


@dataclass(frozen=True)
class SpecialTokens:
    """Hold the special tokens around every block, and the numpy type of a token id."""

    prefix: list[int]
    suffix: list[int]
    dtype: str


@dataclass(frozen=True)
class CorpusCounts:
    """Count the documents of a corpus, their tokens and blocks, and what was dropped.

    `duplicates`, `leaked` and `empty` (without a token) are dropped documents; `fingerprint` is a
    hash of the set of the others.
    """

    documents: int
    tokens: int
    blocks: int
    held_out_documents: int
    held_out_tokens: int
    held_out_blocks: int
    duplicates: int
    leaked: int
    empty: int
    fingerprint: str


class TokenBlocks:
    """Map the blocks of one split, `train` or `held_out`, that `write_blocks` left in a folder."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        special = json.loads((folder / SPECIAL_TOKENS_FILE).read_text(encoding="utf-8"))
        self._special = SpecialTokens(**special)
        # As plain arrays, because slicing numpy's memory-map class is slow.
        self._offsets = np.asarray(np.load(folder / f"{split}.npy", mmap_mode="r"))
        self._ids = np.asarray(np.memmap(folder / f"{split}.ids", self._special.dtype, "r"))
        self._flags = np.asarray(np.memmap(folder / f"{split}.flags", np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of receiving their content.
        return TokenBlocks, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a block with its special tokens, and each token's word number.

        Both int64 (tokens,); words are counted inside the block, -1 for special tokens. A word
        that two blocks share is a word of each.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        span = slice(self._offsets[i], self._offsets[i + 1])
        flags = self._flags[span]
        prefix, suffix = self._special.prefix, self._special.suffix
        inside = slice(len(prefix), len(prefix) + len(flags))
        ids = np.empty(inside.stop + len(suffix), dtype=np.int64)
        ids[: inside.start], ids[inside], ids[inside.stop :] = prefix, self._ids[span], suffix
        words = np.full(len(ids), -1)
        numbers = np.cumsum(flags == STARTS_WORD) - (flags[0] != CONTINUES_WORD)
        words[inside] = np.where(flags == SEPARATOR, -1, numbers)
        return ids, words


def write_blocks(
    texts: Iterable[str], tokenizer: Any, spec: BlockSpec, drop: Callable[[str], bool], folder: Path
) -> CorpusCounts:
    """Tokenize a corpus and write its blocks into a folder, for `TokenBlocks` to read.

    Exact copies of an earlier document are dropped. Whether a document is held out is a function
    of its text and the seed, not of the order; at least one is, and one is not. Packed documents
    are separated by `separator`.

    Args:
        texts: the documents; read once.
        tokenizer: a fast tokenizer of transformers.
        spec: how documents become blocks.
        drop: whether a text is in validation or test, and must not be trained on.
        folder: an empty folder.

    Raises:
        DataError: if there are fewer than two documents, or packed ones fill no block.
        RecipeError: if the tokenizer is not a fast one, or a block has no room for text.
    """
    special = _find_special_tokens(tokenizer)
    payload = spec.length - len(special.prefix) - len(special.suffix)
    if payload < 1:
        raise RecipeError(
            f"data.max_length={spec.length} leaves no room beside the special tokens of a block",
            "Set it to 128, for instance",
        )
    gap = special.suffix if spec.separator is None else [spec.separator]
    gap = gap if spec.pack else []
    lengths, contents, leaked = _tokenize_documents(
        texts, tokenizer, drop, gap, special.dtype, folder
    )
    splits, counts = _split_documents(lengths, contents, spec, leaked)
    for number, split in enumerate(CORPUS_SPLITS):
        tokens = lengths[splits == number]
        if spec.pack:
            offsets = _compute_packed_offsets(tokens, payload, len(gap))
        else:
            offsets = _compute_offsets(tokens, payload)
        if spec.pack and split == "train" and offsets[-1] - offsets[0] < payload:
            raise DataError(
                f"the corpus holds {tokens.sum()} tokens, fewer than one block of {spec.length}",
                "Give more text, or set adapt.pack=false or a smaller data.max_length",
            )
        np.save(folder / f"{split}.npy", offsets)
        prefix = "" if split == "train" else f"{split}_"
        counts[f"{prefix}documents"] = len(tokens)
        counts[f"{prefix}tokens"] = int(tokens.sum())
        counts[f"{prefix}blocks"] = len(offsets) - 1
    _copy_splits(lengths + len(gap), splits, special.dtype, folder)
    (folder / SPECIAL_TOKENS_FILE).write_text(json.dumps(asdict(special)), encoding="utf-8")
    return CorpusCounts(**counts, fingerprint=_fingerprint_documents(contents[splits >= 0]))


def _find_special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens that the tokenizer puts around a text.

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
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    return SpecialTokens(whole[:start], whole[start + len(bare) :], dtype)


def _tokenize_documents(
    texts: Iterable[str], tokenizer: Any, drop: Callable[[str], bool], gap: list[int], dtype: str,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """Write every document as `gap` and its tokens, with a flag for each token: the first pass.

    Returns:
        Each document's tokens without the gap, int64; the hash of its text, uint64; and how
        many were not written because of `drop`.
    """
    lengths, contents, leaked = array("q"), array("Q"), 0

    def filter_texts() -> Iterator[str]:
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
        for batch in batch_documents(filter_texts()):
            encoding = tokenizer(
                [piece for _, piece in batch], add_special_tokens=False, truncation=False,
                padding=False, return_attention_mask=False, return_token_type_ids=False,
                verbose=False,
            )  # fmt: skip
            rows = zip(batch, encoding["input_ids"], encoding.encodings, strict=True)
            for (content, _), tokens, row in rows:
                if content is not None:
                    contents.append(content)
                    lengths.append(0)
                    ids.write(np.array(gap, dtype).tobytes())
                    flags.write(bytes([SEPARATOR] * len(gap)))
                lengths[-1] += len(tokens)
                ids.write(np.array(tokens, dtype).tobytes())
                flags.write(_flag_word_starts(row.word_ids))
            advance(len(lengths))
    return np.array(lengths), np.array(contents), leaked


def _flag_word_starts(words: list[int | None]) -> bytes:
    """Return a flag for each token: whether its word differs from that of the token before."""
    numbers = np.array([-1 if word is None else word for word in words], dtype=np.int64)
    flags = np.full(len(numbers), STARTS_WORD, dtype=np.uint8)
    flags[1:][numbers[1:] == numbers[:-1]] = CONTINUES_WORD
    return flags.tobytes()


def _split_documents(
    lengths: np.ndarray, contents: np.ndarray, spec: BlockSpec, leaked: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Return each document's split, as an index of `CORPUS_SPLITS` or -1, and what was dropped.

    Raises:
        DataError: if there is not a document for each split.
    """
    _, first = np.unique(contents, return_index=True)
    is_first = np.zeros(len(contents), dtype=bool)
    is_first[first] = True
    remaining = np.flatnonzero(is_first & (lengths > 0))
    dropped = {
        "duplicates": len(contents) - len(first),
        "leaked": leaked,
        "empty": len(first) - len(remaining),
    }
    if len(remaining) < 2:
        documents = "1 document" if len(remaining) else "no documents"
        copies = dropped.pop("duplicates")
        parts = [count_noun(copies, "duplicate")] if copies else []
        listed = ", ".join(parts + [f"{count} {why}" for why, count in dropped.items() if count])
        raise DataError(
            f"the corpus has {documents}{f' (dropped: {listed})' if listed else ''}, at least 2 "
            "are needed: one is held out",
            "Give more text",
        )
    # The hashes are uniform, so adding the same number to all of them, modulo 2^64, gives another
    # uniform order.
    order = contents[remaining] + np.uint64(spec.seed * GOLDEN_RATIO_64 % 2**64)
    is_held_out = order < np.uint64(int(spec.held_out * 2**64))
    is_held_out[order.argmin()], is_held_out[order.argmax()] = True, False
    splits = np.full(len(contents), DROPPED, dtype=np.int8)
    splits[remaining] = is_held_out
    return splits, dropped


def _fingerprint_documents(contents: np.ndarray) -> str:
    """Return a hash of a set of hashes, whatever their order."""
    return hashlib.sha256(np.sort(contents).astype("<u8").tobytes()).hexdigest()


def _compute_packed_offsets(lengths: np.ndarray, payload: int, gap: int) -> np.ndarray:
    """Return the bounds of blocks of packed documents; the gap before the first is in none."""
    total = lengths.sum() + (len(lengths) - 1) * gap
    return gap + _compute_offsets(np.array([total]), payload)


def _compute_offsets(lengths: np.ndarray, payload: int) -> np.ndarray:
    """Return where each block begins and the last ends, if every text is cut on its own; int64."""
    blocks = -(-lengths // payload)
    number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    begins = np.repeat(np.cumsum(lengths) - lengths, blocks) + number * payload
    return np.append(begins, lengths.sum())


def _copy_splits(spans: np.ndarray, splits: np.ndarray, dtype: str, folder: Path) -> None:
    """Copy its documents to each split and remove the stream: the second pass.

    Args:
        spans: tokens of each document in the stream, gap included.
        splits: the split of each document.
        dtype: of a token id.
        folder: where the stream is.
    """
    ends = np.cumsum(spans)
    for kind, item in (("ids", dtype), ("flags", "uint8")):
        source = folder / f"stream.{kind}"
        outputs = [open(folder / f"{split}.{kind}", "wb") for split in CORPUS_SPLITS]
        with open(source, "rb") as stream, outputs[0], outputs[1]:
            for start in range(0, int(ends[-1]), CHUNK_TOKENS):
                values = np.fromfile(stream, item, CHUNK_TOKENS)
                by_token = _split_tokens(ends, splits, start, start + len(values))
                for number, output in enumerate(outputs):
                    values[by_token == number].tofile(output)
        source.unlink()


def _split_tokens(ends: np.ndarray, splits: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the split of each of the stream's tokens from start to stop."""
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    bounds = np.minimum(ends[first : last + 1], stop)
    return np.repeat(splits[first : last + 1], np.diff(bounds, prepend=start))
