"""Prepare images as timm's evaluation transform does, by transformers' own arithmetic."""

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers import BitImageProcessorPil

from hftl.errors import RecipeError
from hftl.models.timm_architecture import read_data_config


class TimmImageProcessor(BitImageProcessorPil):
    """Resize, crop and normalize like timm; config.json holds its settings, and no other file."""

    def center_crop(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
        """Return the middle of an image (channels, height, width), rounded as torchvision does."""
        top, left = (
            round((whole - part) / 2)
            for whole, part in zip(image.shape[-2:], (size.height, size.width), strict=True)
        )
        return image[..., top : top + size.height, left : left + size.width]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Write nothing: transformers reads a timm model's preprocessing from its config.json."""


def build_timm_processor(config: Any, image_size: int | None = None) -> TimmImageProcessor:
    """Build the processor of timm's settings in a config.

    Args:
        config: of the wrapper.
        image_size: the side in pixels; None: that of the config.

    Raises:
        RecipeError: if timm pads images, which no processor of transformers does so.
    """
    data = read_data_config(config)
    height, width = (image_size or side for side in data["input_size"][1:])
    if data["crop_mode"] == "border":
        raise RecipeError(
            f"source.model: timm pads the images of {config.architecture!r}", "Use another source"
        )
    edge = math.floor(height / data["crop_pct"])
    size = {"shortest_edge": edge}
    if data["crop_mode"] == "squash":
        size = {"height": edge, "width": math.floor(width / data["crop_pct"])}
    return TimmImageProcessor(
        size=size, crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]), image_std=list(data["std"]),
    )  # fmt: skip
