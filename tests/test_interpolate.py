"""Weights between the original and what was trained: the ends, the way, and what is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of
from support.training import Rows, build_classifier, build_probed_model, perturb
from torch import Tensor, nn

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.arm import select_alpha, set_interpolated_weights, solve_head, train_arm
from hftl.finetune.context import ExperimentContext, RegularizerSetup
from hftl.finetune.retention import check_retention
from hftl.finetune.trainable import prepare
from hftl.models.source import find_source
from hftl.retain.weights import compute_update, iterate_lora_layers
from hftl.train.checkpoint import iterate_trainable


@pytest.fixture
def bert(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


def learnt(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_trainable(model)}


def logits(model: nn.Module) -> Tensor:
    batch = {k: torch.stack([Rows()[i][k] for i in range(8)]) for k in Rows()[0]}
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("strategy", ["full", "partial"])
@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_the_ends_are_the_ends_and_the_rest_lies_between(
    bert: Path, pooling: str, strategy: str
) -> None:
    model = build_probed_model(bert, strategy, pooling)
    start, frozen = learnt(model), {n: p for n, p in model.named_parameters() if p.grad is None}
    frozen = {name: p.clone() for name, p in frozen.items() if not p.requires_grad}
    end = learnt(perturb(model, 0.05))
    for alpha in (0.3, 1.0, 0.0, 0.75, 0, 1):
        set_interpolated_weights(model, start, end, alpha)
        for name, tensor in iterate_trainable(model):
            wanted = (1 - alpha) * start[name] + alpha * end[name]
            torch.testing.assert_close(tensor, wanted)
            if alpha in (0, 1):
                assert torch.equal(tensor, (start, end)[int(alpha)][name])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert bool(frozen) == (strategy == "partial")


LORA = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "use_rslora": True},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "embeddings": {"r": 4, "target_modules": ["word_embeddings", "query"]},
    "saved": {"r": 4, "target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
}


@pytest.mark.parametrize("name", list(LORA))
@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_under_lora_it_is_the_merged_weights_that_lie_between(
    bert: Path, name: str, pooling: str
) -> None:
    model: Any = prepare(build_classifier(bert, "full", pooling), "lora", lora=LORA[name], fresh=[])
    start, first = learnt(model), logits(model)
    end = learnt(perturb(model, 0.2))
    last = logits(model)
    whole = {path: compute_update(layer).detach() for path, layer in iterate_lora_layers(model)}
    assert not torch.allclose(first, last, atol=1e-3)
    for alpha in (0.0, 0.4, 1.0):
        set_interpolated_weights(model, start, end, alpha)
        for path, layer in iterate_lora_layers(model):
            torch.testing.assert_close(compute_update(layer), alpha * whole[path])
        beside = [n for n in start if ".lora_" not in n]
        for key, tensor in iterate_trainable(model):
            if key in beside:
                torch.testing.assert_close(tensor, (1 - alpha) * start[key] + alpha * end[key])
        assert beside
    assert torch.equal(logits(model), last)
    set_interpolated_weights(model, start, end, 0.0)
    torch.testing.assert_close(logits(model), first, atol=1e-6, rtol=0)


def test_a_model_of_merged_weights_says_the_same(bert: Path) -> None:
    """theta(alpha) written out for every weight of a model without an adapter."""
    plain, model = build_probed_model(bert, "full"), build_probed_model(bert, "lora")
    original = {n: p.detach().clone() for n, p in plain.encoder.named_parameters()}
    start = learnt(model)
    end = learnt(perturb(model, 0.2))
    set_interpolated_weights(model, start, end, 0.35)
    deltas = {path: compute_update(layer).detach() for path, layer in iterate_lora_layers(model)}
    with torch.no_grad():
        set_interpolated_weights(model, start, end, 1.0)
        for path, layer in iterate_lora_layers(model):
            merged = original[f"{path}.weight"] + compute_update(layer)
            between = torch.lerp(original[f"{path}.weight"], merged, 0.35)
            plain.encoder.get_parameter(f"{path}.weight").copy_(between)
            torch.testing.assert_close(between, original[f"{path}.weight"] + deltas[path])
        for key in ("head.weight", "head.bias"):
            plain.get_parameter(key).copy_(torch.lerp(start[key], end[key], 0.35))
    set_interpolated_weights(model, start, end, 0.35)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("error", "alphas", "chosen"),
    [
        (0.0, [0.0, 0.25, 0.5, 0.75, 1.0], 0.5),
        (0.1, [0.0, 0.25, 0.5, 0.75, 1.0], 0.25),
        (0.1, [1.0, 0.75, 0.5, 0.25, 0.0], 0.25),
        (9.0, [0.3, 0.2, 1.0], 0.2),
    ],
)
def test_the_smallest_share_within_one_standard_error_of_the_best_is_kept(
    bert: Path, error: float, alphas: list[float], chosen: float
) -> None:
    model = build_probed_model(bert, "full")
    start = learnt(model)
    end = learnt(perturb(model, 0.05))
    seen: list[float] = []

    def score() -> tuple[float, float]:
        way = float((model.head.bias - start["head.bias"]).norm())
        seen.append(way / float((end["head.bias"] - start["head.bias"]).norm()))
        return 1 - (seen[-1] - 0.5) ** 2, error

    told = select_alpha(model, start, alphas, score)
    assert seen == pytest.approx(alphas, abs=1e-5), "an evaluation each, and no other"
    assert told["alpha"] == chosen
    assert [(row["alpha"], row["error"]) for row in told["tried"]] == [(a, error) for a in alphas]
    wanted = [1 - (a - 0.5) ** 2 for a in alphas]
    assert [row["score"] for row in told["tried"]] == pytest.approx(wanted, abs=1e-5)
    for name, tensor in iterate_trainable(model):
        torch.testing.assert_close(tensor, torch.lerp(start[name], end[name], chosen))


@pytest.fixture
def bench(recipe_tree: dict[str, Any]) -> ExperimentContext:
    return bench_of(Recipe.parse(recipe_tree))


def section(strategy: str) -> Finetune:
    training = {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}
    return Finetune(strategy=strategy, pooling="mean", training=training)  # pyright: ignore


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_an_arm_at_0_is_the_probe_and_at_1_what_was_trained(
    bench: ExperimentContext, strategy: str
) -> None:
    plain = train_arm(bench, section(strategy), 0)
    first = train_arm(bench, section(strategy), 0, RegularizerSetup(alphas=(0.0,)))
    last = train_arm(bench, section(strategy), 0, RegularizerSetup(alphas=(1.0,)))
    probe = solve_head(bench, section("head"), 0)
    assert not np.allclose(plain.logits["test"], probe.logits["test"], atol=1e-2)
    np.testing.assert_allclose(first.logits["test"], probe.logits["test"], atol=1e-4)
    assert np.array_equal(last.logits["test"], plain.logits["test"])
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in plain.weights.items())
    both = train_arm(bench, section(strategy), 0, RegularizerSetup(alphas=(0.0, 1.0)))
    told = both.facts["interpolation"]
    scores = {row["alpha"]: row["score"] for row in told["tried"]}
    for alpha, one in ((0.0, first), (1.0, last)):
        labels = bench.prepared.encode_for_metrics(bench.prepared.rows["validation"])
        right = (
            bench.decode_logits(bench.prepared.rows["validation"], one.logits["validation"])
            == labels
        )
        assert scores[alpha] == pytest.approx(right.mean())
        (error,) = (row["error"] for row in told["tried"] if row["alpha"] == alpha)
        assert error == pytest.approx(right.std(ddof=1) / len(right) ** 0.5)
    kept = first if told["alpha"] == 0 else last
    assert np.array_equal(both.logits["test"], kept.logits["test"])


def test_a_random_head_has_no_place_at_the_original(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["retain"] = {"interpolate": [0.0, 1.0]}
    recipe_tree["finetune"]["head_init"] = "random"
    with pytest.raises(RecipeError, match="head_init=random the original has no head"):
        Recipe.parse(recipe_tree)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"bias": "all"}])
def test_an_update_that_does_not_scale_is_refused(
    recipe_tree: dict[str, Any], lora: dict[str, Any], bert: Path
) -> None:
    recipe_tree["retain"] = {"interpolate": [0.0, 1.0]}
    recipe_tree["finetune"]["lora"] = lora
    arm = Recipe.parse(recipe_tree).arms[0]
    with pytest.raises(RecipeError, match=f"finetune.lora.{next(iter(lora))}="):
        check_retention(arm, find_source(Source(model=str(bert))), "classification")
