"""Mask tokens and patches: choose which are predicted, what is shown instead, and the targets.

Tokens: Devlin et al. 2019 (BERT), section 3.1: of the chosen tokens 80 % are shown as the mask,
10 % as a random token, and 10 % unchanged. Patches: He et al. 2022, arXiv:2111.06377, section 3;
order and arithmetic are ViTMAE's in transformers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.corpus import TokenBlocks
from hftl.data.image_inputs import ImageInputs, to_tensor
from hftl.data.text_inputs import IGNORE_INDEX, Augmentation, EncodedRow
from hftl.errors import RecipeError

MASK_SHARE, UNCHANGED_SHARE = 0.8, 0.1
UNIFORM_DEVIATION = 2.0
"""The standard deviation, in grey levels of 255, under which a patch counts as near-constant.

That is the noise which JPEG and resizing leave in an even area. Normalising would blow it up to
the size of a picture, and nothing visible could predict it; one line through a patch is far above.
"""
PATCH_EPSILON = 1e-6
"""Added to a patch's variance, as in ViTMAE."""


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


def count_patches(side: int, patch: int) -> int:
    """Return the number of whole patches of a square image.

    Raises:
        RecipeError: if there are fewer than two, so that none can be predicted from the others.
    """
    patches = (side // patch) ** 2
    if patches < 2:
        raise RecipeError(
            f"data.image_size={side} holds {patches or 'not even one'} patch of {patch} pixels",
            f"Use at least {2 * patch}",
        )
    return patches


def count_visible(patches: int, ratio: float) -> int:
    """Return how many patches stay visible, `int(patches * (1 - ratio))` as in ViTMAE.

    Raises:
        RecipeError: if that is none or all of them.
    """
    count = int(patches * (1 - ratio)) if 0 < ratio < 1 else 0
    if not 0 < count < patches:
        raise RecipeError(
            f"adapt.mask_ratio={ratio} of {patches} patches leaves none "
            f"{'masked' if ratio <= 0 or count else 'visible'}",
            "Use a share between 0 and 1, such as 0.75, or larger pictures",
        )
    return count


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Reshape (batch, 3, height, width) to (batch, patches, patch * patch * 3), row by row.

    Pixels on the right and at the bottom that fill no patch are left out, as the encoder does.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    whole = pixels[..., : rows * patch, : columns * patch]
    cut = whole.reshape(batch, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def split_by_noise(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Split patches into visible and masked ones, by the order of their noise.

    Args:
        noise: (batch, patches); the lowest stay. Equal ones go by their place, on every device.
        ratio: the share that is hidden.

    Returns:
        Visible ids (batch, visible), masked ids (batch, masked), and for each patch its place among
        both, one after the other (batch, patches); all int64.

    Raises:
        RecipeError: if the ratio leaves no patch visible, or none masked.
    """
    order = noise.argsort(dim=1, stable=True)
    keep = count_visible(noise.shape[1], ratio)
    return order[:, :keep], order[:, keep:], order.argsort(dim=1)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather (batch, tokens, width) at ids (batch, picked): (batch, picked, width)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def find_uniform_patches(canvases: Tensor, patch: int) -> Tensor:
    """Return which patches of uint8 (batch, 3, height, width) hardly vary: (batch, patches)."""
    return patchify(canvases.float(), patch).std(-1) < UNIFORM_DEVIATION


def build_pixel_targets(
    pixels: Tensor, patch: int, masked: Tensor, norm: bool, even: Tensor | None = None
) -> Tensor:
    """Return the target pixels of the masked patches.

    Args:
        pixels: (batch, 3, height, width) float32, as the encoder sees them.
        patch: side of a patch, in pixels.
        masked: (batch, masked) ids.
        norm: each patch less its mean, over the root of its unbiased variance.
        even: (batch, patches) bool, near-constant patches that a normalised loss leaves out.

    Returns:
        (batch, masked, patch * patch * 3) float32, NaN in what is left out.
    """
    values = gather_tokens(patchify(pixels, patch), masked)
    if not norm:
        return values
    spread = (values.var(-1, keepdim=True) + PATCH_EPSILON).sqrt()
    values = (values - values.mean(-1, keepdim=True)) / spread
    if even is None:
        return values
    return values.masked_fill(even.gather(1, masked).unsqueeze(-1), torch.nan)


class MaskedImageDataset(Dataset):
    """Hold images, each with the noise that chooses its masked patches.

    Args:
        canvases: (3, side, side) uint8 each.
        keys: what tells each picture from the others.
        patch: side of the encoder's patch, in pixels.
        seed: of the noise.
        change: augmentation of (row, epoch, key), or None.
        teacher: (pictures, width) float32, what the original says of each; or None.
        fixed: the noise of epoch 0 in every epoch, for evaluation.

    Raises:
        RecipeError: if the pictures hold fewer than two patches, or a teacher that saw whole
            pictures is to judge augmented ones.
    """

    def __init__(
        self, canvases: Sequence[Any], keys: Sequence[bytes], patch: int, seed: int,
        change: Augmentation | None = None, teacher: np.ndarray | None = None, fixed: bool = False,
    ) -> None:  # fmt: skip
        if change is not None and teacher is not None:
            raise RecipeError(
                "adapt: the original's features are of whole pictures, and these are augmented",
                "Set data.augment=none, or adapt without feature distillation",
            )
        self.canvases = canvases
        self.keys = keys
        self.patches = count_patches(canvases[0].shape[-1], patch) if len(canvases) else 0
        self.seed = seed
        self.change = change
        self.teacher = teacher
        self.fixed = fixed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose noise and augmentation come next."""
        self._epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return len(self.canvases)

    def __getitem__(self, index: int) -> EncodedRow:
        key = self.keys[index]
        row: EncodedRow = {"pixel_values": self.canvases[index]}
        if self.change is not None:
            row = self.change(row, self._epoch, key)
        row["noise"] = draw_patch_noise(self.patches, self.seed, self._epoch, key)
        if self.teacher is not None:
            row["teacher"] = torch.from_numpy(np.array(self.teacher[index]))
        return row


def draw_patch_noise(patches: int, seed: int, epoch: int, key: bytes) -> Tensor:
    """Return (patches,) float32, uniform in 0..1, a function of its arguments alone."""
    digest = hashlib.blake2b(f"mask {seed} {epoch} ".encode() + key, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.rand(patches, generator=generator)


def collate_masked_images(
    rows: list[EncodedRow], inputs: ImageInputs, ratio: float, norm: bool
) -> dict[str, Tensor]:
    """Return a batch for `MaskedAutoencoder`, with its targets as labels.

    Args:
        rows: of `MaskedImageDataset`.
        inputs: normalises the pixels, and knows what else the encoder takes.
        ratio: the share of patches that is masked.
        norm: whether the targets are normalised patch by patch.

    Returns:
        float32 pixels (batch, 3, side, side), noise (batch, patches), the encoder's arguments,
        teacher (batch, width) where there is one, labels (batch, masked, patch * patch * 3).
    """
    canvases = torch.stack([to_tensor(row["pixel_values"]) for row in rows])
    batch = inputs.collate([{"pixel_values": canvas} for canvas in canvases])
    for name in ("noise", "teacher"):
        if name in rows[0]:
            batch[name] = torch.stack([to_tensor(row[name]) for row in rows])
    _, masked, _ = split_by_noise(batch["noise"], ratio)
    even = find_uniform_patches(canvases, inputs.patch_size) if norm else None
    batch["labels"] = build_pixel_targets(
        batch["pixel_values"], inputs.patch_size, masked, norm, even
    )
    return batch
