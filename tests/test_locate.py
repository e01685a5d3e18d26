"""Where a published model and its base are found."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hftl.config.section import Source
from hftl.errors import RunFolderError
from hftl.inference import find_model
from hftl.publish.published_metadata import PublishedMetadata, read_json_mapping

PACKAGED = "package:somewhere/model"


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[Source, bool]]:
    """The sources that will be looked for, and whether on the hub alone; all are found."""
    sought = []

    def found(source: Source, on_hub: bool) -> Any:
        sought.append((source, on_hub))
        return SimpleNamespace(folder=folder)

    monkeypatch.setattr(find_model, "find_source", found)
    return sought


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        (None, Source(model=PACKAGED)),
        ({"base": None}, Source(model=PACKAGED)),
        # What the run has adapted is on the hub alone, whatever it was made of.
        ({"base": {"weights_sha256": None}}, Source(model="me/base", revision="abc")),
    ],
)
def test_an_installed_source_is_the_base_unless_that_was_adapted(
    adapt: Any, expected: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"base_model_name_or_path": "me/base", "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named), encoding="utf-8")
    sought = asked(monkeypatch, tmp_path)
    monkeypatch.setattr("hftl.runtime.paths.is_local", lambda place: True)
    notes = PublishedMetadata.model_validate({"source": {"model": PACKAGED}, "adapt": adapt})
    find_model.find_base_folder(tmp_path, notes, None)
    assert [source for source, _ in sought] == [expected]


@pytest.mark.parametrize(
    ("name", "revision", "of_the_hub"),
    [("base", "abc", True), ("base", None, False), ("./base", "abc", False)],
)
def test_a_pinned_base_is_the_hubs_even_where_a_folder_has_its_name(
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
    sought = asked(monkeypatch, tmp_path)
    find_model.find_base_folder(tmp_path, PublishedMetadata(), None)
    assert [on_hub for _, on_hub in sought] == [of_the_hub]


@pytest.mark.parametrize(
    ("stands", "revision", "expected"),
    [
        (True, "abc", Source(model="models/base")),
        (False, "abc", Source(model="me/base", revision="abc")),
        (False, None, Source(model="models/base")),
    ],
)
def test_a_run_finds_its_pinned_base_where_its_recipes_path_leads_nowhere(
    stands: bool, revision: str | None, expected: Source, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish = tmp_path / "run" / "publish"
    publish.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if stands:
        (tmp_path / "models" / "base").mkdir(parents=True)
    recipe = "source: {model: models/base}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    named = {"base_model_name_or_path": "me/base", "revision": revision}
    (publish / "adapter_config.json").write_text(json.dumps(named), encoding="utf-8")
    sought = asked(monkeypatch, tmp_path)
    find_model.find_base_folder(publish, PublishedMetadata(), None)
    assert [source for source, _ in sought] == [expected]


@pytest.mark.parametrize("text", ["{", "5", "\xff"])
def test_a_file_that_is_no_mapping_is_no_bug(text: str, tmp_path: Path) -> None:
    (tmp_path / "hftl.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunFolderError, match="hftl.json is no mapping"):
        read_json_mapping(tmp_path / "hftl.json")
