"""Check a learning rate for every part: depths against names, rates against the formula."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import bench_of
from support.tiny import is_image
from support.training import (
    build_classifier,
    build_probed_model,
    build_trainer,
    copy_parameters,
    load_classifier,
)

from hftl.cli import check
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.arm import train_arm
from hftl.models.architectures import ARCHITECTURES
from hftl.models.heads import build_model
from hftl.models.source import find_source
from hftl.pipeline.pipeline import check_recipe
from hftl.train.optimizer import (
    LayerLearningRates,
    build_layer_rates,
    build_optimizer,
    build_parameter_groups,
    compute_depths,
    has_weight_decay,
    summarize_learning_rates,
)

HEAD = r"^(classifier|pre_classifier|pooler|head|score)\."
BLOCK = r"(?:^|\.)(?:encoder\.layer|transformer\.layer|layers|encoder\.layers)\.(\d+)\."
TOP = re.compile(
    r"\w+\.(encoder\.)?(pooler|layernorm|LayerNorm|final_norm|norm|post_layernorm|ln|"
    r"emb_layer_norm_after)\."
)
"""What the encoder holds after its blocks."""
OTHER_NORM = ("deberta", "deberta-v2", "clip", "metaclip_2")
"""Their norm of that name is of relative positions, or read by no image's output."""
STAGES = {
    **dict.fromkeys(
        ("bit", "resnet", "regnet", "convnext", "convnextv2"),
        {"stages.0.layers.0": 1, "stages.0.layers.1": 2, "stages.1": 3},
    ),
    "efficientnet": {"blocks.0": 1, "blocks.1": 2, "encoder.top_conv": 3, "encoder.top_bn": 3},
    "hiera": {"stages.0": 1, "stages.1": 2, "stages.2.layers.0": 3, "stages.2.layers.1": 4},
    "mobilevit": {**{f"encoder.layer.{n}": n + 1 for n in range(5)}, "conv_1x1_exp": 6},
    "pvt_v2": {
        "layers.0.blocks.0": 1, "layers.0.layer_norm": 1, "layers.1.patch_embedding": 2,
        "layers.1.blocks.0": 2, "layers.1.blocks.1": 3, "layers.1.layer_norm": 4,
    },
}  # fmt: skip
"""Depths of what is in no block 0, by the parts of tiny models of several stages."""
BLOCKS = {"albert": 1, "efficientnet": 2, "hiera": 4, "mobilevit": 5}
UNDECAYED = {
    "bert": "embeddings.position_embeddings.weight",
    "roberta": "embeddings.position_embeddings.weight",
    "distilbert": "embeddings.position_embeddings.weight",
    "albert": "embeddings.position_embeddings.weight",
    "electra": "embeddings.position_embeddings.weight",
    "mpnet": "embeddings.position_embeddings.weight encoder.relative_attention_bias.weight",
    "deberta-v2": "encoder.rel_embeddings.weight",
    "modernbert": "",
    "vit": "embeddings.cls_token embeddings.position_embeddings",
    "deit": "embeddings.cls_token embeddings.distillation_token embeddings.position_embeddings",
    "beit": "embeddings.cls_token embeddings.mask_token "
    "layers.N.relative_position_bias.relative_position_bias_table",
    "dinov2_with_registers": "embeddings.cls_token embeddings.mask_token "
    "embeddings.register_tokens embeddings.position_embeddings",
    "swin": "encoder.layers.N.blocks.N.attention.relative_position_bias"
    ".relative_position_bias_table",
    "swinv2": "encoder.layers.N.blocks.N.attention.self.logit_scale "
    "encoder.layers.N.blocks.N.attention.self.continuous_position_bias_mlp.N.weight",
    "clip": "embeddings.position_embedding.weight",
}
"""Every matrix of the encoder that does not decay, blocks and stages counted as one."""


def expect_depth(model_type: str, name: str, blocks: int) -> int:
    """Return the depth that a parameter's name means."""
    top = TOP.match(name) and model_type not in OTHER_NORM
    # The layer before EuroBERT's classifier lies outside its encoder.
    if re.search(HEAD, name) or top or name.startswith("dense."):
        return blocks + 1
    if model_type == "albert":
        return 1 if "albert_layers" in name else 0
    if model_type in ("swin", "swinv2", "donut-swin"):
        stage = re.search(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
        if stage is None:
            return 0
        before = [0, 1][int(stage[1])]
        # Stages of one block and of two; merging is as deep as the last block of its stage.
        return before + 1 + (int(stage[2]) if stage[2] else [0, 1][int(stage[1])])
    if model_type in STAGES:
        inside = [depth for part, depth in STAGES[model_type].items() if f".{part}." in f".{name}"]
        return inside[-1] if inside else 0
    match = re.search(BLOCK, name)
    return int(match[1]) + 1 if match else 0


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - {"timm_wrapper"}))
def test_depth_of_every_parameter_is_that_of_its_name(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(model_type)
    depths, blocks = compute_depths(build_classifier(folder, "full"))
    assert blocks == BLOCKS.get(model_type, 3)
    assert depths == {name: expect_depth(model_type, name, blocks) for name in depths}
    assert set(depths.values()) == set(range(blocks + 2))
    if is_image(model_type):
        return
    source = find_source(Source(model=str(folder)))
    if source.architecture_spec.token_head is not None:
        names = ["a", "b", "c"]
        tokens = build_model(source, "token-classification", "native", 3, names, seed=0).model
        depths, _ = compute_depths(tokens)
        if model_type in ("big_bird", "fnet"):
            # transformers builds their poolers for tokens too, and nothing reads them there.
            depths = {name: depth for name, depth in depths.items() if ".pooler." not in name}
        assert depths == {name: expect_depth(model_type, name, blocks) for name in depths}
    depths, _ = compute_depths(build_classifier(folder, "full", "mean"))
    assert depths.pop("head.weight") == depths.pop("head.bias") == blocks + 1
    stock = source.architecture_spec.encoder
    for name, depth in depths.items():
        stock_name = f"{stock}.{name.removeprefix('encoder.')}"
        assert depth == expect_depth(model_type, stock_name, blocks), name


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_lora_is_as_deep_as_what_it_wraps(bert: Path, pooling: str) -> None:
    model = build_classifier(bert, "lora", pooling)
    depths, _ = compute_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = re.search(r"encoder\.layer\.(\d)\.", name)
            assert depths[name] == (int(block[1]) + 1 if block else 4), name


@pytest.mark.parametrize("strategy", ["full", "lora", "partial"])
def test_rates_follow_the_formula_and_every_parameter_has_one(bert: Path, strategy: str) -> None:
    model = build_classifier(bert, strategy, "mean")
    if strategy == "full":  # A tied parameter stands in one group.
        layers = model.encoder.encoder.layer
        layers[2].output.dense.weight = layers[0].output.dense.weight
    groups = build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.5))
    assert strategy != "full" or {group["depth"] for group in groups} == {0, 1, 2, 3, 4}
    for group in groups:
        assert group["lr"] == pytest.approx(0.01 * 0.5 ** (4 - group["depth"]))
    placed = [id(p) for group in groups for p in group["params"]]
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(placed) == len(set(placed)) and set(placed) == trains


def test_named_rates_go_before_the_decay() -> None:
    rates = build_layer_rates(0.5, {"embeddings": 0.0, "blocks": [1e-5, 2e-5], "head": 1e-3})
    assert rates is not None
    assert [rates.rate(1.0, depth, 3) for depth in range(5)] == [0.0, 1e-5, 2e-5, 2e-5, 1e-3]
    some = build_layer_rates(0.5, {"head": 1e-3})
    assert some is not None
    assert [some.rate(1.0, depth, 3) for depth in range(5)] == [0.0625, 0.125, 0.25, 0.5, 1e-3]
    assert build_layer_rates(None, None) is None
    with pytest.raises(RecipeError, match=r"rates\.blocks has 4 rates, but the source"):
        LayerLearningRates(blocks=(1.0,) * 4).rate(1.0, 1, 3)
    with pytest.raises(RecipeError, match=r"rates\['heads'\]; did you mean 'head'"):
        build_layer_rates(None, {"heads": 0.1})


@pytest.mark.parametrize("model_type", sorted(UNDECAYED))
def test_vectors_tokens_and_positions_do_not_decay(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    loaded = load_classifier(tiny_model(model_type))
    model, prefix = loaded.model, f"{loaded.architecture.encoder}."
    decayed = {name for name, p in model.named_parameters() if has_weight_decay(name, p)}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    without = {re.sub(r"\.\d+\.", ".N.", name.removeprefix(prefix)) for name in matrices - decayed}
    assert without == set(UNDECAYED[model_type].split()) and decayed <= matrices
    for group in build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.9)):
        names = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
        assert group["weight_decay"] == (0.1 if names <= decayed else 0.0)
        assert names <= decayed or not names & decayed


def test_summary_names_each_part_once(bert: Path) -> None:
    model = build_classifier(bert, "full", "mean")
    rows = summarize_learning_rates(model, 0.01, LayerLearningRates(decay=0.5))
    assert [row["part"] for row in rows] == ["embeddings", "block 1", "block 2", "block 3", "head"]
    assert [row["rate"] for row in rows] == pytest.approx([0.000625, 0.00125, 0.0025, 0.005, 0.01])
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["parameters"] for row in rows) == total


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_trainer_takes_steps_of_each_parts_size(bert: Path, tmp_path: Path, strategy: str) -> None:
    more = {"layer_decay": 0.5, "rates": {"head": 0.0}}
    start = build_probed_model(bert, strategy)
    model, plain = build_probed_model(bert, strategy), build_probed_model(bert, strategy)
    build_trainer(model, tmp_path, [], more, max_steps=1, learning_rate=0.04).train()
    build_trainer(plain, tmp_path, max_steps=1, learning_rate=1.0).train()
    before, after = copy_parameters(start), copy_parameters(plain)
    depths, _ = compute_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.0 if depths[name] == 4 else 0.04 * 0.5 ** (4 - depths[name])
            expected = before[name] - rate * (before[name] - after[name])
            torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-4)


def test_optimizer_that_groups_parameters_itself_is_refused(bert: Path) -> None:
    model = build_classifier(bert, "full", "mean")
    groups = build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.5))
    optimizer = build_optimizer(torch.optim.AdamW, {"lr": 1.0, "betas": (0.8, 0.9)}, groups)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.8, 0.9)
    assert {g["lr"] for g in optimizer.param_groups} == {g["lr"] for g in groups}
    for kind, settings in ((torch.optim.AdamW, {"params": []}), (lambda: None, {})):
        with pytest.raises(RecipeError, match="groups parameters in its own way"):
            build_optimizer(kind, settings, groups)


def test_preflight_returns_and_prints_the_rates(
    recipe_tree: dict[str, Any], recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_tree["finetune"] |= {"strategy": "full", "layer_decay": 0.5}
    recipe_tree["measure"]["arms"] = [
        "head", "scratch", {"lora": {"finetune.lr.head": 0.1}},
        {"same": {"finetune.layer_decay": None}},
        {"fixed": {"finetune.lr": {"blocks": [0.0, 0.1]}}},
    ]  # fmt: skip
    recipe = Recipe.parse(recipe_tree)
    context = bench_of(recipe)
    facts = context.run_preflight(recipe, recipe.arms)
    rates = {arm: [row["rate"] for row in rows] for arm, rows in facts["learning_rates"].items()}
    assert rates == {
        "full": pytest.approx([5e-3 * 0.5**k for k in (4, 3, 2, 1, 0)]),
        "lora": pytest.approx([5e-3 * 0.5**k for k in (3, 2, 1)] + [0.1]),
        "fixed": pytest.approx([5e-3 * 0.5**4, 0.0, 0.1, 0.1, 5e-3]),
    }
    recipe_tree["measure"]["arms"] = ["head"]
    recipe_file.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    check(recipe_file)
    printed = capsys.readouterr().out
    assert "full trains" in printed and "block 3" in printed and "2.50e-03" in printed
    del recipe_tree["finetune"]["layer_decay"]
    recipe = Recipe.parse(recipe_tree)
    assert "learning_rates" not in context.run_preflight(recipe, recipe.arms)


def test_rates_that_make_no_sense_are_refused(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["finetune"] |= {"strategy": "full", "lr": {"blocks": [0.1] * 4}}
    with pytest.raises(RecipeError, match=r"finetune\.lr\.blocks has 4 rates, .* 3 blocks"):
        check_recipe(Recipe.parse(recipe_tree))
    recipe_tree["finetune"] |= {"strategy": "head", "lr": None, "layer_decay": 0.9}
    with pytest.raises(RecipeError, match="the strategy head is solved"):
        Recipe.parse(recipe_tree)


def test_arm_moves_as_its_rates_say(recipe_tree: dict[str, Any]) -> None:
    rates = {"embeddings": 0.0, "blocks": [0.0, 0.0, 1e-3]}
    recipe_tree["finetune"] |= {"strategy": "full", "lr": rates}
    recipe_tree["finetune"]["training"]["num_train_epochs"] = 1
    recipe = Recipe.parse(recipe_tree)
    context = bench_of(recipe)
    outcome = train_arm(context, recipe.finetune, 0)
    before = context.build_model("mean", 0).model.state_dict()
    for name, tensor in outcome.weights.items():
        moves = "layer.2." in name or name.startswith("head.")
        assert torch.equal(tensor, before[name]) != moves, name
