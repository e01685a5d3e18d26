"""Validate cards: each defect is named with what to do, a sound card has none."""

from typing import Any

import pytest
import yaml
from support.records import validate_own_card

from hftl.card.validation import validate_card

RESULT = {
    "task": {"type": "text-classification"},
    "dataset": {"type": "reviews", "name": "Reviews"},
    "metrics": [{"type": "accuracy", "value": 0.9}],
}
SOUND: dict[str, Any] = {
    "base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft",
    "pipeline_tag": "text-classification", "language": ["en", "zh-Hant"], "license": "apache-2.0",
    "datasets": ["org/data", "imdb"], "tags": ["hftl", "base_model:adapter:org/base"],
    "model-index": [{"name": "adapter", "results": [RESULT]}],
}  # fmt: skip
DEFECTS: list[tuple[dict[str, Any], str]] = [
    ({"base_model": "/data/models/bert"}, "base_model is '/data/models/bert', which is no hub id"),
    ({"base_model": "./bert"}, "base_model is './bert', which is no hub id"),
    ({"base_model": ["org/base", "a/b/c"]}, "base_model is 'a/b/c', which is no hub id"),
    ({"base_model": None}, "base_model is missing"),
    ({"base_model": {"a": 1}}, "base_model is {'a': 1}, which is no hub id"),
    ({"base_model_relation": "lora"}, "base_model_relation is 'lora'"),
    ({"base_model_relation": ["adapter"]}, "base_model_relation is ['adapter']"),
    ({"datasets": ["C:\\data"]}, "which is no hub id; name a dataset"),
    ({"datasets": "../reviews.csv"}, "datasets is '../reviews.csv'"),
    ({"license": "Apache 2.0"}, "license is 'Apache 2.0'"),
    ({"license": "other"}, "license is other and has no name"),
    ({"license": {"x": 1}}, "license is {'x': 1}"),
    ({"pipeline_tag": "sentiment"}, "pipeline_tag is 'sentiment'"),
    ({"language": "english"}, "language is 'english'"),
    ({"language": [False]}, "language is read as true or false"),
    ({"library_name": None}, "library_name is missing"),
    ({"library_name": "my library"}, "library_name is 'my library'"),
    ({"tags": ["a", 7]}, "The tag 7 is no text"),
    ({"tags": ["base_model:adapter:/home/ann/bert"]}, "names no hub id"),
    ({"model-index": [{"name": "x"}]}, "model-index does not parse"),
    ({"model-index": ["x"]}, "model-index does not parse"),
    ({"model-index": "x"}, "model-index does not parse"),
    ({"model-index": 3}, "model-index does not parse"),
    ({"model-index": [{"name": "x", "results": [RESULT | {"metrics": [{"type": "a"}]}]}]},
     "model-index does not parse"),
    ({"model-index": [{"name": "x", "results": [RESULT | {
        "metrics": [{"type": "a", "value": float("nan")}]}]}]}, "a value that is no number"),
]  # fmt: skip


def card(changed: dict[str, Any] | None = None, body: str = "# Adapter\n") -> str:
    front = {k: v for k, v in (SOUND | (changed or {})).items() if v is not None}
    return f"---\n{yaml.safe_dump(front)}---\n\n{body}"


@pytest.mark.parametrize(
    "changed",
    [{}, {"language": None, "license": None, "datasets": None, "model-index": None},
     {"license": "other", "license_name": "ours"}, {"license": ["mit", "cc-by-4.0"]},
     {"base_model": ["org/a", "org/b"], "base_model_relation": "merge"}],
)  # fmt: skip
def test_sound_card_has_no_problem(changed: dict[str, Any]) -> None:
    assert validate_card(card(changed)) == []


@pytest.mark.parametrize(("changed", "words"), DEFECTS)
def test_each_defect_is_the_one_problem(changed: dict[str, Any], words: str) -> None:
    problems = validate_card(card(changed))
    assert len(problems) == 1 and words in problems[0] and "; " in problems[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no metadata"), ("# Title\n", "no metadata"), ("---\nx: [\n---\n", "not YAML"),
     ("---\nx: a: b\n---\n", "not YAML"), ("---\nx: !!python/name:os.system\n---\n", "not YAML"),
     ("---\nx: 2020-13-45\n---\n", "not YAML"), ("---\nx: \0\n---\n", "not YAML"),
     ("---\n- a\n---\n", "no mapping"), ("---\n1: a\n---\n", "no mapping"),
     (card(body="[More Information Needed]"), "More information needed"),
     (card(body="trained from /home/ann/run"), "place on a machine: '/home/ann'")],
)  # fmt: skip
def test_text_that_cannot_be_a_card(text: str, words: str) -> None:
    problems = validate_card(text)
    assert len(problems) == 1 and words in problems[0]


def test_links_and_plain_paths_are_no_place_on_a_machine() -> None:
    assert validate_card(card(body="https://x.org/home/ann and `cd ~/.cache`, /etc/hosts")) == []


def test_message_holds_no_control_characters() -> None:
    (problems,) = validate_card(card({"pipeline_tag": "\x1b[31mred\n" + "x" * 10_000}))
    assert "\x1b" not in problems and "\n" not in problems and len(problems) < 200


def test_own_card_has_results_and_no_other_key() -> None:
    assert validate_own_card(card()) == []
    assert "the key 'inference'" in validate_own_card(card({"inference": True}))[0]
    assert "model-index is empty" in validate_own_card(card({"model-index": None}))[0]
    assert validate_own_card(card({"model-index": None}), measured=False) == []
    assert "no metadata" in validate_own_card("")[0]
