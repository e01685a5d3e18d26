"""The anatomy against the real modules of each architecture."""

import pytest
import torch
from conftest import tiny_config
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config

from hftl.errors import RecipeError
from hftl.model.anatomy import ANATOMIES, anatomy_of, blocks_of, encoder_of, submodule
from hftl.model.head import last_linear

ARCHITECTURES = sorted(ANATOMIES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_path_exists_in_the_stock_class(name: str) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config(name))
    anatomy = anatomy_of(name)
    encoder = encoder_of(model, anatomy)
    assert len(blocks_of(encoder, anatomy)) == 3
    assert isinstance(submodule(encoder, anatomy.embeddings), nn.Module)
    assert isinstance(submodule(model, anatomy.head_dropout), nn.Dropout)
    assert isinstance(last_linear(model, anatomy), nn.Linear)
    assert last_linear(model, anatomy).out_features == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_all_linears_of_the_blocks_and_no_other(name: str) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config(name))
    anatomy = anatomy_of(name)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    matched = {n for n in linears if any(n.endswith(f".{t}") for t in anatomy.lora_targets)}
    in_blocks = {n for n in linears if f"{anatomy.encoder}.{anatomy.blocks}." in n}
    assert matched == in_blocks
    assert linears - in_blocks, "the head is linear too, and must not be matched"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_alone_is_its_own_encoder(name: str) -> None:
    model = AutoModel.from_config(tiny_config(name))
    assert encoder_of(model, anatomy_of(name)) is model


def test_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="'gpt2' is not supported.*bert, roberta, distilbert"):
        anatomy_of(GPT2Config().model_type)


def test_modules_that_moved_are_noticed() -> None:
    model = AutoModel.from_config(tiny_config("bert"))
    model.encoder.layer[0].intermediate = nn.Identity()
    with pytest.raises(RecipeError, match="no linear layer 'intermediate.dense'"):
        blocks_of(model, anatomy_of("bert"))


def test_seed_decides_the_new_weights() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
        drawn.append(last_linear(model, anatomy_of("bert")).weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
