"""Number rows in a batch, and mark the tokens of them that words are predicted by."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hftl.data.text_inputs import WordInputs
from hftl.retain.kl import KLToOriginal
from hftl.train.samplers import IndexedCollator, IndexedDataset

WORD_STARTS = [[1, 3, 4], [1, 2]]
"""Where the words of two texts begin: the first word of the first has two pieces."""


class Padding:
    """Pad as a tokenizer, and do nothing else."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, side: str) -> None:
        self.padding_side = side

    def pad(
        self, rows: list[dict[str, Any]], return_tensors: str, padding_side: str | None = None,
        return_attention_mask: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        side = padding_side or self.padding_side
        longest = max(len(row["input_ids"]) for row in rows)

        def pad(values: list[int]) -> list[int]:
            more = [0] * (longest - len(values))
            return more + values if side == "left" else values + more

        return {n: torch.tensor([pad(row[n]) for row in rows]) for n in self.model_input_names}


def encode(words: list[int], labelled: bool) -> dict[str, Any]:
    """Return a text of [CLS], its words and [SEP]."""
    ids = list(range(10, 10 + max(words) + 2))
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "words": [*words, -1]}
    return {**row, "labels": np.zeros(len(words) + 1, np.int64)} if labelled else row


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_are_predicted_by_their_first_pieces_in_general_rows_too(side: str) -> None:
    rows = IndexedDataset([encode(WORD_STARTS[0], True)], [encode(WORD_STARTS[1], False)])
    collate = IndexedCollator(WordInputs(Padding(side), 16).collate, len(rows))
    batch = collate([rows[0], rows[1]])
    # Rows are padded on the right, whatever the tokenizer says.
    assert [row.nonzero().flatten().tolist() for row in batch["labelled_tokens"]] == WORD_STARTS
    assert batch["general"].tolist() == [False, True]
    assert (batch["labels"][1] == -100).all(), "general rows have no labels to learn"


def test_without_words_labelled_tokens_count_and_without_labels_all() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    mask = torch.tensor([1, 1, 1, 0])
    rows = [
        {"attention_mask": mask, "labels": torch.tensor([-100, 2, -100, -100])},
        {"attention_mask": mask, "labels": torch.full((4,), -100)},
    ]
    batch = IndexedCollator(collate, 1)([{**row, "row": i} for i, row in enumerate(rows)])
    assert batch["labelled_tokens"].tolist() == [
        [False, True, False, False], [True, True, True, False],
    ]  # fmt: skip
    classes = IndexedCollator(collate, 1)([{"labels": torch.tensor(1), "row": 0}])
    assert "labelled_tokens" not in classes


def test_kl_of_words_is_of_their_tokens_alone() -> None:
    torch.manual_seed(0)
    original = torch.randn(1, 6, 3)
    tokens = torch.tensor([[False, True, False, True, True, False]])
    now = torch.where(tokens.unsqueeze(-1), original, torch.randn(1, 6, 3))
    term = KLToOriginal(on="probe")
    assert term.compute_word_kl(original, now, tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert term.compute_word_kl(original, torch.randn(1, 6, 3), tokens).item() > 0.1
