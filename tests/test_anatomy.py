"""The anatomy against the real modules of each architecture."""

from typing import Any

import pytest
import torch
from tiny import IMAGE_SIZE, is_image, tiny_config
from torch import nn
from transformers import AutoModel

from hftl.errors import RecipeError
from hftl.models.architectures import (
    ARCHITECTURES,
    count_blocks,
    get_architecture,
    get_max_tokens,
    get_native_image_size,
    get_patch_size,
)
from hftl.models.heads import get_last_linear, get_model_architecture
from hftl.models.parts import (
    count_layers,
    get_blocks,
    get_stock_encoder,
    get_submodule,
    get_task_class,
)

TASKS = [
    (name, task)
    for name in sorted(ARCHITECTURES)
    for task in ("classification", "token-classification")
    if task == "classification" or not is_image(name)
]


def stock(name: str, task: str = "classification", **more: Any) -> Any:
    config = tiny_config(name, **more)
    return get_task_class(config, task)(config)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_path_exists_in_the_stock_class(name: str, task: str) -> None:
    model = stock(name, task)
    anatomy = get_architecture(model.config).for_task(task)
    assert get_model_architecture(model) == anatomy
    encoder = get_stock_encoder(model, anatomy)
    assert encoder is not model
    assert len(get_blocks(encoder, anatomy)) == (1 if name == "albert" else 3)
    for path in anatomy.final_parts:
        assert list(get_submodule(encoder, path).parameters())
    if anatomy.head_dropout is not None:
        assert isinstance(get_submodule(model, anatomy.head_dropout), nn.Dropout)
    assert isinstance(get_last_linear(model, anatomy), nn.Linear)
    assert get_last_linear(model, anatomy).out_features == 2
    heads = {n for n, m in model.named_children() if list(m.parameters())} - {anatomy.encoder}
    assert heads == set(anatomy.head_parts)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_the_dropout_before_the_last_layer_is_the_one_named(name: str, task: str) -> None:
    model = stock(name, task)
    anatomy = get_model_architecture(model)
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) or list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        model(**batch(name))
    assert called[-1] is get_last_linear(model, anatomy)
    named = anatomy.head_dropout
    assert isinstance(called[-2], nn.Dropout) == (named is not None)
    assert named is None or called[-2] is get_submodule(model, named)


def batch(name: str) -> dict[str, torch.Tensor]:
    if is_image(name):
        return {"pixel_values": torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    return {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4).long()}


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, {}) for name in sorted(ARCHITECTURES)]
    + [
        ("dinov2", {"use_swiglu_ffn": True}),
        ("dinov2_with_registers", {"use_swiglu_ffn": True}),
        ("beit", {"use_mean_pooling": False}),
        ("beit", {"use_mask_token": False}),
        ("deberta-v2", {"share_att_key": False}),
        ("albert", {"inner_group_num": 2, "num_hidden_groups": 3}),
    ],
)
def test_targets_are_all_linears_of_the_blocks(name: str, more: dict[str, Any]) -> None:
    model = stock(name, **more)
    anatomy = get_architecture(model.config)
    blocks = get_blocks(get_stock_encoder(model, anatomy), anatomy)
    found = sum(isinstance(m, nn.Linear) for block in blocks for m in block.modules())
    assert found == len(blocks) * len(anatomy.lora_targets)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_encoder_alone_is_its_own_encoder(name: str) -> None:
    config = tiny_config(name)
    model = AutoModel.from_config(config)
    anatomy = get_architecture(config)
    if name in ("clip", "siglip"):
        assert get_stock_encoder(model, anatomy) is model.vision_model
    else:
        assert get_stock_encoder(model, anatomy) is model


@pytest.mark.parametrize(
    ("name", "more", "blocks", "told"),
    [
        ("bert", {}, 3, 3),
        ("distilbert", {"n_layers": 5}, 5, 5),
        ("albert", {"num_hidden_layers": 7}, 1, 7),
        ("albert", {"num_hidden_layers": 6, "num_hidden_groups": 3, "inner_group_num": 2}, 6, 6),
        ("swin", {"depths": [2, 3]}, 5, 5),
        ("clip", {}, 3, 3),
        ("siglip", {}, 3, 3),
    ],
)
def test_blocks_and_layers_are_counted(
    name: str, more: dict[str, Any], blocks: int, told: int
) -> None:
    config = tiny_config(name, **more)
    assert (count_blocks(config), count_layers(config)) == (blocks, told)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "xlm-roberta", "camembert", "albert", "electra", "distilbert"]
)
def test_the_longest_text_fits_and_a_longer_one_does_not(name: str) -> None:
    config = tiny_config(name, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    for length, fits in ((get_max_tokens(config), True), (get_max_tokens(config) + 1, False)):
        ids = torch.full((1, length), 7)
        if fits:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("name", "patch"), [("vit", 8), ("swin", 4), ("clip", 8), ("siglip", 8), ("dinov2", 8)]
)
def test_sizes_of_images_and_patches(name: str, patch: int) -> None:
    config = tiny_config(name)
    assert (get_native_image_size(config), get_patch_size(config)) == (IMAGE_SIZE, patch)


def test_oblong_images_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"\(32, 64\) pixels, expected squares"):
        get_native_image_size(tiny_config("vit", image_size=[32, 64]))


@pytest.mark.parametrize("name", [name for name in sorted(ARCHITECTURES) if is_image(name)])
def test_larger_images_run_where_the_anatomy_says_how(name: str) -> None:
    model = stock(name).eval()
    anatomy = get_architecture(model.config)
    more = {"interpolate_pos_encoding": True} if anatomy.interpolate_pos_encoding else {}
    with torch.no_grad():
        logits = model(pixel_values=torch.rand(1, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE), **more).logits
    assert logits.shape == (1, 2)


def test_images_have_no_tokens() -> None:
    with pytest.raises(RecipeError, match="vit has no class for token-classification"):
        get_architecture(tiny_config("vit")).for_task("token-classification")


def test_modules_that_moved_are_noticed() -> None:
    model = stock("bert")
    model.bert.encoder.layer[1].intermediate = nn.Identity()
    with pytest.raises(RecipeError, match="no linear layer 'intermediate.dense'"):
        get_blocks(model.bert, get_architecture(model.config))


def test_a_linear_layer_that_came_is_noticed() -> None:
    model = stock("bert")
    model.bert.encoder.layer[1].gate = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="a block has a linear layer 'gate'"):
        get_blocks(model.bert, get_architecture(model.config))


def test_other_classes_of_the_architecture_are_refused() -> None:
    from transformers import BertForMaskedLM

    with pytest.raises(RecipeError, match="BertForMaskedLM is no sequence, token or image"):
        get_model_architecture(BertForMaskedLM(tiny_config("bert")))


def test_seed_decides_the_new_weights() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = stock("bert")
        drawn.append(get_last_linear(model, get_architecture(model.config)).weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
