"""Mask tokens dynamically: choose which are predicted, and what is shown in their place.

Devlin et al. 2019 (BERT), section 3.1: of the chosen tokens 80 % are shown as the mask, 10 % as a
random token, and 10 % unchanged.
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
    """Describe how the tokens of one tokenizer are masked.

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
    """Return how a tokenizer's tokens are masked.

    Args:
        tokenizer: that of the model.
        ratio: the probability that a token is chosen.
        whole_words: whether the tokens of a word are chosen together.
        embedded: how many tokens the model embeds; none above is drawn. None: all are embedded.

    Raises:
        RecipeError: if the tokenizer has no mask token or does not separate words, or the ratio is
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
    special_ids = set(tokenizer.all_special_ids)
    special = np.zeros(max(vocabulary | special_ids) + 1, dtype=bool)
    special[list(special_ids)] = True
    drawn = {i for i in vocabulary - special_ids if embedded is None or i < embedded}
    replaceable = np.array(sorted(drawn), dtype=np.int64)
    return MaskingSpec(ratio, whole_words, tokenizer.mask_token_id, special, replaceable)


def _has_word_ids(tokenizer: Any) -> bool:
    encoding = tokenizer("one two", add_special_tokens=False)
    return len(set(encoding.word_ids(0))) > 1


def mask_tokens(
    ids: np.ndarray, words: np.ndarray, spec: MaskingSpec, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a block as the model sees it, and the positions that it must predict.

    Each word, or each token, is chosen independently with probability `ratio`; how a chosen token
    is shown is decided token by token (as in BERT's own whole-word masking).

    Args:
        ids: (length,) int64.
        words: (length,) the number of each token's word, -1 for special tokens.
        spec: how to mask.
        generator: of the random numbers.

    Returns:
        The shown ids, (length,) int64, and the chosen positions, sorted int64.
    """
    chance = generator.random(len(ids))
    if spec.whole_words:
        chance = chance[words]
    is_chosen = (chance < spec.ratio) & (words >= 0) & ~spec.special[ids]
    positions = np.flatnonzero(is_chosen)
    fate = generator.random(len(positions))
    shown = ids.copy()
    shown[positions[fate < MASK_SHARE]] = spec.mask_id
    replaced = positions[fate >= MASK_SHARE + UNCHANGED_SHARE]
    shown[replaced] = spec.replaceable[
        generator.integers(len(spec.replaceable), size=len(replaced))
    ]
    return shown, positions


@dataclass(eq=False)
class MaskedBlocks(Dataset):
    """Mask blocks as a function of (seed, epoch, block) alone.

    Args:
        blocks: the stored blocks.
        masking: how they are masked.
        seed: of the masks.
        pad_id: fills up short blocks in a batch.
        fixed: keep the masks of epoch 0, to evaluate on.
    """

    blocks: TokenBlocks
    masking: MaskingSpec
    seed: int
    pad_id: int
    fixed: bool = False
    epoch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose masks come next, unless they are fixed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Return the shown `input_ids`, the chosen `positions` and their `labels`; all int64."""
        ids, words = self.blocks[i]
        generator = _build_generator(self.seed, 0 if self.fixed else self.epoch, i)
        shown, positions = mask_tokens(ids, words, self.masking, generator)
        return {"input_ids": shown, "positions": positions, "labels": ids[positions]}

    def collate(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Return a batch of these blocks, see `collate_masked_blocks`."""
        return collate_masked_blocks(rows, self.pad_id)


def _build_generator(seed: int, epoch: int, block: int) -> np.random.Generator:
    """Return independent random numbers for each (seed, epoch, block).

    Philox counts in its first word: two blocks, which differ in the last, never share a number.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, block]))


def collate_masked_blocks(rows: Sequence[dict[str, np.ndarray]], pad_id: int) -> dict[str, Tensor]:
    """Return masked blocks as one batch, with the indices of its n chosen tokens.

    Returns:
        `input_ids` (batch, longest); `attention_mask` (batch, longest), only where a row is padded;
        `flat` (n,), the indices of the chosen tokens in the flattened batch; `slots` (n,), the
        indices of their labels in the flattened labels; `labels` (batch, most chosen, at least 1),
        -100 where a row has fewer. All int64.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    chosen = np.array([len(row["positions"]) for row in rows])
    longest, most = int(lengths.max()), max(1, int(chosen.max()))
    is_token = np.arange(longest) < lengths[:, None]
    ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    ids[is_token] = np.concatenate([row["input_ids"] for row in rows])
    is_label = np.arange(most) < chosen[:, None]
    labels = np.full(is_label.shape, IGNORE_INDEX, dtype=np.int64)
    labels[is_label] = np.concatenate([row["labels"] for row in rows])
    positions = np.concatenate([row["positions"] for row in rows])
    batch: dict[str, np.ndarray] = {"input_ids": ids}
    if not is_token.all():
        batch["attention_mask"] = is_token.astype(np.int64)
    batch["flat"] = positions + np.repeat(np.arange(len(rows)) * longest, chosen)
    batch["slots"] = np.flatnonzero(is_label)
    batch["labels"] = labels
    return {name: torch.from_numpy(values) for name, values in batch.items()}
