"""Check that names in a LoRA section that match no module are refused, wherever given."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_config
from transformers import AutoModelForSequenceClassification

from hftl import prepare
from hftl.adapt.encoder_io import set_trainable
from hftl.adapt.language_model import load_mlm
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.models.lora import list_adapted_layers
from hftl.models.source import find_source

WRONG = [
    ({"target_modules": ["query", "valeu"]}, "'valeu'; did you mean 'value'"),
    ({"target_modules": "nothing.*"}, "target_modules: no module matches 'nothing.*'"),
    ({"target_modules": "("}, "no regular expression"),
    ({"target_modules": ["query", "classifier"]}, "'classifier' gets no adapter"),
    ({"target_modules": ["query", "key"], "exclude_modules": ["key"]}, "'key' gets no adapter"),
    ({"modules_to_save": ["clasifier"]}, "'clasifier'; did you mean 'classifier'"),
    ({"modules_to_save": ["ifier"]}, "modules_to_save: no module matches 'ifier'"),
    ({"modules_to_save": "classifier"}, "must be a list"),
    ({"exclude_modules": ["querry"]}, "'querry'; did you mean 'query'"),
    ({"exclude_modules": "querry"}, "exclude_modules: no module matches 'querry'"),
    ({"rank_pattern": {"nosuchlayer": 2}}, "rank_pattern: no module matches 'nosuchlayer'"),
    ({"rank_pattern": {"key": 2}, "target_modules": ["query"]}, "no module matches 'key'"),
    ({"rank_pattern": {"(": 2}}, "no regular expression"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern.query must be a whole number above 0"),
    ({"alpha_pattern": {"querry": 2}}, "'querry'; did you mean 'query'"),
    ({"alpha_pattern": {"query": 0}}, "alpha_pattern.query must be a number above 0"),
    ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
    ({"r": 0}, "r must be a whole number above 0"),
    ({"rank_pattern": {"query": 4.5}}, "rank_pattern.query must be a whole number above 0"),
    ({"r": 33}, "lora.r=33 is above both sides of every layer; the longest is 32"),
    ({"rank_pattern": {"key": 10**9}}, "rank_pattern.key=1000000000 is above both sides"),
    ({"layers_to_transform": [0, 7]}, "no adapted layer lies in block 7"),
    ({"layers_to_transform": 7}, "lora"),
    ({"target_parameters": ["nope"]}, "target_parameters: no module matches 'nope'"),
    ({"trainable_token_indices": [99_999]}, "lora: peft refuses it"),
    ({"bias": "nope"}, "lora: peft refuses it"),
]
RIGHT: list[tuple[dict[str, Any], int]] = [
    ({}, 18),
    ({"target_modules": "all-linear"}, 18),
    ({"target_modules": ["query", "encoder.layer.1.attention.self.value"]}, 4),
    ({"target_modules": r".*\.(query|key)"}, 6),
    ({"exclude_modules": ["output.dense"]}, 12),
    ({"rank_pattern": {"query": 2, r"layer\.1\.attention\.self\.key": 4}}, 18),
    ({"layers_to_transform": [0, 2]}, 12),
    ({"modules_to_save": ["embeddings.LayerNorm"]}, 18),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForSequenceClassification.from_config(tiny_config("bert"))


@pytest.mark.parametrize(("lora", "message"), WRONG, ids=lambda part: str(part)[:40])
def test_refuses_a_name_that_matches_nothing(
    lora: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(deepcopy(model), "lora", lora=lora)
    assert message in str(caught.value) and "finetune.lora" in str(caught.value)


@pytest.mark.parametrize(("lora", "layers"), RIGHT, ids=lambda part: str(part)[:40])
def test_names_that_match_choose_layers(lora: dict[str, Any], layers: int, model: Any) -> None:
    assert len(list_adapted_layers(prepare(deepcopy(model), "lora", lora=lora))) == layers


def test_refuses_the_same_in_other_sections(
    tiny_model: Callable[..., Path], recipe_tree: dict[str, Any]
) -> None:
    source = find_source(Source(model=str(tiny_model("bert", True))))
    masked_lm, _ = load_mlm(source, seed=0)
    lora = {"r": 2, "target_modules": ["valeu"]}
    with pytest.raises(RecipeError, match="adapt.lora.target_modules: no module matches 'valeu'"):
        set_trainable(masked_lm, source.architecture_spec, "lora", 0, lora)
    for key in ("r", "lora_alpha"):
        recipe_tree["finetune"]["lora"] = {key: 0}
        with pytest.raises(RecipeError, match=f"finetune.lora.{key} must be a .*above 0"):
            Recipe.parse(recipe_tree)
