"""Architectures without an entry: derived where the modules verify, refused where not."""

from typing import Any

import pytest
import torch
from tiny import IMAGE, TEXT, tiny_config
from transformers import AutoConfig, AutoModelForImageClassification

from hftl.errors import RecipeError
from hftl.models.architectures import ARCHITECTURES, count_blocks, get_architecture
from hftl.models.derive import derived

GROUPS = {"depths": [1, 2], "hidden_sizes": [8, 16]}


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"albert"}))
def test_what_is_derived_is_what_the_table_says(name: str) -> None:
    config = tiny_config(name)
    assert derived(config) == get_architecture(config)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dinov2", {"use_swiglu_ffn": True}),
        ("beit", {"use_mean_pooling": False}),
        ("beit", {"use_mask_token": False}),
    ],
)
def test_variants_are_what_is_derived(name: str, more: dict[str, Any]) -> None:
    config = tiny_config(name, **more)
    assert derived(config) == get_architecture(config) != get_architecture(tiny_config(name))


@pytest.mark.parametrize(
    ("name", "blocks", "linears", "final", "unused"),
    [
        ("ernie", "encoder.layer", 6, (), ()),
        ("megatron-bert", "encoder.layer", 6, ("encoder.ln",), ()),
        ("rembert", "encoder.layer", 6, (), ()),
        ("nomic_bert", "layers", 7, (), ()),
        ("data2vec-text", "encoder.layer", 6, (), ()),
        ("big_bird", "encoder.layer", 6, (), ("pooler",)),
        ("vit_msn", "layers", 6, ("layernorm",), ()),
        ("ijepa", "layers", 6, ("layernorm",), ()),
        ("data2vec-vision", "encoder.layer", 6, (), ()),
        ("swinv2", "encoder.layers.*.blocks", 8, ("layernorm",), ()),
    ],
)
def test_an_unknown_encoder_is_derived(
    name: str, blocks: str, linears: int, final: tuple[str, ...], unused: tuple[str, ...]
) -> None:
    config = tiny_config(name)
    found = get_architecture(config)
    assert (found.blocks, len(found.lora_targets)) == (blocks, linears)
    assert (found.final_parts, found.unused_parts) == (final, unused)
    assert count_blocks(config) == 3
    assert (found.tokens is not None) == (found.modality == "text")


@pytest.mark.parametrize("name", ["beit", "data2vec-vision"])
def test_models_train_after_their_class_was_derived(name: str) -> None:
    config = tiny_config(name)
    derived(config)
    model = AutoModelForImageClassification.from_config(config)
    model(torch.rand(2, 3, *[config.image_size] * 2)).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_config_is_left_as_it_was() -> None:
    config = tiny_config("ernie", num_labels=4)
    before = config.to_dict()
    derived(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, "it is a decoder"),
        ("llama", {**TEXT, "num_key_value_heads": 2}, "it is a decoder"),
        ("ernie", {**TEXT, "is_decoder": True}, "makes it a decoder"),
        ("t5", {"d_model": 16, "num_layers": 2, "d_ff": 32, "num_heads": 2}, "makes it a decoder"),
        ("convnext", {**GROUPS, "num_stages": 2}, "its blocks hold a convolution"),
        ("resnet", {**GROUPS, "embedding_size": 8}, "0 lists of modules hold 3 blocks"),
        ("xmod", {**TEXT, "languages": ["a", "b"]}, "it does not run without weights"),
        ("wav2vec2", {**IMAGE}, "no sequence or image classification class"),
    ],
)
def test_what_cannot_be_verified_is_refused(name: str, fields: dict[str, Any], why: str) -> None:
    config = AutoConfig.for_model(name, **fields)
    what = f"'{name}' is not supported: .*{why}"
    do = "Use one of albert, .* or add an entry to hftl/models/architectures.py"
    with pytest.raises(RecipeError, match=f"{what}.*{do}"):
        get_architecture(config)
