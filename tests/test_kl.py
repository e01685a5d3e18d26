"""KL to the original: each form against a brute-force sum, and what must hold of all of them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hftl.errors import RecipeError
from hftl.retain.kl import (
    KLToOriginal,
    compute_feature_kl,
    compute_probe_kl,
    compute_relational_kl,
    compute_row_kl,
    count_expected_rows,
    select_rows,
)
from hftl.retain.reference import check_head_quality

ROWS, WIDTH, OUTPUTS = 6, 5, 4


@pytest.fixture
def two() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, OUTPUTS), torch.randn(ROWS, OUTPUTS)


def by_hand(p_logits: list[float], q_logits: list[float]) -> float:
    p = [math.exp(v) for v in p_logits]
    q = [math.exp(v) for v in q_logits]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_classes_equal_a_brute_force_sum(
    two: tuple[Tensor, Tensor], temperature: float, direction: str
) -> None:
    original, now = two
    found = compute_row_kl(original, now, temperature, direction)
    for row in range(ROWS):
        sides = [[v / temperature for v in side[row].tolist()] for side in (original, now)]
        wanted = by_hand(*(sides if direction == "forward" else sides[::-1]))
        assert found[row].item() == pytest.approx(temperature**2 * wanted, rel=1e-4, abs=1e-6)


def test_its_mean_over_rows_is_batchmean_and_not_mean(two: tuple[Tensor, Tensor]) -> None:
    original, now = two
    logs = F.log_softmax(now, -1), F.log_softmax(original, -1)
    mean = F.kl_div(*logs, reduction="batchmean", log_target=True)
    found = compute_probe_kl(KLToOriginal(on="probe"), original, now, "classes").mean()
    torch.testing.assert_close(found, mean)
    too_small = F.kl_div(*logs, reduction="mean", log_target=True)
    torch.testing.assert_close(found, too_small * OUTPUTS)


def test_forward_has_the_gradient_of_soft_cross_entropy(two: tuple[Tensor, Tensor]) -> None:
    original, now = two[0], two[1].requires_grad_()
    (mine,) = torch.autograd.grad(compute_row_kl(original, now, 1.0, "forward").sum(), now)
    soft = F.cross_entropy(now, original.softmax(-1), reduction="sum")
    torch.testing.assert_close(mine, torch.autograd.grad(soft, now)[0])


@pytest.mark.parametrize("kind", ["classes", "labels", "target"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_it_is_zero_at_the_original_and_so_is_its_gradient(kind: str, direction: str) -> None:
    torch.manual_seed(1)
    original = torch.randn(ROWS, 1 if kind == "target" else OUTPUTS)
    term = KLToOriginal(on="probe", direction=direction, temperature=2.0)
    now = original.clone().requires_grad_()
    value = compute_probe_kl(term, original, now, kind)
    assert value.shape == (ROWS,) and value.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(value.sum(), now)
    assert gradient.abs().max() < 1e-6
    assert (compute_probe_kl(term, original, original + torch.randn_like(original), kind) > 0).all()


def test_a_shift_of_all_logits_changes_nothing(two: tuple[Tensor, Tensor]) -> None:
    original, now = two
    shift = torch.randn(ROWS, 1) * 10
    for moved in ((original + shift, now), (original, now + shift)):
        torch.testing.assert_close(
            compute_row_kl(*moved, 1.0, "forward"), compute_row_kl(original, now, 1.0, "forward"),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_temperature_keeps_the_size_of_the_gradient(two: tuple[Tensor, Tensor]) -> None:
    original, now = two[0], two[1].requires_grad_()
    (hot,) = torch.autograd.grad(compute_row_kl(original, now, 100.0, "forward").sum(), now)
    # At high temperatures the gradient is (z - z0), centred, over the number of classes.
    apart = (now - original) - (now - original).mean(-1, keepdim=True)
    torch.testing.assert_close(hot, apart / OUTPUTS, atol=5e-3, rtol=5e-2)


def test_several_labels_are_each_a_yes_or_no(two: tuple[Tensor, Tensor]) -> None:
    original, now = two
    term = KLToOriginal(on="probe")
    p, q = original.sigmoid(), now.sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    torch.testing.assert_close(compute_probe_kl(term, original, now, "labels"), wanted)


def test_a_target_is_a_gaussian_around_the_prediction() -> None:
    original, now = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]])
    term = KLToOriginal(on="probe", variance=0.5)
    both = [torch.distributions.Normal(side[:, 0], 0.5**0.5) for side in (original, now)]
    wanted = torch.distributions.kl_divergence(*both)
    torch.testing.assert_close(compute_probe_kl(term, original, now, "target"), wanted)


@pytest.mark.parametrize("bank", [True, False])
def test_relations_equal_a_double_loop(bank: bool) -> None:
    torch.manual_seed(2)
    original, now = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    anchors = torch.randn(7, WIDTH) if bank else None
    hidden = torch.zeros(ROWS, 7, dtype=torch.bool) if bank else None
    if hidden is not None:
        hidden[2, 3] = True
    term = KLToOriginal(tau=0.2, temperature=1.5)
    found = compute_relational_kl(term, original, now, anchors, hidden)
    for i in range(ROWS):
        told = []
        for side in (original, now):
            others = side if anchors is None else anchors
            told.append([
                F.cosine_similarity(side[i], others[j], dim=0).item() / 0.2 / 1.5
                for j in range(len(others))
                if (hidden is None and j != i) or (hidden is not None and not hidden[i, j])
            ])  # fmt: skip
        assert found[i].item() == pytest.approx(1.5**2 * by_hand(*told), rel=1e-4, abs=1e-6)


def test_relations_within_the_batch_do_not_see_a_rotation() -> None:
    torch.manual_seed(3)
    original = torch.randn(ROWS, WIDTH)
    turn, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    term = KLToOriginal(anchors=0)
    assert compute_relational_kl(term, original, 3 * original @ turn, None, None).abs().max() < 1e-4
    alone = compute_relational_kl(term, original[:1], original[1:2].requires_grad_(), None, None)
    assert alone.tolist() == [0.0] and alone.requires_grad


def test_features_are_a_gaussian_around_each_embedding() -> None:
    torch.manual_seed(4)
    original, now = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    spread = torch.tensor(2.5)
    wide = spread * torch.eye(WIDTH)
    both = [torch.distributions.MultivariateNormal(side, wide) for side in (original, now)]
    wanted = torch.distributions.kl_divergence(*both)
    torch.testing.assert_close(compute_feature_kl(original, now, spread), wanted)


@pytest.mark.parametrize("inputs", ["target", "general", "both"])
def test_a_term_is_a_mean_over_its_rows(inputs: str) -> None:
    term = KLToOriginal(inputs=inputs)
    general = torch.tensor([False, False, True, False])
    counts = torch.tensor([True, False, False, True])
    wanted = {
        "target": [True, False, False, True], "general": [False, False, True, False],
        "both": [True, False, True, True],
    }[inputs]  # fmt: skip
    assert select_rows(term, general, counts).tolist() == wanted
    rows = {"target": 8.0, "general": 2.0, "both": 10.0}[inputs]
    assert count_expected_rows(term, torch.tensor(8), 0.25).item() == rows
    small = {"target": 2.0, "general": 0.5, "both": 2.5}[inputs]
    assert count_expected_rows(term, torch.tensor(2), 0.25).item() == small
    assert count_expected_rows(term, torch.tensor(0), 0.25).item() == small / 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight": -0.1}, "would drive the model away"), ({"on": "head"}, "kl.on='head'"),
        ({"direction": "both"}, "kl.direction"), ({"inputs": "test"}, "kl.inputs"),
        ({"temperature": 0.0}, "kl.temperature=0.0 must be above 0"),
        ({"tau": -1.0}, "kl.tau=-1.0 must be above 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes: dict[str, object], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        replace(KLToOriginal(), **changes)  # pyright: ignore


@pytest.mark.parametrize("kind", ["classes", "labels", "target"])
def test_a_head_that_nobody_trained_has_no_opinion(kind: str) -> None:
    torch.manual_seed(5)
    features = torch.randn(300, 8)
    truth = features @ torch.randn(8, 3)
    if kind == "classes":
        labels, solved = truth.argmax(-1), truth
        labels[0] = -100
    elif kind == "labels":
        labels, solved = (truth > 0).float(), truth
        labels[0] = torch.nan
    else:
        labels, solved = truth[:, 0].clone(), truth[:, :1]
        labels[0] = torch.nan
    check_head_quality(solved, labels, kind)
    nobody = features @ (0.02 * torch.randn(8, solved.shape[1]))
    with pytest.raises(RecipeError, match="nobody has trained it"):
        check_head_quality(nobody, labels, kind)
