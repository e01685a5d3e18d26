"""The Fisher information against per-sample autograd, and against what it is for."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_retention import with_probe
from test_trainer import Rows
from tiny import IMAGE_SIZE
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from hftl.config.section import Source
from hftl.errors import NumericError, RecipeError
from hftl.models.heads import build_model, pool_tokens
from hftl.models.source import find_source
from hftl.retain import fisher as module
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.retain.hooks import EmbeddingHook

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
    found = undone(compute_fisher(model, encoder_parameters(model), ROWS, row, kind, seed=0))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    wanted = by_autograd(model, kind, labels)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_sampled_draws_from_the_models_own_classes(model: Any) -> None:
    model.eval()
    found = undone(compute_fisher(model, encoder_parameters(model), ROWS, row, "sampled", 3))
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
    again = compute_fisher(model, encoder_parameters(model), ROWS, row, "sampled", 3)
    assert all(torch.equal(undone(again)[n], v) for n, v in found.items())


def test_it_is_not_the_square_of_the_batch_mean(model: Any) -> None:
    model.eval()
    found = undone(compute_fisher(model, encoder_parameters(model), ROWS, row, "empirical", 0))
    batch = [row(n) for n in range(ROWS)]
    logits = model(
        torch.cat([r["input_ids"] for r in batch]), torch.cat([r["attention_mask"] for r in batch])
    ).logits
    loss = F.cross_entropy(logits, torch.cat([r["labels"] for r in batch]))
    wrong = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
    right = sum(float(value.sum()) for value in found.values())
    assert right > 1.5 * sum(float(g.square().sum()) for g in wrong if g is not None)


def of_task(folder: Path, task: str, outputs: int) -> Any:
    """A pooled tiny BERT with outputs of that task, and rows labelled for it."""
    source = find_source(Source(model=str(folder)))
    names = [] if task == "regression" else ["a", "b", "c"]
    found = build_model(source, task, "mean", outputs, names, seed=0).model
    with torch.no_grad():
        found.head.weight.mul_(30)  # pyright: ignore
    return found


def logits_of(model: Any, number: int) -> Tensor:
    given = row(number)
    return model.eval()(given["input_ids"], given["attention_mask"]).logits[0]


def squares(model: Any, value: Tensor) -> dict[str, Tensor]:
    named = encoder_parameters(model)
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True)
    return {name: g.square() for name, g in zip(named, found, strict=True)}


def log_of(logits: Tensor, answer: Tensor, task: str) -> Tensor:
    if task == "regression":
        return torch.distributions.Normal(logits, 1.0).log_prob(answer).sum()
    return torch.distributions.Bernoulli(logits=logits).log_prob(answer).sum()


def test_of_independent_labels_it_is_the_sum_over_all_sets_of_them(
    tiny_model: Callable[..., Path],
) -> None:
    model = of_task(tiny_model("bert"), "multi-label", 3)
    found = undone(compute_fisher(model, encoder_parameters(model), 2, row, "exact", 0, "labels"))
    wanted = {name: torch.zeros_like(value) for name, value in found.items()}
    for number in range(2):
        logits = logits_of(model, number)
        for held in itertools.product((0.0, 1.0), repeat=3):
            log = log_of(logits, torch.tensor(held), "multi-label")
            for name, square in squares(model, log).items():
                wanted[name] += log.exp().detach() * square / 2
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("task", "answers"), [("multi-label", "labels"), ("regression", "target")])
def test_given_and_drawn_answers_of_other_tasks(
    task: str, answers: str, tiny_model: Callable[..., Path]
) -> None:
    model = of_task(tiny_model("bert"), task, 1 if task == "regression" else 3)
    shape = (1,) if task == "regression" else (1, 3)
    told = [torch.randn(shape) if task == "regression" else torch.rand(shape).round()
            for _ in range(2)]  # fmt: skip

    def batch(number: int) -> dict[str, Any]:
        return {**row(number), "labels": told[number]}

    def information(kind: str, seed: int) -> dict[str, Tensor]:
        named = encoder_parameters(model)
        return undone(compute_fisher(model, named, 2, batch, kind, seed, answers))

    found, name = information("empirical", 0), "encoder.layer.1.output.dense.bias"
    wanted = sum(
        squares(model, log_of(logits_of(model, n), told[n].reshape(-1), task))[name] / 2
        for n in range(2)
    )
    torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-4)
    drawn = torch.stack([information("sampled", seed)[name] for seed in range(150)])
    exact = information("exact", 0)[name]
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all() and (error < 0.3 * exact).any()
    if task == "regression":
        by_hand = sum(squares(model, logits_of(model, n)[0])[name] / 2 for n in range(2))
        torch.testing.assert_close(exact, by_hand, atol=1e-6, rtol=1e-4)


def test_it_leaves_everything_as_it_was(model: Any) -> None:
    named = encoder_parameters(model)
    model.encoder.embeddings.requires_grad_(False)
    kept = torch.ones_like(model.encoder.encoder.layer[0].output.dense.bias)
    model.encoder.encoder.layer[0].output.dense.bias.grad = kept
    trains = [p.requires_grad for p in model.parameters()]
    found, _ = compute_fisher(model, named, 2, row, "features", 0)
    assert found["embeddings.word_embeddings.weight"].any()
    assert [p.requires_grad for p in model.parameters()] == trains
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 1 and gradients[0] is kept and bool((kept == 1).all())
    assert not any(m.sparse for m in model.modules() if isinstance(m, nn.Embedding))
    model(**{k: v for k, v in row(0).items() if k != "labels"}).logits.sum().backward()
    assert model.encoder.encoder.layer[1].output.dense.bias.grad is not None, "no hook is left"


@pytest.mark.parametrize("name", ["albert", "deberta-v2", "vit", "clip"])
def test_features_of_other_architectures(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared layers, embeddings that are used without a look-up, and pictures."""
    source = find_source(Source(model=str(tiny_model(name))))
    image = source.architecture_spec.modality == "image"
    found = build_model(source, "classification", "native" if image else "mean", 3, list("abc"), 0)
    given = {"pixel_values": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)} if image else {
        k: v for k, v in row(0).items() if k != "labels"
    }  # fmt: skip
    parameters = dict(found.encoder.named_parameters())
    tap = EmbeddingHook(found.model.eval())
    embedding = tap.read_outputs(found.model(**given), given.get("attention_mask")).embedding
    assert embedding is not None
    monkeypatch.setattr(module, "FEATURE_DRAWS", embedding.shape[1])
    monkeypatch.setattr(
        torch, "randn", lambda n, *_, **__: torch.eye(n) * n**0.5
    )  # Along a basis nothing is left to chance.
    mine = undone(compute_fisher(found.model, parameters, 1, lambda _: given, "features", 0))
    wanted = {key: torch.zeros_like(p) for key, p in parameters.items()}
    for value in embedding[0]:
        gradients = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for key, gradient in zip(parameters, gradients, strict=True):
            wanted[key] += 0 if gradient is None else gradient.square()
    for key, value in wanted.items():
        torch.testing.assert_close(mine[key], value, atol=1e-6, rtol=1e-4)


def test_features_are_the_diagonal_of_jacobian_squared(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    monkeypatch.setattr(module, "FEATURE_DRAWS", 400)
    name = "encoder.layer.2.output.dense.bias"
    parameter = model.encoder.get_parameter(name)
    found = undone(compute_fisher(model, {name: parameter}, ROWS, row, "features", seed=0))

    def embedding(value: Tensor, given: dict[str, Any]) -> Tensor:
        told = functional_call(
            model.encoder, {name: value}, (given["input_ids"], given["attention_mask"])
        )
        return pool_tokens(told.last_hidden_state, given["attention_mask"], "mean")[0]

    wanted = torch.zeros_like(parameter)
    for number in range(ROWS):
        jacobian = jacrev(embedding)(parameter.detach(), row(number))
        wanted += jacobian.square().sum(0).detach() / ROWS
    torch.testing.assert_close(found[name], wanted, rtol=0.15, atol=0)


def test_along_a_basis_features_are_exact(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.eval()
    width = model.encoder.config.hidden_size
    monkeypatch.setattr(module, "FEATURE_DRAWS", width)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.eye(width) * width**0.5)
    name = "encoder.layer.1.attention.self.value.bias"
    parameter = model.encoder.get_parameter(name)
    found = undone(compute_fisher(model, {name: parameter}, 1, row, "features", seed=0))
    given = row(0)
    told = model.encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
    pooled = pool_tokens(told, given["attention_mask"], "mean")[0]
    rows = [torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in pooled]
    torch.testing.assert_close(found[name], torch.stack(rows).square().sum(0))


def test_kl_nearby_is_half_the_quadratic_form(model: Any) -> None:
    """One weight at a time, for which the diagonal is the whole matrix."""
    model.double().eval()
    found = undone(compute_fisher(model, encoder_parameters(model), ROWS, row, "exact", 0))
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
    fisher, scale = compute_fisher(model, encoder_parameters(model), ROWS, row, "features", 1)
    numbers = sum(tensor.numel() for tensor in fisher.values())
    assert sum(float(t.sum()) for t in fisher.values()) == pytest.approx(numbers, rel=1e-4)
    save_fisher(fisher, tmp_path / "fisher.safetensors", {"kind": "features", "scale": scale})
    found, told = load_fisher(tmp_path / "fisher.safetensors")
    assert told == {"kind": "features", "scale": str(scale)}
    assert describe_fisher(told | {"rows": "6"}) == {
        "kind": "features", "rows": 6, "draws": 2, "scale": scale, "mean": 1.0,
    }  # fmt: skip
    assert found.keys() == fisher.keys()
    assert all(torch.equal(found[name], fisher[name]) for name in found)


def test_what_cannot_be_is_refused(model: Any) -> None:
    with pytest.raises(RecipeError, match="ewc.fisher='all'"):
        compute_fisher(model, encoder_parameters(model), 1, row, "all", 0)
    bare = lambda n: {k: v for k, v in row(n).items() if k != "labels"}  # noqa: E731
    with pytest.raises(RecipeError, match="empirical needs labels"):
        compute_fisher(model, encoder_parameters(model), 1, bare, "empirical", 0)
    with pytest.raises(RecipeError, match="answers='words'"):
        compute_fisher(model, encoder_parameters(model), 1, row, "exact", 0, "words")
    nothing = {"none": nn.Parameter(torch.zeros(3))}
    with pytest.raises(NumericError, match="a mean of 0"):
        compute_fisher(model, nothing, 1, row, "features", 0)


def test_of_an_answer_a_word_only_features_are_known(tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model("bert"))))
    found = build_model(source, "token-classification", "native", 3, list("abc"), seed=0)
    named = dict(found.encoder.named_parameters())
    with pytest.raises(RecipeError, match="exact is of one answer a row, and the model has one a"):
        compute_fisher(found.model, named, 1, row, "exact", 0)
    assert compute_fisher(found.model, named, 1, row, "features", 0)[1] > 0
