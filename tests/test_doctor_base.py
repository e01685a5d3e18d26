"""Examine the base that an adapter names, one that is given, and one that is missing."""

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
from hftl.doctor import checks
from hftl.doctor.adapter_folder import AdapterFolder, defect
from hftl.doctor.checks import check_base_name, examine_adapter
from hftl.doctor.examination import Examination
from hftl.errors import RecipeError
from hftl.models.source import find_source, hash_source_weights
from hftl.runtime import finished_files

pytestmark = pytest.mark.usefixtures("loads_in_this_process")


def test_an_unpinned_base_is_a_warning(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, revision=None)
    examination = examine_adapter(folder)
    assert not examination.defects and "base" in kinds(examination, defects=False)
    assert examination.exit_code == 0


def test_missing_base_is_reported_and_nothing_is_called_sound(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "vit", tmp_path)
    reconfigure(folder, base_model_name_or_path="somebody/unknown")
    examination = examine_adapter(folder)
    assert not examination.defects
    assert "somebody/unknown" in examination.unexamined[0]
    assert examination.exit_code == 5
    (folder / "training_args.bin").write_bytes(b"")
    assert examine_adapter(folder).exit_code == 4


def test_base_unknown_to_the_hub_is_a_defect(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*args: Any, **more: Any) -> Path:
        request = type("Request", (), {"headers": {}, "method": "GET", "url": ""})()
        response = type("Response", (), {"headers": {}, "request": request, "status_code": 404})()
        raise RepositoryNotFoundError("404", response=response)  # pyright: ignore

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    examination = examine_adapter(adapters["bert"])
    assert kinds(examination) == {"base"} and examination.exit_code == 4


def test_given_base_is_compared_with_the_named_one(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    examination = examine_adapter(adapters["bert"], str(snapshot(hub_cache, "bert")))
    assert not examination.defects and not examination.unexamined
    assert kinds(examine_adapter(adapters["bert"], str(snapshot(hub_cache, "bert-4")))) == {
        "base-shape"
    }
    other = examine_adapter(adapters["bert"], "tiny/bert-2")
    assert "base" in kinds(other, defects=False)
    with pytest.raises(RecipeError, match="^--base: the folder .* does not exist"):
        examine_adapter(adapters["bert"], str(tmp_path / "nothing"))


def test_what_a_run_has_written_is_mended_by_its_recipe() -> None:
    settings = {"adapter_config.json": {"peft_type": "LORA"}}
    for run, fix in ((None, "--base ID --fix"), (Path("run"), "source.published_as")):
        folder = AdapterFolder("run", Path("run/publish"), run, False, list(settings), settings, {})
        [finding] = check_base_name(Examination(folder))
        assert fix in finding.fix and "the base is not named" in finding.what


def test_what_fix_leaves_alone_is_not_said_to_be_mended_by_it(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = defect("names", "tensors carry the adapter's name", "a", "Rename them: --fix")
    monkeypatch.setattr(checks, "CHECKS", (lambda examination: [finding],))
    folder = copied(adapters, "bert", tmp_path).rename(tmp_path / "publish")
    assert examine_adapter(folder).findings == [finding]
    (tmp_path / "recipe.yaml").touch()
    [advised] = examine_adapter(tmp_path).findings
    assert advised.fix.startswith("Run the same `hftl run` again") and advised.what == finding.what


def test_the_hash_of_the_right_base_is_no_finding(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    right = hash_source_weights(find_source(Source(model=str(snapshot(hub_cache, "bert")))))
    rewrite(folder / "hftl.json", source={"weights_sha256": right})
    assert not examine_adapter(folder).defects


def test_local_folder_does_not_stand_in_for_the_named_base(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = Path(shutil.copytree(snapshot(hub_cache, "vit"), tmp_path / "tiny" / "bert"))
    monkeypatch.chdir(tmp_path)
    examination = examine_adapter(adapters["bert"])
    assert examination.source is not None and not examination.source.is_local
    assert not examination.defects
    given = examine_adapter(adapters["bert"], "tiny/bert").source
    assert given is not None and given.folder.resolve() == decoy


def test_run_examined_from_another_folder_has_its_pinned_base(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    recipe = "source: {model: models/bert}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    shutil.copytree(adapters["bert"], tmp_path / "publish")
    examination = examine_adapter(tmp_path)
    assert examination.source is not None and not examination.source.is_local
    assert not examination.defects and not examination.unexamined


def test_edited_record_of_a_run_is_a_defect(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    recipe = "source: {model: models/bert}\ndata: {train: {path: a.csv}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "record.json").write_text('{"verdict": "hold"}', encoding="utf-8")
    shutil.copytree(adapters["bert"], tmp_path / "publish")
    finished_files.write_finished_files(tmp_path)
    assert not examine_adapter(tmp_path).defects
    (tmp_path / "record.json").write_text('{"verdict": "publish"}', encoding="utf-8")
    (examination,) = examine_adapter(tmp_path).defects
    assert examination.kind == "record" and "is not what was written" in examination.what


def test_base_of_pickles_is_not_opened(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(snapshot(hub_cache, "bert"), tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    examination = examine_adapter(adapters["bert"], str(base))
    assert "pickles are not opened" in examination.unexamined[0]
