"""List the supported architectures that read a picture together with a prompt.

They have no classification class: hftl's own head reads the state of the prompt's last token.
"""

from dataclasses import replace
from typing import Any

from hftl.models.architecture_spec import SWIGLU_LINEARS, ArchitectureSpec

QWEN = ArchitectureSpec(
    "model", "language_model.layers", SWIGLU_LINEARS, "image",
    final_parts=("language_model.norm",), token_head=None, image_sizes="any", is_causal=True,
    reads_prompt=True,
)  # fmt: skip
IDEFICS = replace(QWEN, blocks="text_model.layers", final_parts=("text_model.norm",))


def _adjust_llava(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the parts of the picture's encoder above the layer that the language model reads."""
    depth, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    layers = [read] if isinstance(read, int) else read
    highest = max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
    unread = [f"vision_tower.encoder.layers.{number}" for number in range(highest, depth)]
    return replace(spec, unused_parts=("vision_tower.post_layernorm", "vision_tower.head", *unread))


VISION_LANGUAGE = {
    "llava": replace(QWEN, adjust=_adjust_llava),
    "idefics2": IDEFICS,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "qwen2_5_vl": QWEN,
}
