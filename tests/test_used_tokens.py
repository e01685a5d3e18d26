"""Check trainings that hold the word vectors in use alone, against those that hold all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from torch import nn

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.finetune import arm
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.context import ExperimentContext
from hftl.finetune.used_tokens import train_used_tokens
from hftl.models.used_embedding import find_word_embedding, hold_used_rows
from hftl.retain.regularizer import Retention
from hftl.retain.weights import L2SP
from hftl.train.arguments import build_finetune_arguments

TRAINING = {"num_train_epochs": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module", params=["bert", "roberta"])
def context(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExperimentContext:  # fmt: skip
    rows = sentences(80)
    table = write_csv(tmp_path_factory.mktemp("data") / "rows.csv", ["text", "label"], rows)
    recipe = Recipe.parse({
        "source": {"model": str(tiny_model(request.param))},
        "data": {"train": {"path": str(table)}, "max_length": 16, "shots": 3},
    })  # fmt: skip
    context = bench_of(recipe)
    context.seeds = (0,)
    return context


def build_section(strategy: str = "full", **training: Any) -> Finetune:
    section = {"strategy": strategy, "pooling": "mean", "training": TRAINING | training}
    return Finetune.model_validate(section)


@contextmanager
def hold_all(*_: Any) -> Iterator[None]:
    yield


def compare_trainings(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch, **training: Any
) -> tuple[ArmOutput, ArmOutput]:
    """Return the outputs of a training of the vectors in use, and of one of all."""
    section = build_section(**training)
    used = train_arm(context, section, 0, compared=False)
    monkeypatch.setattr(arm, "train_used_tokens", hold_all)
    return used, train_arm(context, section, 0, compared=False)


def test_training_is_the_same_and_other_vectors_stay(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    hold = arm.train_used_tokens

    @contextmanager
    def look(*arguments: Any) -> Iterator[None]:
        with hold(*arguments):
            yield
            sizes.append(len(arguments[1].get_input_embeddings().weight))

    monkeypatch.setattr(arm, "train_used_tokens", look)
    used, whole = compare_trainings(context, monkeypatch, bf16=False)
    start: Any = context.build_model("mean", 0)
    table = start.encoder.get_input_embeddings().weight
    assert sizes[0] < len(table), "some words do not occur"
    assert used.weights.keys() == whole.weights.keys()
    assert used.trainable_parameters == whole.trainable_parameters
    for name, tensor in used.weights.items():
        torch.testing.assert_close(tensor, whole.weights[name], rtol=1e-4, atol=1e-6)
    name = next(n for n, p in start.model.named_parameters() if p is table)
    is_same = (used.weights[name] == table).all(1)
    assert torch.equal(is_same, (whole.weights[name] == table).all(1))
    assert 0 < int(is_same.sum()) < len(table)
    for split, logits in used.logits.items():
        assert abs(logits - whole.logits[split]).max() < 1e-4


@pytest.mark.parametrize(
    ("strategy", "training", "retention", "is_held"),
    [
        ("full", {}, None, True),
        ("full", {"weight_decay": 0.01}, None, False),
        ("full", {"optim": "adafactor"}, None, False),
        ("full", {}, Retention([L2SP(0.1)]), False),
        ("gradual", {}, None, False),
    ],
)
def test_table_stays_whole_where_other_vectors_could_change(
    context: ExperimentContext, tmp_path: Path, strategy: str, training: dict[str, Any],
    retention: Retention | None, is_held: bool,
) -> None:  # fmt: skip
    section = build_section(strategy, **training)
    args = build_finetune_arguments(section.training, "classification", str(tmp_path), 0, "cpu")
    encoder: Any = context.build_model("mean", 0).encoder
    table = encoder.get_input_embeddings().weight
    before = table.detach().clone()
    with train_used_tokens(context, encoder, section, args, 0, retention):
        held = encoder.get_input_embeddings().weight
        assert (held is not table) == is_held
    assert encoder.get_input_embeddings().weight is table and torch.equal(table, before)


def test_held_rows_and_their_gradients_are_those_of_the_table() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, padding_idx=1)
    tokens = torch.tensor([[5, 3, 1], [3, 8, 1]])
    plain = table(tokens)
    plain.square().sum().backward()
    expected, before = table.weight.grad, table.weight.detach().clone()
    assert expected is not None
    table.weight.grad = None
    with hold_used_rows(table, torch.tensor([3, 5, 8])):
        held = table(tokens)
        assert torch.equal(held, plain) and len(table.weight) == 4
        held.square().sum().backward()
        assert table.weight.grad is not None
        torch.testing.assert_close(table.weight.grad, expected[[1, 3, 5, 8]])
        with pytest.raises(IndexError):
            table(torch.tensor([2]))
        with torch.no_grad():
            table.weight += 1
        assert set(table.state_dict()) == {"weight"}
    changed = [1, 3, 5, 8]
    before[changed] += 1
    assert torch.equal(table.weight, before) and type(table) is nn.Embedding
    assert not list(table.buffers()) and torch.equal(table(tokens), plain + 1)


def test_table_that_another_layer_shares_or_scales_stays_whole() -> None:
    class Encoder(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.table = table

        def get_input_embeddings(self) -> nn.Embedding:
            return self.table

    table = nn.Embedding(9, 4)
    encoder = Encoder(table)
    assert find_word_embedding(encoder) is table
    encoder.decoder = nn.Linear(4, 9)
    encoder.decoder.weight = table.weight
    assert find_word_embedding(encoder) is None
    assert find_word_embedding(Encoder(nn.Embedding(9, 4, max_norm=1.0))) is None

    class Scaled(nn.Embedding):
        pass

    assert find_word_embedding(Encoder(Scaled(9, 4))) is None
    assert find_word_embedding(Encoder(nn.Embedding(9, 4).requires_grad_(False))) is None
