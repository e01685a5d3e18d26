"""Explain wrong data of `hftl compare` without words of a recipe."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import pictures, sentences, write_csv
from test_compare import adapters

import hftl
from hftl.errors import DataError
from hftl.inference.compare import compare_models
from hftl.inference.eval_data import read_labelled_items

__all__ = ["adapters"]


def other_columns(folder: Path) -> Path:
    return write_csv(folder / "d.csv", ["review", "sentiment"], sentences(4))


def an_empty_text(folder: Path) -> Path:
    return write_csv(folder / "d.csv", ["text", "label"], [("", "negative")])


def an_open_quote(folder: Path) -> Path:
    path = folder / "d.csv"
    path.write_text('text,label\ngood,positive\n"bad,negative\nfine,positive\n12",negative\n')
    return path


def a_number_for_a_class(folder: Path) -> Path:
    path = folder / "d.jsonl"
    path.write_text('{"text": "a film", "label": 0.5}\n')
    return path


def texts_alone(folder: Path) -> Path:
    (folder / "d.txt").write_text("a film\n")
    return folder / "d.txt"


def a_table_of_no_suffix(folder: Path) -> Path:
    (folder / "d.xlsx").write_text("a film\n")
    return folder / "d.xlsx"


def a_folder_of_pictures(folder: Path) -> Path:
    return pictures(folder / "d", 4)


def a_run(folder: Path) -> Path:
    # A run's folder holds folders, none of them a class.
    (folder / "d" / "publish").mkdir(parents=True)
    (folder / "d" / "publish" / "model.safetensors").write_bytes(b"\xff\x00")
    (folder / "d" / "recipe.yaml").write_text("{}")
    return folder / "d"


def a_folder_of_files(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / "one.txt").write_text("a film")
    return folder / "d"


def a_folder_of_splits(folder: Path) -> Path:
    for name in ("train", "test"):
        (folder / "d" / name).mkdir(parents=True)
        (folder / "d" / name / "one.txt").write_text("a film")
    return folder / "d"


WRONG: dict[Callable[..., Path], str] = {
    a_folder_of_splits: "name splits, not classes. Give one of them",
    other_columns: "no column 'text'.*trained with 'text', 'label'", an_empty_text: "text is empty",
    an_open_quote: "d.csv line 3: a quote opens .* row at line 4",
    a_number_for_a_class: "is no class", texts_alone: r"suffix '\.txt'",
    a_table_of_no_suffix: r"suffix '\.xlsx'", a_folder_of_pictures: "no folder of labelled texts",
    a_run: "no folder of labelled texts", a_folder_of_files: "no folders, one a class",
}  # fmt: skip


@pytest.mark.parametrize("make", WRONG)
def test_advice_names_no_recipe_key(
    make: Callable[..., Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    predictor = hftl.load(adapters["two"])
    with pytest.raises(DataError, match=WRONG[make]) as caught:
        read_labelled_items(make(tmp_path), predictor, adapters["two"])
    assert not re.search(r"\bdata\.\w|source\.model|format", str(caught.value)), str(caught.value)


def test_folder_of_classes_is_scored(adapters: dict[str, Path], tmp_path: Path) -> None:
    for name in ("negative", "positive"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "one.txt").write_text("a film")
    assert "2 items" in compare_models([str(adapters["two"])], tmp_path / "d", None)
