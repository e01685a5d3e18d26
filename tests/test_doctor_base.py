"""The base that an adapter names, the one that is given, and what comes of one that is away."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.examination import copied, kinds
from support.planted_defects import (
    reconfigure,
    rewrite,
    snapshot,
)  # fmt: skip

from hftl.config.section import Source
from hftl.doctor.checks import examine_adapter
from hftl.errors import RecipeError
from hftl.models.source import find_source, hash_source_weights
from hftl.runtime import run_folder

pytestmark = pytest.mark.usefixtures("loads_in_this_process")


def test_an_unpinned_base_is_a_warning(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, revision=None)
    found = examine_adapter(folder)
    assert not found.defects and "base" in kinds(found, defects=False)
    assert found.exit_code == 0


def test_a_base_that_is_away_is_said_and_nothing_is_called_sound(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "vit", tmp_path)
    reconfigure(folder, base_model_name_or_path="somebody/unknown")
    found = examine_adapter(folder)
    assert not found.defects
    assert "somebody/unknown" in found.unexamined[0]
    assert found.exit_code == 5
    (folder / "training_args.bin").write_bytes(b"")
    assert examine_adapter(folder).exit_code == 4


def test_a_base_that_the_hub_does_not_know_is_a_defect(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*args: Any, **more: Any) -> Path:
        request = type("Request", (), {"headers": {}, "method": "GET", "url": ""})()
        response = type("Response", (), {"headers": {}, "request": request, "status_code": 404})()
        raise RepositoryNotFoundError("404", response=response)  # pyright: ignore

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    found = examine_adapter(adapters["bert"])
    assert kinds(found) == {"base"} and found.exit_code == 4


def test_a_base_given_is_compared_with_the_one_named(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    found = examine_adapter(adapters["bert"], str(snapshot(hub_cache, "bert")))
    assert not found.defects and not found.unexamined
    assert kinds(examine_adapter(adapters["bert"], str(snapshot(hub_cache, "bert-4")))) == {
        "base-shape"
    }
    other = examine_adapter(adapters["bert"], "tiny/bert-2")
    assert "base" in kinds(other, defects=False)
    with pytest.raises(RecipeError):
        examine_adapter(adapters["bert"], str(tmp_path / "nothing"))


def test_the_hash_of_the_right_base_is_no_finding(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    right = hash_source_weights(find_source(Source(model=str(snapshot(hub_cache, "bert")))))
    rewrite(folder / "hftl.json", source={"weights_sha256": right})
    assert not examine_adapter(folder).defects


def test_a_folder_here_is_not_taken_for_the_base_that_the_adapter_names(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = Path(shutil.copytree(snapshot(hub_cache, "vit"), tmp_path / "tiny" / "bert"))
    monkeypatch.chdir(tmp_path)
    found = examine_adapter(adapters["bert"])
    assert found.source is not None and not found.source.is_local and not found.defects
    given = examine_adapter(adapters["bert"], "tiny/bert").source
    assert given is not None and given.folder.resolve() == decoy


def test_a_run_examined_from_elsewhere_has_its_pinned_base(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    recipe = "source: {model: models/bert}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    shutil.copytree(adapters["bert"], tmp_path / "publish")
    found = examine_adapter(tmp_path)
    assert found.source is not None and not found.source.is_local
    assert not found.defects and not found.unexamined


def test_a_runs_record_that_was_edited_is_a_defect(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    recipe = "source: {model: models/bert}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "record.json").write_text('{"verdict": "hold"}', encoding="utf-8")
    shutil.copytree(adapters["bert"], tmp_path / "publish")
    run_folder.write_finished_files(tmp_path)
    assert not examine_adapter(tmp_path).defects
    (tmp_path / "record.json").write_text('{"verdict": "publish"}', encoding="utf-8")
    (found,) = examine_adapter(tmp_path).defects
    assert found.kind == "record" and "is not what was written" in found.what


def test_a_base_of_pickles_is_not_opened(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(snapshot(hub_cache, "bert"), tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    found = examine_adapter(adapters["bert"], str(base))
    assert "pickles are not opened" in found.unexamined[0]
