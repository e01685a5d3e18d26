"""Report a damaged published folder in one line of `predict` and `compare`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.planted_defects import rewrite
from test_compare import NAMES, adapters

import hftl
from hftl.errors import RecipeError, RunFolderError
from hftl.inference.compare import compare_models
from hftl.models.weight_files import hash_checkpoint

__all__ = ["adapters"]


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)


def another_rank(folder: Path) -> None:
    rewrite(folder / "adapter_config.json", r=2)


def no_kind(folder: Path) -> None:
    rewrite(folder / "adapter_config.json", peft_type="NOPE")


def record_of_another_shape(folder: Path) -> None:
    rewrite(folder / "hftl.json", data={"rows": 3})


def config_of_nothing(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="nope")


def labels_in_another_order(folder: Path) -> None:
    # The record and config.json disagree, whichever is right.
    rewrite(folder / "hftl.json", data={"labels": NAMES[::-1], "task": "classification"})


def record_of_no_task(folder: Path) -> None:
    rewrite(folder / "hftl.json", data={"labels": NAMES, "task": None})


def record_of_no_length(folder: Path) -> None:
    rewrite(folder / "hftl.json", recipe={"data": {"max_length": float("nan")}})


def record_of_no_columns(folder: Path) -> None:
    rewrite(folder / "hftl.json", recipe={"data": {"train": {"text": [3]}}})


def tokenizer_of_nothing(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")


def record_without_labels(folder: Path) -> None:
    rewrite(folder / "hftl.json", data={"labels": None, "task": "classification"})
    rewrite(folder / "config.json", id2label={str(n): f"LABEL_{n}" for n in range(len(NAMES))})


DAMAGES = [
    labels_in_another_order, cut_short, no_weights, another_rank, no_kind, record_of_another_shape,
    config_of_nothing, record_of_no_task, record_of_no_length, record_of_no_columns,
    tokenizer_of_nothing, record_without_labels,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_with_advice_to_run_the_doctor(
    damage: Callable[[Path], None], adapters: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["two"], tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(RunFolderError, match="damaged does not load: .*hftl doctor"):
        hftl.load(folder)
    for models in ([folder, adapters["more"]], [adapters["more"], folder]):
        with pytest.raises(RunFolderError, match="damaged does not load: .*hftl doctor"):
            compare_models(list(map(str, models)), table, None)


def test_unreadable_weights_of_a_base_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RecipeError, match=r"model\.safetensors does not open"):
        hash_checkpoint(tmp_path)


def test_labels_are_in_the_order_of_their_numbers(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["two"], tmp_path / "written"))
    numbered = dict(reversed(list(enumerate(NAMES))))
    rewrite(folder / "config.json", id2label={str(n): name for n, name in numbered.items()})
    assert hftl.load(folder).class_names == NAMES
