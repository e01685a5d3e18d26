"""Rows with their numbers in a batch, and which tokens of them words are told by."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hftl.data.text_inputs import WordInputs
from hftl.retain.kl import KLToOriginal
from hftl.train.samplers import IndexedCollator, IndexedDataset

ROWS = [[1, 3, 4], [1, 2]]
"""Where the words of two texts begin: the first word of the first has two pieces."""


class Padding:
    """A tokenizer that only pads."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, side: str) -> None:
        self.padding_side = side

    def pad(
        self, rows: list[dict[str, Any]], return_tensors: str, padding_side: str | None = None,
        return_attention_mask: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        side = padding_side or self.padding_side
        longest = max(len(row["input_ids"]) for row in rows)
        found: dict[str, list[list[int]]] = {name: [] for name in self.model_input_names}
        for row in rows:
            for name in found:
                more = [0] * (longest - len(row[name]))
                padded = more + row[name] if side == "left" else row[name] + more
                found[name].append(padded)
        return {name: torch.tensor(value) for name, value in found.items()}


def encoded(words: list[int], labelled: bool) -> dict[str, Any]:
    """A text of [CLS], its words and [SEP]."""
    ids = list(range(10, 10 + max(words) + 2))
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "words": [*words, -1]}
    return {**row, "labels": np.zeros(len(words) + 1, np.int64)} if labelled else row


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_are_told_by_their_first_pieces_in_general_rows_too(side: str) -> None:
    rows = IndexedDataset([encoded(ROWS[0], True)], [encoded(ROWS[1], False)])
    collate = IndexedCollator(WordInputs(Padding(side), 16).collate, len(rows))
    batch = collate([rows[0], rows[1]])
    places = [told.nonzero().flatten().tolist() for told in batch["labelled_tokens"]]
    # Rows are padded on the right, whatever the tokenizer says.
    assert places == [[1, 3, 4], [1, 2]]
    assert batch["general"].tolist() == [False, True]
    assert (batch["labels"][1] == -100).all(), "general rows are told, and not learnt from"


def test_without_words_it_is_the_labelled_tokens_and_where_there_are_none_all() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    mask = torch.tensor([1, 1, 1, 0])
    rows = [
        {"attention_mask": mask, "labels": torch.tensor([-100, 2, -100, -100])},
        {"attention_mask": mask, "labels": torch.full((4,), -100)},
    ]
    batch = IndexedCollator(collate, 1)([{**row, "row": i} for i, row in enumerate(rows)])
    assert batch["labelled_tokens"].tolist() == [
        [False, True, False, False],
        [True, True, True, False],
    ]
    classes = IndexedCollator(collate, 1)([{"labels": torch.tensor(1), "row": 0}])
    assert "labelled_tokens" not in classes


def test_the_kl_of_words_is_taken_nowhere_else() -> None:
    torch.manual_seed(0)
    original = torch.randn(1, 6, 3)
    told = torch.tensor([[False, True, False, True, True, False]])
    now = torch.where(told.unsqueeze(-1), original, torch.randn(1, 6, 3))
    term = KLToOriginal(on="probe")

    def value(logits: Tensor) -> float:
        return term.compute_word_kl(original, logits, told).item()

    assert value(now) == pytest.approx(0.0, abs=1e-6)
    assert value(torch.randn(1, 6, 3)) > 0.1
