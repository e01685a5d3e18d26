"""Multi-label and token classification, from the table to the card and back through predict."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FILLER, bench_of, write_csv
from seqeval.metrics import f1_score

import hftl
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data.prepare import prepare_data
from hftl.errors import DataError, NumericError, RecipeError
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table
from hftl.models.features import predict_logits
from hftl.pipeline import pipeline

TRAINING = {"num_train_epochs": 3, "learning_rate": 1e-2, "bf16": False}
LADDER = ["scratch", "head", "majority", "full"]
SEARCH = {"learning_rates": [1e-2], "epochs_factor": 1}


def several(rows: int) -> list[dict[str, Any]]:
    """Sentences that are warm, sad, both or neither, by their words."""
    draw = random.Random(0)
    moods_by_text = {}
    while len(moods_by_text) < rows:
        moods = [mood for mood in ("warm", "sad") if draw.random() < 0.5]
        words = draw.sample(FILLER, 4) + moods
        draw.shuffle(words)
        moods_by_text[" ".join(words)] = moods
    return [{"text": text, "label": moods} for text, moods in moods_by_text.items()]


def tagged(rows: int) -> list[dict[str, Any]]:
    """Sentences whose film words are entities, the second of two beside each other inside."""
    draw = random.Random(0)
    tags_by_words: dict[tuple[str, ...], list[str]] = {}
    while len(tags_by_words) < rows:
        words = draw.sample(FILLER, draw.randint(3, 8))
        tags, before = [], False
        for word in words:
            here = word in ("film", "plot", "story", "actor")
            tags.append(("I-FILM" if before else "B-FILM") if here else "O")
            before = here
        tags_by_words[tuple(words)] = tags
    return [{"tokens": list(words), "tags": tags} for words, tags in tags_by_words.items()]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(model: Path, path: Path, task: str, **more: Any) -> Recipe:
    columns = {"text": "tokens", "label": "tags"} if task == "token-classification" else {}
    tree = {
        "source": {"model": str(model), "published_as": "org/tiny"},
        "data": {"task": task, "train": {"path": str(path), **columns}, "max_length": 16},
        "finetune": {"training": TRAINING, **more},
        "measure": {"seeds": [0, 1], "scratch": SEARCH,
                    "arms": ["majority"] if more else LADDER},
    }  # fmt: skip
    return Recipe.parse(tree)


@pytest.mark.parametrize(
    ("task", "make", "metric"),
    [("multi-label", several, "micro_f1"), ("token-classification", tagged, "f1")],
)
def test_a_whole_run(
    task: str, make: Any, metric: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", make(120))
    record = pipeline.run(recipe(tiny_model(), path, task), tmp_path / "run")
    assert record is not None and record["metric"] == metric
    assert record["reload_difference"] <= 1e-5
    scores = {row["arm"]: row["test"] for row in record["ladder"]}
    assert scores["classical"] > 0.8, "the words say the label"
    assert scores["head"] > scores["majority"]
    assert record.transfer_gain["ci95"] is not None
    card = (tmp_path / "run" / "publish" / "README.md").read_text(encoding="utf-8")
    tag = "token-classification" if task == "token-classification" else "text-classification"
    assert f"pipeline_tag: {tag}" in card


def test_multi_label_predictions_come_back_as_lists(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", several(100))
    tree = recipe(tiny_model(), path, "multi-label", strategy="head", pooling="mean")
    pipeline.run(tree, tmp_path / "run")
    model = hftl.load(tmp_path / "run")
    predictions = model.predict(["the film was warm", "the film was sad and warm"])
    assert [sorted(prediction["scores"]) for prediction in predictions] == [["sad", "warm"]] * 2
    for prediction in predictions:
        assert prediction["label"] == [n for n in ("sad", "warm") if prediction["scores"][n] > 0.5]
    predict_table(str(tmp_path / "run"), path, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and set(rows[0]) == {"text", "input.label", "label", "sad", "warm"}
    right = np.mean([row["label"] == sorted(row["input.label"]) for row in rows])
    assert right > 0.8


def test_columns_of_zero_and_one_are_the_same_as_lists(tmp_path: Path) -> None:
    rows = several(60)
    lists = written(tmp_path / "rows.jsonl", rows)
    table = write_csv(tmp_path / "rows.csv", ["text", "sad", "warm"],
                      [(r["text"], int("sad" in r["label"]), int("warm" in r["label"]))
                       for r in rows])  # fmt: skip
    one, other = (
        prepare_data(Data.model_validate({"task": "multi-label", "train": train}))
        for train in ({"path": str(lists)}, {"path": str(table), "label": ["warm", "sad"]})
    )
    assert one.facts.fingerprint == other.facts.fingerprint
    assert one.names == other.names == ["sad", "warm"]


def test_multi_label_shots_hold_each_class_and_nest(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", several(120))
    prepared = prepare_data(
        Data.model_validate({"task": "multi-label", "train": {"path": str(path)}})
    )
    few, more = prepared.draw_train_rows(5, 0), prepared.draw_train_rows(9, 0)
    assert {row.content for row in few} <= {row.content for row in more}
    for name in ("sad", "warm"):
        assert sum(name in row.label for row in few) >= 5  # pyright: ignore
    assert len(few) <= 10


def test_rare_names_stay_in_train(tmp_path: Path) -> None:
    rows = several(60)
    rows[7]["label"].append("rare")
    rows[9]["label"] += ["rare", "rarer"]
    path = written(tmp_path / "rows.jsonl", rows)
    prepared = prepare_data(
        Data.model_validate({"task": "multi-label", "train": {"path": str(path)}})
    )
    held = [row for row in prepared.rows["train"] if "rarer" in row.label]  # pyright: ignore
    assert len(held) == 1 and "rare" in prepared.names


def test_words_come_back_with_a_tag_each(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", tagged(100))
    tree = recipe(tiny_model(), path, "token-classification", strategy="head")
    pipeline.run(tree, tmp_path / "run")
    model = hftl.load(tmp_path / "run")
    words = ["the", "film", "was", "very", "warm"]
    (prediction,) = model.predict([words])
    assert len(prediction["label"]) == len(prediction["score"]) == 5
    long = ["film"] * 40
    (cut,) = model.predict([long])
    assert cut["label"][20:] == ["O"] * 20 and cut["score"][20:] == [None] * 20
    with pytest.raises(DataError, match="takes a list, got one str"):
        model.predict("the film")
    with pytest.raises(DataError, match="input 1 is 'the film', expected a list of words"):
        model.predict(["the film"])
    text = predict_table(str(tmp_path / "run"), path, None)
    assert text is not None and len(text.splitlines()) == 101


SPELT = {
    "suffixed": {"B-FILM": "FILM-B", "I-FILM": "FILM-I", "O": "o"},
    "bare": {"B-FILM": "ORG", "I-FILM": "ORG", "O": "O"},
}


@pytest.mark.parametrize("spelling", SPELT)
def test_f1_is_of_entities_however_tags_are_spelt(
    spelling: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    spelt = SPELT[spelling]
    rows = [row | {"tags": [spelt[tag] for tag in row["tags"]]} for row in tagged(120)]
    path = written(tmp_path / "rows.jsonl", rows)
    tree = recipe(tiny_model(), path, "token-classification", strategy="full")
    tree = tree.model_copy(
        update={"measure": tree.measure.model_copy(update={"arms": ["classical", "majority"]})}
    )
    record = pipeline.run(tree, tmp_path / "run")
    assert record is not None
    back = {spelt["B-FILM"]: "B-X", spelt["I-FILM"]: "I-X", spelt["O"]: "O"}
    scores = {}
    for entry in record["arms"]:
        folder = tmp_path / "run" / "arms" / f"{entry['arm']}-seed{entry['seed']}"
        table = pq.read_table(folder / "predictions.parquet", filters=[("split", "=", "test")])
        pair = [[[back[tag] for tag in row] for row in table[column].to_pylist()]
                for column in ("label", "prediction")]  # fmt: skip
        expected = f1_score(*pair)
        assert entry["metrics"]["test"]["f1"] == pytest.approx(expected)
        scores[entry["arm"], entry["seed"]] = expected
    assert scores["majority", 0] == 0.0, "what finds no entity scores nothing"
    assert 0 < scores["classical", 0]
    noted = json.loads((tmp_path / "run" / "publish" / "hftl.json").read_text("utf-8"))
    name = "IO" if spelling == "bare" else "BIO"
    assert noted["data"]["tag_scheme"]["name"] == name
    assert [row["label"] for row in record["classes"]["rows"]] == [spelt["B-FILM"].split("-")[0]]
    assert f"read from {name} tags" in (tmp_path / "run" / "publish" / "README.md").read_text()
    text = compare_models([str(tmp_path / "run")], None, None)
    assert f" {scores['full', record['published_seed']]:.3f} [" in text
    model = hftl.load(tmp_path / "run")
    (cut,) = model.predict([["film"] * 40])
    assert cut["label"][20:] == [spelt["O"]] * 20


def test_tags_that_are_ids_are_refused_before_training(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Integer tags had f1 0.0 always, and f1 chooses the epoch."""
    ids = {"O": 0, "B-FILM": 1, "I-FILM": 2}
    rows = [row | {"tags": [ids[tag] for tag in row["tags"]]} for row in tagged(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    tree = recipe(tiny_model(), path, "token-classification")
    message = r"data\.train\.label: tags are ids \(0, 1, 2\).*Write the tags' names"
    with pytest.raises(DataError, match=message):
        pipeline.check_recipe(tree)
    with pytest.raises(DataError, match=message):
        pipeline.run(tree, tmp_path / "run")


def test_words_that_are_cut_count_as_missed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"tokens": [*"the a plot of it is and".split(), str(i), "film"],
             "tags": ["O", "O", "B-FILM", *["O"] * 5, "B-FILM"]} for i in range(40)]  # fmt: skip
    path = written(tmp_path / "rows.jsonl", rows)
    tree = recipe(tiny_model(), path, "token-classification", strategy="head")
    tree = tree.model_copy(update={"data": tree.data.model_copy(update={"max_length": 8})})
    record = pipeline.run(tree, tmp_path / "run")
    assert record is not None
    assert any("are cut" in warning for warning in record["check"]["warnings"])
    arm = next(a for a in record["arms"] if a["arm"] == "head")
    assert arm["metrics"]["test"]["recall"] == pytest.approx(0.5), "one of two lies behind the cut"
    assert arm["metrics"]["test"]["precision"] == pytest.approx(1.0)


def test_words_are_not_pooled(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: finetune\.pooling=mean makes one vec"):
        recipe(tiny_model(), tmp_path / "x.jsonl", "token-classification", pooling="mean")


def test_a_label_list_longer_than_the_words_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tagged(20)
    rows[3]["tags"].append("O")
    path = written(tmp_path / "rows.jsonl", rows)
    words = len(rows[3]["tokens"])
    with pytest.raises(DataError, match=rf"line 4: {words + 1} labels for {words} words"):
        bench_of(recipe(tiny_model(), path, "token-classification"))


def test_a_row_with_a_rare_name_goes_back_with_its_group(tmp_path: Path) -> None:
    rows = several(60)
    for number, row in enumerate(rows):
        row["who"] = f"author {number // 4}"
    for number in (8, 9, 33):
        rows[number]["label"].append(f"rare {number % 2}")
    path = written(tmp_path / "rows.jsonl", rows)
    data = {"task": "multi-label", "train": {"path": str(path)}, "group": "who"}
    for seed in range(6):
        splits = prepare_data(Data.model_validate(data | {"seed": seed})).rows
        groups = {split: {row.group for row in rows} for split, rows in splits.items()}
        assert not groups["train"] & (groups["test"] | groups["validation"])
        assert not groups["test"] & groups["validation"]


@pytest.mark.parametrize("task", ["classification", "multi-label", "token-classification"])
def test_outputs_that_are_not_finite_are_no_answers(
    task: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tagged(40) if task == "token-classification" else several(40)
    if task == "classification":
        rows = [{**row, "label": str(len(row["label"]))} for row in rows]
    path = written(tmp_path / "rows.jsonl", rows)
    bench = bench_of(recipe(tiny_model(), path, task))
    built = bench.build_model("native", 0)
    with torch.no_grad():
        built.last_linear.bias.fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        predict_logits(
            built.model, bench.encode_rows(bench.prepared.rows["test"]), bench.inputs, "cpu"
        )


def test_a_length_that_holds_no_word_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", tagged(40))
    tree = recipe(tiny_model(), path, "token-classification")
    tree = tree.model_copy(update={"data": tree.data.model_copy(update={"max_length": 2})})
    with pytest.raises(RecipeError, match="max_length=2 leaves no room .* Use more than 2"):
        bench_of(tree)


def test_a_column_that_is_never_on_is_named(tmp_path: Path) -> None:
    rows = [(f"text {i}", i % 2, (i + 1) % 2, 0) for i in range(40)]
    table = write_csv(tmp_path / "t.csv", ["text", "a", "b", "c"], rows)
    train = {"path": str(table), "label": ["a", "b", "c"]}
    with pytest.raises(DataError, match="label column 'c' is never 1"):
        prepare_data(Data.model_validate({"task": "multi-label", "train": train}))
