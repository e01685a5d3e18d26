"""Encode pictures of any shape as rows of patches, as SigLIP2's NaFlex checkpoints read them.

A canvas is the whole picture, resized in its own shape until it holds as many patches as the model
may read. It is cut into patches when a batch is made, so that caches, crops and comparisons see
pictures here as elsewhere.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hftl.data.image_inputs import ImageInputs, to_tensor
from hftl.data.image_processing import makes_patches, rebuild_processor, resize_to_patches
from hftl.data.text_inputs import EncodedRow, add_labels
from hftl.errors import RecipeError


@dataclass(frozen=True)
class PatchedInputs(ImageInputs):
    """Encode pictures as patches, a mask and a grid, as the source's own processor makes them."""

    keeps_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_patch_processor(self.processor, self.patch_size)
        super().__post_init__()

    @property
    def canvas_side(self) -> int:
        """Return the side in pixels of a square of as many patches as a picture may have."""
        return round(math.sqrt(self.processor.max_num_patches) * self.patch_size)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Return the bytes of the largest canvas."""
        return (3 * self.processor.max_num_patches * self.patch_size**2,)

    def draw_canvas(self, image: Image.Image) -> np.ndarray:
        """Return what is cached of an image: (3, height, width) uint8, whole patches."""
        return resize_to_patches(self.processor, image)

    def length(self, encoded: EncodedRow) -> int:
        """Return the patches of a row, those of padding included."""
        return self.processor.max_num_patches

    def collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        """Return patches, their mask and the grids of pictures; labels as in `TextInputs`.

        They are the processor's own: `pixel_values` (batch, max_num_patches, patch_size**2 * 3)
        float32, 0 at padding, `pixel_attention_mask` (batch, max_num_patches) and `spatial_shapes`
        (batch, 2), rows and columns.
        """
        size, most = self.patch_size, self.processor.max_num_patches
        patches, masks, grids = [], [], []
        for row in rows:
            picture = self._normalize(to_tensor(row["pixel_values"])[None])[0]
            cut = cut_into_patches(picture, size)
            padding = most - len(cut)
            patches.append(functional.pad(cut, (0, 0, 0, padding)))
            masks.append(functional.pad(torch.ones(len(cut), dtype=torch.int32), (0, padding)))
            grids.append([side // size for side in picture.shape[1:]])
        batch = {
            "pixel_values": torch.stack(patches),
            "pixel_attention_mask": torch.stack(masks),
            "spatial_shapes": torch.tensor(grids),
        }
        return add_labels(batch, rows)


def cut_into_patches(picture: Tensor, side: int) -> Tensor:
    """Return the patches of a picture row by row, (patches, side * side * 3), channels last.

    Args:
        picture: (3, height, width), both multiples of the side.
        side: of a patch, in pixels.
    """
    parts = picture.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return parts.permute(1, 3, 2, 4, 0).reshape(-1, side * side * picture.shape[0])


def limit_patches(processor: Any, image_size: int | None) -> Any:
    """Return a copy whose pictures have as many patches as a square of that side, in pixels.

    Args:
        processor: transformers' image processor.
        image_size: a multiple of the patch; None changes nothing.
    """
    settings = processor.to_dict()
    if image_size is not None and makes_patches(processor):
        settings["max_num_patches"] = (image_size // processor.patch_size) ** 2
    return rebuild_processor(processor, settings)


def check_patch_processor(processor: Any, patch_size: int) -> None:
    """Refuse a processor that does not cut resized pictures into patches of that side.

    Raises:
        RecipeError: naming what it does.
    """
    settings = processor.to_dict()
    does = "makes no patches"
    if makes_patches(processor):
        if settings["patch_size"] == patch_size and settings["do_resize"]:
            return
        resized = "resized" if settings["do_resize"] else "not resized"
        does = f"makes patches of {settings['patch_size']} pixels, {resized}"
    raise RecipeError(
        f"the source's {settings.get('image_processor_type', 'image processor')} {does}, and the "
        f"model reads patches of {patch_size} pixels of resized pictures",
        "Save the model's own processor beside it",
    )
