"""Pictures in patches: which are hidden, and what a model should say of those.

He et al. 2022, arXiv:2111.06377, section 3; order and arithmetic are ViTMAE's in transformers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hftl.data.image_inputs import ImageInputs, pixels_to_tensor
from hftl.data.text_inputs import Augmentation
from hftl.errors import RecipeError

UNIFORM_DEVIATION = 2.0
"""The standard deviation, in grey levels of 255, under which a patch counts as near-constant.

That is the noise which JPEG and resizing leave in an even area. Normalising would blow it up to
the size of a picture, and nothing visible could predict it; one line through a patch is far above.
"""
PATCH_EPSILON = 1e-6
"""Added to a patch's variance, as in ViTMAE."""


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

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.keys[index]
        row: dict[str, Any] = {"pixel_values": self.canvases[index]}
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
    rows: list[dict[str, Any]], inputs: ImageInputs, ratio: float, norm: bool
) -> dict[str, Any]:
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
    canvases = torch.stack([pixels_to_tensor(row["pixel_values"]) for row in rows])
    batch = inputs.collate([{"pixel_values": canvas} for canvas in canvases])
    for name in ("noise", "teacher"):
        if name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows])
    _, masked, _ = split_by_noise(batch["noise"], ratio)
    even = find_uniform_patches(canvases, inputs.patch_size) if norm else None
    batch["labels"] = build_pixel_targets(
        batch["pixel_values"], inputs.patch_size, masked, norm, even
    )
    return batch
