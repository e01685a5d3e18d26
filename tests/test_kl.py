"""Check each form of KL to the original against a brute-force sum, and its properties."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from hftl.errors import RecipeError
from hftl.retain.kl import KLToOriginal, compute_feature_kl, compute_row_kl
from hftl.retain.original import check_head_quality
from hftl.retain.regularizer import Step

ROWS, WIDTH, OUTPUTS = 6, 5, 4


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Logits of the original and of a model."""
    torch.manual_seed(0)
    return torch.randn(ROWS, OUTPUTS), torch.randn(ROWS, OUTPUTS)


def sum_kl(p_logits: list[float], q_logits: list[float]) -> float:
    p, q = ([math.exp(v) for v in side] for side in (p_logits, q_logits))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_class_kl_equals_a_brute_force_sum(
    logits: tuple[Tensor, Tensor], temperature: float, direction: str
) -> None:
    values = compute_row_kl(*logits, temperature, direction)
    for row in range(ROWS):
        sides = [[v / temperature for v in side[row].tolist()] for side in logits]
        expected = sum_kl(*(sides if direction == "forward" else sides[::-1]))
        assert values[row].item() == pytest.approx(temperature**2 * expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["classes", "labels", "target"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_value_and_gradient_are_zero_at_the_original(kind: str, direction: str) -> None:
    torch.manual_seed(1)
    original = torch.randn(ROWS, 1 if kind == "target" else OUTPUTS)
    term = KLToOriginal(on="probe", direction=direction, temperature=2.0)
    current = original.clone().requires_grad_()
    value = term.compute_probe_kl(original, current, kind)
    assert value.shape == (ROWS,) and value.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(value.sum(), current)
    assert gradient.abs().max() < 1e-6
    other = original + torch.randn_like(original)
    assert (term.compute_probe_kl(original, other, kind) > 0).all()


def test_kl_of_other_tasks_is_that_of_torch(logits: tuple[Tensor, Tensor]) -> None:
    """Compare independent labels, a target, and features with torch.distributions."""
    labels = kl_divergence(*(Bernoulli(logits=side) for side in logits)).sum(-1)
    value = KLToOriginal(on="probe").compute_probe_kl(*logits, "labels")
    torch.testing.assert_close(value, labels)
    targets = [side[:, :1] for side in logits]
    target = kl_divergence(*(Normal(side[:, 0], 0.5**0.5) for side in targets))
    value = KLToOriginal(on="probe", variance=0.5).compute_probe_kl(*targets, "target")
    torch.testing.assert_close(value, target)
    spread = torch.tensor(2.5)
    around = [MultivariateNormal(side, spread * torch.eye(OUTPUTS)) for side in logits]
    torch.testing.assert_close(compute_feature_kl(*logits, spread), kl_divergence(*around))


@pytest.mark.parametrize("has_bank", [True, False])
def test_relational_kl_equals_a_double_loop(has_bank: bool) -> None:
    torch.manual_seed(2)
    original, current = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    anchors = torch.randn(7, WIDTH) if has_bank else None
    hidden = torch.zeros(ROWS, 7, dtype=torch.bool) if has_bank else torch.eye(ROWS).bool()
    hidden[2, 3] |= has_bank
    term = KLToOriginal(tau=0.2, temperature=1.5)
    values = term.compute_relational_kl(original, current, anchors, hidden if has_bank else None)
    for i in range(ROWS):
        sides = []
        for side in (original, current):
            others = side if anchors is None else anchors
            sides.append([
                F.cosine_similarity(side[i], others[j], dim=0).item() / 0.2 / 1.5
                for j in range(len(others))
                if not hidden[i, j]
            ])  # fmt: skip
        assert values[i].item() == pytest.approx(1.5**2 * sum_kl(*sides), rel=1e-4, abs=1e-6)


def test_relational_kl_within_the_batch_ignores_a_rotation() -> None:
    torch.manual_seed(3)
    original = torch.randn(ROWS, WIDTH)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    term = KLToOriginal(anchors=0)
    rotated = term.compute_relational_kl(original, 3 * original @ rotation, None, None)
    assert rotated.abs().max() < 1e-4
    alone = term.compute_relational_kl(original[:1], original[1:2].requires_grad_(), None, None)
    assert alone.tolist() == [0.0] and alone.requires_grad


@pytest.mark.parametrize(
    ("inputs", "expected", "share"),
    [
        ("target", [True, False, False, True], 1.0), ("general", [False, False, True, False], 0.25),
        ("both", [True, False, True, True], 1.25),
    ],
)  # fmt: skip
def test_term_is_a_mean_over_its_rows(inputs: str, expected: list[bool], share: float) -> None:
    batch = {"general": torch.tensor([False, False, True, False])}
    counts = torch.tensor([True, False, False, True])
    for target_rows in (8, 2, 0):
        step = Step(nn.Module(), batch, None, counts, torch.tensor(target_rows), 0.25, epoch=0)
        assert step.select_rows(inputs).tolist() == expected
        assert step.count_rows(inputs).item() == max(target_rows, 1) * share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "would drive the model away"), ({"on": "head"}, "'on' .*got 'head'"),
        ({"direction": "both"}, "'direction' must"), ({"inputs": "test"}, "'inputs' must"),
        ({"temperature": 0.0}, "'temperature' .*at least"),
        ({"tau": -1.0}, "'tau' .*at least"), ({"variance": 0.0}, "variance=0.0 must be"),
        ({"on": "mlm"}, "need a recipe"), ({"weight": "auto"}, "need a recipe"),
        ({"wieght": 1.0}, "did you mean 'weight'"),
    ],
)  # fmt: skip
def test_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        KLToOriginal(**arguments)


@pytest.mark.parametrize("kind", ["classes", "labels", "target"])
def test_refuses_an_untrained_head(kind: str) -> None:
    torch.manual_seed(5)
    features = torch.randn(300, 8)
    solved = features @ torch.randn(8, 1 if kind == "target" else 3)
    labels = {"classes": solved.argmax(-1), "labels": (solved > 0).float(),
              "target": solved[:, 0].clone()}[kind]  # fmt: skip
    labels[0] = -100 if kind == "classes" else torch.nan
    check_head_quality(solved, labels, kind)
    untrained = features @ (0.02 * torch.randn(8, solved.shape[1]))
    with pytest.raises(RecipeError, match="was never trained"):
        check_head_quality(untrained, labels, kind)
