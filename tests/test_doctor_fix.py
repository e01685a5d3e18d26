"""Fix what the doctor can prove, and leave the rest alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.examination import copied, kinds
from support.planted_defects import (
    COMMIT,
    NAMES,
    SOUND,
    as_in_transformers_4,
    into_cache,
    plant,
    reconfigure,
    rewrite,
    save,
    snapshot,
    wrapped,
)  # fmt: skip

from hftl.config.section import Source
from hftl.doctor.adapter_folder import open_adapter_folder
from hftl.doctor.checks import examine_adapter
from hftl.doctor.examination import Examination
from hftl.doctor.fix import fix_adapter, get_backup_folder
from hftl.doctor.renamed_modules import find_new_name, find_renamed_keys
from hftl.doctor.report import run_doctor
from hftl.errors import RecipeError
from hftl.models.source import find_source, hash_source_weights
from hftl.runtime.run_folder import hash_file

pytestmark = pytest.mark.usefixtures("loads_in_this_process")


def mended(folder: Path, base: str | None = None) -> tuple[list[str], Examination]:
    lines = fix_adapter(examine_adapter(folder, base), base)
    return lines, examine_adapter(folder, base)


@pytest.mark.parametrize(
    ("adapter", "model", "lists"),
    [("vit", "vit", "encoder.layer"), ("dinov2", "dinov2", "layers"), ("vit-mae", "vit", "layers")],
)
def test_old_names_are_renamed_and_the_weights_stay(
    adapter: str, model: str, lists: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, adapter, tmp_path)
    if adapter == "vit-mae":
        reconfigure(folder, target_modules=["intermediate.dense"])
    else:
        as_in_transformers_4(folder, model, lists)
    path = folder / "adapter_model.safetensors"
    rewrite(folder / "hftl.json", weight_files={path.name: hash_file(path)})
    before = (folder / "adapter_config.json").read_bytes()
    assert "stale-names" in kinds(examine_adapter(folder))
    lines, examination = mended(folder)
    assert lines and not examination.defects
    recorded = json.loads((folder / "hftl.json").read_text())["weight_files"]
    assert recorded == {path.name: hash_file(path)}
    right, ours = (load_file(f / "adapter_model.safetensors") for f in (adapters[adapter], folder))
    assert right.keys() == ours.keys()
    assert all(torch.equal(right[key], ours[key]) for key in right)
    assert (get_backup_folder(folder) / "adapter_config.json").read_bytes() == before
    targets = [json.loads((f / "adapter_config.json").read_text())["target_modules"]
               for f in (adapters[adapter], folder)]  # fmt: skip
    assert sorted(targets[0]) == sorted(targets[1])


@pytest.mark.parametrize("renames", [4, *(pytest.param(n, marks=pytest.mark.slow)
                                       for n in (0, 1, 2, 3, 5))])  # fmt: skip
def test_fix_that_was_killed_is_finished_by_the_next(
    renames: int, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the power fail at each rename: copies of config, weights and record, and they."""
    folder = copied(adapters, "vit", tmp_path)
    as_in_transformers_4(folder, "vit", "encoder.layer")
    path, rename, done = folder / "adapter_model.safetensors", Path.rename, []
    rewrite(folder / "hftl.json", weight_files={path.name: hash_file(path)})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(file: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(file, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", fail)
        mended(folder)
    assert not mended(folder)[1].defects
    assert json.loads((folder / "hftl.json").read_text())["weight_files"] == {
        path.name: hash_file(path)
    }
    assert not list(folder.glob(".tmp-*"))
    copies = get_backup_folder(folder)
    assert all(copy.read_bytes() == before[copy.name] for copy in copies.iterdir())


def test_patterns_are_renamed_too(hub_cache: Path, tmp_path: Path) -> None:
    settings = SOUND["vit"][1] | {"rank_pattern": {"layers.1.attention.q_proj": 2}}
    folder = save(wrapped(snapshot(hub_cache, "vit"), "vit", settings), tmp_path / "adapter")
    assert not examine_adapter(folder).defects
    as_in_transformers_4(folder, "vit", "encoder.layer")
    reconfigure(folder, rank_pattern={"encoder.layer.1.attention.attention.query": 2})
    _, examination = mended(folder)
    assert not examination.defects


def test_base_given_by_its_hub_id_is_named_and_pinned(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    plant("base is a local path", folder)
    (folder / "README.md").write_text(
        "---\nbase_model: /home/x/bert\nlibrary_name: peft\n---\nIt\n"
    )
    lines, examination = mended(folder, "tiny/bert")
    assert len(lines) == 2 and not examination.defects
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny/bert" and settings["revision"] == COMMIT
    assert "base_model: tiny/bert" in (folder / "README.md").read_text()


def test_unfitting_base_is_not_written(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    plant("base is a local path", folder)
    assert mended(folder, "tiny/bert-2")[0] == []


def test_only_a_proven_base_is_pinned(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, revision=None)
    assert mended(folder)[0] == []
    right = hash_source_weights(find_source(Source(model=str(snapshot(hub_cache, "bert")))))
    rewrite(folder / "hftl.json", source={"weights_sha256": right})
    lines, examination = mended(folder)
    assert COMMIT in lines[0] and "base" not in kinds(examination, defects=False)


def test_labels_and_inputs_are_taken_from_record_and_base(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "vit", tmp_path)
    (folder / "config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert not any("labels" in line for line in mended(folder)[0])
    assert (folder / "preprocessor_config.json").exists()
    rewrite(folder / "hftl.json", data={"labels": NAMES})
    lines, examination = mended(folder)
    assert lines and not examination.defects
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["architectures"] == ["ViTForImageClassification"]


def test_pickles_are_left_where_they_are(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    (folder / "training_args.bin").write_bytes(b"x")
    said: list[str] = []
    assert run_doctor(open_adapter_folder(folder), None, True, said.append) == 4
    assert (folder / "training_args.bin").exists()
    assert "nothing here can be fixed without you" in said


def test_copy_of_the_hub_and_folder_of_a_run_are_not_changed(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapters["bert"], run / "publish")
    source = {"model": str(snapshot(hub_cache, "bert"))}
    (run / "recipe.yaml").write_text(
        json.dumps({"source": source, "data": {"train": {"path": "x.csv"}}})
    )
    examination = examine_adapter(run)
    assert not examination.defects and examination.folder.run == run
    assert examine_adapter(run / "publish").folder.run == run
    with pytest.raises(RecipeError, match="its run writes it"):
        fix_adapter(examination, None)
    into_cache(hub_cache, "adapter", adapters["bert"])
    examination = examine_adapter("tiny/adapter")
    assert not examination.defects
    with pytest.raises(RecipeError, match="on a hub"):
        fix_adapter(examination, None)


def test_old_module_names_have_new_ones() -> None:
    modules = ["vit.layers.0.attention.q_proj", "dinov2.encoder.layer.3.attention.o_proj",
               "swin.encoder.layers.0.blocks.1.attention.v_proj", "vit.layers.0.mlp.fc1",
               "vit.layers.0.mlp.fc2", "bert.encoder.layer.0.attention.self.query"]  # fmt: skip
    old = {
        "vit.encoder.layer.0.attention.attention.query": modules[0],
        "dinov2.encoder.layer.3.attention.output.dense": modules[1],
        "swin.encoder.layers.0.blocks.1.attention.self.value": modules[2],
        "vit.encoder.layer.0.intermediate.dense": modules[3],
        "vit.encoder.layer.0.output.dense": modules[4],
        "bert.encoder.layer.0.attention.self.query": None,
        "bert.encoder.layer.9.attention.self.query": None,
        "vit.encoder.layer.7.attention.attention.query": None,
    }
    assert {name: find_new_name(name, modules) for name in old} == old
    keys = {f"base_model.model.{name}.lora_A.weight": new for name, new in old.items()}
    expected = {k: f"base_model.model.{new}.lora_A.weight" for k, new in keys.items() if new}
    assert find_renamed_keys(keys, modules) == expected
