"""Refuse what a source model cannot do in `check` and before a run trains, in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures, sentences, write_csv
from support.tiny import save_tiny, tiny_config
from transformers import AutoModel, AutoTokenizer

from hftl import Recipe, run
from hftl.errors import DataError, HftlError, RecipeError, is_out_of_memory
from hftl.pipeline.pipeline import check_recipe

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]


def refuse(tree: dict[str, Any], folder: Path) -> HftlError:
    """Return the refusal of `check`, which `run` gives too before anything trains."""
    errors = []
    for start in (check_recipe, lambda recipe: run(recipe, folder / "run")):
        with pytest.raises(HftlError) as caught:
            start(Recipe.parse(tree))
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert not list((folder / "run").glob("arms/*"))
    assert not list((folder / "run").glob("phases/adapt*"))
    return errors[0]


def build_tree(model: Path, table: Path, **sections: Any) -> dict[str, Any]:
    data = {"train": {"path": str(table)}, "max_length": 16} | sections.pop("data", {})
    training = {"num_train_epochs": 1, "bf16": False}
    finetune = {"training": training} | sections.pop("finetune", {})
    measure = {"seeds": [0], "arms": []} | sections.pop("measure", {})
    return {"source": {"model": str(model)}, "data": data, "finetune": finetune,
            "measure": measure, **sections}  # fmt: skip


def copy_with_token(source: Path, folder: Path) -> Path:
    """Copy a model, with a token in its tokenizer that it does not embed."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["kryptonite"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", ["first", "last"])
def test_token_that_the_model_does_not_embed_is_refused(
    place: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = copy_with_token(tiny_model(), tmp_path / "model")
    rows = sentences(60)
    number = 0 if place == "first" else len(rows) - 1
    rows[number] = (f"kryptonite {rows[number][0]}", rows[number][1])
    error = refuse(
        build_tree(model, write_csv(tmp_path / "t.csv", ["text", "label"], rows)), tmp_path
    )
    assert isinstance(error, DataError)
    assert "'kryptonite'" in str(error) and f"line {number + 2}" in str(error), error


def test_longer_tokenizer_is_accepted_where_no_row_holds_its_tokens(
    tiny_model: Tiny, tmp_path: Path, table: Path
) -> None:
    model = copy_with_token(tiny_model(), tmp_path / "model")
    check_recipe(Recipe.parse(build_tree(model, table)))


def test_adaptation_draws_from_all_tokens_and_refuses_such_a_tokenizer(
    tiny_model: Tiny, tmp_path: Path, table: Path
) -> None:
    model = copy_with_token(tiny_model("bert", True), tmp_path / "model")
    error = refuse(build_tree(model, table, adapt={"objective": "mlm"}), tmp_path)
    assert isinstance(error, RecipeError) and "42 tokens" in str(error)


def test_segments_that_the_model_does_not_embed_are_refused(tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model")
    AutoModel.from_config(tiny_config("bert", type_vocab_size=1)).save_pretrained(model)
    file = model / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": names}))
    rows = [(text, text[::-1], label) for text, label in sentences(60)]
    table = write_csv(tmp_path / "t.csv", ["a", "b", "label"], rows)
    data = {"train": {"path": str(table), "text": ["a", "b"]}}
    error = refuse(build_tree(model, table, data=data), tmp_path)
    assert isinstance(error, RecipeError) and "1 segment" in str(error)


def test_general_data_are_read(tiny_model: Tiny, tmp_path: Path, table: Path) -> None:
    for name, content, words in (
        ("missing.csv", None, "does not exist"),
        ("unclosed.csv", b'text,label\n"a film,x\n', "unclosed.csv"),
        ("latin1.csv", "text,label\ncafé,x\n".encode("latin-1"), "latin1.csv"),
        ("unlabelled.csv", b"text\na film\n", "no column 'label'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        data = {"general": {"path": str(tmp_path / name), "label": "label"}}
        error = refuse(build_tree(tiny_model(), table, data=data), tmp_path / name.split(".")[0])
        assert isinstance(error, DataError) and words in str(error), error


@pytest.mark.parametrize("adapt", [None, {"objective": "mae"}])
def test_source_of_one_channel_is_refused(adapt: dict[str, Any] | None, tmp_path: Path) -> None:
    model = save_tiny("vit", tmp_path / "model")
    AutoModel.from_config(tiny_config("vit", num_channels=1)).save_pretrained(model)
    folder = pictures(tmp_path / "pictures", 20)
    tree = build_tree(model, folder, adapt=adapt, data={"max_length": 128})
    error = refuse(tree, tmp_path)
    assert isinstance(error, RecipeError) and "1 channel" in str(error)


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_saved_modules_survive_or_are_refused(
    pooling: str, tiny_model: Tiny, tmp_path: Path, table: Path
) -> None:
    finetune = {"strategy": "lora", "pooling": pooling, "lora": {"modules_to_save": ["embeddings"]}}
    tree = build_tree(
        tiny_model(), table, finetune=finetune | {"training": {"num_train_epochs": 1}}
    )
    try:
        check_recipe(Recipe.parse(tree))
    except RecipeError as error:
        assert "finetune.lora" in str(error)
        return
    run(Recipe.parse(tree), tmp_path / "run")


@pytest.mark.parametrize("where", ["finetune", "arm", "adapt"])
def test_name_that_matches_no_module_is_refused(
    where: str, tiny_model: Tiny, tmp_path: Path, table: Path
) -> None:
    lora = {"target_modules": ["query", "valeu"]}
    more: dict[str, Any] = {
        "finetune": {"finetune": {"lora": lora}},
        "arm": {"measure": {"arms": [{"other": {"finetune.lora.target_modules": ["valeu"]}}]}},
        "adapt": {"adapt": {"objective": "mlm", "method": "lora", "lora": lora}},
    }[where]
    error = refuse(build_tree(tiny_model("bert", True), table, **more), tmp_path)
    assert isinstance(error, RecipeError) and "did you mean 'value'" in str(error)


def test_out_of_memory_is_recognised_on_every_device() -> None:
    for message in (
        "DefaultCPUAllocator: can't allocate memory: 9 bytes",
        "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.00 MB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(message)) and not is_out_of_memory(ValueError(message))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
