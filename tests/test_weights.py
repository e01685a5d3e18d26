"""Check penalties on weights against brute force, under LoRA against the merged weights."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.training import (
    assert_same_parameters,
    assert_same_step,
    build_probed_model,
    build_trainer,
    copy_parameters,
    load_classifier,
    perturb,
    run_first_step,
    stack_rows,
)
from torch import Tensor, nn

from hftl.adapt.encoder_io import merge_encoder_state
from hftl.errors import RecipeError
from hftl.finetune.trainable import prepare
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.retain.fisher import EWC
from hftl.retain.weights import (
    L2SP,
    WeightPenalty,
    check_low_rank,
    check_unchanged_base,
    compute_update,
    compute_update_norm,
    iterate_encoder_parameters,
    iterate_lora_layers,
)

HEAD = ("head.", "classifier.")


def get_inner_encoder(model: Any) -> Any:
    """Return the encoder inside, its layers wrapped."""
    return get_encoder(model, get_model_spec(model))


def copy_encoder_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in iterate_encoder_parameters(model)}


def sum_shifts(model: nn.Module, start: dict[str, Tensor], fisher: Any = None) -> Any:
    """Return the squared distance of the encoder's parameters from a start, weighted or not."""
    return sum(
        ((p - start[name]).square() * (1 if fisher is None else fisher[name])).sum()
        for name, p in iterate_encoder_parameters(model)
    )


def build_even_fisher(model: nn.Module) -> dict[str, Tensor]:
    named = get_inner_encoder(model).named_parameters()
    return {name.replace(".base_layer.", "."): torch.ones_like(p) for name, p in named}


def record_start(model: nn.Module, *penalties: WeightPenalty[Any]) -> None:
    """Record the start, where a penalty is 0."""
    for penalty in penalties:
        penalty.record_start(model)
        assert penalty.compute_penalty(model) == 0


# The penalty


@pytest.mark.parametrize(("pooling", "strategy"), [("mean", "full"), ("native", "partial")])
def test_penalty_is_the_weighted_squared_distance(bert: Path, strategy: str, pooling: str) -> None:
    model = build_probed_model(bert, strategy, pooling)
    before, start = copy_parameters(model), copy_encoder_parameters(model)
    fisher = {name: torch.rand_like(p) for name, p in start.items()}
    penalty, ewc = L2SP(0.3, head=0.2), EWC(0.6, fisher)
    record_start(model, ewc)
    penalty.record_start(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith(HEAD)]
    drawn_to_zero = 0.1 * sum(p.square().sum() for p in head)
    torch.testing.assert_close(penalty.compute_penalty(model), drawn_to_zero)
    perturb(model, 0.05)
    torch.testing.assert_close(ewc.compute_penalty(model), 0.3 * sum_shifts(model, start, fisher))
    value = penalty.compute_penalty(model)
    drawn_to_zero = 0.1 * sum(p.square().sum() for p in head)
    torch.testing.assert_close(value, drawn_to_zero + 0.15 * sum_shifts(model, start))
    gradients = torch.autograd.grad(value, list(trained.values()))
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        to_zero = name.startswith(HEAD)
        expected = 0.2 * parameter if to_zero else 0.3 * (parameter - before[name])
        torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize(("pooling", "rslora"), [("mean", True), ("native", False)])
def test_merged_weights_count_under_lora(bert: Path, pooling: str, rslora: bool) -> None:
    loaded = load_classifier(bert, pooling)
    plain = {k: v.clone() for k, v in loaded.encoder.state_dict().items()}
    lora = {"r": 4, "lora_alpha": 12, "use_rslora": rslora}
    model = prepare(loaded.model, "lora", lora=lora, fresh=loaded.fresh)
    layers = dict(iterate_lora_layers(model))
    fisher = {f"{name}.weight": torch.rand(layer.base_layer.weight.shape)
              for name, layer in layers.items()}  # fmt: skip
    l2sp, ewc = L2SP(0.4), EWC(0.4, fisher | {"embeddings.nothing": torch.ones(2)})
    record_start(model, l2sp, ewc)
    perturb(model, 0.05)
    inner: Any = SimpleNamespace(encoder=get_inner_encoder(model))
    merged = merge_encoder_state(inner)
    shifts = {n: (merged[n] - plain[n]).square() for n in fisher}
    assert len(layers) == 18 and all(shift.max() > 1e-8 for shift in shifts.values())
    expected = 0.2 * sum(shift.sum() for shift in shifts.values())
    torch.testing.assert_close(l2sp.compute_penalty(model), expected, rtol=1e-4, atol=1e-6)
    weighted = 0.2 * sum((fisher[n] * shift).sum() for n, shift in shifts.items())
    torch.testing.assert_close(ewc.compute_penalty(model), weighted, rtol=1e-4, atol=1e-6)
    for layer in layers.values():
        torch.testing.assert_close(compute_update_norm(layer), compute_update(layer).square().sum())
    ewc.compute_penalty(model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)


def test_modules_saved_by_an_adapter_count_as_the_encoders(bert: Path) -> None:
    """Draw a layer of the original to where it was, and only the head to zero."""
    model = build_probed_model(bert, "full", "native")
    lora = {"modules_to_save": ["LayerNorm"], "target_modules": ["query"]}
    model = prepare(model, "lora", lora=lora, fresh=[])
    before = copy_encoder_parameters(model)
    assert "encoder.layer.2.output.LayerNorm.weight" in before and len(before) == 14
    l2sp, ewc = L2SP(0.4), EWC(0.4, {n: torch.ones_like(p) for n, p in before.items()})
    record_start(model, l2sp, ewc)
    perturb(model, 0.05)
    saved = 0.2 * sum_shifts(model, before)
    updates = [compute_update(layer).square().sum() for _, layer in iterate_lora_layers(model)]
    torch.testing.assert_close(l2sp.compute_penalty(model), saved + 0.2 * sum(updates))
    torch.testing.assert_close(ewc.compute_penalty(model), saved)
    head = [p for n, p in model.named_parameters() if "classifier.modules_to_save" in n]
    expected = 0.1 * sum(p.square().sum() for p in head)
    torch.testing.assert_close(L2SP(0.0, head=0.2).compute_penalty(model), expected)


@pytest.mark.parametrize(
    ("name", "target"), [("bert", "word_embeddings"), ("vit", "patch_embeddings.projection")]
)
def test_lora_of_embeddings_and_convolutions_counts(
    name: str, target: str, tiny_model: Callable[..., Path]
) -> None:
    loaded = load_classifier(tiny_model(name))
    model = prepare(loaded.model, "lora", lora={"target_modules": [target]}, fresh=loaded.fresh)
    ((path, layer),) = iterate_lora_layers(model)
    before = layer.get_base_layer().weight.detach().clone()
    fisher = torch.rand(before.shape)
    l2sp, ewc = L2SP(0.4), EWC(0.4, {f"{path}.weight": fisher})
    start = copy_encoder_parameters(model)
    record_start(model, l2sp, ewc)
    perturb(model, 0.3)
    merged = deepcopy(layer)
    merged.merge()
    shift = (merged.get_base_layer().weight - before).detach().square()
    assert shift.max() > 1e-4
    # A pooler trains whole.
    whole = 0.2 * sum_shifts(model, start)
    torch.testing.assert_close(l2sp.compute_penalty(model), 0.2 * shift.sum() + whole)
    torch.testing.assert_close(ewc.compute_penalty(model), 0.2 * (fisher * shift).sum())


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_mixed_precision_changes_no_penalty(bert: Path, strategy: str) -> None:
    model = build_probed_model(bert, strategy)
    penalties = [L2SP(0.4, head=0.1), EWC(0.4, build_even_fisher(model))]
    for penalty in penalties:
        penalty.record_start(model)
    perturb(model, 0.05)
    for penalty in penalties:
        expected = penalty.compute_penalty(model)
        with torch.autocast("cpu", torch.bfloat16):
            value = penalty.compute_penalty(model)
        assert value.dtype == torch.float32 and torch.equal(value, expected)


# Training


@pytest.mark.parametrize(
    ("kind", "strategy"), [("l2sp", "lora"), ("decoupled", "full"), ("ewc", "full")]
)
def test_training_with_a_penalty_stays_nearer(
    bert: Path, tmp_path: Path, kind: str, strategy: str
) -> None:
    distances = []
    for weight in (0.0, 3.0):
        model, distance = build_probed_model(bert, strategy), L2SP(2.0)
        distance.record_start(model)
        penalty: Any = L2SP(weight, decoupled=kind == "decoupled")
        if kind == "ewc":
            penalty = EWC(weight, build_even_fisher(model))
        settings = {"optim": "adamw_torch", "learning_rate": 0.03, "num_train_epochs": 3}
        build_trainer(model, tmp_path, [penalty], **settings).train()
        distances.append(float(distance.compute_penalty(model).detach()))
    assert distances[1] < 0.8 * distances[0]


def test_penalty_counts_once_a_step_however_it_is_cut(bert: Path, tmp_path: Path) -> None:
    steps = []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer = build_trainer(
            build_probed_model(bert, "full"), tmp_path, [L2SP(0.4, head=0.3)],
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        steps.append(run_first_step(trainer))
    assert_same_step(*steps)


def test_resumed_training_has_the_first_start(bert: Path, tmp_path: Path) -> None:
    def build() -> Any:
        model = build_probed_model(bert, "lora")
        return build_trainer(
            model, tmp_path, [L2SP(0.5), EWC(0.5, build_even_fisher(model))],
            num_train_epochs=2, learning_rate=0.05, save_strategy="epoch",
        )  # fmt: skip

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_parameters(resumed.model, whole.model)


def test_decoupled_step_follows_the_schedule(bert: Path, tmp_path: Path) -> None:
    model, pairs = build_probed_model(bert, "full"), []
    start = copy_encoder_parameters(model)

    class RecordedL2SP(L2SP):
        def after_step(self, model: nn.Module, optimizer: Any) -> None:
            before = copy_encoder_parameters(model)
            super().after_step(model, optimizer)
            pairs.append((before, copy_encoder_parameters(model)))

    settings = {"learning_rate": 0.1, "lr_scheduler_type": "linear"}
    build_trainer(model, tmp_path, [RecordedL2SP(0.5, decoupled=True)], **settings).train()
    for rate, (before, after) in zip((0.1, 0.2 / 3, 0.1 / 3), pairs, strict=True):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value - rate * 0.5 * (value - start[name]))


def test_decoupled_step_is_outside_the_optimizer(bert: Path) -> None:
    model = build_probed_model(bert, "full")
    penalty = L2SP(0.5, decoupled=True)
    penalty.record_start(model)
    before = copy_parameters(model)
    now = copy_parameters(perturb(model, 0.05))
    assert penalty.compute_penalty(model) == 0
    inside = {id(p) for _, p in iterate_encoder_parameters(model)}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in inside) == own], "lr": rate}
        for own, rate in ((True, 0.1), (False, 0.7))
    ]
    penalty.after_step(model, torch.optim.AdamW(groups))
    for name, parameter in model.named_parameters():
        step = 0.1 * 0.5 * (now[name] - before[name]) if id(parameter) in inside else 0.0
        torch.testing.assert_close(parameter.detach(), now[name] - step)
    with pytest.raises(RecipeError, match="under LoRA the base does not move"):
        L2SP(0.5, decoupled=True).record_start(build_probed_model(bert, "lora"))


# Refusals


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("full", "embeddings.word_embeddings.weight"),
        ("lora", "encoder.layer.0.output.dense.weight"),
    ],
)
def test_refuses_the_fisher_of_another_source(bert: Path, strategy: str, name: str) -> None:
    model = build_probed_model(bert, strategy)
    with pytest.raises(RecipeError, match=r"is \(3, 3\), and the weight \("):
        EWC(1.0, {name: torch.ones(3, 3)}).record_start(model)
    with pytest.raises(RecipeError, match="nothing of the encoder that trains"):
        EWC(1.0, {"layers.0.weight": torch.ones(3, 3)}).record_start(model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", False, None])
def test_refuses_an_adapter_that_changes_its_base(init: Any) -> None:
    for lora in ({"init_lora_weights": init}, {"bias": "all"}, {"bias": "lora_only"}):
        with pytest.raises(RecipeError, match="with the adapter off"):
            check_unchanged_base(lora, "finetune.lora")


@pytest.mark.parametrize("init", [None, True, "gaussian", "orthogonal"])
def test_accepts_an_adapter_that_starts_at_zero(bert: Path, init: Any) -> None:
    lora = {} if init is None else {"init_lora_weights": init}
    check_unchanged_base(lora, "finetune.lora")
    check_low_rank(lora, "finetune.lora")
    model = build_probed_model(bert, "full")
    plain = deepcopy(model).eval()
    adapted = prepare(model, "lora", lora={"r": 4, **lora}).eval()
    batch = stack_rows(4, labels=False)
    torch.testing.assert_close(adapted(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [3]},
     {"target_parameters": ["weight"]}],
)  # fmt: skip
def test_refuses_an_update_that_is_not_low_rank(lora: dict[str, Any], bert: Path) -> None:
    (name,) = lora
    with pytest.raises(RecipeError, match=f"finetune.lora.{name}=.*the update s B A"):
        check_low_rank(lora, "finetune.lora")
    check_low_rank(LoraConfig().to_dict(), "lora")
    if name == "use_dora":
        for penalty in (L2SP(0.1), EWC(0.1, {})):
            with pytest.raises(RecipeError, match="lora.use_dora=True"):
                penalty.record_start(prepare(build_probed_model(bert, "full"), "lora", lora=lora))


def test_refuses_a_negative_weight_and_a_trained_adapter(bert: Path) -> None:
    for kind, arguments in ((L2SP, (-1.0,)), (L2SP, (0, -1.0)), (EWC, (-1.0, {}))):
        with pytest.raises(RecipeError, match="must be a number from 0 to"):
            kind(*arguments)
    model = build_probed_model(bert, "lora")
    penalties = [L2SP(1.0), EWC(1.0, build_even_fisher(model))]
    record_start(model, *penalties)
    perturb(model, 0.05)
    for penalty in penalties:
        with pytest.raises(RecipeError, match="has been trained already"):
            penalty.record_start(model)
