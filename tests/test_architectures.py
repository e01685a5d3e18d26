"""Compare every architecture's entry with what its stock class does, forward and backward."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures
from safetensors.torch import save_file
from support.tiny import IMAGE_SIZE, TEXT, draw_images, is_image, save_tiny, tiny_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertForMaskedLM,
)

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune.arm import train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import prepare
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.architectures import (
    ARCHITECTURES,
    count_shared_layers,
    get_config_spec,
    get_max_tokens,
    get_native_image_size,
    get_patch_size,
)
from hftl.models.encoders import (
    accepts_attention_mask,
    count_blocks,
    get_blocks,
    get_encoder_class,
    get_stock_encoder,
    get_task_class,
    has_prefix,
    list_block_paths,
)
from hftl.models.features import predict_logits
from hftl.models.lora import list_adapted_layers
from hftl.models.model_parts import get_last_linear, get_model_spec
from hftl.models.pooling import pool_before_head
from hftl.publish.export import export_model, rebuild_model
from hftl.train.checkpoint import BestWeightsCallback, list_training_modes

CLASSIFICATION = "classification"
NAMES = sorted(ARCHITECTURES.keys() - {"timm_wrapper"})
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dinov2", {"use_swiglu_ffn": True}),
    ("dinov2_with_registers", {"use_swiglu_ffn": True}),
    ("beit", {"use_mean_pooling": False}),
    ("beit", {"use_mask_token": False}),
    ("data2vec-vision", {"use_mean_pooling": False, "use_mask_token": True}),
    ("deberta", {"relative_attention": False}),
    ("deberta", {"pos_att_type": ["p2c"]}),
    ("deberta-v2", {"share_att_key": False}),
    ("roc_bert", {"concat_input": False}),
    ("esm", {"position_embedding_type": "rotary"}),
    ("albert", {"inner_group_num": 2, "num_hidden_groups": 3}),
    ("eurobert", {"classifier_pooling": "mean"}),
    ("modernbert-decoder", {"classifier_bias": True}),
]
CASES = [
    *((name, {}, CLASSIFICATION) for name in NAMES),
    *(
        (name, {}, TOKEN_CLASSIFICATION)
        for name in NAMES
        if not is_image(name) and ARCHITECTURES[name].token_head is not None
    ),
    *((name, changes, CLASSIFICATION) for name, changes in VARIANTS),
]
ids = [f"{name}-{task[:5]}-{'-'.join(changes)}" for name, changes, task in CASES]
every_case = pytest.mark.parametrize(("name", "changes", "task"), CASES, ids=ids)


def build_stock(name: str, changes: dict[str, Any], task: str = CLASSIFICATION) -> Any:
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    model = get_task_class(config, task)(config)
    pool_before_head(model)
    return model


def make_batch(name: str, side: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    if is_image(name):
        return draw_images(name, 2, side)
    ids = torch.tensor([[2, 7, 9, 3]])
    masked = accepts_attention_mask(get_encoder_class(tiny_config(name)))
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})


@every_case
def test_entry_is_what_runs(name: str, changes: dict[str, Any], task: str) -> None:
    """Compare the entry with the order of calls and with missing gradients."""
    model = build_stock(name, changes, task).train()
    spec = get_config_spec(model.config).for_task(task)
    assert get_model_spec(model) == spec
    encoder = get_stock_encoder(model, spec)
    assert encoder is not model
    paths = [f"{spec.encoder}.{path}" for path in list_block_paths(encoder, spec)]
    get_blocks(encoder, spec)
    calls: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for path, module in model.named_modules():
        owns = isinstance(module, nn.Dropout) or list(module.parameters(recurse=False))
        if path in paths or owns:
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    last = get_last_linear(model, spec)
    last.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    batch = make_batch(name)
    model(**batch).logits.square().sum().backward()

    outputs = next(iter(batch.values())).shape[: 2 if task == TOKEN_CLASSIFICATION else 1]
    assert shapes == [(*outputs, last.in_features)]
    blocks = [call for call in calls if call in paths]
    assert blocks == (paths if name != "albert" else blocks) and set(blocks) == set(paths)
    without = {path for path, p in model.named_parameters() if p.grad is None}
    inside = {path.removeprefix(f"{spec.encoder}.") for path in without}
    # A token class may hold a pooler that it does not read, as FNet's does.
    unused = (*spec.unused_parts, *(["pooler"] if task == TOKEN_CLASSIFICATION else []))
    named = {path for path, _ in encoder.named_parameters() if has_prefix(path, unused)}
    assert inside == named and len(inside) == len(without)

    after = {
        call.removeprefix(f"{spec.encoder}.")
        for call in calls[len(calls) - calls[::-1].index(paths[-1]) :]
        if call.startswith(f"{spec.encoder}.") and call.removeprefix(f"{spec.encoder}.") != ""
        and list(model.get_submodule(call).parameters())
    }  # fmt: skip
    parts = (*spec.final_parts, *([spec.pooler] if spec.pooler else []))
    assert all(has_prefix(path, (*parts, *unused)) for path in after)
    assert all(any(has_prefix(path, (part,)) for path in after) for part in spec.final_parts)

    heads = {path for path, m in model.named_children() if list(m.parameters())} - {spec.encoder}
    assert heads == set(spec.head.parts)
    assert calls[-1] == spec.head.last_linear
    before = model.get_submodule(calls[-2])
    outside = not calls[-2].startswith(f"{spec.encoder}.")
    assert spec.head.dropout == (calls[-2] if isinstance(before, nn.Dropout) and outside else None)


@pytest.mark.parametrize("name", NAMES)
def test_encoder_alone(name: str) -> None:
    config = tiny_config(name)
    spec = get_config_spec(config)
    kind = get_encoder_class(config)
    takes = inspect.signature(kind.__init__).parameters
    has_own_head = not is_image(name) or spec.prefix_tokens > 0
    assert not has_own_head or spec.add_pooling_layer == ("add_pooling_layer" in takes)
    model = AutoModel.from_config(config)
    encoder = get_stock_encoder(model, spec)
    assert (encoder is model) == (spec.encoder != "vision_model")
    stock = build_stock(name, {}).base_model
    poolers = [getattr(m, "pooler", None) for m in ([stock] if is_image(name) else [stock, model])]
    assert (spec.pooler is not None) == any(p is not None and list(p.parameters()) for p in poolers)


@pytest.mark.parametrize(
    ("name", "changes", "blocks", "layers"),
    [
        ("bert", {}, 3, 0),
        ("distilbert", {"n_layers": 5}, 5, 0),
        ("albert", {"num_hidden_layers": 7}, 1, 7),
        ("albert", {"num_hidden_layers": 6, "num_hidden_groups": 3, "inner_group_num": 2}, 6, 6),
        ("swin", {"depths": [2, 3]}, 5, 0),
        ("clip", {}, 3, 0),
        ("efficientnet", {}, 2, 0),
        ("mobilevit", {}, 5, 0),
    ],
)
def test_blocks_and_layers_are_counted(
    name: str, changes: dict[str, Any], blocks: int, layers: int
) -> None:
    config = tiny_config(name, **changes)
    assert (count_blocks(config), count_shared_layers(config)) == (blocks, layers)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "albert", "electra", "distilbert", "mpnet", "data2vec-text", "esm"]
)
def test_the_longest_text_fits_and_a_longer_one_does_not(name: str) -> None:
    config = tiny_config(name, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    ids = torch.full((1, get_max_tokens(config) + 1), 7)
    model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("name", "patch"),
    [("vit", 8), ("swin", 4), ("clip", 8), ("siglip", 8), ("dinov2", 8)],
)
def test_sizes_of_images_and_patches(name: str, patch: int) -> None:
    config = tiny_config(name)
    assert (get_native_image_size(config), get_patch_size(config)) == (IMAGE_SIZE, patch)


@pytest.mark.parametrize("name", list(filter(is_image, NAMES)))
def test_larger_images_run_as_the_entry_says(name: str) -> None:
    model = build_stock(name, {}).eval()
    sizes = get_config_spec(model.config).image_sizes
    assert sizes != "fixed"
    arguments = {"interpolate_pos_encoding": True} if sizes == "argument" else {}
    with torch.no_grad():
        logits = model(**make_batch(name, 2 * IMAGE_SIZE), **arguments).logits
    assert logits.shape == (2, 2)


def test_refuses_other_layers_in_a_block_and_other_classes() -> None:
    model = build_stock("bert", {})
    spec, layer = get_config_spec(model.config), model.bert.encoder.layer[1]
    layer.gate = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="a block has a linear layer 'gate'"):
        get_blocks(model.bert, spec)
    del layer.gate
    layer.intermediate = nn.Identity()
    with pytest.raises(RecipeError, match="no linear layer 'intermediate.dense'"):
        get_blocks(model.bert, spec)
    with pytest.raises(RecipeError, match="BertForMaskedLM is no sequence, token or image"):
        get_model_spec(BertForMaskedLM(model.config))
    with pytest.raises(RecipeError, match="vit has no class for token-classification"):
        get_config_spec(tiny_config("vit")).for_task(TOKEN_CLASSIFICATION)
    with pytest.raises(RecipeError, match=r"\(32, 64\) pixels, expected squares"):
        get_native_image_size(tiny_config("vit", image_size=[32, 64]))


@pytest.mark.parametrize("size", [32, 32.0, [32.0, 32], 0, 32.5, "32", True, math.nan, []])
def test_sides_of_images_are_whole_numbers(size: Any) -> None:
    config = tiny_config("vit")
    config.__dict__["image_size"] = size  # Not every class of configs checks its fields.
    if size in (32, [32, 32]):
        assert repr(get_native_image_size(config)) == "32"
        return
    with pytest.raises(RecipeError, match="expected a whole number above 0"):
        get_native_image_size(config)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, "hftl has no entry for it"),
        ("convbert", TEXT, "hftl has no entry for it"),
    ],
)
def test_refuses_an_unsupported_architecture(
    name: str, fields: dict[str, Any], reason: str
) -> None:
    config = AutoConfig.for_model(name, **fields)
    advice = "Use one of those that `hftl sources` lists, .*, or add an entry to hftl/models/"
    with pytest.raises(RecipeError, match=f"'{name}' is not supported: {reason}.*{advice}"):
        get_config_spec(config)


def test_refuses_an_encoder_that_its_config_makes_a_decoder() -> None:
    with pytest.raises(RecipeError, match="is_decoder in its config makes the encoder 'bert'"):
        get_config_spec(tiny_config("bert", is_decoder=True))


@pytest.mark.parametrize("strategy", ["head", "partial", "lora", "full"])
def test_a_convolutional_network_fits_an_entry(strategy: str) -> None:
    """Support stages of unequal blocks, no patches and no linear layers by one entry."""
    config = tiny_config("resnet")
    assert (count_blocks(config), count_shared_layers(config)) == (3, 0)
    assert (get_patch_size(config), get_native_image_size(config)) == (1, None)
    model: Any = prepare(get_task_class(config, CLASSIFICATION)(config), strategy, blocks=1)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    top = "resnet.encoder.stages.1.layers.0."
    if strategy == "lora":
        assert len(list_adapted_layers(model)) == 3 * 3 + 2
    elif strategy == "partial":
        assert any(name.startswith(top) for name in trains)
        assert not any(name.startswith("resnet.embedder") for name in trains)
    for module, trains_now in list_training_modes(model):
        module.training = trains_now
    statistics = get_statistics(model)
    assert model(pixel_values=torch.rand(2, 3, 40, 40)).logits.shape == (2, 2)
    moved = {n for n, value in get_statistics(model).items() if not value.equal(statistics[n])}
    embedder = {name for name in statistics if "embedder" in name}
    assert moved & embedder == (embedder if strategy == "full" else set())
    assert bool(moved) == (strategy in ("partial", "full"))


def get_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of BatchNorm's running means and variances."""
    return {name: b.clone() for name, b in model.named_buffers() if ".running_" in name}


@pytest.mark.parametrize("strategy", ["lora", "partial", "gradual", "full"])
def test_running_statistics_are_stored_where_they_move(strategy: str, tmp_path: Path) -> None:
    """An arm's folder and the published model hold the statistics that were measured."""
    context, finetune = build_resnet_arm(tmp_path, strategy)
    output = train_arm(context, finetune, 0)
    stored = {name for name in output.weights if ".running_" in name}
    assert bool(stored) == (strategy != "lora")
    assert any("embedder" in name for name in stored) == (strategy in ("gradual", "full"))
    save_file(output.weights, tmp_path / "weights.safetensors")
    model: Any = rebuild_model(context, finetune, 0, tmp_path / "weights.safetensors")
    rows = context.encode_rows(context.prepared.rows["test"])
    expected = output.logits["test"]
    rebuilt = predict_logits(model, rows, context.inputs, "cpu")
    np.testing.assert_allclose(rebuilt, expected, atol=1e-4)
    if strategy == "lora":
        return
    export_model(context, model, finetune, tmp_path / "publish")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "publish")
    reloaded = predict_logits(plain, rows, context.inputs, "cpu")
    np.testing.assert_allclose(reloaded, expected, atol=1e-4)
    source = context.build_model("native", 0).model.state_dict()
    model.load_state_dict({name: source[name] for name in stored}, strict=False)
    reset = predict_logits(model, rows, context.inputs, "cpu")
    # Where the head alone was best, what a later phase moved is put back.
    moved = any(not output.weights[name].equal(source[name]) for name in stored)
    assert moved or strategy == "gradual"
    assert (np.abs(reset - expected).max() > 1e-2) == moved
    weights = {name: t for name, t in output.weights.items() if ".running_" not in name}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(RunFolderError, match="running_mean"):
        rebuild_model(context, finetune, 0, tmp_path / "weights.safetensors")


def build_resnet_arm(folder: Path, strategy: str) -> tuple[ExperimentContext, Finetune]:
    """Save a tiny random ResNet and pictures, and return what its arm is trained from."""
    save_tiny("resnet", folder / "resnet")
    training = {"num_train_epochs": 2, "learning_rate": 1e-2, "bf16": False}
    recipe = Recipe.parse({
        "source": {"model": str(folder / "resnet")},
        "data": {"train": {"path": str(pictures(folder / "pictures", 20))}},
        "finetune": {"strategy": strategy, "blocks": 1, "training": training, "lora": {"r": 2},
                     "freeze_batchnorm": False},
    })  # fmt: skip
    return bench_of(recipe), recipe.finetune


def test_running_statistics_of_the_best_evaluation_are_restored() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[2].weight.requires_grad_(False)
    best = BestWeightsCallback("eval_loss", greater=False, patience=None)
    statistics = get_statistics(model)
    best.on_evaluate(None, SimpleNamespace(epoch=1), None, model=model, metrics={"eval_loss": 1.0})
    assert best.weights.keys() & statistics.keys() == {"1.running_mean", "1.running_var"}
    model.train()(torch.rand(2, 3, 8, 8))
    assert not model[1].running_mean.equal(statistics["1.running_mean"])
    best.restore(model)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(get_statistics(model)[name], statistics[name])
