"""Read from hftl.json how a model is used, and find its base."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hftl.config.section import Source
from hftl.errors import RecipeError, RunFolderError
from hftl.inference import find_model
from hftl.publish.published_metadata import PublishedMetadata
from hftl.publish.settings_files import read_json_mapping


def read(tree: Any, folder: Path) -> PublishedMetadata:
    (folder / "hftl.json").write_text(json.dumps(tree), encoding="utf-8")
    return PublishedMetadata.read(folder)


def test_folder_without_hftl_json_has_the_defaults(tmp_path: Path) -> None:
    result = PublishedMetadata.read(tmp_path)
    assert result == PublishedMetadata() and result.data is None and result.adapted_base is None
    assert (result.recipe.data.train.text, result.recipe.data.max_length) == ("text", 128)


def test_known_keys_are_read_and_others_ignored(tmp_path: Path) -> None:
    result = read(
        {
            "data": {"task": "regression", "labels": None, "rows": 3},
            "recipe": {"data": {"train": {"text": ["a", "b"], "path": "x.csv"}, "max_length": 64}},
            "adapt": {"base": {"weights_sha256": "ab"}, "stages": []},
            "metric": "pearson",
            "ladder": {},
        },
        tmp_path,
    )
    assert result.data is not None and result.data.task == "regression"
    assert result.recipe.data.train.text == ["a", "b"] and result.recipe.data.max_length == 64
    assert result.adapted_base is not None and result.adapted_base.weights_sha256 == "ab"
    assert result.metric == "pearson"


def test_the_scheme_of_tags_is_the_noted_one_where_it_has_the_model_s_tags(tmp_path: Path) -> None:
    data = {"task": "token-classification", "labels": ["ORG", "O"]}
    scheme = {"name": "IO", "outside": "O", "standard": {"ORG": "B-ORG", "O": "O"}}
    result = read({"data": data | {"tag_scheme": scheme}}, tmp_path).tag_scheme
    assert result is not None and result.standardize(["ORG", "O"]) == ("B-ORG", "O")
    assert read({"data": data}, tmp_path).tag_scheme is None, "as folders of before"
    other = data | {"labels": ["PER", "O"]}
    assert read({"data": other | {"tag_scheme": scheme}}, tmp_path).tag_scheme is None


@pytest.mark.parametrize(
    ("tree", "words"),
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
def test_wrong_value_is_named(tree: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as result:
        read(tree, tmp_path)
    assert result.value.what.endswith(f"hftl.json says {words}")
    assert result.value.fix == f"Look closer: hftl doctor {tmp_path}"


def test_long_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as result:
        read({"metric": ["x" * 1000]}, tmp_path)
    assert len(result.value.what) < len(str(tmp_path)) + 120


PACKAGED = "package:somewhere/model"


def record_lookups(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[Source, bool]]:
    """Record the lookups of sources, and whether on the hub alone; all succeed."""
    lookups = []

    def find(source: Source, on_hub: bool) -> Any:
        lookups.append((source, on_hub))
        return SimpleNamespace(folder=folder)

    monkeypatch.setattr(find_model, "find_source", find)
    return lookups


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        (None, Source(model=PACKAGED)),
        ({"base": None}, Source(model=PACKAGED)),
        # What the run has adapted is on the hub alone, whatever it was made of.
        ({"base": {"weights_sha256": None}}, Source(model="me/base", revision="abc")),
    ],
)
def test_installed_source_is_the_base_unless_it_was_adapted(
    adapt: Any, expected: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"base_model_name_or_path": "me/base", "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named), encoding="utf-8")
    lookups = record_lookups(monkeypatch, tmp_path)
    monkeypatch.setattr("hftl.runtime.paths.is_local", lambda place: True)
    notes = PublishedMetadata.model_validate({"source": {"model": PACKAGED}, "adapt": adapt})
    find_model.find_base_folder(tmp_path, notes, None)
    assert [source for source, _ in lookups] == [expected]


def test_given_base_that_is_not_there_is_the_fault_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="^--base: the folder ./none does not exist"):
        find_model.find_base_folder(tmp_path, PublishedMetadata(), "./none")


@pytest.mark.parametrize(
    ("name", "revision", "of_the_hub"),
    [("base", "abc", True), ("base", None, False), ("./base", "abc", False)],
)
def test_pinned_base_comes_from_the_hub_even_where_a_folder_has_its_name(
    name: str,
    revision: str | None,
    of_the_hub: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    named = {"base_model_name_or_path": name, "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named), encoding="utf-8")
    lookups = record_lookups(monkeypatch, tmp_path)
    find_model.find_base_folder(tmp_path, PublishedMetadata(), None)
    assert [on_hub for _, on_hub in lookups] == [of_the_hub]


@pytest.mark.parametrize(
    ("is_there", "revision", "expected"),
    [
        (True, "abc", Source(model="models/base")),
        (False, "abc", Source(model="me/base", revision="abc")),
        (False, None, Source(model="models/base")),
    ],
)
def test_run_uses_its_pinned_base_where_the_path_of_its_recipe_is_missing(
    is_there: bool, revision: str | None, expected: Source, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish = tmp_path / "run" / "publish"
    publish.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if is_there:
        (tmp_path / "models" / "base").mkdir(parents=True)
    recipe = "source: {model: models/base}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    named = {"base_model_name_or_path": "me/base", "revision": revision}
    (publish / "adapter_config.json").write_text(json.dumps(named), encoding="utf-8")
    lookups = record_lookups(monkeypatch, tmp_path)
    find_model.find_base_folder(publish, PublishedMetadata(), None)
    assert [source for source, _ in lookups] == [expected]


@pytest.mark.parametrize("text", ["{", "5", "\xff"])
def test_file_without_a_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "hftl.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunFolderError, match="hftl.json is no mapping"):
        read_json_mapping(tmp_path / "hftl.json")
