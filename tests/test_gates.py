"""What may leave the machine: an allow-list, no local path, and a listing that says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.records import make_record

from hftl.errors import RunFolderError
from hftl.pipeline.push import preview_push
from hftl.publish.checks import check_files

WEIGHTS = save({"weight": torch.ones(2)}, metadata={"format": "pt"}).decode("latin-1")
FILES = {
    "README.md": "# card\n[base](https://huggingface.co/home/base)\n",
    "hftl.json": json.dumps({"recipe": {"data": {"train": {"path": "data/reviews.csv"}}}}),
    "config.json": "{}",
    "adapter_config.json": '{"base_model_name_or_path": "org/base"}',
    "adapter_model.safetensors": WEIGHTS,
    "head.safetensors": WEIGHTS,
    "tokenizer.json": '{"vocab": {"/home/": 1}}',
    "tokenizer_config.json": "{}",
    "vocab.txt": "/home/a\n",
    "assets/ladder.png": "png",
    "assets/per-class_2.png": "png",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model.safetensors.index.json": "{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        put(tmp_path / "publish" / name, content)
    return tmp_path / "publish"


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("latin-1"))


def test_what_a_run_writes_passes(folder: Path) -> None:
    assert check_files(folder) == sorted(FILES)


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin", "optimizer.pt", "pytorch_model.bin", ".env", ".git/config",
        "adapter_model.safetensors.bak", "xmodel.safetensors", "notes/README.md",
        "assets/README.md", "assets/ladder.png.py", "assets/deep/ladder.png", "README.md.exe",
        "predictions.parquet", "model-1-of-2.safetensors", "model-00001-of-00002.safetensors.py",
    ],
)  # fmt: skip
def test_file_that_is_not_on_the_list_is_refused(folder: Path, name: str) -> None:
    put(folder / name, "x")
    with pytest.raises(RunFolderError, match="not among the files that may be published") as caught:
        check_files(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["README.md", "hftl.json", "config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"base": "/home/ann/models/bert"}', "/home/ann/models/bert"),
        ("path: /root/data.csv", "/root/data.csv"),
        ("see (/Users/ann/x)", "/Users/ann/x"),
        ("`/mnt/disk/x`", "/mnt/disk/x"),
        ("/workspace/run", "/workspace/run"),
        ("/scratch/ann", "/scratch/ann"),
        ("file:///home/ann/x", "/home/ann/x"),
        (r'{"base": "C:\\Users\\ann"}', "C:"),
    ],
)
def test_path_of_this_machine_is_refused(folder: Path, name: str, text: str, path: str) -> None:
    put(folder / name, text)
    with pytest.raises(RunFolderError, match="names a path of this machine: ") as caught:
        check_files(folder)
    assert f"{name} names" in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["https://huggingface.co/home/base", "data/reviews.csv", "package:pkg/data/train.csv",
     "his/her and/or", "a rate of 3/4", "runs/work/x"],
)  # fmt: skip
def test_what_is_no_local_path_passes(folder: Path, text: str) -> None:
    put(folder / "README.md", text)
    assert "README.md" in check_files(folder)


def record(decision: str, base: str | None) -> dict[str, Any]:
    tree = make_record()
    tree["source"]["published_as"] = base
    tree["verdict"] = {"decision": decision, "reasons": ["because"]}
    return tree


@pytest.mark.parametrize(("decision", "base"), [("publish", "org/base"), ("hold", None)])
def test_dry_run_lists_files_sizes_and_verdict(
    folder: Path, decision: str, base: str | None
) -> None:
    put(folder / "hftl.json", json.dumps(record(decision, base)))
    found = preview_push(folder.parent)
    assert [name for name, _ in found.files] == sorted(FILES)
    assert dict(found.files)["head.safetensors"] == len(WEIGHTS)
    assert (found.decision, found.reasons, found.base) == (decision, ["because"], base)


def test_dry_run_refuses_what_the_push_would(folder: Path) -> None:
    put(folder / "hftl.json", json.dumps(record("publish", "org/base")))
    put(folder / "training_args.bin", "x")
    with pytest.raises(RunFolderError, match="training_args.bin"):
        preview_push(folder.parent)


def test_dry_run_of_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no publish folder.*hftl run"):
        preview_push(tmp_path)
