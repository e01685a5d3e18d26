"""A learning rate for every part: depths against names, rates against the formula."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import bench_of
from support.tiny import FIELDS, is_image
from support.training import build_probed_model, build_trainer, copy_parameters

from hftl.cli import check
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.trainable import prepare
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

BLOCK = r"(?:^|\.)(?:encoder\.layer|transformer\.layer|layers|encoder\.layers)\.(\d+)\."
TOP = {
    "vit": r"vit\.layernorm", "deit": r"deit\.layernorm", "beit": r"beit\.pooler",
    "data2vec-vision": r"data2vec_vision\.pooler",
    "dinov2": r"dinov2\.layernorm", "dinov2_with_registers": r"dinov2_with_registers\.layernorm",
    "swin": r"swin\.layernorm", "modernbert": r"model\.final_norm",
    "siglip": r"vision_model\.post_layernorm", "bert": r"bert\.pooler",
    "albert": r"albert\.pooler", "swinv2": r"swinv2\.layernorm",
    "megatron-bert": r"bert\.(encoder\.ln|pooler)", "nomic_bert": r"nomic_bert\.pooler",
    "big_bird": r"bert\.pooler", "vit_mae": r"vit\.layernorm", "vit_msn": r"vit\.layernorm",
    "esm": r"esm\.encoder\.emb_layer_norm_after", "esmc": r"esmc\.norm",
    "ijepa": r"ijepa\.layernorm", "roberta-prelayernorm": r"roberta_prelayernorm\.LayerNorm",
    "ultrabert": r"model\.norm", "xlm-roberta-xl": r"roberta\.encoder\.LayerNorm",
    **dict.fromkeys(("ernie", "fnet", "gte", "mobilebert", "rembert", "roc_bert"), r"\w+\.pooler"),
}  # fmt: skip
"""What stands after the blocks inside the encoder."""
SPARED = {
    "bert": "bert.embeddings.position_embeddings.weight",
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert"), "roberta.embeddings.position_embeddings.weight"
    ),
    "distilbert": "distilbert.embeddings.position_embeddings.weight",
    "albert": "albert.embeddings.position_embeddings.weight",
    "electra": "electra.embeddings.position_embeddings.weight",
    "mpnet": "mpnet.embeddings.position_embeddings.weight "
    "mpnet.encoder.relative_attention_bias.weight",
    "deberta-v2": "deberta.encoder.rel_embeddings.weight",
    "modernbert": "",
    "vit": "vit.embeddings.cls_token vit.embeddings.position_embeddings",
    "vit_mae": "vit.embeddings.cls_token vit.embeddings.position_embeddings",
    "deit": "deit.embeddings.cls_token deit.embeddings.distillation_token "
    "deit.embeddings.position_embeddings",
    "beit": "beit.embeddings.cls_token beit.embeddings.mask_token "
    "beit.layers.N.relative_position_bias.relative_position_bias_table",
    "dinov2": "dinov2.embeddings.cls_token dinov2.embeddings.mask_token "
    "dinov2.embeddings.position_embeddings",
    "dinov2_with_registers": "dinov2_with_registers.embeddings.cls_token "
    "dinov2_with_registers.embeddings.mask_token "
    "dinov2_with_registers.embeddings.register_tokens "
    "dinov2_with_registers.embeddings.position_embeddings",
    "swin": "swin.encoder.layers.N.blocks.N.attention.relative_position_bias"
    ".relative_position_bias_table",
    "swinv2": "swinv2.encoder.layers.N.blocks.N.attention.self.logit_scale "
    "swinv2.encoder.layers.N.blocks.N.attention.self.continuous_position_bias_mlp.N.weight",
    "clip": "vision_model.embeddings.position_embedding.weight",
    "siglip": "vision_model.embeddings.position_embedding.weight",
}  # fmt: skip
"""Every matrix that does not decay, blocks and stages counted as one."""
HEAD = r"^(classifier|pre_classifier|pooler|head|score)\."


def model_of(model_type: str, folder: Path, pooling: str = "native", strategy: str = "full") -> Any:
    source = find_source(Source(model=str(folder)))
    built = build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)
    return prepare(built.model, strategy, fresh=built.fresh)


def by_name(model_type: str, name: str, blocks: int) -> int:
    """The depth that a parameter's name tells."""
    if re.search(HEAD, name) or re.match(TOP.get(model_type, "$"), name):
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
    found = re.search(BLOCK, name)
    return int(found[1]) + 1 if found else 0


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_parameter_is_as_deep_as_its_name_says(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    assert model_type in FIELDS
    model = model_of(model_type, tiny_model(model_type))
    found, blocks = compute_depths(model)
    assert blocks == (1 if model_type == "albert" else 3)
    assert found == {name: by_name(model_type, name, blocks) for name in found}
    assert set(found.values()) == set(range(blocks + 2))


@pytest.mark.parametrize("model_type", [m for m in sorted(ARCHITECTURES) if not is_image(m)])
def test_in_token_and_pooled_models_the_depths_are_the_same(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    source = find_source(Source(model=str(tiny_model(model_type))))
    tokens = build_model(source, "token-classification", "native", 3, ["a", "b", "c"], seed=0).model
    depths, blocks = compute_depths(tokens)
    if model_type in ("big_bird", "fnet"):
        # transformers builds their poolers for tokens too, and nothing reads them there.
        depths = {name: depth for name, depth in depths.items() if ".pooler." not in name}
    assert depths == {name: by_name(model_type, name, blocks) for name in depths}
    stock = source.architecture_spec.encoder
    found, blocks = compute_depths(model_of(model_type, tiny_model(model_type), "mean"))
    assert found.pop("head.weight") == found.pop("head.bias") == blocks + 1
    as_stock = {name: f"{stock}.{name.removeprefix('encoder.')}" for name in found}
    assert found == {name: by_name(model_type, as_stock[name], blocks) for name in found}


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_lora_is_as_deep_as_what_it_wraps(tiny_model: Callable[..., Path], pooling: str) -> None:
    model = model_of("bert", tiny_model("bert"), pooling, "lora")
    found, _ = compute_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = re.search(r"encoder\.layer\.(\d)\.", name)
            assert found[name] == (int(block[1]) + 1 if block else 4), name


@pytest.mark.parametrize("strategy", ["full", "lora", "partial"])
def test_rates_follow_the_formula_and_every_parameter_has_one(
    tiny_model: Callable[..., Path], strategy: str
) -> None:
    model = model_of("bert", tiny_model("bert"), "mean", strategy)
    found = build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.5))
    assert {g["depth"]: g["lr"] for g in found} == {
        depth: pytest.approx(0.01 * 0.5 ** (4 - depth))
        for depth in ({0, 1, 2, 3, 4} if strategy == "full" else {g["depth"] for g in found})
    }
    placed = [id(p) for g in found for p in g["params"]]
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


@pytest.mark.parametrize("model_type", sorted(SPARED))
def test_vectors_tokens_and_positions_do_not_decay(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    model = model_of(model_type, tiny_model(model_type))
    decayed = {name for name, p in model.named_parameters() if has_weight_decay(name, p)}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    spared = {re.sub(r"\.\d+\.", ".N.", name) for name in matrices - decayed}
    assert spared == set(SPARED[model_type].split()) and decayed <= matrices
    for group in build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.9)):
        names = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
        assert group["weight_decay"] == (0.1 if names <= decayed else 0.0)
        assert names <= decayed or not names & decayed


def test_the_table_names_each_part_once(tiny_model: Callable[..., Path]) -> None:
    model = model_of("bert", tiny_model("bert"), "mean")
    rows = summarize_learning_rates(model, 0.01, LayerLearningRates(decay=0.5))
    assert [row["part"] for row in rows] == ["embeddings", "block 1", "block 2", "block 3", "head"]
    assert [row["rate"] for row in rows] == pytest.approx([0.000625, 0.00125, 0.0025, 0.005, 0.01])
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["parameters"] for row in rows) == total


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_trainer_takes_steps_of_each_parts_size(
    tiny_model: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    model = build_probed_model(tiny_model("bert"), strategy)
    before = copy_parameters(model)
    more = {"layer_decay": 0.5, "rates": {"head": 0.0}}
    trainer = build_trainer(model, tmp_path, [], more, max_steps=1, learning_rate=0.04)
    trainer.train()
    gradients = {}
    again = build_probed_model(tiny_model("bert"), strategy)
    plain = build_trainer(again, tmp_path, [], {}, max_steps=1, learning_rate=1.0)
    start = copy_parameters(again)
    plain.train()
    gradients = {name: start[name] - value for name, value in copy_parameters(again).items()}
    depth_of, _ = compute_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.0 if depth_of[name] == 4 else 0.04 * 0.5 ** (4 - depth_of[name])
            wanted = before[name] - rate * gradients[name]
            torch.testing.assert_close(parameter.detach(), wanted, atol=1e-6, rtol=1e-4)


def test_a_tied_parameter_stands_in_one_group(tiny_model: Callable[..., Path]) -> None:
    model = model_of("bert", tiny_model("bert"), "mean")
    layers = model.encoder.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    found = build_parameter_groups(model, 0.01, 0.0, LayerLearningRates(decay=0.5))
    placed = [id(p) for g in found for p in g["params"]]
    assert len(placed) == len(set(placed))


def test_an_optimizer_with_groups_of_its_own_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = model_of("bert", tiny_model("bert"), "mean")
    chosen = build_parameter_groups(model, 0.01, 0.1, LayerLearningRates(decay=0.5))
    found = build_optimizer(torch.optim.AdamW, {"lr": 1.0, "betas": (0.8, 0.9)}, chosen)
    assert isinstance(found, torch.optim.AdamW) and found.defaults["betas"] == (0.8, 0.9)
    assert {g["lr"] for g in found.param_groups} == {g["lr"] for g in chosen}
    for kind, settings in ((torch.optim.AdamW, {"params": []}), (lambda: None, {})):
        with pytest.raises(RecipeError, match="groups parameters in its own way"):
            build_optimizer(kind, settings, chosen)


def test_the_preflight_tells_and_prints_the_rates(
    recipe_tree: dict[str, Any], recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_tree["finetune"] |= {"strategy": "full", "layer_decay": 0.5}
    recipe_tree["measure"]["arms"] = [
        "head", "scratch", {"lora": {"finetune.lr.head": 0.1}}, {"same": {"finetune.layer_decay":
        None}}, {"fixed": {"finetune.lr": {"blocks": [0.0, 0.1]}}},
    ]  # fmt: skip
    _, found = check_recipe(Recipe.parse(recipe_tree))
    rates = {arm: [row["rate"] for row in rows] for arm, rows in found["learning_rates"].items()}
    assert rates == {
        "full": pytest.approx([5e-3 * 0.5**k for k in (4, 3, 2, 1, 0)]),
        "lora": pytest.approx([5e-3 * 0.5**k for k in (3, 2, 1)] + [0.1]),
        "fixed": pytest.approx([5e-3 * 0.5**4, 0.0, 0.1, 0.1, 5e-3]),
    }
    recipe_file.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    check(recipe_file)
    printed = capsys.readouterr().out
    assert "full trains" in printed and "block 3" in printed and "2.50e-03" in printed
    del recipe_tree["finetune"]["layer_decay"]
    recipe_tree["measure"]["arms"] = ["head"]
    _, found = check_recipe(Recipe.parse(recipe_tree))
    assert "learning_rates" not in found


def test_rates_that_make_no_sense_are_refused(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["finetune"] |= {"strategy": "full", "lr": {"blocks": [0.1] * 4}}
    with pytest.raises(RecipeError, match=r"finetune\.lr\.blocks has 4 rates, .* 3 blocks"):
        check_recipe(Recipe.parse(recipe_tree))
    recipe_tree["finetune"] |= {"strategy": "head", "lr": None, "layer_decay": 0.9}
    with pytest.raises(RecipeError, match="the strategy head is solved"):
        Recipe.parse(recipe_tree)


def test_an_arm_with_rates_moves_as_its_rates_say(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["finetune"] |= {
        "strategy": "full",
        "lr": {"embeddings": 0.0, "blocks": [0.0, 0.0, 1e-3]},
    }
    recipe = Recipe.parse(recipe_tree)
    bench = bench_of(recipe)
    outcome = train_arm(bench, recipe.finetune, 0)
    before = bench.build_model("mean", 0).model.state_dict()
    for name, tensor in outcome.weights.items():
        moves = "layer.2." in name or name.startswith("head.")
        assert torch.equal(tensor, before[name]) != moves, name


def test_the_rate_of_an_unknown_part_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rates\['heads'\]; did you mean 'head'"):
        build_layer_rates(None, {"heads": 0.1})
