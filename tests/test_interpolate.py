"""Check weights between the original and the trained ones: the ends, the way, and the choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of
from support.training import build_classifier, build_probed_model, perturb, stack_rows
from torch import Tensor, nn

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.interpolate import select_alpha, set_interpolated_weights
from hftl.finetune.solved_arms import solve_head
from hftl.finetune.trainable import prepare
from hftl.models.source import find_source
from hftl.pipeline.retention import check_retention
from hftl.retain.regularizer import Retention
from hftl.retain.weights import compute_update, iterate_lora_layers
from hftl.train.checkpoint import iterate_trainable

pytestmark = pytest.mark.usefixtures("fast_reload")


def copy_trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_trainable(model)}


def compute_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**stack_rows(8, labels=False)).logits


@pytest.mark.parametrize(("pooling", "strategy"), [("mean", "full"), ("native", "partial")])
def test_ends_are_exact_and_the_rest_lies_between(bert: Path, pooling: str, strategy: str) -> None:
    model = build_probed_model(bert, strategy, pooling)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = copy_trainable(model)
    end = copy_trainable(perturb(model, 0.05))
    for alpha in (0.3, 1.0, 0.0, 0.75, 0, 1):
        set_interpolated_weights(model, start, end, alpha)
        for name, tensor in iterate_trainable(model):
            expected = (1 - alpha) * start[name] + alpha * end[name]
            torch.testing.assert_close(tensor, expected)
            if alpha in (0, 1):
                assert torch.equal(tensor, (start, end)[int(alpha)][name])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert bool(frozen) == (strategy == "partial")


@pytest.mark.parametrize(
    ("lora", "pooling"),
    [
        ({"lora_alpha": 12}, "native"),
        ({"use_rslora": True}, "mean"),
        ({"init_lora_weights": "orthogonal"}, "mean"),
        ({"target_modules": ["word_embeddings", "query"]}, "native"),
        ({"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}, "mean"),
    ],
)
def test_merged_weights_lie_between_under_lora(
    bert: Path, lora: dict[str, Any], pooling: str
) -> None:
    plain = build_classifier(bert, "full", pooling)
    model: Any = prepare(plain, "lora", lora={"r": 4} | lora, fresh=[])
    start, first = copy_trainable(model), compute_logits(model)
    end = copy_trainable(perturb(model, 0.2))
    last = compute_logits(model)
    whole = {path: compute_update(layer).detach() for path, layer in iterate_lora_layers(model)}
    others = [name for name in start if ".lora_" not in name]
    assert others and not torch.allclose(first, last, atol=1e-3)
    for alpha in (0.0, 0.4, 1.0):
        set_interpolated_weights(model, start, end, alpha)
        for path, layer in iterate_lora_layers(model):
            torch.testing.assert_close(compute_update(layer), alpha * whole[path])
        tensors = dict(iterate_trainable(model))
        for name in others:
            torch.testing.assert_close(tensors[name], torch.lerp(start[name], end[name], alpha))
    assert torch.equal(compute_logits(model), last)
    set_interpolated_weights(model, start, end, 0.0)
    torch.testing.assert_close(compute_logits(model), first, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("error", "alphas", "chosen"),
    [
        (0.0, [0.0, 0.25, 0.5, 0.75, 1.0], 0.5),
        (0.1, [1.0, 0.75, 0.5, 0.25, 0.0], 0.25),
        (9.0, [0.3, 0.2, 1.0], 0.2),
    ],
)
def test_smallest_share_within_one_standard_error_of_the_best_is_chosen(
    bert: Path, error: float, alphas: list[float], chosen: float
) -> None:
    model = build_probed_model(bert, "full")
    start = copy_trainable(model)
    end = copy_trainable(perturb(model, 0.05))
    scored: list[float] = []

    def score() -> tuple[float, float]:
        way = float((model.head.bias - start["head.bias"]).norm())
        scored.append(way / float((end["head.bias"] - start["head.bias"]).norm()))
        return 1 - (scored[-1] - 0.5) ** 2, error

    choice = select_alpha(model, start, alphas, score)
    assert scored == pytest.approx(alphas, abs=1e-5), "an evaluation each, and no other"
    assert choice["alpha"] == chosen
    assert [(row["alpha"], row["error"]) for row in choice["tried"]] == [(a, error) for a in alphas]
    expected = [1 - (a - 0.5) ** 2 for a in alphas]
    assert [row["score"] for row in choice["tried"]] == pytest.approx(expected, abs=1e-5)
    for name, tensor in iterate_trainable(model):
        torch.testing.assert_close(tensor, torch.lerp(start[name], end[name], chosen))


@pytest.mark.parametrize("strategy", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_arm_at_0_is_the_probe_and_at_1_the_trained_one(
    recipe_tree: dict[str, Any], strategy: str
) -> None:
    context = bench_of(Recipe.parse(recipe_tree))
    training = {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}
    section = Finetune.model_validate(
        {"strategy": strategy, "pooling": "mean", "training": training}
    )
    plain, first, last, both = (
        train_arm(context, section, 0, Retention(alphas=alphas))
        for alphas in ((), (0.0,), (1.0,), (0.0, 1.0))
    )
    probe = solve_head(context, section, 0)
    assert not np.allclose(plain.logits["test"], probe.logits["test"], atol=1e-2)
    np.testing.assert_allclose(first.logits["test"], probe.logits["test"], atol=1e-4)
    assert np.array_equal(last.logits["test"], plain.logits["test"])
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in plain.weights.items())
    rows = context.prepared.rows["validation"]
    labels = context.prepared.encode_for_metrics(rows)
    tried = {row["alpha"]: row for row in both.facts["interpolation"]["tried"]}
    for alpha, arm in ((0.0, first), (1.0, last)):
        right = context.prepared.decode_for_metrics(rows, arm.logits["validation"]) == labels
        assert tried[alpha]["score"] == pytest.approx(right.mean())
        assert tried[alpha]["error"] == pytest.approx(right.std(ddof=1) / len(right) ** 0.5)
    chosen = first if both.facts["interpolation"]["alpha"] == 0 else last
    assert np.array_equal(both.logits["test"], chosen.logits["test"])


def test_refuses_what_has_no_original_or_no_scale(recipe_tree: dict[str, Any], bert: Path) -> None:
    recipe_tree["retain"] = {"interpolate": [0.0, 1.0]}
    for lora in ({"use_dora": True}, {"bias": "all"}):
        recipe_tree["finetune"]["lora"] = lora
        arm = Recipe.parse(recipe_tree).arms[0]
        with pytest.raises(RecipeError, match=f"finetune.lora.{next(iter(lora))}="):
            check_retention(arm, find_source(Source(model=str(bert))), "classification")
    recipe_tree["finetune"] |= {"lora": {}, "head_init": "random"}
    with pytest.raises(RecipeError, match="head_init=random the original has no head"):
        Recipe.parse(recipe_tree)
