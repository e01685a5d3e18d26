"""Refuse a recipe's value in plain words: key, what is expected, what came, and what to do."""

import re
from pathlib import Path
from typing import Any

import pytest

from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Recipe
from hftl.config.refusals import show_value
from hftl.errors import RecipeError

FOREIGN = re.compile(
    r"input should|instance of|valid (str|int|dict|list|num|bool)|unable to|after validation|"
    r"\.(str|float|list|dict|literal|function)\b|\bNone\b|\bTrue\b|Table|Fraction"
)
"""Words of pydantic and Python, which no recipe holds."""
MAPPING = "a mapping {fraction: ...} or a mapping {path: ...}"
WHOLE = "a whole number of at least 1, or null"
REFUSED = {
    "source=null": ("'source' is missing", "Add it: a mapping {model: ...}"),
    "source=org/model": ("'source' must be a mapping {model: ...}", "Its keys: model, revision"),
    "source.model=5": (
        "'source.model' must be a text that is not empty, got 5",
        "Put it in quotes: '5'",
    ),
    "source.quantization=8bit": ("must be 4bit, or null, got '8bit'", "did you mean '4bit'?"),
    "data.train=[a.csv, b.csv]": ("'data.train' must be a mapping {path: ...}", "keys: path"),
    "data.train.text=5": ("'data.train.text' must be a text or a list, each a text, got 5", ""),
    "data.train.text=[a, 5]": ("'data.train.text.1' must be a text, got 5", ""),
    "data.train.text={a: b}": ("'data.train.text' must be a text or a list", "got {a: b}"),
    "data.validation=0.2": (f"must be {MAPPING}, got 0.2", "Its keys: fraction, path"),
    "data.test={fraction: 20}": ("must be a number above 0 and below 1, got 20", ""),
    "data.task=regresion": ("token-classification, or null, got 'regresion'", "'regression'?"),
    "data.shots=many": (f"'data.shots' must be {WHOLE}, got 'many'", ""),
    "data.shots=2.5": (f"'data.shots' must be {WHOLE}, got 2.5", ""),
    "data.shots=true": (f"'data.shots' must be {WHOLE}, got true", ""),
    "data.image_size=[224, 224]": ("a whole number from 1 to 4096, or null, got [224, 224]", ""),
    "data.label_names={0: 5}": ("'data.label_names.0' must be a text", "Put it in quotes"),
    "adapt={}": ("'adapt.objective' is missing", "Add it: mlm, clm or mae"),
    "adapt=mlm": ("'adapt' must be a mapping {objective: ...}, a list, each a mapping", "keys"),
    "adapt=[{objective: mlm, pack: maybe}]": ("'adapt.0.pack' must be true or false", "'maybe'"),
    "adapt={objective: mlm, training: 5}": ("'adapt.training' must be a mapping", "learning_rate"),
    "finetune.lr={blocks: 1e-4}": ("must be a list of one entry or more", "blocks: [0.0001]"),
    "finetune.zero_shot={descriptions: {a: 5}}": ("zero_shot.descriptions.a' must be a text", ""),
    "finetune.lora.target_modules=5": ("must be a text, a list, each a text, or null", ""),
    "finetune.training.bf16=maybe": ("bf16 must be true or false, got 'maybe'", ""),
    "retain={kl: {weight: heavy}}": ("'retain.kl.weight' must be a number or auto", "'heavy'"),
    "retain={kl: 5}": ("'retain.kl' must be a mapping, a list, each a mapping, or null", "keys"),
    "measure.seeds=3": ("from 0 to 4294967295, got 3", "Write seeds: [3]"),
    "measure.seeds=-1": ("each a whole number from 0 to 4294967295, got -1", "Correct the value"),
    "measure.arms=scratch": ("'measure.arms' must be a list, each an arm's name", "[scratch]"),
    "measure.arms=[5]": ("'measure.arms.0' must be an arm's name, or one with its changes", ""),
    "measure.arms=[{full: 5}]": ("'measure.arms.0.full' must be a mapping, or null, got 5", ""),
    "measure.arms=[{full: {finetune: 5}}]": ("measure.arms.full: 'finetune' must be a", "Write"),
    "measure.analyses=probe": ("each probe, curve, distance or shift", "analyses: [probe]"),
    "publish.license_name=a b": ("must be a name of letters, digits", "got 'a b'"),
    "publish.benchmark={}": ("'publish.benchmark.dataset' is missing", "owner/name"),
}


@pytest.mark.parametrize("assignment", REFUSED)
def test_a_wrong_value_is_refused_in_words_of_the_recipe(assignment: str) -> None:
    tree: dict[str, Any] = {"source": {"model": "org/m"}, "data": {"train": {"path": "a.csv"}}}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(apply_overrides(tree, [assignment]), "r.yaml")
    line = str(caught.value)
    assert line.startswith("r.yaml: ") and caught.value.fix
    assert all(words in line for words in REFUSED[assignment]), line
    assert FOREIGN.search(line) is None, line


def test_a_value_is_shown_as_yaml_and_cut() -> None:
    assert [show_value(value) for value in (None, True, [1, "a"], {"a": None}, "x", 1e-9)] == [
        "null", "true", "[1, a]", "{a: null}", "'x'", "1e-09",
    ]  # fmt: skip
    assert len(show_value(list(range(100)))) == 60
    assert "\n" not in show_value(["a\nb"]) + show_value({"a": "b: c\n"})
    assert show_value(Path("a")) == repr(Path("a"))
