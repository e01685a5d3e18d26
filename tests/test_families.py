"""Train every family by every strategy that fits it: what trains, what stays, what reloads.

Those of timm are in tests/test_timm.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.family_grid import Family, check_every_strategy, save_sentences, save_stripes
from support.fresh_process import FreshProcess
from support.tiny import CAUSAL_MODELS, save_tiny
from support.training import perturb
from support.vision_language import save_vision_language_model
from test_pairs import save_pair
from test_text_families import FAMILIES
from test_vision import ENCODERS
from transformers import AutoModel

from hftl.models.pairs import PAIRS
from hftl.models.vision_language_architectures import VISION_LANGUAGE

Tiny = Callable[..., Path]
pytestmark = pytest.mark.slow

ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
GATED = f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"
CLIP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2"
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)
SQUEEZE = "squeeze_excite.reduce squeeze_excite.expand"
VIT_IN_MOBILEVIT = (
    "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
IN_MOBILEVIT = (
    *(f"layer.{n}.{way}_1x1.convolution" for n in range(3) for way in ("expand", "reduce")),
    *(f"downsampling_layer.{way}_1x1.convolution" for way in ("expand", "reduce")),
    *(f"{name}.convolution" for name in ("conv_kxk", "conv_1x1", "conv_projection", "fusion")),
    *(f"transformer.layer.{n}.{end}" for n in range(4) for end in VIT_IN_MOBILEVIT),
)
CONVOLUTIONAL = {
    "resnet": Family(
        "classifier.", "classifier.", "resnet.encoder.stages.1.layers.0.", 3,
        "shortcut.convolution layer.0.convolution layer.1.convolution layer.2.convolution", 11,
        "classifier",
    ),
    "regnet": Family(
        "classifier.", "classifier.", "regnet.encoder.stages.1.layers.0.", 3,
        "shortcut.convolution layer.0.convolution layer.2.attention.0 layer.2.attention.2 "
        "layer.3.convolution", 14, "classifier",
    ),
    "bit": Family(
        "classifier.", "bit.norm. classifier.", "bit.encoder.stages.1.layers.0.", 3,
        "conv1 conv2 conv3 downsample.conv", 11, "classifier",
    ),
    "convnext": Family(
        "classifier.", "convnext.layernorm. classifier.", "convnext.encoder.stages.1.layers.0.", 3,
        "pwconv1 pwconv2", 6, "classifier", "convnext.encoder.stages.1.downsampling_layer.",
    ),
    "convnextv2": Family(
        "classifier.", "convnextv2.layernorm. classifier.",
        "convnextv2.encoder.stages.1.layers.0.", 3, "pwconv1 pwconv2", 6, "classifier",
        "convnextv2.encoder.stages.1.downsampling_layer.",
    ),
    "efficientnet": Family(
        "classifier.", "efficientnet.encoder.top_conv. efficientnet.encoder.top_bn. classifier.",
        "efficientnet.encoder.blocks.1.", 2,
        f"{SQUEEZE} projection.project_conv expansion.expand_conv", 7, "classifier",
    ),
    "mobilevit": Family(
        "classifier.", "mobilevit.conv_1x1_exp. classifier.", "mobilevit.encoder.layer.4.", 5,
        " ".join(IN_MOBILEVIT), 80, "classifier",
    ),
    "pvt_v2": Family(
        "classifier.", "pvt_v2.encoder.layers.1.layer_norm. classifier.",
        "pvt_v2.encoder.layers.1.blocks.1.", 3,
        "attention.query attention.key attention.value attention.proj "
        "attention.spatial_reduction mlp.dense1 mlp.dense2", 19, "classifier",
    ),
    "swinv2": Family(
        "classifier.", "swinv2.layernorm. classifier.", "swinv2.encoder.layers.1.blocks.1.", 3,
        f"{BERT} attention.self.continuous_position_bias_mlp.0 "
        "attention.self.continuous_position_bias_mlp.2", 24, "classifier",
    ),
    "hiera": Family(
        "classifier.", "hiera.pooler. classifier.", "hiera.encoder.stages.2.layers.1.", 4,
        "attn.qkv attn.proj mlp.fc1 mlp.fc2 proj", 18, "classifier",
    ),
    "siglip2": Family(
        "classifier.", "vision_model.post_layernorm. classifier.", "vision_model.encoder.layers.2.",
        3, CLIP, 18, "classifier", idle="vision_model.head.",
    ),
}  # fmt: skip
UNDER_OWN_HEAD = {
    "dinov3_vit": Family(
        "head.", "encoder.norm. head.", "encoder.model.layer.2.", 3,
        "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.up_proj "
        "mlp.down_proj", 18, "head", idle="encoder.embeddings.mask_token", pooling="cls+mean",
    ),
    "dinov3_convnext": Family(
        "head.", "encoder.layer_norm. head.", "encoder.model.stages.1.layers.0.", 3,
        "pointwise_conv1 pointwise_conv2", 6, "head", "encoder.model.stages.1.downsample_layers.",
        pooling="cls+mean",
    ),
}  # fmt: skip
DECODER = Family("score.", "model.norm. score.", "model.layers.2.", 3, GATED, 21, "score")
TEXTS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"), DECODER
    ),
    "starcoder2": replace(DECODER, layers=f"{ATTENTION} mlp.c_fc mlp.c_proj", count=18),
    "modernbert-decoder": Family(
        "classifier.", "head. model.final_norm. classifier.", "model.layers.2.", 3,
        "attn.q_proj attn.k_proj attn.v_proj attn.Wo mlp.Wi mlp.Wo", 18, "classifier head",
    ),
    "deberta": Family(
        "classifier.", "pooler. classifier.", "deberta.encoder.layer.2.", 3,
        "attention.self.in_proj attention.self.pos_proj attention.self.pos_q_proj "
        "attention.output.dense intermediate.dense output.dense", 18, "classifier pooler",
    ),
    "esm": Family(
        "classifier.out_proj.", "esm.encoder.emb_layer_norm_after. classifier.",
        "esm.encoder.layer.2.", 3, BERT, 18, "classifier", idle="esm.contact_head.",
    ),
    "eurobert": Family(
        "classifier.", "model.norm. dense. classifier.", "model.layers.2.", 3, GATED, 21,
        "classifier dense",
    ),
    "gte": Family(
        "classifier.", "gte.pooler. classifier.", "gte.layers.2.", 3, GATED, 21,
        "classifier gte.pooler.dense",
    ),
    "jina_embeddings_v3": Family(
        "classifier.out_proj.", "classifier.", "roberta.layers.2.", 3,
        f"{ATTENTION} mlp.fc1 mlp.fc2", 18, "classifier",
    ),
    "nomic_bert": Family(
        "classifier.", "nomic_bert.pooler. classifier.", "nomic_bert.layers.2.", 3, GATED, 21,
        "classifier nomic_bert.pooler.dense",
    ),
}  # fmt: skip
PROJECTED = Family(
    "head.", "encoder.post_layernorm. projection. head.", "encoder.encoder.layers.2.", 3, CLIP, 18,
    "head", pooling="embedding", solved=("head", "zero_shot"),
)  # fmt: skip
ATTENTION_POOLED = replace(PROJECTED, after="encoder.post_layernorm. encoder.head. head.")
OF_PAIRS = {
    "clip": PROJECTED, "metaclip_2": PROJECTED, "siglip": ATTENTION_POOLED,
    "siglip2": ATTENTION_POOLED,
}  # fmt: skip
IDEFICS = Family(
    "head.", "encoder.text_model.norm. head.", "encoder.text_model.layers.2.", 3, GATED, 21,
    "head", pooling="last",
)  # fmt: skip
QWEN = replace(
    IDEFICS, after="encoder.language_model.norm. head.", top="encoder.language_model.layers.2."
)
# LLaVA reads the last but one layer of its image half.
IDLE = "encoder.vision_tower.encoder.layers.1. encoder.vision_tower.post_layernorm."
IN_A_PROMPT = {
    "llava": replace(QWEN, idle=IDLE), "idefics2": IDEFICS, "idefics3": IDEFICS,
    "smolvlm": IDEFICS, "qwen2_5_vl": QWEN,
}  # fmt: skip


def test_every_family_is_in_a_table() -> None:
    assert CONVOLUTIONAL.keys() == {*ENCODERS, "bit", "siglip2"}
    assert TEXTS.keys() == {*CAUSAL_MODELS, *FAMILIES}
    assert OF_PAIRS.keys() == set(PAIRS) and IN_A_PROMPT.keys() == set(VISION_LANGUAGE)


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *UNDER_OWN_HEAD])
def test_images(name: str, tiny_model: Tiny, tmp_path: Path, reload_server: FreshProcess) -> None:
    family, data = (CONVOLUTIONAL | UNDER_OWN_HEAD)[name], save_stripes(tmp_path / "pictures")
    check_every_strategy(family, tiny_model(name), data, tmp_path, reload_server)


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path, reload_server: FreshProcess) -> None:
    """Its weights are as far from 0 as trained ones: else a head must magnify what differs."""
    folder = save_tiny(name, tmp_path / "model")
    perturb(AutoModel.from_pretrained(folder), 0.2).save_pretrained(folder)  # pyright: ignore
    data = save_sentences(tmp_path / "reviews.csv")
    check_every_strategy(TEXTS[name], folder, data, tmp_path, reload_server)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, tmp_path: Path, reload_server: FreshProcess) -> None:
    (tmp_path / "pair").mkdir()
    pair, data = save_pair(name, tmp_path / "pair"), save_stripes(tmp_path / "pictures")
    check_every_strategy(OF_PAIRS[name], pair, data, tmp_path, reload_server)


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_pictures_in_a_prompt(name: str, tmp_path: Path, reload_server: FreshProcess) -> None:
    (tmp_path / "model").mkdir()
    model = save_vision_language_model(name, tmp_path / "model", name != "idefics2")
    data = save_stripes(tmp_path / "pictures")
    check_every_strategy(IN_A_PROMPT[name], model, data, tmp_path, reload_server)
