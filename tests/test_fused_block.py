"""Compare blocks that run as one function with the separate layers of transformers and peft."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import TEXT_MODELS
from support.training import count_applications
from test_packing import build_batch, build_pair, collect
from torch import Tensor, nn

from hftl.models import fused_block
from hftl.models.architectures import ARCHITECTURES
from hftl.models.dropout import draw_mask, get_factor
from hftl.models.lora_kernels import fuse_lora

FUSED = sorted(name for name in TEXT_MODELS if ARCHITECTURES[name].post_norm)
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the blocks that run as one function."""
    return count_applications(monkeypatch, fused_block._Block)


def add_adapter(model: Any, targets: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **changes)
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


def assert_equal(one: Any, other: Any) -> None:
    (logits, gradients), (expected, slow) = (collect(x, build_batch()) for x in (one, other))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == slow.keys() and gradients
    for name, gradient in gradients.items():
        assert gradient.dtype == slow[name].dtype
        torch.testing.assert_close(gradient, slow[name], atol=3e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", FUSED)
def test_every_block_runs_as_one_function(name: str, calls: list[int]) -> None:
    packed, _ = build_pair(name)
    packed.eval()(**build_batch())
    assert len(calls) == packed.config.num_hidden_layers > 0


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        (".*layer.*(query|value|dense)", {}), (".*layer.*", {"alpha_pattern": {"query": 7}}),
        (".*layer.1.*(key|intermediate.dense)", {"rank_pattern": {"key": 3}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapter", ["on", "off"])
def test_lora_inside_equals_that_of_peft(
    targets: str, changes: Any, adapter: str, calls: list[int]
) -> None:
    targets += "(query|key|value|dense)" if targets.endswith("layer.*") else ""
    packed, padded = (add_adapter(x, targets, **changes) for x in build_pair("bert"))
    fuse_lora(packed)
    models = [packed.eval(), padded.eval()]
    if adapter == "off":
        for model in models:
            model.disable_adapter_layers()
            model.base_model.model.classifier.requires_grad_(True)
    assert_equal(*models)
    assert len(calls) == packed.config.num_hidden_layers


def test_what_is_frozen_gets_no_gradient_and_its_casts_follow_its_weights() -> None:
    packed, padded = build_pair("bert")
    for model in (packed.eval(), padded.eval()):
        model.requires_grad_(False)
        model.bert.encoder.layer[1].output.dense.weight.requires_grad_(True)
        model.bert.encoder.layer[1].attention.self.key.bias.requires_grad_(True)
    assert_equal(packed, padded)
    with torch.autocast("cpu", torch.bfloat16):
        before = packed(**build_batch()).logits
        with torch.no_grad():
            packed.bert.encoder.layer[0].intermediate.dense.weight.mul_(2)
        assert not torch.equal(packed(**build_batch()).logits, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.intermediate.dense.register_forward_hook(lambda *args: None),
        lambda block: setattr(block.output, "dense", nn.Sequential(block.output.dense)),
    ],
    ids=["hook", "other layer"],
)
def test_what_a_block_does_not_know_runs_as_separate_layers(change: Any, calls: list[int]) -> None:
    packed, padded = build_pair("bert")
    for model in (packed.eval(), padded.eval()):
        change(model.bert.encoder.layer[0])
    assert_equal(packed, padded)
    assert len(calls) == packed.config.num_hidden_layers - 1


def test_losses_of_fifty_steps_are_those_of_the_separate_layers() -> None:
    losses: list[list[float]] = []
    for model in build_pair("bert", **QUIET):
        optimizer, draw = torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator()
        losses.append([])
        for _ in range(50):
            batch = build_batch()
            batch["input_ids"] = torch.randint(5, 30, (4, 7), generator=draw)
            labels = batch["input_ids"][:, 0] % 2
            loss = nn.functional.cross_entropy(model.train()(**batch).logits[:, :2], labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_dropout_is_reproducible_and_its_gradient_is_that_of_the_draw(calls: list[int]) -> None:
    packed, _ = build_pair("bert")
    packed.train()
    batch = build_batch()

    def compute(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return packed(**batch).logits.square().sum()

    assert torch.equal(compute(3), compute(3)) and not torch.equal(compute(3), compute(4))
    compute(3).backward()
    weight = packed.bert.encoder.layer[0].output.dense.weight
    step = torch.randn(weight.shape) * 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            values.append(compute(3))
            weight -= sign * step
    assert weight.grad is not None and float((weight.grad * step).sum()) != 0
    expected = float((weight.grad * step).sum())
    assert float(values[0] - values[1]) / 2 == pytest.approx(expected, rel=0.02, abs=1e-5)
    assert calls


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.997])
def test_masks_have_the_mean_and_variance_of_dropout_and_do_not_repeat(probability: float) -> None:
    """Tolerances are five standard errors of 200 000 draws."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    masks = [draw_mask((500, 401), probability).float() for _ in range(2)]
    torch.set_rng_state(state)
    assert torch.equal(draw_mask((500, 401), probability).float(), masks[0]), "not resumable"
    error = (probability * (1 - probability) / masks[0].numel()) ** 0.5
    pairs = [
        masks, [masks[0][:, 1:], masks[0][:, :-1]], [masks[0][1:], masks[0][:-1]],
        [masks[0][:, 4:], masks[0][:, :-4]],
    ]  # fmt: skip
    for mask in masks:
        assert float(mask.mean()) == pytest.approx(1 - probability, abs=5 * error + 2**-17)
        scaled = mask * get_factor(probability)
        assert float(scaled.mean()) == pytest.approx(1, abs=5 * error * get_factor(probability))
    for one, other in pairs:
        covariance = float((one * other).mean() - one.mean() * other.mean())
        assert abs(covariance) < 5 * probability * (1 - probability) / one.numel() ** 0.5


def test_dropout_keeps_the_mean_of_the_sums() -> None:
    torch.manual_seed(0)
    packed, _ = build_pair("bert")
    block = packed.bert.encoder.layer[0]
    hidden, output = torch.randn(3, 16), torch.randn(3, 16)
    tensors = [None] * 24 + [torch.ones(16), torch.zeros(16)] * 2
    setup: Any = type("Setup", (), {"dropouts": (0.3, 0.0), "epsilons": (1e-5, 1e-5)})
    totals = [
        fused_block._add_and_normalize(hidden, output.clone(), setup, 0, tensors).total
        for _ in range(4000)
    ]
    torch.testing.assert_close(torch.stack(totals).mean(0), hidden + output, atol=0.1, rtol=0)
    assert block.layout is ARCHITECTURES["bert"].post_norm
