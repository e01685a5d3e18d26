"""Dynamic masking: which tokens are to be guessed, and what is shown in their place.

Devlin et al. 2019 (BERT), section 3.1: of the chosen tokens 80 % are shown as the mask, 10 % as a
random token, and 10 % as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.corpus import TokenBlocks
from hftl.errors import RecipeError

MASK_SHARE, UNCHANGED_SHARE = 0.8, 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class MaskingSpec:
    """How the tokens of one tokenizer are masked.

    Args:
        ratio: the probability that a token is chosen.
        whole_words: whether the tokens of a word are chosen together.
        mask_id: the mask token.
        special: bool by token id; these are never chosen.
        replaceable: int64 ids, from which a random token is drawn.
    """

    ratio: float
    whole_words: bool
    mask_id: int
    special: np.ndarray
    replaceable: np.ndarray


def build_masking_spec(
    tokenizer: Any, ratio: float, whole_words: bool, embedded: int | None = None
) -> MaskingSpec:
    """Return the masking of a tokenizer's tokens.

    Args:
        tokenizer: of the model.
        ratio: the probability that a token is chosen.
        whole_words: whether the tokens of a word are chosen together.
        embedded: how many tokens the model embeds; none above is drawn. None: all are embedded.

    Raises:
        RecipeError: if the tokenizer has no mask token or tells no words apart, or the ratio is
            not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise RecipeError(
            f"adapt.mask_ratio={ratio} must lie between 0 and 1", "Set it to 0.15, for instance"
        )
    if tokenizer.mask_token_id is None:
        raise RecipeError(
            "the source model's tokenizer has no mask token, so it cannot be adapted by mlm",
            "Give a source model that was pretrained with masked tokens",
        )
    if whole_words and not _has_word_ids(tokenizer):
        raise RecipeError(
            "the source model's tokenizer does not say where words begin",
            "Set adapt.whole_words=false",
        )
    vocabulary = set(tokenizer.get_vocab().values())
    hidden = set(tokenizer.all_special_ids)
    special = np.zeros(max(vocabulary | hidden) + 1, dtype=bool)
    special[list(hidden)] = True
    drawn = {i for i in vocabulary - hidden if embedded is None or i < embedded}
    replaceable = np.array(sorted(drawn), dtype=np.int64)
    return MaskingSpec(ratio, whole_words, tokenizer.mask_token_id, special, replaceable)


def mask_tokens(
    ids: np.ndarray, words: np.ndarray, masking: MaskingSpec, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A block as the model sees it, and where it must guess.

    Each word, or each token, is chosen for itself with probability `ratio`; what a chosen token
    is shown as is decided token by token (as in BERT's own whole-word masking).

    Args:
        ids: (length,) int64.
        words: (length,) the number of each token's word, -1 for special tokens.
        masking: how.
        draw: where the random numbers come from.

    Returns:
        The shown ids, (length,) int64, and the chosen positions, sorted int64.
    """
    chance = draw.random(len(ids))
    if masking.whole_words:
        chance = chance[words]
    hit = (chance < masking.ratio) & (words >= 0) & ~masking.special[ids]
    positions = np.flatnonzero(hit)
    fate = draw.random(len(positions))
    shown = ids.copy()
    shown[positions[fate < MASK_SHARE]] = masking.mask_id
    swapped = positions[fate >= MASK_SHARE + UNCHANGED_SHARE]
    shown[swapped] = masking.replaceable[draw.integers(len(masking.replaceable), size=len(swapped))]
    return shown, positions


@dataclass(eq=False)
class MaskedBlocks(Dataset):
    """Blocks with their masks, a function of (seed, epoch, block) alone.

    Args:
        blocks: the stored blocks.
        masking: how they are masked.
        seed: of the masks.
        pad_id: fills up short blocks in a batch.
        fixed: the masks of epoch 0 for ever, to evaluate on.
    """

    blocks: TokenBlocks
    masking: MaskingSpec
    seed: int
    pad_id: int
    fixed: bool = False
    epoch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose masks come next, unless they are fixed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`input_ids` as shown, the chosen `positions`, and the `labels` there; all int64."""
        ids, words = self.blocks[i]
        draw = _build_generator(self.seed, 0 if self.fixed else self.epoch, i)
        shown, positions = mask_tokens(ids, words, self.masking, draw)
        return {"input_ids": shown, "positions": positions, "labels": ids[positions]}

    def collate(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """A batch of these blocks, see `collate_masked_blocks`."""
        return collate_masked_blocks(rows, self.pad_id)


def collate_masked_blocks(rows: Sequence[dict[str, np.ndarray]], pad_id: int) -> dict[str, Tensor]:
    """Masked blocks as one batch, with what picks the n chosen tokens out of it.

    Returns:
        `input_ids` (batch, longest); `attention_mask` (batch, longest), only where a row is padded;
        `flat` (n,), the chosen tokens' places in the batch laid out as one row; `slots` (n,), the
        places of their labels in the labels laid out as one row; `labels` (batch, most chosen, at
        least 1), -100 where a row has fewer. All int64.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    chosen = np.array([len(row["positions"]) for row in rows])
    longest, most = int(lengths.max()), max(1, int(chosen.max()))
    there = np.arange(longest) < lengths[:, None]
    ids = np.full(there.shape, pad_id, dtype=np.int64)
    ids[there] = np.concatenate([row["input_ids"] for row in rows])
    asked = np.arange(most) < chosen[:, None]
    labels = np.full(asked.shape, IGNORE_INDEX, dtype=np.int64)
    labels[asked] = np.concatenate([row["labels"] for row in rows])
    positions = np.concatenate([row["positions"] for row in rows])
    batch: dict[str, np.ndarray] = {"input_ids": ids}
    if not there.all():
        batch["attention_mask"] = there.astype(np.int64)
    batch["flat"] = positions + np.repeat(np.arange(len(rows)) * longest, chosen)
    batch["slots"] = np.flatnonzero(asked)
    batch["labels"] = labels
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def _build_generator(seed: int, epoch: int, block: int) -> np.random.Generator:
    """Random numbers of their own for each (seed, epoch, block).

    Philox counts in its first word: two blocks, apart in the last, never share a number.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, block]))


def _has_word_ids(tokenizer: Any) -> bool:
    found = tokenizer("one two", add_special_tokens=False)
    return len(set(found.word_ids(0))) > 1
