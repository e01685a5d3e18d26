"""Refuse bad input to an adaptation at the command line in one line, with the right exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import pictures
from PIL import Image
from support.command import Hftl

Tiny = Callable[..., Path]
Refuse = Callable[..., None]
MLM = "adapt={objective: mlm, guard: off, training: {max_steps: 1, bf16: false}}"
MAE = MLM.replace("mlm", "mae")
JUNK = np.random.default_rng(0).bytes(4000)


@pytest.fixture
def refuse(hftl: Hftl, tmp_path: Path) -> Refuse:
    """`refuse(recipe, code, words, overrides)`: run `hftl adapt`, and check its one line."""

    def run(
        recipe: Path, code: int, words: list[str], *overrides: str, command: str = "adapt"
    ) -> None:
        place = ["--output", tmp_path / "out"] if command == "adapt" else []
        # Of the recipe's arms none but its own, which are timed before an adaptation begins.
        hftl(command, recipe, "measure.arms=[]", *overrides, *place).assert_error(code, *words)

    return run


@pytest.fixture
def image_recipe(tmp_path: Path, tiny_model: Tiny) -> Path:
    """Write a recipe of 20 images and the tiny ViT."""
    tree = {
        "source": {"model": str(tiny_model("vit"))},
        "data": {"train": {"path": str(pictures(tmp_path / "pics", 10))}},
    }
    path = tmp_path / "images.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


CORPORA: dict[str, tuple[str, str | bytes | None, list[str]]] = {
    "empty": ("c.txt", "", ["data.unlabeled", "c.txt", "no documents"]),
    "blank": ("c.txt", "\n \n\n", ["c.txt"]),
    "shorter than a block": (
        "c.txt", "a film\nthe plot\nan actor\n", ["fewer than one block of 16", "adapt.pack=false"],
    ),
    "one document": ("c.txt", "the film was good\n" * 9, ["1 document", "8 duplicates"]),
    "binary junk": ("c.txt", JUNK, ["c.txt holds binary data"]),
    "binary junk as csv": ("c.csv", JUNK, ["c.csv"]),
    "binary junk as parquet": ("c.parquet", JUNK, ["c.parquet"]),
    "missing": ("c.txt", None, ["data.unlabeled.path", "c.txt", "does not exist"]),
    "missing column": ("c.csv", "body\na film\n", ["c.csv", "'text'", "body"]),
    "unknown suffix": ("c.doc", "a film\n", ["c.doc", "'.doc'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPORA)
def test_bad_corpus_of_text(refuse: Refuse, recipe_file: Path, tmp_path: Path, case: str) -> None:
    name, content, words = CORPORA[case]
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "here" / name).write_bytes(raw)
    refuse(recipe_file, 3, words, MLM, f"data.unlabeled={name}")
    out = tmp_path / "out"
    assert json.loads((out / "error.json").read_text("utf-8"))["exit_code"] == 3
    assert not list(out.glob("phases/corpus-*")) and not list(out.glob("phases/adapt-*"))


@pytest.mark.parametrize("task", ["classification", "null"])
@pytest.mark.parametrize("case", ["empty", "missing column"])
def test_check_reads_the_corpus(
    refuse: Refuse, recipe_file: Path, tmp_path: Path, case: str, task: str
) -> None:
    """Before `hftl run` does, whether or not the recipe has arms."""
    name, content, words = CORPORA[case]
    (tmp_path / "here" / name).write_text(str(content), encoding="utf-8")
    overrides = [MLM, f"data.unlabeled={name}", f"data.task={task}"]
    refuse(recipe_file, 3, words, *overrides, command="check")


def test_check_reads_unlabeled_data_of_an_analysis(refuse: Refuse, recipe_file: Path) -> None:
    words = ["data.unlabeled.path", "c.txt", "does not exist"]
    overrides = ["data.unlabeled=c.txt", "measure.analyses=[distance]"]
    refuse(recipe_file, 3, words, *overrides, command="check")


def test_missing_general_text(refuse: Refuse, recipe_file: Path) -> None:
    words = ["data.general.path", "g.txt", "does not exist"]
    refuse(recipe_file, 3, words, MLM, "data.general=g.txt")


def test_bad_corpus_of_images(refuse: Refuse, image_recipe: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("junk", "none", "small"):
        (here / name).mkdir()
    (here / "junk" / "a.png").write_bytes(JUNK)
    Image.new("RGB", (4, 4), "red").save(here / "small" / "dot.png")
    (here / "t.csv").write_text("text\nsome words\n")
    for path, words in (
        ("junk", ["a.png", "not an image"]), ("none", ["none"]), ("./c", ["c", "does not exist"]),
        ("small", ["dot.png", "patch of 8"]), ("t.csv", ["t.csv: no column 'image'; it has text"]),
    ):  # fmt: skip
        refuse(image_recipe, 3, words, MAE, f"data.unlabeled={path}")


@pytest.mark.parametrize(
    ("model", "assignment", "words"),
    [
        ("bert", MAE, ["adapt.objective=mae", "images", "reads text"]),
        ("vit", MLM, ["adapt.objective=mlm", "reads images", "mlm needs text"]),
        ("swin", MAE, ["adapt.objective=mae", "swin", "windows"]),
        ("clip", MAE, ["adapt.objective=mae", "clip"]),
    ],
)
def test_architecture_without_the_objective(
    refuse: Refuse, recipe_file: Path, image_recipe: Path, tiny_model: Tiny, model: str,
    assignment: str, words: list[str],
) -> None:  # fmt: skip
    recipe = recipe_file if model == "bert" else image_recipe
    refuse(recipe, 2, words, f"source.model={tiny_model(model)}", assignment)


def extend(assignment: str, more: str) -> str:
    return assignment.replace("guard", f"{more}, guard", 1)


RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "mask nothing": ([extend(MLM, "mask_ratio: 0")], ["'adapt.mask_ratio'"]),
    "dora": (
        [extend(MLM, "method: lora, lora: {use_dora: true}")],
        ["adapt.lora.use_dora=true", "cannot be joined"],
    ),
    "dora after": (
        [extend(MLM, "method: lora"), "finetune.lora.use_dora=true"],
        ["finetune.lora.use_dora=true", "cannot be joined"],
    ),
    "bias": ([extend(MLM, "method: lora, lora: {bias: all}")], ["adapt.lora.bias"]),
    "misspelt": ([MLM, "adapt.pakc=true"], ["'adapt.pakc'", "'adapt.pack'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("command", ["adapt", "check"])
def test_bad_recipe(refuse: Refuse, recipe_file: Path, case: str, command: str) -> None:
    overrides, words = RECIPES[case]
    refuse(recipe_file, 2, words, *overrides, command=command)


def test_settings_that_the_source_does_not_allow(
    refuse: Refuse, recipe_file: Path, image_recipe: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    blocks = extend(MLM, "method: lora+blocks, blocks: 9")
    refuse(recipe_file, 2, ["adapt.blocks=9", "3 blocks"], blocks)
    words = ["adapt.mask_ratio=0.99", "16 patches"]
    refuse(image_recipe, 2, words, extend(MAE, "mask_ratio: 0.99"))
    folder = shutil.copytree(tiny_model(), tmp_path / "maskless")
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    settings.pop("mask_token")
    path.write_text(json.dumps(settings), encoding="utf-8")
    refuse(recipe_file, 2, ["no mask token"], f"source.model={folder}", MLM)


@pytest.mark.parametrize("command", ["adapt", "check"])
def test_too_few_rows_held_out_for_neighbours(
    refuse: Refuse, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("hftl.adapt.adaptation.HEAD_MAX_STEPS", 1)
    words = ["adapt.guard=neighbours", "rows are held out"]
    guarded = MLM.replace("guard: off", "guard: neighbours")
    refuse(recipe_file, 3, words, guarded, command=command)
