"""The Fisher information against per-sample autograd, and against what it is for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_retention import with_probe
from test_trainer import Rows
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from hftl.errors import NumericError, RecipeError
from hftl.model.head import pool
from hftl.retain import fisher as module
from hftl.retain.fisher import fisher_information, load_fisher, save_fisher

ROWS = 6


def row(number: int) -> dict[str, Any]:
    return {key: value.unsqueeze(0) for key, value in Rows()[number].items()}


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    """A probed tiny BERT with dropout, in train mode, which must make no difference."""
    return with_probe(tiny_model("bert"), "full", dropout=0.3).train()


def encoder_parameters(model: Any) -> dict[str, nn.Parameter]:
    return dict(model.encoder.named_parameters())


def by_autograd(model: Any, kind: str, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The mean over rows of squared per-sample gradients, by torch.func."""
    model.eval()
    named = {f"encoder.{n}": p.detach() for n, p in model.encoder.named_parameters()}
    rows = [row(n) for n in range(ROWS)]
    ids = torch.cat([r["input_ids"] for r in rows])

    def log(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        mask = torch.ones(1, one.shape[0])
        told = functional_call(model, parameters, (one.unsqueeze(0), mask))
        return F.log_softmax(told.logits[0], -1)[label]

    def each(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = [grad(log)(parameters, *pair) for pair in zip(ids, labels, strict=True)]
        return {name: torch.stack([one[name] for one in found]) for name in parameters}

    with torch.no_grad():
        shares = model(ids, torch.ones_like(ids, dtype=torch.float)).logits.softmax(-1)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    if kind == "exact":
        for label in range(shares.shape[1]):
            found = each(named, ids, torch.full((ROWS,), label))
            for name, g in found.items():
                share = shares[:, label].reshape(-1, *[1] * (g.dim() - 1))
                total[name] += (share * g.square()).sum(0)
    else:
        for name, g in each(named, ids, labels).items():  # pyright: ignore
            total[name] += g.square().sum(0)
    return {name.removeprefix("encoder."): t / ROWS for name, t in total.items()}


def undone(told: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    fisher, scale = told
    return {name: tensor * scale for name, tensor in fisher.items()}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_it_equals_per_sample_autograd(model: Any, kind: str) -> None:
    labels = torch.stack([Rows()[n]["labels"] for n in range(ROWS)])
    model.train()
    modes = [m.training for m in model.modules()]
    found = undone(fisher_information(model, encoder_parameters(model), ROWS, row, kind, seed=0))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    wanted = by_autograd(model, kind, labels)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_sampled_draws_from_the_models_own_classes(model: Any) -> None:
    model.eval()
    found = undone(fisher_information(model, encoder_parameters(model), ROWS, row, "sampled", 3))
    labels = []
    for number in range(ROWS):
        given = row(number)
        with torch.no_grad():
            logits = model(given["input_ids"], given["attention_mask"]).logits[0]
        draw = torch.Generator().manual_seed(3 * 1_000_003 + number)
        labels.append(int(torch.multinomial(logits.softmax(-1), 1, generator=draw)))
    wanted = by_autograd(model, "sampled", torch.tensor(labels))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    again = fisher_information(model, encoder_parameters(model), ROWS, row, "sampled", 3)
    assert all(torch.equal(undone(again)[n], v) for n, v in found.items())


def test_it_is_not_the_square_of_the_batch_mean(model: Any) -> None:
    model.eval()
    found = undone(fisher_information(model, encoder_parameters(model), ROWS, row, "empirical", 0))
    batch = [row(n) for n in range(ROWS)]
    logits = model(
        torch.cat([r["input_ids"] for r in batch]), torch.cat([r["attention_mask"] for r in batch])
    ).logits
    loss = F.cross_entropy(logits, torch.cat([r["labels"] for r in batch]))
    wrong = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
    right = sum(float(value.sum()) for value in found.values())
    assert right > 1.5 * sum(float(g.square().sum()) for g in wrong if g is not None)


def test_features_are_the_diagonal_of_jacobian_squared(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    monkeypatch.setattr(module, "DRAWS", 400)
    name = "encoder.layer.2.output.dense.bias"
    parameter = model.encoder.get_parameter(name)
    found = undone(fisher_information(model, {name: parameter}, ROWS, row, "features", seed=0))

    def embedding(value: Tensor, given: dict[str, Any]) -> Tensor:
        told = functional_call(
            model.encoder, {name: value}, (given["input_ids"], given["attention_mask"])
        )
        return pool(told.last_hidden_state, given["attention_mask"], "mean")[0]

    wanted = torch.zeros_like(parameter)
    for number in range(ROWS):
        jacobian = jacrev(embedding)(parameter.detach(), row(number))
        wanted += jacobian.square().sum(0).detach() / ROWS
    torch.testing.assert_close(found[name], wanted, rtol=0.15, atol=0)


def test_along_a_basis_features_are_exact(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.eval()
    width = model.encoder.config.hidden_size
    monkeypatch.setattr(module, "DRAWS", width)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.eye(width) * width**0.5)
    name = "encoder.layer.1.attention.self.value.bias"
    parameter = model.encoder.get_parameter(name)
    found = undone(fisher_information(model, {name: parameter}, 1, row, "features", seed=0))
    given = row(0)
    told = model.encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
    pooled = pool(told, given["attention_mask"], "mean")[0]
    rows = [torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in pooled]
    torch.testing.assert_close(found[name], torch.stack(rows).square().sum(0))


def test_kl_nearby_is_half_the_quadratic_form(model: Any) -> None:
    """One weight at a time, for which the diagonal is the whole matrix."""
    model.double().eval()
    found = undone(fisher_information(model, encoder_parameters(model), ROWS, row, "exact", 0))
    ids = torch.cat([row(n)["input_ids"] for n in range(ROWS)])
    mask = torch.ones(ids.shape, dtype=torch.double)

    def logs() -> Tensor:
        with torch.no_grad():
            return model(ids, mask).logits.log_softmax(-1)

    before, checked = logs(), 0
    for name in ("encoder.layer.2.output.dense.weight", "encoder.layer.0.intermediate.dense.bias"):
        parameter = model.encoder.get_parameter(name)
        flat, information = parameter.data.view(-1), found[name].view(-1)
        for place in information.topk(3).indices.tolist():
            flat[place] += 1e-3
            now = logs()
            flat[place] -= 1e-3
            kl = (before.exp() * (before - now)).sum(-1).mean().item()
            assert kl == pytest.approx(0.5 * 1e-6 * information[place].item(), rel=0.05)
            checked += 1
    assert checked == 6


def test_its_mean_is_one_and_it_comes_back_from_the_disk(model: Any, tmp_path: Path) -> None:
    fisher, scale = fisher_information(model, encoder_parameters(model), ROWS, row, "features", 1)
    numbers = sum(tensor.numel() for tensor in fisher.values())
    assert sum(float(t.sum()) for t in fisher.values()) == pytest.approx(numbers, rel=1e-4)
    save_fisher(fisher, tmp_path / "fisher.safetensors", {"kind": "features", "scale": scale})
    found, told = load_fisher(tmp_path / "fisher.safetensors")
    assert told == {"kind": "features", "scale": str(scale)}
    assert found.keys() == fisher.keys()
    assert all(torch.equal(found[name], fisher[name]) for name in found)


def test_what_cannot_be_is_refused(model: Any) -> None:
    with pytest.raises(RecipeError, match="ewc.fisher='all'"):
        fisher_information(model, encoder_parameters(model), 1, row, "all", 0)
    bare = lambda n: {k: v for k, v in row(n).items() if k != "labels"}  # noqa: E731
    with pytest.raises(RecipeError, match="empirical needs labels"):
        fisher_information(model, encoder_parameters(model), 1, bare, "empirical", 0)
    nothing = {"none": nn.Parameter(torch.zeros(3))}
    with pytest.raises(NumericError, match="a mean of 0"):
        fisher_information(model, nothing, 1, row, "features", 0)
