"""Normalize names and texts of many spellings: one class, one item, or a clear warning."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bench_of, sentences, write_csv
from PIL import Image

import hftl
from hftl.analysis.check import run_preflight_checks
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data.facts import PreparedFacts
from hftl.data.label_parsing import find_label_fault
from hftl.data.normalization import (
    find_doubtful_names,
    find_fraction,
    normalize_name,
    normalize_text,
)
from hftl.data.prepare import prepare_data
from hftl.errors import DataError
from hftl.inference.compare import compare_models
from hftl.pipeline.pipeline import check_recipe, run

pytestmark = pytest.mark.usefixtures("fast_reload")

HEADER = ["text", "label"]


def write_table(path: Path, rows: list[tuple[str, Any]]) -> Path:
    """Write texts and labels as CSV or lines of JSON, by the path's suffix."""
    if path.suffix == ".csv":
        return write_csv(path, HEADER, rows)
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 1.0, "1", "1.0", " 1 ", "1.00", np.float64(1), np.int64(1)], "1"),
        (["caf\u00e9", "cafe\u0301", " caf\u00e9", "\ufeffcaf\u00e9\u200b"], "caf\u00e9"),
        (["very good", "very  good", "very\tgood", "very\u00a0good"], "very good"),
        (["\u2068ja\u2069", "ja\u061c", "\u200dja\u200c"], "ja"),
        (["\u0645\u06cc\u200c\u062e\u0648"], "\u0645\u06cc\u200c\u062e\u0648"),
        (["\U0001f469\u200d\U0001f4bb"], "\U0001f469\u200d\U0001f4bb"),
        (["007"], "007"), (["1.5"], "1.5"), (["-2.0", -2], "-2"), ([True], "True"),
    ],
)  # fmt: skip
def test_the_spellings_of_a_class_are_one_name(values: list[Any], name: str) -> None:
    assert {normalize_name(value) for value in values} == {name}


def test_the_key_of_a_text_is_its_own_key() -> None:
    for text in ("\u0130stanbul", "Stra\u00dfe", "\u1e9e", "\u03a3\u03c2", "\u00c5ngstr\u00f6m "):
        assert normalize_text(normalize_text(text)) == normalize_text(text)
    assert normalize_text("good film") != normalize_text("good films")


@pytest.mark.parametrize("value", ["\u200b", " \ufeff ", float("nan"), None, ""])
def test_a_label_of_nothing_is_refused(value: Any) -> None:
    assert find_label_fault({"y": value}, "y", "classification") is not None


def test_numbers_with_fractions_are_no_classes() -> None:
    assert find_fraction(["1", "2.5", "3"]) == "2.5"
    assert find_fraction(["1", "2", "9" * 400]) is None
    assert find_fraction(["v1.5", "2.5"]) is None
    assert find_fraction(["NaN", "n/a", "2.5", "3"]) == "2.5"
    assert find_fraction(["nan", "none"]) is None


def test_doubtful_names_are_named() -> None:
    counts = {"Good": 9, "good": 2, "bad": 5, "NaN": 3, "lone": 1}
    case, missing, lone = find_doubtful_names(counts)
    assert "'Good' and 'good' differ only in case" in case
    assert "'NaN' (3 labels) reads like a missing value" in missing
    assert "1 of 5 classes have one row only" in lone and "'lone'" in lone
    assert find_doubtful_names({"a": 2, "b": 2}) == []
    assert len(find_doubtful_names({"a": 2, "n/a": 1})) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ca\u200dr", "car"], r"'car' and 'ca\u200dr' differ only in case or in characters"),
        (["\u2764", "\u2764\ufe0f"], "cannot be seen"), (["01", "1"], "'01' and '1' are the same"),
        *((pair, "same number") for pair in (["0", "-0"], ["1", "+1"], ["1", "1."])),
    ],
)  # fmt: skip
def test_names_that_a_reader_takes_for_one_are_named(names: list[str], words: str) -> None:
    [warning] = find_doubtful_names(dict.fromkeys(names, 2))
    assert words in warning


@pytest.mark.parametrize(
    ("name", "task"),
    [("a.csv", "classification"), ("a.jsonl", "classification"), ("a.jsonl", "multi-label")],
)
def test_fractions_are_refused_whatever_the_table_and_beside_missing_values(
    tmp_path: Path, name: str, task: str
) -> None:
    labels: list[Any] = ["nan", *(str(i / 8) for i in range(39))] * 2
    if task == "multi-label":
        labels = [[label] for label in labels]
    path = write_table(tmp_path / name, [(f"text {i}", y) for i, y in enumerate(labels)])
    with pytest.raises(DataError, match=r"line \d: a\..* has numbers with fractions.*0\.125"):
        prepare_data(Data.model_validate({"task": task, "train": {"path": str(path)}}))


def test_copies_that_differ_in_spelling_do_not_straddle(tmp_path: Path) -> None:
    """Labels drawn by a coin can't be predicted from a copy in train: each text stays once."""
    coin = random.Random(0)
    rows = [(text, coin.choice(["heads", "tails"])) for text, _ in sentences(80)]
    both = [*rows, *((text.upper() + " ", label) for text, label in rows)]
    path = write_csv(tmp_path / "a.csv", HEADER, both)
    prepared = prepare_data(Data.model_validate({"train": {"path": str(path)}}))
    texts = [normalize_text(row.content[0]) for part in prepared.rows.values() for row in part]
    assert len(texts) == len(set(texts)) == 80
    assert prepared.facts.duplicates == 80


def test_tables_of_other_line_ends_and_case_leak_nothing(tmp_path: Path) -> None:
    rows = sentences(60)
    train = write_csv(tmp_path / "train.csv", HEADER, rows)
    test = write_csv(tmp_path / "test.csv", HEADER, [(f"{t.title()}\r\n", y) for t, y in rows[:20]])
    data = Data.model_validate({"train": {"path": str(train)}, "test": {"path": str(test)}})
    prepared = prepare_data(data)
    assert prepared.facts.leaked == 20
    assert prepared.facts.splits["test"] == 20


def test_a_target_that_parquet_has_rounded_is_no_contradiction(tmp_path: Path) -> None:
    texts = [text for text, _ in sentences(60)]
    values = [i / 7 for i in range(60)]
    train = write_csv(tmp_path / "a.csv", HEADER, list(zip(texts, values, strict=True)))
    test = tmp_path / "b.parquet"
    rounded = pa.array(np.array(values[:20], np.float32))
    pq.write_table(pa.table({"text": texts[:20], "label": rounded}), test)
    tables = {"train": {"path": str(train)}, "test": {"path": str(test)}}
    prepared = prepare_data(Data.model_validate({"task": "regression", **tables}))
    assert (prepared.facts.conflicting, prepared.facts.leaked) == (0, 20)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_split_of_contradictions_alone_is_named_so(tmp_path: Path, task: str) -> None:
    texts = [text for text, _ in sentences(60)]
    train = write_csv(tmp_path / "a.csv", HEADER, [(t, i % 2) for i, t in enumerate(texts)])
    test = [(t.title(), (i + 1) % 2) for i, t in enumerate(texts[:30])]
    tables = {
        "train": {"path": str(train)},
        "test": {"path": str(write_csv(tmp_path / "b.csv", HEADER, test))},
    }
    with pytest.raises(DataError, match="60 rows with contradictory labels.*Correct the labels"):
        prepare_data(Data.model_validate({"task": task, **tables}))
    table = write_csv(tmp_path / "c.csv", HEADER, [(t, n) for t in texts for n in (0, 1)])
    with pytest.raises(DataError, match=r"two different labels.*120 rows") as refusal:
        prepare_data(Data.model_validate({"task": task, "train": {"path": str(table)}}))
    assert ("multi-label" in str(refusal.value)) == (task == "classification")


def test_data_prepared_before_contradictions_were_counted_are_checked(
    recipe_tree: dict[str, Any],
) -> None:
    """A run folder of an earlier version is continued."""
    recipe = Recipe.parse(recipe_tree)
    bench = bench_of(recipe)
    newer = ("contradictory_inputs", "distinct_inputs", "near_pictures", "label_type")
    facts = bench.prepared.facts.to_dict()
    older = PreparedFacts.model_validate({key: facts[key] for key in facts if key not in newer})
    older = replace(bench.prepared, facts=older)
    assert run_preflight_checks(recipe, recipe.arms, bench.source, bench.inputs, older)["warnings"]


def test_models_are_compared_whatever_the_spelling_of_their_classes(
    recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    """An earlier version published names as the table had them, and plain peft does still."""
    names = {"positive": "caf\u00e9", "negative": "2"}
    rows = [(text, names[label]) for text, label in sentences(80)]
    recipe_tree["data"]["train"]["path"] = str(write_csv(tmp_path / "a.csv", HEADER, rows))
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    run(Recipe.parse(recipe_tree), tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "publish", tmp_path / "older")
    for file in ("config.json", "hftl.json"):
        path = tmp_path / "older" / file
        text = json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=False)
        path.write_text(text.replace("caf\u00e9", "cafe\u0301").replace('"2"', '"2.0"'), "utf-8")
    config = json.loads((tmp_path / "older" / "config.json").read_text("utf-8"))
    assert set(config["id2label"].values()) == {"cafe\u0301", "2.0"}
    table = write_csv(tmp_path / "b.csv", HEADER, [(t, f" {y} ") for t, y in rows])
    models = [str(tmp_path / "run"), str(tmp_path / "older")]
    for order in (models, models[::-1]):
        first, second = (
            line.split()[1:5]
            for line in compare_models(order, table, None).splitlines()
            if "/" in line and "warning" not in line
        )
        assert first[:3] == second[:3]


def test_contradictory_labels_are_counted_in_check_record_and_card(
    recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = sentences(120)
    other = {"positive": "negative", "negative": "positive"}
    rows += [(text, other[label]) for text, label in rows[:40]]
    recipe_tree["data"]["train"]["path"] = str(write_csv(tmp_path / "a.csv", HEADER, rows))
    recipe_tree["measure"] |= {"arms": ["majority"], "seeds": [0]}
    recipe_tree["finetune"]["strategy"] = "head"
    recipe = Recipe.parse(recipe_tree)
    header, checked = check_recipe(recipe)
    assert "80 rows with contradictory labels" in header["rows"]
    assert "0 duplicate rows" in header["rows"]
    assert any("40 of 120 distinct inputs (33%)" in warning for warning in checked["warnings"])
    record = run(recipe, tmp_path / "run")
    assert record is not None and record["data"]["contradictory_inputs"] == 40
    card = (tmp_path / "run" / "publish" / "README.md").read_text("utf-8")
    assert "40 of 120 distinct inputs (33.3%) could not be measured" in card


@pytest.mark.parametrize(
    ("values", "suffix", "label_type"),
    [
        ((0, 1), "csv", "integer"), ((0, 1), "jsonl", "integer"), (("0", "1"), "jsonl", "text"),
        ((0.0, 1.0), "jsonl", "integer"), ((False, True), "jsonl", "boolean"),
        (("a", "b"), "csv", "text"),
    ],
)  # fmt: skip
def test_the_type_of_labels_is_that_of_the_table(
    tmp_path: Path, values: Any, suffix: str, label_type: str
) -> None:
    rows = [(text, values[label == "positive"]) for text, label in sentences(80)]
    path = write_table(tmp_path / f"a.{suffix}", rows)
    data = Data.model_validate({"train": {"path": str(path)}})
    assert prepare_data(data).facts.label_type == label_type


@pytest.mark.parametrize("values", [(0, 1), pytest.param((False, True), marks=pytest.mark.slow)])
def test_predictions_have_the_type_of_the_labels(
    recipe_tree: dict[str, Any], tmp_path: Path, values: tuple[Any, Any]
) -> None:
    rows = [(text, values[label == "positive"]) for text, label in sentences(80)]
    recipe_tree["data"]["train"]["path"] = str(write_table(tmp_path / "a.jsonl", rows))
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    run(Recipe.parse(recipe_tree), tmp_path / "run")
    answers = hftl.load(tmp_path / "run").predict([text for text, _ in rows])
    labels = {answer["label"] for answer in answers}
    assert labels == set(values) and {type(label) for label in labels} == {type(values[0])}
    assert set(answers[0]["scores"]) == {str(value) for value in values}


def test_re_encoded_pictures_are_counted_with_a_warning(
    recipe_tree: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    draw = np.random.default_rng(0)
    for number in range(40):
        coarse = draw.integers(0, 255, (10, 12, 3)).astype("uint8")
        picture = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
        for split in ("train", "test"):
            folder = tmp_path / split / ("light", "dark")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            if split == "train":
                picture.save(folder / f"{number}.png")
            elif number < 12:
                picture.resize((72, 60)).save(folder / f"{number}.jpg", quality=90)
            else:
                noise = draw.integers(0, 255, (10, 12, 3)).astype("uint8")
                Image.fromarray(noise).resize((96, 80)).save(folder / f"{number}.png")
    recipe_tree["source"]["model"] = str(tiny_model("vit"))
    recipe_tree["data"] = {"train": {"path": str(tmp_path / "train")},
                           "test": {"path": str(tmp_path / "test")}}  # fmt: skip
    del recipe_tree["finetune"]["pooling"]
    _, checked = check_recipe(Recipe.parse(recipe_tree))
    assert any("12 pictures of validation and test" in w for w in checked["warnings"]), checked
