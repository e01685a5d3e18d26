"""Texts as token ids, tokenised once, and batches padded to their longest row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from hftl.data.load import Row

Encoded = dict[str, list[int]]


def encode(tokenizer: Any, texts: list[tuple[str, ...]], max_length: int) -> list[Encoded]:
    """Token ids of texts or pairs, cut to `max_length` tokens, not padded."""
    if not texts:
        return []
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
    keys = [key for key in tokenizer.model_input_names if key in found]
    return [{key: found[key][i] for key in keys} for i in range(len(texts))]


class Examples(Dataset):
    """Encoded rows with their labels: (rows,) int64 class ids or floats."""

    def __init__(self, encoded: list[Encoded], labels: Any) -> None:
        self.encoded = encoded
        self.labels = labels

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.encoded[index], "labels": self.labels[index].item()}


@dataclass(frozen=True)
class Pad:
    """Collates rows into tensors (batch, longest row); labels keep int64 or become float32."""

    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def length_facts(tokenizer: Any, rows: list[Row], max_length: int) -> dict[str, float]:
    """Median length in tokens, share of rows cut short, share of unknown tokens."""
    texts = [row.texts for row in rows]
    columns = [list(column) for column in zip(*texts, strict=True)]
    ids = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
    lengths = sorted(map(len, ids))
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
    return {
        "median_tokens": lengths[len(lengths) // 2],
        "truncated": sum(length > max_length for length in lengths) / len(lengths),
        "unknown_tokens": unknown / max(1, sum(lengths)),
    }
