"""What hftl.json notes of a model's use: defaults, what is passed over, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hftl.errors import RunFolderError
from hftl.publish.published_metadata import PublishedMetadata


def read(tree: Any, folder: Path) -> PublishedMetadata:
    (folder / "hftl.json").write_text(json.dumps(tree), encoding="utf-8")
    return PublishedMetadata.read(folder)


def test_a_folder_without_notes_has_the_defaults(tmp_path: Path) -> None:
    found = PublishedMetadata.read(tmp_path)
    assert found == PublishedMetadata() and found.data is None and found.adapted_base is None
    assert (found.recipe.data.train.text, found.recipe.data.max_length) == ("text", 128)


def test_what_is_noted_is_read_and_the_rest_passed_over(tmp_path: Path) -> None:
    found = read(
        {
            "data": {"task": "regression", "labels": None, "rows": 3},
            "recipe": {"data": {"train": {"text": ["a", "b"], "path": "x.csv"}, "max_length": 64}},
            "adapt": {"base": {"weights_sha256": "ab"}, "stages": []},
            "metric": "pearson",
            "ladder": {},
        },
        tmp_path,
    )
    assert found.data is not None and found.data.task == "regression"
    assert found.recipe.data.train.text == ["a", "b"] and found.recipe.data.max_length == 64
    assert found.adapted_base is not None and found.adapted_base.weights_sha256 == "ab"
    assert found.metric == "pearson"


def test_the_scheme_of_tags_is_the_noted_one_where_it_has_the_model_s_tags(tmp_path: Path) -> None:
    data = {"task": "token-classification", "labels": ["ORG", "O"]}
    scheme = {"name": "IO", "outside": "O", "standard": {"ORG": "B-ORG", "O": "O"}}
    found = read({"data": data | {"tag_scheme": scheme}}, tmp_path).tag_scheme
    assert found is not None and found.standardize(["ORG", "O"]) == ("B-ORG", "O")
    assert read({"data": data}, tmp_path).tag_scheme is None, "as folders of before"
    other = data | {"labels": ["PER", "O"]}
    assert read({"data": other | {"tag_scheme": scheme}}, tmp_path).tag_scheme is None


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"data": {"task": "chess"}}, "'chess' for data.task"),
        ({"data": {"task": None}}, "None for data.task"),
        ({"data": {"labels": []}}, "{'labels': []} for data"),
        ({"data": 5}, "5 for data"),
        ({"data": {"task": "classification", "labels": [1]}}, "[1] for data.labels"),
        ({"recipe": {"data": {"max_length": float("nan")}}}, "nan for recipe.data.max_length"),
        ({"recipe": {"data": {"max_length": "64"}}}, "'64' for recipe.data.max_length"),
        ({"recipe": {"data": {"train": {"text": [3]}}}}, "[3] for recipe.data.train.text"),
        ({"recipe": {"data": {"train": {"text": []}}}}, "[] for recipe.data.train.text"),
        (
            {"recipe": {"data": {"train": {"text": ["a", "b", "c"]}}}},
            "['a', 'b', 'c'] for recipe.data.train.text",
        ),
        ({"recipe": {"data": {"train": {"label": ["a"]}}}}, "['a'] for recipe.data.train.label"),
        ({"recipe": []}, "[] for recipe"),
        ({"source": {"weights_sha256": 7}}, "7 for source.weights_sha256"),
        ({"adapt": "full"}, "'full' for adapt"),
        ({"metric": ["accuracy"]}, "['accuracy'] for metric"),
    ],
)
def test_what_makes_no_sense_is_named(tree: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as found:
        read(tree, tmp_path)
    assert found.value.what.endswith(f"hftl.json says {told}")
    assert found.value.fix == f"Look closer: hftl doctor {tmp_path}"


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as found:
        read({"metric": ["x" * 1000]}, tmp_path)
    assert len(found.value.what) < len(str(tmp_path)) + 120
