"""Exactly the intended parameters train, and the others do not move."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hftl.errors import RecipeError
from hftl.finetune.strategy import prepare, trainable_parameters
from hftl.model.adapters import wrapped_layers
from hftl.model.head import Built, build
from hftl.model.source import find_source
from hftl.sections import Source

ARCHITECTURES = ["bert", "roberta", "distilbert"]
LINEARS_A_BLOCK = 6


def built(folder: Path, pooling: str = "native") -> Built:
    return build(find_source(Source(model=str(folder))), pooling, 3, ["a", "b", "c"], seed=0)


def training(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pooling", ["native", "mean", "cls"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_trains_the_last_linear_alone(
    name: str, pooling: str, tiny_model: Callable[..., Path]
) -> None:
    model = prepare(built(tiny_model(name), pooling).model, "head")
    last = {"native": "classifier", "mean": "head", "cls": "head"}[pooling]
    if name == "roberta" and pooling == "native":
        last = "classifier.out_proj"
    assert training(model) == {f"{last}.weight", f"{last}.bias"}


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_partial_trains_the_top_blocks_pooler_and_head(
    name: str, blocks: int, tiny_model: Callable[..., Path]
) -> None:
    found = built(tiny_model(name))
    model = prepare(found.model, "partial", blocks=blocks, fresh=found.fresh)
    path = f"{found.anatomy.encoder}.{found.anatomy.blocks}"
    top = tuple(f"{path}.{i}." for i in range(3 - blocks, 3))
    heads = tuple(f"{head}." for head in found.anatomy.head)
    pooler = f"{found.anatomy.encoder}.{found.anatomy.pooler}."
    expected = {n for n, _ in model.named_parameters() if n.startswith((*top, *heads, pooler))}
    assert training(model) == expected, sorted(training(model) ^ expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_trains_everything(name: str, tiny_model: Callable[..., Path]) -> None:
    model = prepare(built(tiny_model(name), "mean").model, "full")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("masked_lm", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_wraps_every_block_linear_and_trains_all_that_is_fresh(
    name: str, masked_lm: bool, pooling: str, tiny_model: Callable[..., Path]
) -> None:
    found = built(tiny_model(name, masked_lm), pooling)
    model = prepare(found.model, "lora", fresh=found.fresh)
    assert len(wrapped_layers(model)) == 3 * LINEARS_A_BLOCK
    trains = training(model)
    for module in found.fresh:
        own = [n for n in trains if module in n.replace("modules_to_save.default.", "")
               .replace(".modules_to_save.default", "")]  # fmt: skip
        assert own, f"{module} is fresh and does not train: {sorted(trains)}"
    assert not [n for n in trains if "lora_" not in n and ".layer." in n], "a block's own weight"


def test_masked_lm_checkpoint_of_bert_has_a_fresh_pooler(tiny_model: Callable[..., Path]) -> None:
    assert "bert.pooler.dense" in built(tiny_model("bert", True)).fresh
    assert "bert.pooler.dense" not in built(tiny_model("bert", False)).fresh


def test_without_loading_info_the_pooler_is_taken_as_fresh(
    tiny_model: Callable[..., Path],
) -> None:
    model = prepare(built(tiny_model()).model, "lora")
    assert any("pooler" in name for name in training(model))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, 3 * LINEARS_A_BLOCK),
        ({"use_rslora": True}, 3 * LINEARS_A_BLOCK),
        ({"target_modules": ["query", "value"]}, 6),
        ({"target_modules": "all-linear"}, 3 * LINEARS_A_BLOCK),
        ({"layers_to_transform": [2]}, LINEARS_A_BLOCK),
        ({"bias": "lora_only"}, 3 * LINEARS_A_BLOCK),
    ],
)
def test_lora_options(settings: dict, expected: int, tiny_model: Callable[..., Path]) -> None:
    model = prepare(built(tiny_model(), "mean").model, "lora", lora=settings)
    assert len(wrapped_layers(model)) == expected


def test_lora_start_leaves_the_output_unchanged(tiny_model: Callable[..., Path]) -> None:
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4)}
    model = built(tiny_model(), "mean").model.eval()
    before = model(**inputs).logits
    after = prepare(model, "lora").eval()(**inputs).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "partial", "blocks": 4}, "blocks=4, but the source model has 3"),
        ({"strategy": "sideways"}, "unknown strategy 'sideways'"),
        ({"strategy": "lora", "lora": {"target_modules": ["nothing"]}}, "peft refuses it"),
    ],
)
def test_refusals(arguments: dict, message: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(built(tiny_model()).model, **arguments)


def test_trainable_parameters_counts_numbers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert trainable_parameters(model) == 4 * 2 + 2
