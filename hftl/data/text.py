"""Texts as token ids, and batches padded to their longest row."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.load import Row

EncodedRow = dict[str, Any]


@dataclass(frozen=True)
class TextInputs:
    """What an encoder of texts takes: token ids of a text or a pair, cut at `max_length` tokens."""

    tokenizer: Any
    max_length: int

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Token ids of each row, not padded."""
        if not rows:
            return []
        columns = [list(column) for column in zip(*(row.content for row in rows), strict=True)]
        found = self.tokenizer(*columns, truncation=True, max_length=self.max_length, padding=False)
        keys = [key for key in self.tokenizer.model_input_names if key in found]
        return [{key: found[key][i] for key in keys} for i in range(len(rows))]

    def length(self, encoded: EncodedRow) -> int:
        """Tokens of a row: what its forward pass costs."""
        return len(encoded["input_ids"])

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Tensors (batch, longest row); labels int64 (batch,), or float32 (batch, ...)."""
        return add_labels(self._padded(rows), rows)

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """The values (batch, width) row by row, each (1, width)."""
        return list(values.split(1))

    def save(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """Median length in tokens, share of rows cut short, share of unknown tokens."""
        columns = [list(column) for column in zip(*(row.content for row in rows), strict=True)]
        return self._facts(self.tokenizer(*columns, truncation=False, verbose=False)["input_ids"])

    def _facts(self, ids: list[list[int]]) -> dict[str, float]:
        lengths = sorted(map(len, ids))
        unknown = sum(row.count(self.tokenizer.unk_token_id) for row in ids)
        return {
            "median_tokens": lengths[len(lengths) // 2],
            "truncated": sum(length > self.max_length for length in lengths) / len(lengths),
            "unknown_tokens": unknown / max(1, sum(lengths)),
        }

    def _padded(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Pad on the right, with the mask of what is padded, whatever the tokenizer says.

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
    """The same for texts that come as words, each with an answer of its own.

    A word is told by its first token. `words` in an encoded row holds that token's place, -1 where
    the word was cut off.
    """

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Token ids of each row and where its words begin."""
        if not rows:
            return []
        found = self.tokenizer(
            [list(row.content) for row in rows], is_split_into_words=True,
            truncation=True, max_length=self.max_length, padding=False,
        )  # fmt: skip
        keys = [key for key in self.tokenizer.model_input_names if key in found]
        return [
            {key: found[key][i] for key in keys}
            | {"words": find_first_tokens(found.word_ids(i), len(row.content))}
            for i, row in enumerate(rows)
        ]

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Tensors (batch, longest row); labels (batch, longest row) int64, -100 off the words."""
        batch = self._padded(rows)
        if "labels" not in rows[0]:
            return batch
        labels = torch.full(batch["input_ids"].shape, -100)
        for number, row in enumerate(rows):
            places = np.asarray(row["words"])
            there = places >= 0
            labels[number, places[there]] = torch.from_numpy(row["labels"][there])
        batch["labels"] = labels
        return batch

    def split_outputs(self, values: Tensor, rows: list[EncodedRow]) -> list[Tensor]:
        """The values (batch, length, width) at each row's words, (words, width); NaN where cut."""
        found = []
        for value, row in zip(values, rows, strict=True):
            places = torch.as_tensor(row["words"])
            picked = value.new_full((len(places), value.shape[-1]), float("nan"))
            picked[places >= 0] = value[places[places >= 0].to(value.device)]
            found.append(picked)
        return found

    def summarize(self, rows: list[Row]) -> dict[str, float]:
        """As for texts."""
        words = [list(row.content) for row in rows]
        return self._facts(
            self.tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)[
                "input_ids"
            ]
        )


def add_labels(batch: dict[str, Any], rows: list[EncodedRow]) -> dict[str, Any]:
    """The batch with its rows' labels stacked, where they have any."""
    if "labels" in rows[0]:
        batch["labels"] = torch.from_numpy(np.stack([row["labels"] for row in rows]))
    return batch


def build_word_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer for texts that come as words.

    One of bytes (RoBERTa, ModernBERT) reads a word without a space before it as the rest of the
    word before; it is told to put the space there.
    """
    if not _lacks_prefix_space(tokenizer):
        return tokenizer
    found: Any = type(tokenizer).from_pretrained(
        folder, add_prefix_space=True, padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
    )  # fmt: skip
    if _lacks_prefix_space(found):
        state = json.loads(found.backend_tokenizer.to_str())
        for step in _find_byte_level_steps(state["pre_tokenizer"]):
            step["add_prefix_space"] = True
        found._tokenizer = type(found.backend_tokenizer).from_str(json.dumps(state))
    return found


def _lacks_prefix_space(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps = _find_byte_level_steps(json.loads(backend.to_str())["pre_tokenizer"])
    return any(not step["add_prefix_space"] for step in steps)


def _find_byte_level_steps(state: Any) -> list[dict[str, Any]]:
    """The byte-level steps of a pre-tokenizer's state."""
    if not state:
        return []
    steps = state.get("pretokenizers", [state])
    return [step for step in steps if step["type"] == "ByteLevel"]


def find_first_tokens(word_ids: list[int | None], words: int) -> list[int]:
    """The place of each word's first token, -1 where it has none."""
    places = [-1] * words
    for place in reversed(range(len(word_ids))):
        word = word_ids[place]
        if word is not None:
            places[word] = place
    return places


# Rows as a dataset for the Trainer.


Augmentation = Callable[[EncodedRow, int, bytes], EncodedRow]


class EncodedDataset(Dataset):
    """Encoded rows with what they teach.

    Args:
        encoded: the rows as the encoder takes them.
        labels: an array a row: () int64 or float32, (classes,) float32, or (words,) int64.
        keys: what tells each row from the others.
        change: augmentation of (row, epoch, key), or None.
    """

    def __init__(
        self,
        encoded: list[EncodedRow],
        labels: list[Any],
        keys: list[bytes],
        augment: Augmentation | None,
    ) -> None:
        self.encoded = encoded
        self.labels = labels
        self.keys = keys
        self.change = augment
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentation comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.encoded[index]
        if self.change is not None:
            row = self.change(row, self._epoch, self.keys[index])
        return {**row, "labels": self.labels[index]}
