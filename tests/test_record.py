"""Write, hash and read records, and name what is wrong with one that does not read."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.records import add_forgetting, make_record

from hftl.errors import RunFolderError
from hftl.measure.record import Record, describe_environment
from hftl.runtime.run_folder import fingerprint, to_json

TREE = add_forgetting(make_record())


def parse(**changes: Any) -> Record:
    return Record.parse(copy.deepcopy(TREE) | changes)


def test_the_json_is_sorted_and_finite_and_ends_its_line() -> None:
    text = to_json({"b": [math.nan, (1.5, math.inf)], "a": "Grüße", "c": {"d": -math.inf}})
    assert json.loads(text) == {"a": "Grüße", "b": [None, [1.5, None]], "c": {"d": None}}
    assert text.startswith('{\n "a": "Grüße",\n "b": [') and text.endswith("\n}\n")


def test_the_hash_leaves_out_what_differs_between_identical_runs() -> None:
    other = TREE["environment"] | {"device": "cuda"}
    again = parse(environment=other, timings={"lora-seed0": {"train_seconds": 2.5}})
    assert again.hash == parse().hash


@pytest.mark.parametrize(
    "changes", [{"published_seed": 0}, {"metric": "f1"}, {"test_metrics": None}, {"arms": []}]
)
def test_the_hash_covers_everything_else(changes: dict[str, Any]) -> None:
    assert parse(**changes).hash != parse().hash


def test_the_order_of_keys_does_not_matter_but_that_of_lists_does() -> None:
    backwards = {key: TREE[key] for key in reversed(TREE)}
    assert Record.parse(backwards).hash == parse().hash
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint({"a": {"b": 1, "c": 2}}) == fingerprint({"a": {"c": 2, "b": 1}})


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(to_json(TREE), encoding="utf-8")
    record = Record.read(tmp_path)
    assert record.to_dict() == json.loads(to_json(TREE)) and record.to_json() == to_json(TREE)
    assert record.folder == tmp_path and record.hash == fingerprint(
        {k: v for k, v in TREE.items() if k not in ("environment", "timings")}
    )
    # Values are attributes, and plain JSON by their keys.
    assert record["arms"] == TREE["arms"] and record["schema_version"] == 2
    gain = record.transfer_gain
    assert gain is not None and gain.value == gain["value"] == TREE["transfer_gain"]["value"]
    assert record.verdict["decision"] == record.verdict.decision == "publish"
    with pytest.raises(KeyError):
        record["widget"]


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    here: Any = tree
    for part in path:
        here = here[int(part) if isinstance(here, list) else part]
    if value is KeyError:
        del here[last]
    else:
        here[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 1, "schema_version is 1, this version of hftl reads 2"),
        ("schema_version", KeyError, "schema_version is None"),
        ("transfer_gain.value", "much", "transfer_gain.value is 'much', expected a valid number"),
        ("transfer_gain.outcome", "good", "transfer_gain.outcome is 'good', expected 'positive'"),
        ("arms.2.metrics.test", None, "arms.2.metrics.test is None, expected"),
        ("ladder.0.sd", KeyError, "ladder.0.sd is missing"),
        ("verdict", KeyError, "verdict is missing"),
        ("verdicts", {}, "unknown key verdicts; did you mean 'verdict'?"),
        ("source.colour", "red", "unknown key source.colour"),
        ("recipe.finetune.blocks", "two", "recipe.finetune.blocks is 'two', expected"),
        ("recipe.data.test", {}, "recipe.data.test.fraction is missing"),
        ("recipe.finetune.training.no_such", 1, "recipe"),
    ],
)
def test_a_damaged_record_is_refused_by_its_key(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    tree = copy.deepcopy(TREE)
    put(tree, key, value)
    (tmp_path / "record.json").write_text(to_json(tree), encoding="utf-8")
    with pytest.raises(RunFolderError) as raised:
        Record.read(tmp_path)
    assert f"{tmp_path / 'record.json'}: {message}" in raised.value.what
    assert "hftl run" in raised.value.fix
    # The same command alone refuses an older run.
    assert ("--restart" in raised.value.fix) == (key == "schema_version")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 10_000])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match="record.json"):
        Record.read(tmp_path)


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no finished run: it has no record.json"):
        Record.read(str(tmp_path))


def test_the_schema_names_every_key() -> None:
    schema = Record.model_json_schema()
    assert TREE.keys() <= schema["properties"].keys()
    assert schema["properties"]["schema_version"]["const"] == 2
    assert "value" in schema["$defs"]["BaselineGain"]["properties"]


def test_the_environment_names_versions_and_no_host() -> None:
    import getpass
    import socket

    environment = describe_environment("cpu", "float32")
    text = to_json(environment.to_dict())
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert set(environment.packages) >= {"hftl", "torch", "transformers", "peft"}
