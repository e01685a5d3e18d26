"""Bad input to an adaptation at the command line: one line on stderr and the right exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cli_errors
import yaml
from conftest import pictures
from PIL import Image
from test_cli_errors import Hftl

hftl = test_cli_errors.hftl
"""The fixture: `hftl("adapt", ...)` in this process."""
Tiny = Callable[..., Path]
MLM = "adapt={objective: mlm, guard: off, training: {max_steps: 1, bf16: false}}"
MAE = "adapt={objective: mae, guard: off, training: {max_steps: 1, bf16: false}}"
JUNK = np.random.default_rng(0).bytes(4000)


def is_error(
    hftl: Hftl, recipe: Path, code: int, words: list[str], *overrides: str, command: str = "adapt"
) -> None:
    place = ["--output", recipe.parent / "out"] if command == "adapt" else []
    hftl(command, recipe, *overrides, *place).is_error(code, *words)


@pytest.fixture
def picture_recipe(tmp_path: Path, tiny_model: Tiny) -> Path:
    """A recipe of 20 pictures and the tiny ViT."""
    tree = {
        "source": {"model": str(tiny_model("vit"))},
        "data": {"train": {"path": str(pictures(tmp_path / "pics", 10))}},
    }
    path = tmp_path / "pictures.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


CORPORA: dict[str, tuple[str, str | bytes | None, list[str]]] = {
    "empty": ("c.txt", "", ["data.unlabeled", "c.txt", "no documents"]),
    "blank": ("c.txt", "\n \n\n", ["c.txt"]),
    "shorter than a block": (
        "c.txt", "a film\nthe plot\nan actor\n", ["fewer than one block of 16", "adapt.pack=false"],
    ),
    "one document": ("c.txt", "the film was good\n" * 9, ["1 document", "8 duplicates"]),
    "binary junk": ("c.txt", JUNK, ["c.txt line"]),
    "binary junk as csv": ("c.csv", JUNK, ["c.csv"]),
    "binary junk as parquet": ("c.parquet", JUNK, ["c.parquet"]),
    "missing": ("c.txt", None, ["data.unlabeled.path", "c.txt", "does not exist"]),
    "missing column": ("c.csv", "body\na film\n", ["c.csv", "'text'", "body"]),
    "unknown suffix": ("c.doc", "a film\n", ["c.doc", "'.doc'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_of_text(hftl: Hftl, recipe_file: Path, tmp_path: Path, case: str) -> None:
    name, content, words = CORPORA[case]
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "here" / name).write_bytes(raw)
    is_error(hftl, recipe_file, 3, words, MLM, f"data.unlabeled={name}")
    out = tmp_path / "out"
    assert json.loads((out / "error.json").read_text("utf-8"))["exit_code"] == 3
    assert not list(out.glob("phases/corpus-*")) and not list(out.glob("phases/adapt-*"))


def test_general_text_that_is_missing(hftl: Hftl, recipe_file: Path) -> None:
    words = ["data.general.path", "g.txt", "does not exist"]
    is_error(hftl, recipe_file, 3, words, MLM, "data.general=g.txt")


def test_a_corpus_of_pictures(hftl: Hftl, picture_recipe: Path, tmp_path: Path) -> None:
    for name, content in (("junk", JUNK), ("text", b"a film\n"), ("none", None)):
        folder = tmp_path / "here" / name
        folder.mkdir()
        words = [name] if content is None else ["a.png", "not an image"]
        if content is not None:
            (folder / "a.png").write_bytes(content)
        is_error(hftl, picture_recipe, 3, words, MAE, f"data.unlabeled={name}")
    words = ["c", "does not exist"]
    is_error(hftl, picture_recipe, 3, words, MAE, "data.unlabeled=./c")


def test_a_picture_smaller_than_a_patch(hftl: Hftl, picture_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "small"
    folder.mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "dot.png")
    words = ["dot.png", "patch of 8"]
    is_error(hftl, picture_recipe, 3, words, MAE, "data.unlabeled=small")


@pytest.mark.parametrize(
    ("model", "assignment", "words"),
    [
        ("bert", MAE, ["adapt.objective=mae", "images", "reads text"]),
        ("vit", MLM, ["adapt.objective=mlm", "reads images", "mlm needs text"]),
        ("swin", MAE, ["adapt.objective=mae", "swin", "windows"]),
        ("clip", MAE, ["adapt.objective=mae", "clip"]),
    ],
)
def test_an_architecture_without_the_objective(
    hftl: Hftl, recipe_file: Path, picture_recipe: Path, tiny_model: Tiny, model: str,
    assignment: str, words: list[str],
) -> None:  # fmt: skip
    recipe = recipe_file if model == "bert" else picture_recipe
    is_error(hftl, recipe, 2, words, f"source.model={tiny_model(model)}", assignment)


def with_(assignment: str, more: str) -> str:
    return assignment.replace("guard", f"{more}, guard", 1)


RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "mask nothing": ([with_(MLM, "mask_ratio: 0")], ["'adapt.mask_ratio'"]),
    "mask all": ([with_(MLM, "mask_ratio: 1")], ["'adapt.mask_ratio'"]),
    "dora": (
        [with_(MLM, "method: lora, lora: {use_dora: true}")],
        ["adapt.lora.use_dora=true", "cannot be joined"],
    ),
    "dora after": (
        [with_(MLM, "method: lora"), "finetune.lora.use_dora=true"],
        ["finetune.lora.use_dora=true", "cannot be joined"],
    ),
    "dora beside top blocks": (
        [with_(MLM, "method: lora+blocks, lora: {use_dora: true}")], ["adapt.lora.use_dora=true"],
    ),
    "bias": ([with_(MLM, "method: lora, lora: {bias: all}")], ["adapt.lora.bias"]),
    "pair": ([MLM, "adapt.pakc=true"], ["'adapt.pakc'", "'adapt.pack'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("command", ["adapt", "check"])
def test_a_recipe(hftl: Hftl, recipe_file: Path, case: str, command: str) -> None:
    overrides, words = RECIPES[case]
    is_error(hftl, recipe_file, 2, words, *overrides, command=command)


def test_too_many_blocks(hftl: Hftl, recipe_file: Path) -> None:
    words = ["adapt.blocks=9", "3 blocks"]
    is_error(hftl, recipe_file, 2, words, with_(MLM, "method: lora+blocks, blocks: 9"))


def test_a_mask_ratio_that_leaves_no_patch(hftl: Hftl, picture_recipe: Path) -> None:
    words = ["adapt.mask_ratio=0.99", "16 patches"]
    is_error(hftl, picture_recipe, 2, words, with_(MAE, "mask_ratio: 0.99"))


def test_a_tokenizer_without_a_mask_token(
    hftl: Hftl, recipe_file: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "maskless"
    shutil.copytree(tiny_model(), folder)
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    settings.pop("mask_token")
    path.write_text(json.dumps(settings), encoding="utf-8")
    is_error(hftl, recipe_file, 2, ["no mask token"], f"source.model={folder}", MLM)


def test_too_little_held_out_for_neighbours(hftl: Hftl, recipe_file: Path) -> None:
    words = ["adapt.guard=neighbours", "rows are held out"]
    is_error(hftl, recipe_file, 3, words, MLM.replace("guard: off", "guard: neighbours"))
