"""Check the Fisher information against per-sample autograd, and against its definition."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import IMAGE_SIZE
from support.training import Rows, build_probed_model
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from hftl.config.section import Source
from hftl.errors import NumericError, RecipeError
from hftl.models.heads import build_model
from hftl.models.source import find_source
from hftl.retain import fisher as module
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.retain.original import EmbeddingHook

ROWS = 6
Squares = dict[str, Tensor]


def get_row(number: int) -> dict[str, Any]:
    return {key: value.unsqueeze(0) for key, value in Rows()[number].items()}


def get_unlabelled_row(number: int) -> dict[str, Any]:
    return {key: value for key, value in get_row(number).items() if key != "labels"}


@pytest.fixture
def model(bert: Path) -> Any:
    """Build a probed tiny BERT with dropout, in train mode, which must make no difference."""
    return build_probed_model(bert, "full", dropout=0.3).train()


def build_task_model(folder: Path, task: str, outputs: int) -> Any:
    """Return a pooled tiny BERT with outputs of a task."""
    source = find_source(Source(model=str(folder)))
    names = [] if task == "regression" else ["a", "b", "c"]
    model: Any = build_model(source, task, "mean", outputs, names, seed=0).model
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model


def measure(model: Any, kind: str, rows: int = ROWS, get: Any = get_row, seed: int = 3,
            logit_kind: str = "classes") -> Squares:  # fmt: skip
    """Return the information of the encoder's parameters, not normalized."""
    named = dict(model.encoder.named_parameters())
    fisher, scale = compute_fisher(model, named, rows, get, kind, seed, logit_kind)
    return {name: tensor * scale for name, tensor in fisher.items()}


def compute_logits(model: Any, number: int) -> Tensor:
    return model.eval()(**get_unlabelled_row(number)).logits[0]


def square_gradients(model: Any, value: Tensor) -> Squares:
    """Return squared gradients of a number, by the encoder's parameters."""
    named = dict(model.encoder.named_parameters())
    gradients = torch.autograd.grad(
        value, list(named.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(named[name]) if g is None else g.square()
        for name, g in zip(named, gradients, strict=True)
    }


def add_squares(parts: list[tuple[Any, Squares]]) -> Squares:
    return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}


def assert_close(fisher: Squares, expected: Squares) -> None:
    assert fisher.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled"])
def test_fisher_of_classes_is_the_mean_of_squared_row_gradients(model: Any, kind: str) -> None:
    modes = [m.training for m in model.modules()]
    fisher = measure(model, kind)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    parts = []
    for number in range(ROWS):
        logits = compute_logits(model, number)
        logs, p = logits.log_softmax(-1), logits.softmax(-1).detach()
        draw = torch.Generator().manual_seed(3 * 1_000_003 + number)
        weights = {
            "exact": p,
            "empirical": torch.eye(3)[get_row(number)["labels"][0]],
            "sampled": torch.eye(3)[torch.multinomial(p, 1, generator=draw)[0]],
        }[kind]
        parts += [(w / ROWS, square_gradients(model, logs[i])) for i, w in enumerate(weights)]
    assert_close(fisher, add_squares(parts))


def test_exact_fisher_of_independent_labels_sums_over_all_their_sets(bert: Path) -> None:
    model, parts = build_task_model(bert, "multi-label", 3), []
    for number in range(2):
        logits = compute_logits(model, number)
        for values in itertools.product((0.0, 1.0), repeat=3):
            log = Bernoulli(logits=logits).log_prob(torch.tensor(values)).sum()
            parts.append((log.exp().detach() / 2, square_gradients(model, log)))
    assert_close(measure(model, "exact", 2, logit_kind="labels"), add_squares(parts))


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_given_and_drawn_labels_of_other_tasks(task: str, bert: Path) -> None:
    regression = task == "regression"
    model = build_task_model(bert, task, 1 if regression else 3)
    labels = [torch.randn(1) if regression else torch.rand(1, 3).round() for _ in range(2)]

    def get_batch(number: int) -> dict[str, Any]:
        return {**get_row(number), "labels": labels[number]}

    def measure_task(kind: str, seed: int = 0) -> Squares:
        return measure(model, kind, 2, get_batch, seed, "target" if regression else "labels")

    parts = []
    for number in range(2):
        logits = compute_logits(model, number)
        distribution = Normal(logits, 1.0) if regression else Bernoulli(logits=logits)
        log = distribution.log_prob(labels[number].reshape(-1)).sum()
        parts.append((0.5, square_gradients(model, log)))
    assert_close(measure_task("empirical"), add_squares(parts))
    name = "encoder.layer.1.output.dense.bias"
    drawn = torch.stack([measure_task("sampled", seed)[name] for seed in range(60)])
    exact, error = measure_task("exact")[name], drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all() and (error < 0.4 * exact).any()


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "vit", "clip"])
def test_fisher_of_features_is_exact_along_a_basis(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Try shared layers, embeddings that are used without a look-up, and images."""
    source = find_source(Source(model=str(tiny_model(name))))
    image = source.architecture_spec.modality == "image"
    loaded = build_model(source, "classification", "native" if image else "mean", 3, list("abc"), 0)
    batch = get_unlabelled_row(0)
    if image:
        batch = {"pixel_values": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    hook = EmbeddingHook(loaded.model.eval())
    embedding = hook.read_outputs(loaded.model(**batch), batch.get("attention_mask")).embedding
    monkeypatch.setattr(module, "FEATURE_DRAWS", embedding.shape[1])
    monkeypatch.setattr(torch, "randn", lambda n, *_, **__: torch.eye(n) * n**0.5)
    named = dict(loaded.encoder.named_parameters())
    fisher, scale = compute_fisher(loaded.model, named, 1, lambda _: batch, "features", 0)
    expected = add_squares([(1, square_gradients(loaded, value)) for value in embedding[0]])
    assert_close({name: tensor * scale for name, tensor in fisher.items()}, expected)


def test_fisher_leaves_the_model_unchanged(model: Any) -> None:
    model.encoder.embeddings.requires_grad_(False)
    bias = model.encoder.encoder.layer[0].output.dense.bias
    bias.grad = gradient = torch.ones_like(bias)
    before = [p.requires_grad for p in model.parameters()]
    assert measure(model, "features", 2)["embeddings.word_embeddings.weight"].any()
    assert [p.requires_grad for p in model.parameters()] == before
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 1 and gradients[0] is gradient and bool((gradient == 1).all())
    assert not any(m.sparse for m in model.modules() if isinstance(m, nn.Embedding))
    model(**get_unlabelled_row(0)).logits.sum().backward()
    assert model.encoder.encoder.layer[1].output.dense.bias.grad is not None, "no hook is left"


def test_mean_is_one_and_files_round_trip(model: Any, tmp_path: Path) -> None:
    named = dict(model.encoder.named_parameters())
    fisher, scale = compute_fisher(model, named, ROWS, get_row, "features", 1)
    numbers = sum(tensor.numel() for tensor in fisher.values())
    assert sum(float(t.sum()) for t in fisher.values()) == pytest.approx(numbers, rel=1e-4)
    save_fisher(fisher, tmp_path / "fisher.safetensors", {"kind": "features", "scale": scale})
    loaded, metadata = load_fisher(tmp_path / "fisher.safetensors")
    assert metadata == {"kind": "features", "scale": str(scale)}
    assert describe_fisher(metadata | {"rows": "6"}).to_dict() == {
        "kind": "features", "rows": 6, "draws": 2, "scale": scale, "mean": 1.0,
    }  # fmt: skip
    assert loaded.keys() == fisher.keys()
    assert all(torch.equal(loaded[name], fisher[name]) for name in loaded)


def test_refuses_unknown_kinds_and_missing_labels(model: Any) -> None:
    with pytest.raises(RecipeError, match="ewc.fisher='all'"):
        measure(model, "all", 1)
    with pytest.raises(RecipeError, match="empirical needs labels"):
        measure(model, "empirical", 1, get_unlabelled_row)
    with pytest.raises(RecipeError, match="logit_kind='words'"):
        measure(model, "exact", 1, logit_kind="words")
    with pytest.raises(NumericError, match="a mean of 0"):
        named = {"none": nn.Parameter(torch.zeros(3))}
        compute_fisher(model, named, 1, get_row, "features", 0)


def test_refuses_all_but_features_for_words(bert: Path) -> None:
    source = find_source(Source(model=str(bert)))
    loaded = build_model(source, "token-classification", "native", 3, list("abc"), seed=0)
    named = dict(loaded.encoder.named_parameters())
    with pytest.raises(RecipeError, match="exact is of one label a row, and the model has one a"):
        compute_fisher(loaded.model, named, 1, get_row, "exact", 0)
    assert compute_fisher(loaded.model, named, 1, get_row, "features", 0)[1] > 0
