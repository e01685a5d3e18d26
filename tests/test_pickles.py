"""Pickles that would run code: refused in one line by whatever meets them, and never run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from support.planted_defects import rewrite, save, wrapped
from support.tiny import save_tiny, tiny_tokenizer

import hftl
from hftl.config.recipe import Recipe
from hftl.doctor.checks import examine_adapter
from hftl.errors import HftlError
from hftl.inference.compare import compare_models

LORA = {"task_type": "SEQ_CLS", "target_modules": ["query"]}


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def as_checkpoint(path: Path, mark: Path) -> None:
    torch.save({"x": Hostile(mark)}, path)


def as_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(mark)))


def as_noise(path: Path, mark: Path) -> None:
    path.write_bytes(b"no pickle at all")


def as_nothing(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


FORMS = [as_checkpoint, as_pickle, as_noise, as_nothing]


@pytest.mark.parametrize("write", FORMS)
def test_a_pickle_in_a_published_folder(write: Callable[..., None], tmp_path: Path) -> None:
    base, mark = save_tiny("bert", tmp_path / "base"), tmp_path / "mark"
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], sentences(4))
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(base), revision=None)
    whole = tmp_path / "whole"
    wrapped(base, "bert", LORA).merge_and_unload().save_pretrained(whole)
    tiny_tokenizer(whole)
    for folder, kind in ((adapter, "adapter_model"), (whole, "pytorch_model")):
        write(folder / "training_args.bin", mark)
        hftl.load(folder)  # which is passed over
        (folder / f"{kind.replace('pytorch_', '')}.safetensors").unlink()
        write(folder / f"{kind}.bin", mark)
        for use in (lambda: hftl.load(folder), lambda: compare_models([str(folder)], table, None)):  # noqa: B023
            with pytest.raises(HftlError, match=r"pickle.* hftl doctor") as caught:
                use()
            assert caught.value.exit_code == 4
        assert "unsafe" in {one.kind for one in examine_adapter(folder).defects}
    assert not mark.exists()


@pytest.mark.parametrize("write", FORMS)
def test_a_pickle_as_the_source_or_the_base(write: Callable[..., None], tmp_path: Path) -> None:
    base, mark = save_tiny("bert", tmp_path / "base"), tmp_path / "mark"
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    write(base / "pytorch_model.bin", mark)
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], sentences(40))
    recipe = Recipe.parse({"source": {"model": str(base)}, "data": {"train": {"path": str(table)}}})
    with pytest.raises(HftlError, match="pickle") as caught:
        bench_of(recipe).build_model("native", 0)
    assert caught.value.exit_code == 2
    with pytest.raises(HftlError, match="pickle"):
        hftl.load(adapter, base)
    assert "pickles are not opened" in examine_adapter(adapter, str(base)).unexamined[0]
    assert not mark.exists()
