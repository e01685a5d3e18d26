"""The record's JSON and its hash."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hftl.measure.record import Record, describe_environment
from hftl.runtime.fingerprints import fingerprint, to_json

TREE: dict[str, Any] = {
    "schema_version": 1,
    "arms": [{"arm": "lora", "seed": 0, "metrics": {"test": {"accuracy": 0.75}}}],
    "environment": {"device": "cpu"},
    "timings": {"finetune": 3.5},
    "transfer_gain": {"value": 0.1},
    "verdict": {"decision": "publish"},
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(value: float) -> None:
    found = json.loads(to_json({"a": [value, (1.5, value)], "b": {"c": value}}))
    assert found == {"a": [None, [1.5, None]], "b": {"c": None}}


def test_the_json_is_sorted_readable_and_ends_its_line() -> None:
    text = to_json({"b": 1, "a": "Grüße"})
    assert text == '{\n "a": "Grüße",\n "b": 1\n}\n'


@pytest.mark.parametrize("key", ["environment", "timings"])
def test_the_hash_leaves_out_what_differs_between_identical_runs(key: str) -> None:
    same = {k: v for k, v in TREE.items() if k != key}
    assert Record(TREE, Path()).hash == Record(same, Path("moved")).hash
    assert Record(TREE, Path()).hash == Record(TREE | {key: {"else": 1}}, Path()).hash


@pytest.mark.parametrize("key", sorted(TREE.keys() - {"environment", "timings"}))
def test_the_hash_knows_everything_else(key: str) -> None:
    assert Record(TREE, Path()).hash != Record(TREE | {key: None}, Path()).hash


def test_the_order_of_keys_does_not_matter_but_that_of_lists_does() -> None:
    backwards = {key: TREE[key] for key in reversed(TREE)}
    assert Record(backwards, Path()).hash == Record(TREE, Path()).hash
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint({"a": {"b": 1, "c": 2}}) == fingerprint({"a": {"c": 2, "b": 1}})


def test_a_record_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(to_json(TREE), encoding="utf-8")
    found = Record.read(tmp_path)
    assert found.tree == TREE
    assert found["schema_version"] == 1
    assert found.transfer_gain == {"value": 0.1}
    assert found.verdict == {"decision": "publish"}
    assert found.hash == Record(TREE, Path()).hash


def test_the_environment_names_versions_and_no_host() -> None:
    import getpass
    import socket

    text = to_json(describe_environment("cpu", "float32"))
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert set(json.loads(text)["packages"]) >= {"hftl", "torch", "transformers", "peft"}
