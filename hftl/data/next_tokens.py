"""Choose the positions of a text at which a decoder's next token counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.corpus import TokenBlocks
from hftl.data.masking import collate_masked_blocks


def select_positions(words: np.ndarray) -> np.ndarray:
    """Return the positions of a block whose next token is predicted, sorted int64.

    No special token predicts one: the first token after the end of a document has nothing to do
    with it. That a document ends is predicted. Attention does reach back across documents.

    Args:
        words: (length,) the number of each token's word, -1 for special tokens.
    """
    return np.flatnonzero(words[:-1] >= 0)


@dataclass(frozen=True, eq=False)
class NextTokenBlocks(Dataset):
    """Hold blocks of tokens with the next tokens as labels, the same in every epoch.

    Args:
        blocks: the stored blocks.
        pad_id: fills up short blocks in a batch.
    """

    blocks: TokenBlocks
    pad_id: int

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Return `input_ids`, the `positions` that count and their next tokens; all int64."""
        ids, words = self.blocks[i]
        positions = select_positions(words)
        return {"input_ids": ids, "positions": positions, "labels": ids[positions + 1]}

    def collate(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Return a batch of these blocks, see `collate_masked_blocks`."""
        return collate_masked_blocks(rows, self.pad_id)
