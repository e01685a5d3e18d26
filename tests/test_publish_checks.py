"""Check files and rights before a push."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.records import make_record

from hftl.errors import RunFolderError
from hftl.pipeline.push import preview_push
from hftl.publish.checks import Account, check_files, complete_repo_id, find_missing_permission

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


def test_files_of_a_run_pass(folder: Path) -> None:
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
def test_other_text_than_a_local_path_passes(folder: Path, text: str) -> None:
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
    preview = preview_push(folder.parent)
    assert [name for name, _ in preview.files] == sorted(FILES)
    assert dict(preview.files)["head.safetensors"] == len(WEIGHTS)
    assert (preview.decision, preview.reasons, preview.base) == (decision, ["because"], base)


def test_dry_run_refuses_what_the_push_would(folder: Path) -> None:
    put(folder / "hftl.json", json.dumps(record("publish", "org/base")))
    put(folder / "training_args.bin", "x")
    with pytest.raises(RunFolderError, match="training_args.bin"):
        preview_push(folder.parent)


def test_dry_run_of_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no publish folder.*hftl run"):
        preview_push(tmp_path)


def token(role: str = "write", **fine: Any) -> dict[str, Any]:
    """Return the hub's whoami of `me`, a writer in `lab` and a reader in `club`."""
    access_token: dict[str, Any] = {"role": role} | ({"fineGrained": fine} if fine else {})
    orgs = [{"name": "lab", "roleInOrg": "contributor"}, {"name": "club", "roleInOrg": "read"}]
    return {"name": "me", "orgs": orgs, "auth": {"accessToken": access_token}}


def scoped(name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"type": "any", "name": name}, "permissions": list(permissions)}


WRITE = "repo.write"
CASES: list[tuple[dict[str, Any], str, bool, str | None]] = [
    (token(), "me/model", False, None),
    (token(), "lab/model", False, None),
    (token(), "club/model", False, "may only read in the organisation club"),
    (token(), "them/model", False, "me is not them"),
    (token(), "them/model", True, None),
    (token("read"), "me/model", False, "read-only"),
    (token("read"), "them/model", True, "read-only"),
    (token("fineGrained", scoped=[scoped("me", WRITE)]), "me/model", False, None),
    (token("fineGrained", scoped=[scoped("me/model", WRITE)]), "me/model", False, None),
    (token("fineGrained", scoped=[scoped("me/model", WRITE)]), "me/model-base", False, WRITE),
    (token("fineGrained", scoped=[scoped("me", "repo.content.read")]), "me/model", False, WRITE),
    (token("fineGrained", scoped=[]), "me/model", False, WRITE),
    (token("fineGrained", scoped=[], **{"global": ["discussion.write"]}), "x/y", True, None),
    (token("fineGrained", scoped=[], **{"global": ["discussion.write"]}), "me/y", False, WRITE),
    (token("fineGrained", scoped=[scoped("x/y", "discussion.write")]), "x/y", True, None),
    # What a hub of one's own may leave out speaks against nobody.
    ({"name": "me"}, "me/model", False, None),
]


@pytest.mark.parametrize(("who", "repo_id", "request_", "missing"), CASES)
def test_missing_permission_is_named(
    who: dict[str, Any], repo_id: str, request_: bool, missing: str | None
) -> None:
    missing_permission = find_missing_permission(Account.model_validate(who), repo_id, request_)
    assert (missing_permission is None) == (missing is None)
    assert (missing or "") in (missing_permission or "")


def test_name_without_an_owner_belongs_to_the_user() -> None:
    assert complete_repo_id(Account.model_validate(token()), "model") == "me/model"
    assert complete_repo_id(Account.model_validate(token()), "lab/model") == "lab/model"
