"""List the supported architectures that read images."""

from dataclasses import replace
from typing import Any

from hftl.models.architecture_spec import BERT_LINEARS, ArchitectureSpec, HeadSpec

VIT_LINEARS = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
CLIP_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip

VIT = ArchitectureSpec(
    "vit", "layers", VIT_LINEARS, "image", final_parts=("layernorm",),
    head=HeadSpec(dropout=None), token_head=None, add_pooling_layer=True, prefix_tokens=1,
    patch_size="patch_size", image_sizes="argument", masked_images="drop",
)  # fmt: skip
UNMASKED_VIT = replace(VIT, masked_images=None)
STOCK_POOLED = replace(UNMASKED_VIT, add_pooling_layer=False, prefix_tokens=0)
"""A ViT that its stock class alone pools."""
CLIP = replace(
    STOCK_POOLED, encoder="vision_model", blocks="encoder.layers", lora_targets=CLIP_LINEARS,
    final_parts=(), unused_parts=("post_layernorm",),
)  # fmt: skip
SIGLIP = replace(CLIP, final_parts=("post_layernorm",), unused_parts=("head",))
SIGLIP_HALF = replace(CLIP, final_parts=("post_layernorm", "head"), unused_parts=())


def _adjust_beit(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the norm that stands for the pooler, above the patches' mean, and the mask token."""
    if config.use_mean_pooling:
        spec = replace(spec, prefix_tokens=0)
    else:
        spec = replace(spec, pooler=None, final_parts=("layernorm",))
    if config.use_mask_token:
        spec = replace(spec, unused_parts=("embeddings.mask_token",))
    return spec


def _adjust_dinov2(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the gated layers of the largest models."""
    gated = (*VIT_LINEARS[:4], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return replace(spec, lora_targets=gated) if config.use_swiglu_ffn else spec


def _adjust_registers(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Count the registers after the class token."""
    spec = replace(spec, prefix_tokens=1 + config.num_register_tokens)
    return _adjust_dinov2(spec, config)


def _adjust_dinov3(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Count the registers after the class token, and name the gated layers of the largest."""
    spec = replace(spec, prefix_tokens=1 + config.num_register_tokens)
    gated = (*spec.lora_targets, "mlp.gate_proj")
    return replace(spec, lora_targets=gated) if config.use_gated_mlp else spec


def _adjust_pvt(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the norm of the last stage, which comes after the last block."""
    return replace(spec, final_parts=(f"encoder.layers.{len(config.depths) - 1}.layer_norm",))


BEIT = replace(
    VIT, encoder="beit", pooler="pooler", final_parts=(), masked_images="cover", adjust=_adjust_beit
)  # fmt: skip
DINOV2 = replace(
    VIT, encoder="dinov2", blocks="encoder.layer", unused_parts=("embeddings.mask_token",),
    add_pooling_layer=False, image_sizes="any", adjust=_adjust_dinov2,
)  # fmt: skip
SWIN = replace(STOCK_POOLED, encoder="swin", blocks="encoder.layers.*.blocks")
RESNET = ArchitectureSpec(
    "resnet", "encoder.stages.*.layers", ("layer.0.convolution", "layer.1.convolution"), "image",
    optional_targets=("layer.2.convolution", "shortcut.convolution"),
    head=HeadSpec(last_linear="classifier.1", dropout=None), token_head=None, image_sizes="any",
)  # fmt: skip
CONVNEXT = replace(
    RESNET, encoder="convnext", lora_targets=("pwconv1", "pwconv2"), optional_targets=(),
    skipped_layers=("dwconv",), final_parts=("layernorm",), head=HeadSpec(dropout=None),
)  # fmt: skip

IMAGE_ENCODERS = {
    "vit": VIT,
    "deit": replace(VIT, encoder="deit", prefix_tokens=2),
    "vit_msn": replace(UNMASKED_VIT, add_pooling_layer=False),
    "ijepa": replace(STOCK_POOLED, encoder="ijepa"),
    "beit": BEIT,
    "data2vec-vision": replace(
        BEIT, encoder="data2vec_vision", blocks="encoder.layer", masked_images=None,
        lora_targets=(
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            *BERT_LINEARS[3:],
        ),
    ),
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(
        DINOV2, encoder="dinov2_with_registers", adjust=_adjust_registers
    ),
    "swin": SWIN,
    "swinv2": replace(
        SWIN, encoder="swinv2",
        lora_targets=(
            *BERT_LINEARS[:3], "attention.self.continuous_position_bias_mlp.0",
            "attention.self.continuous_position_bias_mlp.2", *BERT_LINEARS[3:],
        ),
    ),
    "resnet": RESNET,
    "regnet": replace(
        RESNET, encoder="regnet", lora_targets=("layer.0.convolution",),
        optional_targets=(
            "layer.2.convolution", "layer.2.attention.0", "layer.2.attention.2",
            "layer.3.convolution", "shortcut.convolution",
        ),
        skipped_layers=("layer.1.convolution",),
    ),
    "bit": replace(
        RESNET, encoder="bit", lora_targets=("conv1", "conv2", "conv3"),
        optional_targets=("downsample.conv",), final_parts=("norm",),
    ),
    "convnext": CONVNEXT,
    "convnextv2": replace(CONVNEXT, encoder="convnextv2"),
    "efficientnet": replace(
        RESNET, encoder="efficientnet", blocks="encoder.blocks",
        lora_targets=(
            "squeeze_excite.reduce", "squeeze_excite.expand", "projection.project_conv",
        ),
        optional_targets=("expansion.expand_conv",),
        skipped_layers=("depthwise_conv.depthwise_conv",),
        final_parts=("encoder.top_conv", "encoder.top_bn"), head=HeadSpec(),
    ),
    "mobilevit": replace(
        RESNET, encoder="mobilevit", blocks="encoder.layer", lora_targets=(),
        optional_targets=(
            "expand_1x1.convolution", "reduce_1x1.convolution", "conv_kxk.convolution",
            "conv_1x1.convolution", "attention.attention.query", "attention.attention.key",
            "attention.attention.value", *BERT_LINEARS[3:], "conv_projection.convolution",
            "fusion.convolution",
        ),
        skipped_layers=("conv_3x3.convolution",), final_parts=("conv_1x1_exp",), head=HeadSpec(),
    ),
    "pvt_v2": ArchitectureSpec(
        "pvt_v2", "encoder.layers.*.blocks",
        ("attention.query", "attention.key", "attention.value", "attention.proj",
         "mlp.dense1", "mlp.dense2"),
        "image", optional_targets=("attention.spatial_reduction",),
        skipped_layers=("mlp.dwconv.dwconv",), head=HeadSpec(dropout=None), token_head=None,
        image_sizes="any", adjust=_adjust_pvt,
    ),
    "hiera": replace(
        SWIN, encoder="hiera", blocks="encoder.stages.*.layers",
        lora_targets=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), optional_targets=("proj",),
        pooler="pooler", final_parts=(), patch_size="patch_stride",
    ),
    "donut-swin": replace(SWIN, encoder="donut", lora_targets=BERT_LINEARS, final_parts=()),
    "clip": CLIP,
    "metaclip_2": CLIP,
    "siglip": SIGLIP,
    "siglip2": replace(SIGLIP, image_sizes="patches"),
}  # fmt: skip
UNHEADED_ENCODERS = {
    "dinov3_vit": replace(
        DINOV2, encoder="dinov3_vit", blocks="model.layer", masked_images=None,
        lora_targets=(*VIT_LINEARS[:4], "mlp.up_proj", "mlp.down_proj"), final_parts=("norm",),
        adjust=_adjust_dinov3,
    ),
    "dinov3_convnext": replace(
        CONVNEXT, encoder="dinov3_convnext", blocks="model.stages.*.layers",
        lora_targets=("pointwise_conv1", "pointwise_conv2"), skipped_layers=("depthwise_conv",),
        final_parts=("layer_norm",), prefix_tokens=1,
    ),
}  # fmt: skip
"""Encoders that transformers has no classification class for; their class token comes first."""
IMAGE_HALVES = {
    "clip_vision_model": replace(CLIP, final_parts=("post_layernorm",), unused_parts=()),
    "metaclip_2_vision_model": replace(CLIP, final_parts=("post_layernorm",), unused_parts=()),
    "siglip_vision_model": SIGLIP_HALF,
    "siglip2_vision_model": replace(SIGLIP_HALF, image_sizes="patches"),
}  # fmt: skip
"""The image halves of pairs, under a head on what the pair compares with texts."""
