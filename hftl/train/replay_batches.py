"""Rows that know their numbers, general data behind the target's, and how they make a batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.models.features import batch_by_length
from hftl.retain.reference import BATCH_METADATA, TrainingRows
from hftl.train.loss import IGNORE_INDEX

BATCH_TOKENS = 4096
BATCH_ROWS = 32
"""What the original looks at in one go: tokens of texts once padded, or pictures."""
DETERMINISM_ROWS = 16
"""Rows that are read twice to see whether they repeat."""


class IndexedDataset(Dataset):
    """A training dataset whose rows hold their number; general rows stand behind the target's.

    Its length is the target's. General rows without `labels` get labels that count for nothing.

    Args:
        target: has a length and `labels` in its rows.
        general: None where there is none.
    """

    def __init__(self, target: Any, general: Any | None) -> None:
        self.target = target
        self.general = general

    @property
    def total_rows(self) -> int:
        """All rows, the general ones among them."""
        return len(self.target) + (0 if self.general is None else len(self.general))

    def set_epoch(self, epoch: int) -> None:
        """Tells both."""
        for part in (self.target, self.general):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, number: int) -> dict[str, Any]:
        behind = number - len(self.target)
        if behind < 0:
            return {**self.target[number], "row": number}
        assert self.general is not None
        row = dict(self.general[behind])
        if "labels" not in row and "label" not in row:
            row["labels"] = build_ignored_labels(self.target[0], row)
        return {**row, "row": number}


def build_ignored_labels(like: dict[str, Any], row: dict[str, Any]) -> Any:
    """Labels of the form that another row's have, which count for nothing.

    Args:
        like: a row with `labels` or `label`.
        row: the row that has none; of words it gets one a word, or one a token.
    """
    given = like["labels"] if "labels" in like else like["label"]
    label = np.asarray(given)
    if label.dtype.kind == "f":
        found = np.full(label.shape, np.nan, np.float32)
    elif label.ndim == 0:
        found = np.full((), IGNORE_INDEX, np.int64)
    else:
        words = row["words"] if "words" in row else row["input_ids"]
        found = np.full(len(words), IGNORE_INDEX, np.int64)
    return torch.from_numpy(found) if isinstance(given, Tensor) else found


class IndexedCollator:
    """A collator that keeps the rows' numbers: `row`, and `general` where they are general data.

    Where every word has a label, `labelled_tokens` (batch, length) bool are the first tokens of words.

    Args:
        collate: makes a batch of rows.
        target: rows of the target.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], target: int) -> None:
        self.collate = collate
        self.target = target

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([row["row"] for row in rows])
        plain = [{key: value for key, value in row.items() if key != "row"} for row in rows]
        batch = dict(self.collate(plain))
        labels = batch.get("labels")
        if labels is not None and _has_token_labels(labels):
            mask = batch.get("attention_mask", torch.ones_like(labels))
            batch["labelled_tokens"] = find_word_tokens(plain, labels, mask)
        return {**batch, "row": numbers, "general": numbers >= self.target}


def find_word_tokens(rows: list[dict[str, Any]], labels: Tensor, mask: Tensor) -> Tensor:
    """(batch, length) bool: the tokens that words are told by, whether they have labels or not.

    Args:
        rows: with `words`, the places of their words' first tokens; of rows without it these are
            the tokens that have a label, and where none has one, as in general data, all.
        labels: (batch, length) int64, -100 where there is none.
        mask: (batch, length), 1 where a token counts.
    """
    if "words" not in rows[0]:
        told = labels != IGNORE_INDEX
        return torch.where(told.any(1, keepdim=True), told, mask > 0)
    told = torch.zeros_like(labels, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = torch.as_tensor(row["words"])
        # Behind the padding, where that comes first.
        told[number, places[places >= 0] + int(mask[number].argmax())] = True
    return told


def is_deterministic(rows: IndexedDataset, collate: Callable[[list[Any]], dict[str, Any]]) -> bool:
    """Whether rows are the same each time they are read, and in every epoch.

    It reads a few of them twice, in the first epoch and the second, and leaves the first.
    """
    numbers = [*range(min(DETERMINISM_ROWS, len(rows)))]
    numbers += [*range(len(rows), min(len(rows) + DETERMINISM_ROWS, rows.total_rows))]
    seen = []
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        seen.append(collate([rows[number] for number in numbers]))
    rows.set_epoch(0)
    return seen[0].keys() == seen[1].keys() and all(
        torch.equal(value, seen[1][key]) if isinstance(value, Tensor) else value == seen[1][key]
        for key, value in seen[0].items()
        if key != "labels"
    )


def build_training_rows(rows: IndexedDataset, collate: IndexedCollator) -> TrainingRows:
    """All rows of a training in batches, for the original to look at."""
    lengths = [len(rows[n].get("input_ids", ())) for n in range(rows.total_rows)]
    if any(lengths):
        batches = batch_by_length(lengths, BATCH_TOKENS)
    else:
        numbers = list(range(rows.total_rows))
        batches = [numbers[i : i + BATCH_ROWS] for i in range(0, rows.total_rows, BATCH_ROWS)]

    def batch(numbers: list[int]) -> dict[str, Any]:
        found = collate([rows[n] for n in numbers])
        return {key: value for key, value in found.items() if key not in BATCH_METADATA}

    return TrainingRows(
        len(rows), rows.total_rows, batches, batch, is_deterministic(rows, collate.collate)
    )


def _has_token_labels(labels: Tensor) -> bool:
    """Whether each token has a class of its own, or none."""
    return labels.dim() == 2 and not labels.is_floating_point()
