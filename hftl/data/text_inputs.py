"""Encode texts as token ids, and pad batches to their longest row.

`TextInputs` is what `ImageInputs` is for images: it encodes rows, collates batches, splits outputs
by row and saves the preprocessing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.rows import Row
from hftl.errors import DataError
from hftl.runtime.run_folder import fingerprint
from hftl.train.hf_compat import set_backend_tokenizer

IGNORE_INDEX = -100
"""The class id of an element without a label, which cross-entropy passes over."""
EncodedValue = list[int] | np.ndarray | Tensor
EncodedRow = dict[str, EncodedValue]
"""The inputs of one row by the names of the model's arguments, and its `labels` in training."""
Augmentation = Callable[[EncodedRow, int, bytes], EncodedRow]
"""A function of an encoded row, the epoch and the row's key."""

_RULES: dict[bytes, str] = {}
"""Hashes of rules by that of all that a tokenizer writes: siblings share theirs, and sorting a
vocabulary takes 50 ms."""


@dataclass(frozen=True)
class TextInputs:
    """Encode a text or a pair of texts as token ids, truncated to `max_length` tokens."""

    tokenizer: Any
    max_length: int
    forward_facts: ClassVar[None] = None
    """Nothing besides texts is given to the model."""

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Return the token ids of each row, not padded.

        Raises:
            DataError: if a text has no token.
        """
        if not rows:
            return []
        encoded = self._split_encoding(
            self.tokenizer(
                *_list_columns(rows), truncation=True, max_length=self.max_length, padding=False
            )
        )
        # A decoder's tokenizer may put nothing around a text.
        for row, inputs in zip(rows, encoded, strict=True):
            if not inputs["input_ids"]:
                raise DataError(
                    f"{row.where}: the source model's tokenizer makes no token of the text",
                    "Remove the row",
                )
        return encoded

    def length(self, encoded: EncodedRow) -> int:
        """Return the tokens of a row, the cost of its forward pass."""
        return len(encoded["input_ids"])

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Return tensors (batch, longest row); labels int64 (batch,), or float32 (batch, ...)."""
        return add_labels(self._pad(rows), rows)

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """Return the values (batch, width) row by row, each (1, width)."""
        return list(values.split(1))

    def hash_preprocessing(self) -> str:
        """Return the hash of all that makes token ids of a text, but for their number."""
        written = _hash_rules(self.tokenizer.backend_tokenizer.to_str())
        special = {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()}
        names = list(self.tokenizer.model_input_names)
        return fingerprint({"rules": written, "special": special, "inputs": names})

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Return median and largest length in tokens, share of truncated rows and share of unknown
        tokens."""
        encoding = self.tokenizer(*_list_columns(rows), truncation=False, verbose=False)
        return self._summarize_ids(encoding["input_ids"])

    def _split_encoding(self, encoding: Any) -> list[EncodedRow]:
        keys = [key for key in self.tokenizer.model_input_names if key in encoding]
        return [{key: encoding[key][i] for key in keys} for i in range(len(encoding["input_ids"]))]

    def _summarize_ids(self, ids: list[list[int]]) -> dict[str, float]:
        lengths = sorted(map(len, ids))
        unknown = sum(row.count(self.tokenizer.unk_token_id) for row in ids)
        return {
            "median_tokens": lengths[len(lengths) // 2],
            "max_tokens": self.max_length,
            "truncated": sum(length > self.max_length for length in lengths) / len(lengths),
            "unknown_tokens": unknown / max(1, sum(lengths)),
        }

    def _pad(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Pad on the right and add the mask of the padding, whatever the tokenizer's settings.

        Padding on the left moves a text's first token and its positions by the length of its
        neighbours, and without the mask the encoder reads the padding.
        """
        names = self.tokenizer.model_input_names
        inputs = [{k: v for k, v in row.items() if k in names} for row in rows]
        return dict(
            self.tokenizer.pad(
                inputs, padding_side="right", return_attention_mask=True, return_tensors="pt"
            )
        )


@dataclass(frozen=True)
class WordInputs(TextInputs):
    """Encode texts that are given as words, each with a label.

    A word is predicted at its first token. `words` in an encoded row holds the position of that
    token, -1 where the word was cut off.
    """

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Return the token ids of each row and where its words begin."""
        if not rows:
            return []
        encoding = self.tokenizer(
            [list(row.content) for row in rows], is_split_into_words=True,
            truncation=True, max_length=self.max_length, padding=False,
        )  # fmt: skip
        return [
            encoded | {"words": find_first_tokens(encoding.word_ids(i), len(rows[i].content))}
            for i, encoded in enumerate(self._split_encoding(encoding))
        ]

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Return tensors (batch, longest row); labels int64 of the same shape, -100 off words."""
        batch = self._pad(rows)
        if "labels" not in rows[0]:
            return batch
        labels = torch.full(batch["input_ids"].shape, IGNORE_INDEX)
        for number, row in enumerate(rows):
            positions = np.asarray(row["words"])
            is_present = positions >= 0
            own = np.asarray(row["labels"])
            labels[number, positions[is_present]] = torch.from_numpy(own[is_present])
        batch["labels"] = labels
        return batch

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """Return the values (batch, length, width) at each row's words, (words, width).

        A word that was cut off has NaN.
        """
        outputs = []
        for value, row in zip(values, rows, strict=True):
            positions = torch.as_tensor(row["words"])
            picked = value.new_full((len(positions), value.shape[-1]), float("nan"))
            picked[positions >= 0] = value[positions[positions >= 0].to(value.device)]
            outputs.append(picked)
        return outputs

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Return the same as for texts."""
        words = [list(row.content) for row in rows]
        encoding = self.tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
        return self._summarize_ids(encoding["input_ids"])


def _list_columns(rows: list[Row]) -> list[list[str]]:
    """Return the texts column by column, one column or two."""
    return [list(column) for column in zip(*(row.content for row in rows), strict=True)]


def check_embedded(
    rows: list[Row], encoded: list[EncodedRow], tokenizer: Any, embedded: int
) -> None:
    """Refuse a row with a token that a model does not embed.

    Args:
        rows: the texts.
        encoded: their token ids.
        tokenizer: which made them.
        embedded: the number of tokens that the model embeds.

    Raises:
        DataError: naming the first such row.
    """
    for row, inputs in zip(rows, encoded, strict=True):
        largest = int(max(inputs["input_ids"]))
        if largest >= embedded:
            raise DataError(
                f"{row.where}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has the "
                f"number {largest}, and the model embeds {embedded} tokens; its tokenizer has "
                f"{len(tokenizer)}",
                "Give a model with embeddings for all tokens (resize_token_embeddings), or with "
                "its own tokenizer",
            )


def add_labels(batch: dict[str, Tensor], rows: list[EncodedRow]) -> dict[str, Tensor]:
    """Return the batch with its rows' labels stacked, if they have any."""
    if "labels" in rows[0]:
        batch["labels"] = torch.from_numpy(np.stack([row["labels"] for row in rows]))
    return batch


def build_word_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """Return the tokenizer for texts that are given as words.

    A byte-level tokenizer (RoBERTa, ModernBERT) reads a word without a space before it as the
    continuation of the word before; this one adds the space.
    """
    if not _lacks_prefix_space(tokenizer):
        return tokenizer
    spaced: Any = type(tokenizer).from_pretrained(
        folder, add_prefix_space=True, padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names, pad_token=tokenizer.pad_token,
    )  # fmt: skip
    if _lacks_prefix_space(spaced):
        # A tokenizer.json without a class of its own ignores the argument.
        state = json.loads(spaced.backend_tokenizer.to_str())
        for step in _find_byte_level_steps(state["pre_tokenizer"]):
            step["add_prefix_space"] = True
        set_backend_tokenizer(spaced, json.dumps(state))
    return spaced


def _lacks_prefix_space(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps = _find_byte_level_steps(json.loads(backend.to_str())["pre_tokenizer"])
    return any(not step["add_prefix_space"] for step in steps)


class _ByteLevelStep(TypedDict):
    """Hold the entries of a pre-tokenizer's step that are read and set here."""

    type: str
    add_prefix_space: bool


def _find_byte_level_steps(state: Any) -> list[_ByteLevelStep]:
    """Return the byte-level steps of a pre-tokenizer's state."""
    if not state:
        return []
    steps = state.get("pretokenizers", [state])
    return [step for step in steps if step["type"] == "ByteLevel"]


def find_first_tokens(word_ids: list[int | None], words: int) -> list[int]:
    """Return the position of each word's first token, -1 where it has none."""
    positions = [-1] * words
    for position in reversed(range(len(word_ids))):
        word = word_ids[position]
        if word is not None:
            positions[word] = position
    return positions


class EncodedDataset(Dataset):
    """Hold encoded rows with their labels, for the Trainer.

    Args:
        encoded: the rows as the encoder takes them.
        labels: an array a row: () int64 or float32, (classes,) float32, or (words,) int64.
        keys: what distinguishes each row from the others.
        augment: augmentation of (row, epoch, key), or None.
        places: the file and line of each row, for messages; None: there are none.
    """

    def __init__(
        self, encoded: list[EncodedRow], labels: list[Any], keys: list[bytes],
        augment: Augmentation | None, places: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.encoded = encoded
        self.places = places
        self.labels = labels
        self.keys = keys
        self.augment = augment
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose augmentation comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> EncodedRow:
        row = self.encoded[index]
        if self.augment is not None:
            row = self.augment(row, self._epoch, self.keys[index])
        return {**row, "labels": self.labels[index]}


def _hash_rules(state: str) -> str:
    """Return the hash of what a tokenizer writes, but for truncation and padding.

    Every call of the tokenizer leaves its own there.
    """
    key = hashlib.sha256(state.encode()).digest()
    if key not in _RULES:
        read = json.loads(state)
        rules = {name: read[name] for name in read.keys() - {"truncation", "padding"}}
        # Indented, as `fingerprint` writes it, a vocabulary takes ten times as long.
        _RULES[key] = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return _RULES[key]
