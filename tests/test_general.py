"""Load general data: drop copies, split documents into two halves, and read controls."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bench_of, pictures, sentences, write_csv
from PIL import Image

from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data import general as module
from hftl.data.general import GeneralData, load_general, read_general, write_general
from hftl.data.prepare import PreparedData, prepare_data
from hftl.data.rows import InputSpec, Row
from hftl.errors import DataError
from hftl.models.source import find_source
from hftl.pipeline import pipeline
from hftl.pipeline.corpora import build_leak_filter
from hftl.pipeline.run import Run

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]

HEADER = ["text", "document", "tone"]


def draw_rows(rows: int, each: int = 6) -> list[tuple[str, str, str]]:
    return [(text, f"d{i // each}", tone) for i, (text, tone) in enumerate(sentences(rows, 7))]


def load(
    path: Path, rows: list[Any], header: list[str] = HEADER, /, **more: Any
) -> tuple[GeneralData, PreparedData]:
    """General data of these rows beside the 160 sentences of the run."""
    run = write_csv(path / "run.csv", ["text", "label"], sentences(160))
    table = write_csv(path / "general.csv", header, rows)
    group = more.pop("group", None)
    bad = more.pop("bad_rows", "refuse")
    seed = more.pop("seed", 0)
    tree = {"train": {"path": str(run)}, "general": {"path": str(table), **more}, "seed": seed,
            "bad_rows": bad}  # fmt: skip
    prepared = prepare_data(Data.model_validate(tree))
    data = Data.model_validate(tree | {"group": group})
    return load_general(data, prepared, InputSpec()), prepared


def texts(rows: list[Row]) -> list[str]:
    return [row.content[0] for row in rows]


def describe_halves(general: GeneralData) -> dict[str, list[tuple[Any, ...]]]:
    return {
        half: [(row.content, row.label, row.group) for row in getattr(general, half)]
        for half in ("train_rows", "eval_rows")
    }


def test_no_document_straddles_and_halves_are_alike(tmp_path: Path) -> None:
    general, _ = load(tmp_path, draw_rows(240), label="document")
    used, measured = (
        {row.group for row in half} for half in (general.train_rows, general.eval_rows)
    )
    assert not used & measured and len(used | measured) == 40
    assert abs(len(general.train_rows) - len(general.eval_rows)) <= 6
    assert general.controls == ("document",) and general.classes == ()
    assert general.facts.documents == "document"
    assert general.get_control_values("document").tolist() == [
        row.group for row in general.eval_rows
    ]
    for name in set(general.get_control_values("document")):
        is_named = general.get_control_values("document") == name
        assert len(set(general.get_document_ids()[is_named])) == 1
    assert len(set(general.get_document_ids())) == len(measured)


def test_order_of_rows_does_not_matter_and_the_seed_does(tmp_path: Path) -> None:
    rows = draw_rows(240)
    first, _ = load(tmp_path, rows, label=["document", "tone"])
    random.Random(1).shuffle(rows)
    again, _ = load(tmp_path, rows, label=["document", "tone"])
    assert describe_halves(first) == describe_halves(again)
    assert first.facts == again.facts
    other, _ = load(tmp_path, rows, label=["document", "tone"], seed=1)
    assert set(texts(other.eval_rows)) != set(texts(first.eval_rows))
    assert other.facts.fingerprint != first.facts.fingerprint


def test_few_values_are_classes_and_separate_no_documents(tmp_path: Path) -> None:
    general, _ = load(tmp_path, draw_rows(240), label=["tone", "document"])
    assert general.classes == ("tone",) and general.facts.documents == "document"
    assert set(general.get_control_values("tone")) == {"negative", "positive"}
    alone, _ = load(tmp_path, draw_rows(240), label="tone")
    assert alone.facts.documents is None and all(row.group is None for row in alone.train_rows)
    assert len(set(alone.get_document_ids())) == len(alone.eval_rows) == 120


def test_group_of_the_run_separates_documents_where_the_table_has_it(tmp_path: Path) -> None:
    named, _ = load(tmp_path, draw_rows(240), group="document")
    assert named.facts.documents == "document" and named.controls == ()
    assert {r.group for r in named.train_rows}.isdisjoint(r.group for r in named.eval_rows)
    other, _ = load(tmp_path, draw_rows(240), group="author")
    assert other.facts.documents is None


def test_copies_of_each_other_and_of_the_run_are_dropped(tmp_path: Path) -> None:
    own = [(text, "d1", "tone") for text, _ in sentences(160)[:30]]
    rows = draw_rows(240)
    general, prepared = load(tmp_path, [*rows, *own, *rows[:9]], label="document")
    known = {t for split in prepared.rows.values() for t in texts(split)}
    remaining = texts(general.train_rows) + texts(general.eval_rows)
    overlap = len({row[0] for row in rows} & known)
    assert not known & set(remaining) and len(remaining) == len(set(remaining)) == 240 - overlap
    assert general.facts.duplicates >= 9 and general.facts.known == 30


def test_rows_with_two_labels_of_the_task_are_dropped(tmp_path: Path) -> None:
    rows = [(text, document, tone) for text, document, tone in draw_rows(240)]
    twice = [(text, "d0", "positive" if tone == "negative" else "negative")
             for text, _, tone in rows[:3]]  # fmt: skip
    header = ["text", "document", "label"]
    general, _ = load(tmp_path, [*rows, *twice], header, label=["document", "label"])
    remaining = texts(general.train_rows) + texts(general.eval_rows)
    assert not {text for text, _, _ in twice} & set(remaining)
    assert general.facts.conflicting == 6
    other, _ = load(tmp_path, [*rows, *twice], HEADER, label=["document", "tone"])
    assert other.facts.conflicting == 0 and other.facts.duplicates >= 3


@pytest.mark.parametrize("modality", ["text", "image"])
def test_near_copies_of_what_measures_are_not_used(
    recipe_tree: dict[str, Any], tmp_path: Path, tiny_model: Tiny, modality: str
) -> None:
    if modality == "text":
        near = [(f"{text}!", tone) for text, tone in sentences(160)]
        path = write_csv(tmp_path / "g.csv", ["text", "label"], [*near, *sentences(80, seed=9)])
    else:
        recipe_tree["source"]["model"] = str(tiny_model("vit"))
        recipe_tree["data"] = {"train": {"path": str(pictures(tmp_path / "train", 40))}}
        del recipe_tree["finetune"]["pooling"]
        path = pictures(tmp_path / "general", 40)
        for file in path.rglob("*.png"):
            pixels = np.asarray(Image.open(file))
            Image.fromarray(pixels + (pixels < 255)).save(file)
    recipe_tree["data"]["general"] = {"path": str(path), "label": "label"}
    recipe = Recipe.parse(recipe_tree)
    this = Run(recipe, tmp_path / "run", print)
    (tmp_path / "run").mkdir()
    context = pipeline._load_data(this, find_source(recipe.source), is_checked=False)
    general = pipeline._load_general_rows(this, context, is_checked=False)
    assert general is not None
    is_near = build_leak_filter(context)
    assert not any(map(is_near, general.train_rows)) and any(map(is_near, general.eval_rows))
    assert general.facts.near > 5 and len(general.train_rows) > 5


def test_rows_are_limited_in_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRAIN_ROWS", 31)
    general, _ = load(tmp_path, draw_rows(240), label="document", rows=50)
    assert len(general.eval_rows) == 48 and len(general.train_rows) == 30
    whole, _ = load(tmp_path, draw_rows(240), label="document")
    assert set(texts(general.eval_rows)) < set(texts(whole.eval_rows))


def test_stored_general_data_are_read_again(tmp_path: Path) -> None:
    for label in (None, ["document", "tone"]):
        general, _ = load(tmp_path, draw_rows(240), label=label)
        write_general(general, tmp_path)
        again = read_general(tmp_path)
        assert again == general


def test_blank_lines_separate_texts_and_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [[text] for text, _ in sentences(60, 7)]
    general, _ = load(tmp_path, [*rows[:30], [""], *rows[30:]], ["text"])
    assert general.facts.rows_read == 60
    broken = [*draw_rows(60), ("a text", "", "")]
    with pytest.raises(DataError, match=r"general.csv line 62: the label is empty"):
        load(tmp_path, broken, label="document")
    skipped, _ = load(tmp_path, broken, label="document", bad_rows="skip")
    assert skipped.facts.bad_rows == 1 and skipped.facts.rows_read == 61


def test_data_that_cannot_measure_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'topic'.*it has text, document, tone") as why:
        load(tmp_path, draw_rows(60), label="topic")
    assert "data.general" in str(why.value.fix)
    with pytest.raises(DataError, match="10 rows to measure forgetting on, of 20 read"):
        load(tmp_path, draw_rows(20))
    with pytest.raises(DataError, match="0 rows to measure"):
        load(tmp_path, [(text, "a", "b") for text, _ in sentences(160)])
    with pytest.raises(DataError, match="'tone' has one value only, 'same'"):
        load(tmp_path, [(t, d, "same") for t, d, _ in draw_rows(60)], label="tone")


def test_texts_are_split_into_words_where_words_are_tagged(tmp_path: Path) -> None:
    words = [[" ".join(text.split())] for text, _ in sentences(60, 7)]
    run = write_csv(tmp_path / "run.csv", ["text", "label"], sentences(160))
    general = write_csv(tmp_path / "general.csv", ["text"], words)
    tree = {"train": {"path": str(run)}, "general": {"path": str(general)}}
    prepared = prepare_data(Data.model_validate(tree))
    data = Data.model_validate(tree | {"task": "token-classification"})
    loaded_general = load_general(data, prepared, InputSpec())
    assert all(len(row.content) == 7 for row in loaded_general.eval_rows)


def test_pictures_of_a_folder_with_and_without_classes(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "general", 30)
    run = pictures(tmp_path / "run", 12)
    for path in sorted((run / "dark").iterdir())[:3]:
        path.unlink()
    reading = InputSpec("image", 8)
    for label, values in ((None, None), ("label", {"light", "dark"})):
        tree = {"train": {"path": str(run)}, "general": {"path": str(folder), "label": label}}
        data = Data.model_validate(tree)
        prepared = prepare_data(data, reading)
        general = load_general(data, prepared, reading)
        own = {row.content for rows in prepared.rows.values() for row in rows}
        rows = [*general.train_rows, *general.eval_rows]
        assert len(rows) == 60 - general.facts.known and general.facts.known > 0
        assert not own & {row.content for row in rows}
        assert all(row.size == (40, 36) and row.table == "general" for row in rows)
        if values:
            assert set(general.get_control_values("label")) == values and general.classes == (
                "label",
            )


def test_the_label_of_train_is_no_control(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["data"]["train"]["label"] = "stars"
    recipe_tree["data"]["general"] = {"path": "g.csv", "text": "body"}
    table = Recipe.parse(recipe_tree).data.general
    assert table is not None and table.label is None and table.label_columns == []
    recipe_tree["data"]["general"]["label"] = ["topic"]
    again = Recipe.parse(Recipe.parse(recipe_tree).to_dict()).data.general
    assert again is not None and again.label_columns == ["topic"]


def test_general_rows_are_encoded_as_others(
    recipe_tree: dict[str, Any], tmp_path: Path, tiny_model: Tiny
) -> None:
    general, _ = load(tmp_path, draw_rows(60))
    context = bench_of(Recipe.parse(recipe_tree))
    context.general = general
    encoded = context.encode_rows(general.train_rows)
    assert len(encoded) == len(general.train_rows) and all(row["input_ids"] for row in encoded)
    assert context.with_encoder(context.source, "w", None, ()).general is general
    assert np.all([len(row["input_ids"]) <= 16 for row in encoded])
