"""Compare what a step costs less with what transformers' Trainer does in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import build_classifier, build_trainer, copy_parameters
from torch import nn
from transformers import Trainer

from hftl.train.step_costs import StepCosts


class CheapTrainer(StepCosts, Trainer):
    """Train as transformers does, but for what a step costs less."""


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_clipped_training_is_the_trainers(limit: float, bert: Path, tmp_path: Path) -> None:
    trained = []
    for kind in (Trainer, CheapTrainer):
        model = build_classifier(bert, "full")
        trainer = build_trainer(model, tmp_path, max_grad_norm=limit, kind=kind)
        trainer.train()
        trained.append((copy_parameters(model), trainer.state.total_flos))
    (theirs, their_count), (ours, our_count) = trained
    assert our_count == their_count > 0
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)


def test_gradients_below_the_limit_are_left_alone(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[float] = []

    def record(parameters: Any, most: float, norm: torch.Tensor) -> None:
        clipped.append(float(norm))

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", record)
    for limit, count in ((1e9, 0), (1e-6, 3)):
        build_trainer(build_classifier(bert, "full"), tmp_path, max_grad_norm=limit).train()
        assert len(clipped) == count


def test_gradients_a_little_below_a_small_limit_are_clipped_as_by_torch(
    bert: Path, tmp_path: Path
) -> None:
    limit = 1e-2
    model = build_classifier(bert, "full")
    trainer: Any = build_trainer(model, tmp_path, max_grad_norm=limit)
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.grad = torch.zeros_like(weight)
    weight.grad.view(-1)[0] = limit - 5e-7
    expected = nn.Parameter(weight.detach().clone())
    expected.grad = weight.grad.clone()
    nn.utils.clip_grad_norm_([expected], limit)
    norm = trainer.clip_gradients(model)
    assert float(norm) == pytest.approx(limit - 5e-7)
    assert float(weight.grad.max()) < limit - 6e-7
    torch.testing.assert_close(weight.grad, expected.grad, rtol=0, atol=0)


def test_parameters_are_counted_once_a_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_classifier(bert, "full")
    trainer = build_trainer(model, tmp_path)
    counted = []
    count = model.num_parameters
    monkeypatch.setattr(model, "num_parameters", lambda **k: counted.append(k) or count(**k))
    trainer.train()
    assert counted.count({"exclude_embeddings": True}) == 1
