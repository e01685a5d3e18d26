"""Penalties on weights against brute force, under LoRA against the merged weights."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_retention import retaining, with_probe
from test_trainer import Rows, weights
from torch import nn

from hftl.adapt.encoder_io import merge_encoder_state
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.strategies import prepare
from hftl.models.heads import build_model
from hftl.models.source import find_source
from hftl.retain.weights import (
    EWC,
    L2SP,
    check_low_rank,
    check_unchanged_base,
    compute_update,
    compute_update_norm,
    iterate_encoder_parameters,
    iterate_lora_layers,
)


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """The model with everything that trains elsewhere."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


@pytest.fixture
def bert(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


@pytest.mark.parametrize("strategy", ["full", "partial"])
@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_l2sp_is_the_squared_distance(bert: Path, strategy: str, pooling: str) -> None:
    model = with_probe(bert, strategy, pooling)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    term = L2SP(0.3, head=0.2)
    term.start(model)
    head = ("head.", "classifier.")
    own = sum(p.square().sum() for n, p in before.items() if n.startswith(head))
    torch.testing.assert_close(term.penalty(model), 0.1 * own)
    moved(model)
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = sum(
        0.1 * p.square().sum() if n.startswith(head) else 0.15 * (p - before[n]).square().sum()
        for n, p in now.items()
    )
    found = term.penalty(model)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found, list(now.values()))
    for (name, parameter), gradient in zip(now.items(), gradients, strict=True):
        by_hand = (0.2 * parameter if name.startswith(head)
                   else 0.3 * (parameter - before[name]))  # fmt: skip
        torch.testing.assert_close(gradient, by_hand.detach())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_under_lora_the_merged_weights_count(bert: Path, pooling: str, rslora: bool) -> None:
    source = find_source(Source(model=str(bert)))
    built = build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)
    plain = {k: v.clone() for k, v in built.encoder.state_dict().items()}
    lora = {"r": 4, "lora_alpha": 12, "use_rslora": rslora}
    model = prepare(built.model, "lora", lora=lora, fresh=built.fresh)
    l2sp = L2SP(0.4)
    torch.manual_seed(0)
    layers = dict(iterate_lora_layers(model))
    fisher = {f"{name}.weight": torch.rand(layer.base_layer.weight.shape)
              for name, layer in layers.items()}  # fmt: skip
    ewc = EWC(0.4, fisher | {"embeddings.nothing": torch.ones(2)})
    for term in (l2sp, ewc):
        term.start(model)
        assert term.penalty(model) == 0
    moved(model)
    merged = merge_encoder_state(type("Wrapped", (), {"encoder": wrapped_encoder(model)})())  # pyright: ignore
    apart = {n: merged[f"{n}.weight"] - plain[f"{n}.weight"] for n in layers}
    assert len(layers) == 18 and all(delta.abs().max() > 1e-4 for delta in apart.values())
    wanted = 0.2 * sum(delta.square().sum() for delta in apart.values())
    torch.testing.assert_close(l2sp.penalty(model), wanted, rtol=1e-4, atol=1e-6)
    weighted = 0.2 * sum((fisher[f"{n}.weight"] * d.square()).sum() for n, d in apart.items())
    torch.testing.assert_close(ewc.penalty(model), weighted, rtol=1e-4, atol=1e-6)
    for layer in layers.values():
        torch.testing.assert_close(compute_update_norm(layer), compute_update(layer).square().sum())
    ewc.penalty(model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)


def test_what_an_adapter_saves_whole_in_the_encoder_is_the_encoders(bert: Path) -> None:
    """A layer of the original is drawn to where it was, and only the head to zero."""
    model = with_probe(bert, "full", "native")
    lora = {"modules_to_save": ["LayerNorm"], "target_modules": ["query"]}
    model = prepare(model, "lora", lora=lora, fresh=[])
    names = [name for name, _ in iterate_encoder_parameters(model)]
    assert "encoder.layer.2.output.LayerNorm.weight" in names and len(names) == 14
    before = {name: p.detach().clone() for name, p in iterate_encoder_parameters(model)}
    term, ewc = L2SP(0.4), EWC(0.4, {n: torch.ones_like(p) for n, p in before.items()})
    term.start(model), ewc.start(model)
    assert term.penalty(model) == ewc.penalty(model) == 0
    moved(model)
    whole = 0.2 * sum((p - before[n]).square().sum() for n, p in iterate_encoder_parameters(model))
    low = 0.2 * sum(compute_update(layer).square().sum() for _, layer in iterate_lora_layers(model))
    torch.testing.assert_close(term.penalty(model), whole + low)
    torch.testing.assert_close(ewc.penalty(model), whole)
    head = {n: p for n, p in model.named_parameters() if "classifier.modules_to_save" in n}
    wanted = 0.1 * sum(p.square().sum() for p in head.values())
    torch.testing.assert_close(L2SP(0.0, head=0.2).penalty(model), wanted)


@pytest.mark.parametrize(
    ("name", "target"), [("bert", "word_embeddings"), ("vit", "patch_embeddings.projection")]
)
def test_factors_of_other_layers_count_as_well(
    name: str, target: str, tiny_model: Callable[..., Path]
) -> None:
    source = find_source(Source(model=str(tiny_model(name))))
    built = build_model(source, "classification", "native", 3, ["a", "b", "c"], seed=0)
    model = prepare(built.model, "lora", lora={"target_modules": [target]}, fresh=built.fresh)
    ((path, layer),) = iterate_lora_layers(model)
    before = layer.get_base_layer().weight.detach().clone()
    fisher = torch.rand(before.shape)
    l2sp, ewc = L2SP(0.4), EWC(0.4, {f"{path}.weight": fisher})
    l2sp.start(model), ewc.start(model)
    assert l2sp.penalty(model) == ewc.penalty(model) == 0
    moved(model, 0.3)
    merged = deepcopy(layer)
    merged.merge()
    apart = (merged.get_base_layer().weight - before).detach()
    assert apart.abs().max() > 1e-2
    beside = 0.2 * sum(moved_far(p, q) for p, q in others(model, l2sp))
    torch.testing.assert_close(l2sp.penalty(model), 0.2 * apart.square().sum() + beside)
    torch.testing.assert_close(ewc.penalty(model), 0.2 * (fisher * apart.square()).sum())


def others(model: nn.Module, term: L2SP) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What of the encoder trains whole, as a pooler, beside where it started."""
    return [(p, term._start[n]) for n, p in iterate_encoder_parameters(model)]


def moved_far(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (now - before).square().sum()


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_mixed_precision_leaves_a_penalty_alone(bert: Path, strategy: str) -> None:
    model = with_probe(bert, strategy)
    names = [n for n, _ in iterate_encoder_parameters(model)] + [
        f"{n}.weight" for n, _ in iterate_lora_layers(model)
    ]
    shapes = {n: p.shape for n, p in with_probe(bert, "full").encoder.named_parameters()}
    terms = [L2SP(0.4, head=0.1), EWC(0.4, {n: torch.rand(shapes[n]) for n in names})]
    for term in terms:
        term.start(model)
    moved(model)
    for term in terms:
        wanted = term.penalty(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = term.penalty(model)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_resumed_training_is_drawn_to_where_the_first_one_began(
    bert: Path, tmp_path: Path, strategy: str
) -> None:
    def trainer(folder: str, **more: Any) -> Any:
        terms = [L2SP(0.5), EWC(0.5, fisher)]
        return retaining(
            with_probe(bert, strategy), tmp_path / folder, terms, {}, num_train_epochs=2,
            learning_rate=0.05, save_strategy="epoch", **more,
        )  # fmt: skip

    fisher = {n: torch.ones_like(p) for n, p in with_probe(bert, "full").encoder.named_parameters()}
    whole = trainer("whole")
    whole.train()
    again = trainer("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_the_decoupled_step_follows_the_schedule(bert: Path, tmp_path: Path) -> None:
    """By hand, with the rate of each step and the gradients of a penalty-free twin."""
    model = with_probe(bert, "full")
    start = {name: p.detach().clone() for name, p in iterate_encoder_parameters(model)}
    seen: list[dict[str, Any]] = []

    class Watched(L2SP):
        def after_step(self, model: nn.Module, optimizer: Any) -> None:
            before = {n: p.detach().clone() for n, p in iterate_encoder_parameters(model)}
            super().after_step(model, optimizer)
            after = {n: p.detach().clone() for n, p in iterate_encoder_parameters(model)}
            seen.append({"before": before, "after": after})

    retaining(
        model, tmp_path, [Watched(0.5, decoupled=True)], {}, learning_rate=0.1,
        lr_scheduler_type="linear",
    ).train()  # fmt: skip
    assert len(seen) == 3
    for step, told in enumerate(seen):
        rate = 0.1 * (3 - step) / 3
        for name, value in told["before"].items():
            wanted = value - rate * 0.5 * (value - start[name])
            torch.testing.assert_close(told["after"][name], wanted)


def wrapped_encoder(model: Any) -> Any:
    """The encoder inside, its layers wrapped."""
    from hftl.models.heads import get_encoder, get_model_architecture

    return get_encoder(model, get_model_architecture(model))


def test_ewc_weighs_each_weight(bert: Path) -> None:
    model = with_probe(bert, "full")
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in iterate_encoder_parameters(model)}
    fisher = {name: torch.rand_like(p) for name, p in before.items()}
    term = EWC(0.6, fisher)
    term.start(model)
    assert term.penalty(model) == 0
    moved(model)
    wanted = 0.3 * sum(
        (fisher[name] * (p - before[name]).square()).sum()
        for name, p in iterate_encoder_parameters(model)
    )
    torch.testing.assert_close(term.penalty(model), wanted)
    same = EWC(0.6, {name: torch.ones_like(p) for name, p in before.items()})
    same._start = before
    l2sp = L2SP(0.6)
    l2sp._start = before
    torch.testing.assert_close(same.penalty(model), l2sp.penalty(model))


def test_ewc_of_another_source_is_refused(bert: Path) -> None:
    for strategy, name in (("full", "embeddings.word_embeddings.weight"),
                           ("lora", "encoder.layer.0.output.dense.weight")):  # fmt: skip
        model = with_probe(bert, strategy)
        with pytest.raises(RecipeError, match=r"is \(3, 3\), and the weight \("):
            EWC(1.0, {name: torch.ones(3, 3)}).start(model)
        with pytest.raises(RecipeError, match="nothing of the encoder that trains"):
            EWC(1.0, {"layers.0.weight": torch.ones(3, 3)}).start(model)


def test_the_decoupled_step_is_outside_the_optimizer(bert: Path) -> None:
    model = with_probe(bert, "full")
    term = L2SP(0.5, decoupled=True)
    term.start(model)
    before = weights(model)
    moved(model)
    now = weights(model)
    assert term.penalty(model) == 0
    inside = {id(p) for _, p in iterate_encoder_parameters(model)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in inside], "lr": 0.1},
        {"params": [p for p in model.parameters() if id(p) not in inside], "lr": 0.7},
    ]
    term.after_step(model, torch.optim.AdamW(groups))
    for name, parameter in model.named_parameters():
        step = 0.1 * 0.5 * (now[name] - before[name]) if id(parameter) in inside else 0.0
        torch.testing.assert_close(parameter.detach(), now[name] - step)
    with pytest.raises(RecipeError, match="under LoRA the base does not move"):
        L2SP(0.5, decoupled=True).start(with_probe(bert, "lora"))


@pytest.mark.parametrize("term", ["l2sp", "decoupled", "ewc"])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_training_with_a_penalty_stays_nearer(
    bert: Path, tmp_path: Path, term: str, strategy: str
) -> None:
    if (term, strategy) == ("decoupled", "lora"):
        return
    judge, far = L2SP(2.0), []
    for weight in (0.0, 3.0):
        model = with_probe(bert, strategy)
        judge = L2SP(2.0)
        judge.start(model)
        fisher = {n: torch.ones_like(p) for n, p in wrapped_encoder(model).named_parameters()}
        fisher = {n.replace(".base_layer.", "."): f for n, f in fisher.items()}
        terms = {
            "l2sp": lambda w: L2SP(w), "decoupled": lambda w: L2SP(w, decoupled=True),
            "ewc": lambda w, f=fisher: EWC(w, f),
        }  # fmt: skip
        kept = terms[term](weight)
        retaining(
            model, tmp_path, [kept], {}, optim="adamw_torch", learning_rate=0.03,
            num_train_epochs=4,
        ).train()  # fmt: skip
        far.append(float(judge.penalty(model)))
    assert far[1] < 0.8 * far[0]


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_penalty_counts_once_a_step_however_it_is_cut(
    bert: Path, tmp_path: Path, strategy: str
) -> None:
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = with_probe(bert, strategy)
        trainer = retaining(
            model, tmp_path, [L2SP(0.4, head=0.3)], {}, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated, num_train_epochs=2,
        )  # fmt: skip
        trainer.train()
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [{"init_lora_weights": v} for v in ("pissa", "pissa_niter_4", "olora", "corda", False, None)]
    + [{"bias": "all"}, {"bias": "lora_only"}],
)
def test_an_adapter_that_changes_its_base_is_refused(lora: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="with the adapter off"):
        check_unchanged_base(lora, "finetune.lora")


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [3]},
     {"target_parameters": ["weight"]}],
)  # fmt: skip
def test_an_update_that_is_not_low_rank_is_refused(lora: dict[str, Any], bert: Path) -> None:
    (name,) = lora
    with pytest.raises(RecipeError, match=f"finetune.lora.{name}=.*the update s B A"):
        check_low_rank(lora, "finetune.lora")
    check_low_rank(LoraConfig().to_dict(), "lora")
    if name == "use_dora":
        for term in (L2SP(0.1), EWC(0.1, {})):
            with pytest.raises(RecipeError, match="lora.use_dora=True"):
                term.start(prepare(with_probe(bert, "full"), "lora", lora=lora))


@pytest.mark.parametrize("begins", [None, True, "gaussian", "orthogonal"])
def test_an_adapter_that_starts_from_nothing_is_not(bert: Path, begins: Any) -> None:
    lora = {} if begins is None else {"init_lora_weights": begins}
    check_unchanged_base(lora, "finetune.lora")
    check_low_rank(lora, "finetune.lora")
    LoraConfig(**lora)
    model = with_probe(bert, "full")
    plain = deepcopy(model).eval()
    adapted = prepare(model, "lora", lora={"r": 4, **lora}).eval()
    batch = {k: torch.stack([Rows()[i][k] for i in range(4)]) for k in Rows()[0]}
    batch.pop("labels")
    torch.testing.assert_close(adapted(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [lambda: L2SP(-1.0), lambda: L2SP(0, -1.0), lambda: EWC(-1.0, {})])
def test_a_negative_weight_is_refused(kind: Callable[[], Any]) -> None:
    with pytest.raises(RecipeError, match="would drive the model away"):
        kind()


@pytest.mark.parametrize("kind", ["l2sp", "ewc"])
def test_an_adapter_that_was_trained_before_is_refused(bert: Path, kind: str) -> None:
    model = with_probe(bert, "lora")
    name, layer = next(iter(iterate_lora_layers(model)))
    fisher = {f"{name}.weight": torch.ones_like(layer.get_base_layer().weight)}
    term = L2SP(1.0) if kind == "l2sp" else EWC(1.0, fisher)
    term.start(model)
    assert float(term.penalty(model)) == 0
    with pytest.raises(RecipeError, match="has been trained already"):
        term.start(moved(model))
