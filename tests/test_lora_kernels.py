"""Compare fused and merged LoRA layers with peft's own, forward and backward."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from support.training import count_applications
from torch import Tensor, nn

from hftl.models import lora_kernels
from hftl.models.lora_kernels import fuse_lora, merge_lora

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3}, "bias": {"lora_bias": True}, "trained bias": {"bias": "all"},
    "ranks": {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 5}},
}  # fmt: skip
FUSED = {"plain": 2, "rslora": 2, "ranks": 2, "trained bias": 1}
"""How many of the two layers fuse; the second has no bias to train."""
every_setting = pytest.mark.parametrize("name", SETTINGS)


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"], **SETTINGS[name]))  # pyright: ignore
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.3)
    return adapted


def run(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    output.float().square().sum().backward()
    gradients = [p.grad.clone() for p in [*model.parameters(), inputs] if p.grad is not None]
    model.zero_grad()
    return output.detach(), gradients


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the fused product."""
    return count_applications(monkeypatch, lora_kernels._LoraProduct)


@every_setting
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
@pytest.mark.parametrize("adapter", ["on", "off"])
def test_fused_layers_equal_those_of_peft(
    name: str, shape: tuple[int, ...], adapter: str, fused_calls: list[int]
) -> None:
    model, inputs = build(name), torch.randn(shape)
    if adapter == "off":
        model.disable_adapter_layers()
    expected, slow = run(model, inputs)
    state = model.state_dict()
    fuse_lora(model)
    assert sum(type(m) is not Linear and isinstance(m, Linear) for m in model.modules()) == 2
    output, fast = run(model, inputs)
    assert len(fused_calls) == (FUSED.get(name, 0) if adapter == "on" else 0)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert state.keys() == model.state_dict().keys()


def test_half_precision_is_as_exact_as_that_of_peft(fused_calls: list[int]) -> None:
    model, inputs = build("plain"), torch.randn(64, 6)
    exact = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        slow = run(model, inputs)
        fuse_lora(model)
        fast = run(model, inputs)
    assert len(fused_calls) == 2 and fast[0].dtype == slow[0].dtype == torch.bfloat16
    for one, other, true in zip(fast[1], slow[1], exact[1], strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - true).norm() < 1.2 * (other - true).norm() + 1e-2 * true.norm()
    assert (fast[0] - exact[0]).norm() < 1.2 * (slow[0] - exact[0]).norm()


def test_a_frozen_weight_is_cast_once_and_again_when_it_has_changed() -> None:
    model, inputs = build("plain"), torch.randn(4, 6)
    fuse_lora(model)
    layer = model.base_model.model[0]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        held = layer._frozen
        model(inputs)
        assert layer._frozen is held
        with torch.no_grad():
            layer.base_layer.weight.mul_(2)
        changed = model(inputs)
        model.load_state_dict(build("plain").state_dict())
        assert torch.equal(model(inputs), before) and not torch.equal(changed, before)


def test_only_what_needs_a_gradient_gets_one() -> None:
    model = build("plain")
    fuse_lora(model)
    first = model.base_model.model[0]
    first.lora_A["default"].weight.requires_grad_(False)
    model(torch.randn(4, 6)).sum().backward()
    assert first.lora_A["default"].weight.grad is None
    assert first.lora_B["default"].weight.grad is not None


def test_predictions_are_those_of_peft_to_the_bit(fused_calls: list[int]) -> None:
    model, inputs = build("plain").eval(), torch.randn(4, 6)
    with torch.no_grad():
        expected = model(inputs)
        fuse_lora(model)
        assert torch.equal(model(inputs), expected) and not fused_calls


def test_an_output_may_be_changed_in_place(fused_calls: list[int]) -> None:
    """Swin V2 adds to what its projection returns."""
    model = build("plain")
    fuse_lora(model)
    inputs = torch.randn(3, 4, 6)
    model(inputs).mul_(2.0).sum().backward()
    assert len(fused_calls) == 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@every_setting
@pytest.mark.parametrize("fused", [True, False])
def test_merged_layers_predict_alike_and_get_their_own_tensors_back(name: str, fused: bool) -> None:
    model, inputs = build(name).eval(), torch.randn(4, 6)
    if fused:
        fuse_lora(model)
    with torch.no_grad():
        expected = model(inputs)
    before = {path: (p.data_ptr(), p.detach().clone()) for path, p in model.named_parameters()}
    calls: list[str] = []
    for path, module in model.named_modules():
        if path.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    with torch.no_grad(), merge_lora(model):
        torch.testing.assert_close(model(inputs), expected, atol=1e-6, rtol=1e-5)
    # peft cannot merge a bias into the second layer, which has none.
    assert len(calls) == (1 if name == "bias" else 0), "the adapter ran beside its layer"
    for path, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[path][0]
        assert torch.equal(parameter, before[path][1])
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)


def test_layers_are_whole_after_an_error_while_they_are_merged() -> None:
    model, inputs = build("plain").eval(), torch.randn(4, 6)
    expected = model(inputs)
    with pytest.raises(KeyError), merge_lora(model):
        raise KeyError
    assert torch.equal(model(inputs), expected)


def test_an_adapter_that_is_off_or_merged_before_is_left_alone() -> None:
    model, inputs = build("plain").eval(), torch.randn(4, 6)
    with model.disable_adapter():
        expected = model(inputs)
        with merge_lora(model):
            assert torch.equal(model(inputs), expected)
    model.merge_adapter()
    expected = model(inputs)
    with merge_lora(model):
        assert torch.equal(model(inputs), expected)
    assert all(m.merged for m in model.modules() if isinstance(m, Linear))
    assert torch.equal(model(inputs), expected)
