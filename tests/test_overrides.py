"""Read YAML as users write it: numbers with exponents, doubled keys, overrides at any depth."""

from pathlib import Path
from typing import Any

import pytest

from hftl.config.overrides import apply_overrides, flatten, parse_yaml, read_yaml, set_key
from hftl.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E+3", 5000.0), ("-2.5e-3", -2.5e-3), (".5e1", 5.0), ("1.e2", 100.0),
        ("5.0e-4", 5e-4), ("3", 3), ("'1e-4'", "1e-4"), ("e-4", "e-4"), ("1e", "1e"),
        ("bert-1e-4", "bert-1e-4"), ("", None), ("[1e-4, 3e-4]", [1e-4, 3e-4]), ("true", True),
        ("False", False), ("on", "on"), ("no", "no"),
        ("{on: probe, y: 1}", {"on": "probe", "y": 1}),
        ("{0: bad, 01: b, true: c, 1.50: d}", {"0": "bad", "01": "b", "true": "c", "1.50": "d"}),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    result = parse_yaml(text, "here")
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"r\.yaml line 4: not valid YAML: key 'c' is given twice"),
        ("a: 1\nnull: 2\n", r"r\.yaml line 2: not valid YAML: key None is not a word"),
        ("1: a\n'1': b\n", r"r\.yaml line 2: not valid YAML: key '1' is given twice"),
        ("a: 1\nb: [1, 2\nc: 3\n", r"r\.yaml line 3: not valid YAML"),
        ("a: b: c", r"r\.yaml line 1: not valid YAML"),
        ("a: !!python/object:os.system x", r"r\.yaml line 1: not valid YAML"),
        ("a: 2020-13-45", r"r\.yaml.*: not valid YAML: month"),
        ("a: \x00", r"r\.yaml.*: not valid YAML"),
        ("[" * 5000, r"r\.yaml: not valid YAML: maximum recursion depth"),
    ],
)
def test_what_is_not_yaml_is_named_by_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"folder", "cannot be read"),
        (b"a: \xe9\n", "cannot be read"),
        (b"- a\n- b\n", "must be a mapping of sections, got list"),
        (b"", "must be a mapping of sections, got NoneType"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"mine\.yaml {message}"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("finetune.lora.r=16", {"finetune": {"lora": {"r": 16}}}),
        ("measure.scratch.epochs_factor=5e-1", {"measure": {"scratch": {"epochs_factor": 0.5}}}),
        ("retain.kl={weight: 0.3, on: probe}", {"retain": {"kl": {"weight": 0.3, "on": "probe"}}}),
        ("data.test=a=b.csv", {"data": {"test": "a=b.csv"}}),
        ("data.shots=", {"data": {"shots": None}}),
    ],
)  # fmt: skip
def test_an_override_makes_what_is_missing(assignment: str, value: dict[str, Any]) -> None:
    assert apply_overrides({}, [assignment]) == value


def test_an_override_leaves_its_neighbours() -> None:
    tree = {"finetune": {"lora": {"r": 8, "lora_alpha": 16}}, "retain": None}
    assert apply_overrides(tree, ["finetune.lora.r=4", "finetune.lora.r=2", "retain.l2sp=0.1"]) == {
        "finetune": {"lora": {"r": 2, "lora_alpha": 16}},
        "retain": {"l2sp": 0.1},
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("finetune.lora.r", "override 'finetune.lora.r' is not key=value"),
        ("=3", "override '=3' is not key=value"),
        ("data.shots=[1", "override data.shots line 1: not valid YAML"),
        ("data.train.path=x", "data.train.path: data.train is 'a.csv', not a mapping"),
    ],
)
def test_an_override_that_cannot_be_applied(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_overrides({"data": {"train": "a.csv"}}, [assignment])


@pytest.mark.parametrize("index", ["\u00b2", "\u2460", "x"])
def test_an_index_that_is_no_number_is_refused(index: str) -> None:
    with pytest.raises(RecipeError, match="none of a list"):
        set_key({"a": [{"b": 1}, {"b": 2}, {"b": 3}]}, f"a.{index}.b", 4)


def test_flatten_is_undone_by_set_key() -> None:
    tree = {"a": {"b": {"c": 1, "d": None}, "e": [{"f": 2}]}, "g": {}}
    flat = flatten(tree)
    assert flat == {"a.b.c": 1, "a.b.d": None, "a.e": [{"f": 2}], "g": {}}
    again: dict[str, Any] = {}
    for key, value in flat.items():
        set_key(again, key, value)
    assert again == tree
