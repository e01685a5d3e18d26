"""Check the Fisher information against per-sample autograd, and against its definition."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import IMAGE_SIZE
from support.training import Rows, build_probed_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from hftl.config.section import Source
from hftl.errors import NumericError, RecipeError
from hftl.models.heads import build_model, pool_tokens
from hftl.models.source import find_source
from hftl.retain import fisher as module
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.retain.reference import EmbeddingHook

ROWS = 6


def get_row(number: int) -> dict[str, Any]:
    return {key: value.unsqueeze(0) for key, value in Rows()[number].items()}


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    """A probed tiny BERT with dropout, in train mode, which must make no difference."""
    return build_probed_model(tiny_model("bert"), "full", dropout=0.3).train()


def get_encoder_parameters(model: Any) -> dict[str, nn.Parameter]:
    return dict(model.encoder.named_parameters())


def compute_by_autograd(model: Any, kind: str, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Return the mean over rows of squared per-sample gradients, by torch.func."""
    model.eval()
    named = {f"encoder.{n}": p.detach() for n, p in model.encoder.named_parameters()}
    rows = [get_row(n) for n in range(ROWS)]
    ids = torch.cat([r["input_ids"] for r in rows])

    def compute_log(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        mask = torch.ones(1, one.shape[0])
        outputs = functional_call(model, parameters, (one.unsqueeze(0), mask))
        return F.log_softmax(outputs.logits[0], -1)[label]

    def compute_gradients(
        parameters: dict[str, Tensor], ids: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        rows = [grad(compute_log)(parameters, *pair) for pair in zip(ids, labels, strict=True)]
        return {name: torch.stack([one[name] for one in rows]) for name in parameters}

    with torch.no_grad():
        probabilities = model(ids, torch.ones_like(ids, dtype=torch.float)).logits.softmax(-1)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    if kind == "exact":
        for label in range(probabilities.shape[1]):
            gradients = compute_gradients(named, ids, torch.full((ROWS,), label))
            for name, g in gradients.items():
                p = probabilities[:, label].reshape(-1, *[1] * (g.dim() - 1))
                total[name] += (p * g.square()).sum(0)
    else:
        for name, g in compute_gradients(named, ids, labels).items():  # pyright: ignore
            total[name] += g.square().sum(0)
    return {name.removeprefix("encoder."): t / ROWS for name, t in total.items()}


def unnormalize(result: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    fisher, scale = result
    return {name: tensor * scale for name, tensor in fisher.items()}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_fisher_equals_per_sample_autograd(model: Any, kind: str) -> None:
    labels = torch.stack([Rows()[n]["labels"] for n in range(ROWS)])
    model.train()
    modes = [m.training for m in model.modules()]
    fisher = unnormalize(
        compute_fisher(model, get_encoder_parameters(model), ROWS, get_row, kind, seed=0)
    )
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    expected = compute_by_autograd(model, kind, labels)
    assert fisher.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, atol=1e-6, rtol=1e-4)


def test_sampled_draws_from_the_model_s_distribution(model: Any) -> None:
    model.eval()
    fisher = unnormalize(
        compute_fisher(model, get_encoder_parameters(model), ROWS, get_row, "sampled", 3)
    )
    labels = []
    for number in range(ROWS):
        batch = get_row(number)
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[0]
        draw = torch.Generator().manual_seed(3 * 1_000_003 + number)
        labels.append(int(torch.multinomial(logits.softmax(-1), 1, generator=draw)))
    expected = compute_by_autograd(model, "sampled", torch.tensor(labels))
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, atol=1e-6, rtol=1e-4)
    again = compute_fisher(model, get_encoder_parameters(model), ROWS, get_row, "sampled", 3)
    assert all(torch.equal(unnormalize(again)[n], v) for n, v in fisher.items())


def test_fisher_is_not_the_square_of_the_batch_mean(model: Any) -> None:
    model.eval()
    fisher = unnormalize(
        compute_fisher(model, get_encoder_parameters(model), ROWS, get_row, "empirical", 0)
    )
    batch = [get_row(n) for n in range(ROWS)]
    logits = model(
        torch.cat([r["input_ids"] for r in batch]), torch.cat([r["attention_mask"] for r in batch])
    ).logits
    loss = F.cross_entropy(logits, torch.cat([r["labels"] for r in batch]))
    wrong = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
    right = sum(float(value.sum()) for value in fisher.values())
    assert right > 1.5 * sum(float(g.square().sum()) for g in wrong if g is not None)


def build_task_model(folder: Path, task: str, outputs: int) -> Any:
    """Return a pooled tiny BERT with outputs of a task."""
    source = find_source(Source(model=str(folder)))
    names = [] if task == "regression" else ["a", "b", "c"]
    model: Any = build_model(source, task, "mean", outputs, names, seed=0).model
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model


def compute_logits(model: Any, number: int) -> Tensor:
    batch = get_row(number)
    return model.eval()(batch["input_ids"], batch["attention_mask"]).logits[0]


def compute_squares(model: Any, value: Tensor) -> dict[str, Tensor]:
    named = get_encoder_parameters(model)
    gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True)
    return {name: g.square() for name, g in zip(named, gradients, strict=True)}


def compute_log_likelihood(logits: Tensor, label: Tensor, task: str) -> Tensor:
    if task == "regression":
        return torch.distributions.Normal(logits, 1.0).log_prob(label).sum()
    return torch.distributions.Bernoulli(logits=logits).log_prob(label).sum()


def test_fisher_of_independent_labels_sums_over_all_their_sets(
    tiny_model: Callable[..., Path],
) -> None:
    model = build_task_model(tiny_model("bert"), "multi-label", 3)
    fisher = unnormalize(
        compute_fisher(model, get_encoder_parameters(model), 2, get_row, "exact", 0, "labels")
    )
    expected = {name: torch.zeros_like(value) for name, value in fisher.items()}
    for number in range(2):
        logits = compute_logits(model, number)
        for values in itertools.product((0.0, 1.0), repeat=3):
            log = compute_log_likelihood(logits, torch.tensor(values), "multi-label")
            for name, square in compute_squares(model, log).items():
                expected[name] += log.exp().detach() * square / 2
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "logit_kind"), [("multi-label", "labels"), ("regression", "target")]
)
def test_given_and_drawn_labels_of_other_tasks(
    task: str, logit_kind: str, tiny_model: Callable[..., Path]
) -> None:
    model = build_task_model(tiny_model("bert"), task, 1 if task == "regression" else 3)
    shape = (1,) if task == "regression" else (1, 3)
    labels = [torch.randn(shape) if task == "regression" else torch.rand(shape).round()
              for _ in range(2)]  # fmt: skip

    def get_batch(number: int) -> dict[str, Any]:
        return {**get_row(number), "labels": labels[number]}

    def compute_information(kind: str, seed: int) -> dict[str, Tensor]:
        named = get_encoder_parameters(model)
        return unnormalize(compute_fisher(model, named, 2, get_batch, kind, seed, logit_kind))

    fisher, name = compute_information("empirical", 0), "encoder.layer.1.output.dense.bias"
    expected = sum(
        compute_squares(
            model, compute_log_likelihood(compute_logits(model, n), labels[n].reshape(-1), task)
        )[name]
        / 2
        for n in range(2)
    )
    torch.testing.assert_close(fisher[name], expected, atol=1e-6, rtol=1e-4)
    drawn = torch.stack([compute_information("sampled", seed)[name] for seed in range(150)])
    exact = compute_information("exact", 0)[name]
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all() and (error < 0.3 * exact).any()
    if task == "regression":
        by_hand = sum(
            compute_squares(model, compute_logits(model, n)[0])[name] / 2 for n in range(2)
        )
        torch.testing.assert_close(exact, by_hand, atol=1e-6, rtol=1e-4)


def test_fisher_leaves_the_model_unchanged(model: Any) -> None:
    named = get_encoder_parameters(model)
    model.encoder.embeddings.requires_grad_(False)
    gradient = torch.ones_like(model.encoder.encoder.layer[0].output.dense.bias)
    model.encoder.encoder.layer[0].output.dense.bias.grad = gradient
    before = [p.requires_grad for p in model.parameters()]
    fisher, _ = compute_fisher(model, named, 2, get_row, "features", 0)
    assert fisher["embeddings.word_embeddings.weight"].any()
    assert [p.requires_grad for p in model.parameters()] == before
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 1 and gradients[0] is gradient and bool((gradient == 1).all())
    assert not any(m.sparse for m in model.modules() if isinstance(m, nn.Embedding))
    model(**{k: v for k, v in get_row(0).items() if k != "labels"}).logits.sum().backward()
    assert model.encoder.encoder.layer[1].output.dense.bias.grad is not None, "no hook is left"


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "vit", "clip"])
def test_features_along_a_basis_are_exact(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared layers, embeddings that are used without a look-up, and images."""
    source = find_source(Source(model=str(tiny_model(name))))
    image = source.architecture_spec.modality == "image"
    loaded = build_model(source, "classification", "native" if image else "mean", 3, list("abc"), 0)
    batch = {"pixel_values": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)} if image else {
        k: v for k, v in get_row(0).items() if k != "labels"
    }  # fmt: skip
    parameters = dict(loaded.encoder.named_parameters())
    hook = EmbeddingHook(loaded.model.eval())
    embedding = hook.read_outputs(loaded.model(**batch), batch.get("attention_mask")).embedding
    monkeypatch.setattr(module, "FEATURE_DRAWS", embedding.shape[1])
    monkeypatch.setattr(torch, "randn", lambda n, *_, **__: torch.eye(n) * n**0.5)
    fisher = unnormalize(
        compute_fisher(loaded.model, parameters, 1, lambda _: batch, "features", 0)
    )
    expected = {key: torch.zeros_like(p) for key, p in parameters.items()}
    for value in embedding[0]:
        gradients = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for key, gradient in zip(parameters, gradients, strict=True):
            expected[key] += 0 if gradient is None else gradient.square()
    for key, value in expected.items():
        torch.testing.assert_close(fisher[key], value, atol=1e-6, rtol=1e-4)


def test_features_are_the_diagonal_of_jacobian_squared(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    monkeypatch.setattr(module, "FEATURE_DRAWS", 400)
    name = "encoder.layer.2.output.dense.bias"
    parameter = model.encoder.get_parameter(name)
    fisher = unnormalize(
        compute_fisher(model, {name: parameter}, ROWS, get_row, "features", seed=0)
    )

    def compute_embedding(value: Tensor, batch: dict[str, Any]) -> Tensor:
        outputs = functional_call(
            model.encoder, {name: value}, (batch["input_ids"], batch["attention_mask"])
        )
        return pool_tokens(outputs.last_hidden_state, batch["attention_mask"], "mean")[0]

    expected = torch.zeros_like(parameter)
    for number in range(ROWS):
        jacobian = jacrev(compute_embedding)(parameter.detach(), get_row(number))
        expected += jacobian.square().sum(0).detach() / ROWS
    torch.testing.assert_close(fisher[name], expected, rtol=0.15, atol=0)


def test_kl_nearby_is_half_the_quadratic_form(model: Any) -> None:
    """One weight at a time, for which the diagonal is the whole matrix."""
    model.double().eval()
    fisher = unnormalize(
        compute_fisher(model, get_encoder_parameters(model), ROWS, get_row, "exact", 0)
    )
    ids = torch.cat([get_row(n)["input_ids"] for n in range(ROWS)])
    mask = torch.ones(ids.shape, dtype=torch.double)

    def compute_logs() -> Tensor:
        with torch.no_grad():
            return model(ids, mask).logits.log_softmax(-1)

    before, checked = compute_logs(), 0
    for name in ("encoder.layer.2.output.dense.weight", "encoder.layer.0.intermediate.dense.bias"):
        parameter = model.encoder.get_parameter(name)
        flat, information = parameter.data.view(-1), fisher[name].view(-1)
        for index in information.topk(3).indices.tolist():
            flat[index] += 1e-3
            now = compute_logs()
            flat[index] -= 1e-3
            kl = (before.exp() * (before - now)).sum(-1).mean().item()
            assert kl == pytest.approx(0.5 * 1e-6 * information[index].item(), rel=0.05)
            checked += 1
    assert checked == 6


def test_mean_is_one_and_files_round_trip(model: Any, tmp_path: Path) -> None:
    fisher, scale = compute_fisher(
        model, get_encoder_parameters(model), ROWS, get_row, "features", 1
    )
    numbers = sum(tensor.numel() for tensor in fisher.values())
    assert sum(float(t.sum()) for t in fisher.values()) == pytest.approx(numbers, rel=1e-4)
    save_fisher(fisher, tmp_path / "fisher.safetensors", {"kind": "features", "scale": scale})
    loaded, metadata = load_fisher(tmp_path / "fisher.safetensors")
    assert metadata == {"kind": "features", "scale": str(scale)}
    assert describe_fisher(metadata | {"rows": "6"}) == {
        "kind": "features", "rows": 6, "draws": 2, "scale": scale, "mean": 1.0,
    }  # fmt: skip
    assert loaded.keys() == fisher.keys()
    assert all(torch.equal(loaded[name], fisher[name]) for name in loaded)


def test_refuses_unknown_kinds_and_missing_labels(model: Any) -> None:
    with pytest.raises(RecipeError, match="ewc.fisher='all'"):
        compute_fisher(model, get_encoder_parameters(model), 1, get_row, "all", 0)
    bare = lambda n: {k: v for k, v in get_row(n).items() if k != "labels"}  # noqa: E731
    with pytest.raises(RecipeError, match="empirical needs labels"):
        compute_fisher(model, get_encoder_parameters(model), 1, bare, "empirical", 0)
    with pytest.raises(RecipeError, match="logit_kind='words'"):
        compute_fisher(model, get_encoder_parameters(model), 1, get_row, "exact", 0, "words")
    nothing = {"none": nn.Parameter(torch.zeros(3))}
    with pytest.raises(NumericError, match="a mean of 0"):
        compute_fisher(model, nothing, 1, get_row, "features", 0)


def test_refuses_all_but_features_for_words(tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model("bert"))))
    loaded = build_model(source, "token-classification", "native", 3, list("abc"), seed=0)
    named = dict(loaded.encoder.named_parameters())
    with pytest.raises(RecipeError, match="exact is of one label a row, and the model has one a"):
        compute_fisher(loaded.model, named, 1, get_row, "exact", 0)
    assert compute_fisher(loaded.model, named, 1, get_row, "features", 0)[1] > 0
