"""Check multi-label and token classification, from the table to the card and through predict."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FILLER, bench_of, write_csv
from scipy.special import expit
from seqeval.metrics import f1_score
from transformers import AutoConfig

import hftl
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data import prepare
from hftl.data.prepare import PreparedData, prepare_data
from hftl.errors import DataError, NumericError, RecipeError
from hftl.finetune.arm_files import read_logits
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table
from hftl.measure.label_calibration import compute_probabilities
from hftl.measure.record import Record
from hftl.measure.thresholds import fit_thresholds
from hftl.models.features import predict_logits
from hftl.pipeline import pipeline
from hftl.pipeline.record_sections import build_data_section

pytestmark = pytest.mark.usefixtures("fast_reload")

MOODS, TAGS = "multi-label", "token-classification"


def make_moods(rows: int) -> list[dict[str, Any]]:
    """Return sentences that are warm, sad, both or neither, by their words."""
    draw = random.Random(0)
    moods_by_text = {}
    while len(moods_by_text) < rows:
        moods = [mood for mood in ("warm", "sad") if draw.random() < 0.5]
        words = draw.sample(FILLER, 4) + moods
        draw.shuffle(words)
        moods_by_text[" ".join(words)] = moods
    return [{"text": text, "label": moods} for text, moods in moods_by_text.items()]


def make_tagged(rows: int, begin: str = "B-FILM", inside: str = "I-FILM") -> list[dict[str, Any]]:
    """Return sentences whose film words are entities; the second of two neighbours is inside."""
    draw = random.Random(0)
    tags_by_words: dict[tuple[str, ...], list[str]] = {}
    while len(tags_by_words) < rows:
        words = draw.sample(FILLER, draw.randint(3, 8))
        entity = [word in ("film", "plot", "story", "actor") for word in words]
        tags_by_words[tuple(words)] = [
            (inside if before else begin) if here else "O"
            for here, before in zip(entity, [False, *entity], strict=False)
        ]
    return [{"text": list(words), "label": tags} for words, tags in tags_by_words.items()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_moods(path: Path, rows: list[dict[str, Any]], **more: Any) -> PreparedData:
    train = {"path": str(write_rows(path / "rows.jsonl", rows))}
    return prepare_data(Data.model_validate({"task": MOODS, "train": train} | more))


def make_recipe(
    model: Path, path: Path, task: str, finetune: Any = None, measure: Any = None, length: int = 16
) -> Recipe:
    training = {"num_train_epochs": 3, "learning_rate": 1e-2, "bf16": False}
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/tiny"},
        "data": {"task": task, "train": {"path": str(path)}, "max_length": length},
        "finetune": {"strategy": "head", "training": training} | (finetune or {}),
        "measure": {"seeds": [0, 1], "arms": []} | (measure or {}),
    })  # fmt: skip


# Runs


@pytest.fixture(scope="module")
def runs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Record]]:
    """Run each task; the tags are spelt with the entity first."""
    folder, results = tmp_path_factory.mktemp("runs"), {}
    for task, rows in ((MOODS, make_moods(100)), (TAGS, make_tagged(120, "FILM-B", "FILM-I"))):
        path = write_rows(folder / f"{task}.jsonl", rows)
        own, other = ("head", "full") if task == MOODS else ("full", "head")
        measure = {"arms": [other, "classical", "majority"]}
        recipe = make_recipe(bert, path, task, {"strategy": own}, measure)
        record = pipeline.run(recipe, folder / task)
        assert record is not None
        results[task] = folder / task, record
    return results


@pytest.mark.parametrize(
    ("task", "metric", "tag"),
    [(MOODS, "micro_f1", "text-classification"), (TAGS, "f1", "token-classification")],
)
def test_run_reports_the_tasks_metric_and_tag(
    runs: dict[str, tuple[Path, Record]], task: str, metric: str, tag: str
) -> None:
    folder, record = runs[task]
    assert record["metric"] == metric and record["reload_difference"] <= 1e-5
    scores = {row["arm"]: row["test"] for row in record["ladder"]}
    assert scores["classical"] > 0.8, "the words say the label"
    assert scores["head"] > scores["majority"]
    assert record.transfer_gain["ci95"] is not None
    card = (folder / "publish" / "README.md").read_text(encoding="utf-8")
    assert f"pipeline_tag: {tag}" in card
    # Its outcome is of accuracy, here of whole sets of labels, or of words outside of entities.
    assert record.advice is not None and record.advice.outcome is None


@pytest.mark.slow
@pytest.mark.parametrize("task", [MOODS, TAGS])
def test_trained_arms_run_on_the_task(task: str, bert: Path, tmp_path: Path) -> None:
    rows = make_moods(120) if task == MOODS else make_tagged(120, "ORG", "ORG")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    measure = {"arms": ["scratch", "full"],
               "scratch": {"learning_rates": [1e-2], "epochs_factor": 1}}  # fmt: skip
    recipe = make_recipe(bert, path, task, {"strategy": "lora"}, measure)
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] <= 1e-5
    assert {"lora", "full", "scratch"} <= {row["arm"] for row in record["ladder"]}


def test_multi_label_predictions_are_lists(
    runs: dict[str, tuple[Path, Record]], tmp_path: Path
) -> None:
    folder, _ = runs[MOODS]
    predictions = hftl.load(folder).predict(["the film was warm", "the film was sad and warm"])
    assert [sorted(prediction["scores"]) for prediction in predictions] == [["sad", "warm"]] * 2
    for prediction in predictions:
        assert prediction["label"] == [n for n in ("sad", "warm") if prediction["scores"][n] > 0.5]
    predict_table(str(folder), folder.parent / f"{MOODS}.jsonl", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and set(rows[0]) == {"text", "input.label", "label", "sad", "warm"}
    assert np.mean([row["label"] == sorted(row["input.label"]) for row in rows]) > 0.8


def test_thresholds_and_curves_of_validation_decide_what_is_predicted(
    bert: Path, tmp_path: Path
) -> None:
    draw = random.Random(1)
    rows = make_moods(260)
    for row in rows:
        row["label"] = [mood for mood in row["label"] if mood == "warm" or draw.random() < 0.5]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe(bert, path, MOODS, measure={"seeds": [0], "thresholds": "f1"})
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record.thresholds is not None and record.calibration is not None
    prepared = prepare.read_prepared_data(tmp_path / "run" / "phases" / "data")
    logits = {s: read_logits(tmp_path / "run" / "arms" / "head-seed0", s)
              for s in ("validation", "test")}  # fmt: skip
    labels = {s: prepared.encode_for_metrics(prepared.rows[s]) for s in logits}
    thresholds = fit_thresholds(logits["validation"], labels["validation"], "f1")
    assert list(record.thresholds.thresholds.values()) == pytest.approx(thresholds.tolist())
    assert thresholds[0] != 0.5, "half of the sad rows do not say so"
    config = AutoConfig.from_pretrained(tmp_path / "run" / "publish")
    assert config.label_thresholds == record.thresholds.thresholds
    predictions = hftl.load(tmp_path / "run").predict(
        [row.content[0] for row in prepared.rows["test"]], 0.8
    )
    above = expit(logits["test"].astype(float)) > thresholds
    assert [row["label"] for row in predictions] == [
        [name for name, holds in zip(prepared.names, row, strict=True) if holds] for row in above
    ]
    wrong = int((above != labels["test"]).sum())
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"{wrong} of {above.size} answers are wrong. Each label is decided at its" in report
    assert wrong != int(((logits["test"] > 0) != labels["test"]).sum())
    curves = record.calibration.labels
    assert curves is not None and [curve.method for curve in curves.values()] == ["platt"] * 2
    scores = [list(row["scores"].values()) for row in predictions]
    expected = compute_probabilities(logits["test"], list(curves.values()))
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert record.conformal is not None
    held = np.mean([set(names) <= set(row["set"])
                    for names, row in zip([r.label for r in prepared.rows["test"]], predictions,
                                          strict=True)])  # fmt: skip
    assert held == next(f.held.value for f in record.conformal.test if f.coverage == 0.8)
    after = record.thresholds.after["micro_f1"].value
    assert f" {after:.3f} [" in compare_models([str(tmp_path / "run")], None, None)


def test_every_word_is_predicted_a_tag(runs: dict[str, tuple[Path, Record]]) -> None:
    folder, _ = runs[TAGS]
    model = hftl.load(folder)
    (prediction,) = model.predict([["the", "film", "was", "very", "warm"]])
    assert len(prediction["label"]) == len(prediction["score"]) == 5
    (cut,) = model.predict([["film"] * 40])
    assert cut["label"][20:] == ["O"] * 20 and cut["score"][20:] == [None] * 20
    with pytest.raises(DataError, match="takes a list, got one str"):
        model.predict("the film")
    for given in (None, 3, {"text": ["the"]}, pa.table({"text": ["the"]})):
        with pytest.raises(DataError, match=f"a list of inputs, got a {type(given).__name__}"):
            model.predict(cast(Any, given))
    with pytest.raises(DataError, match="input 1 is 'the film', expected a list of words"):
        model.predict(["the film"])
    text = predict_table(str(folder), folder.parent / f"{TAGS}.jsonl", None)
    assert text is not None and len(text.splitlines()) == 121


def test_f1_is_of_entities_however_tags_are_spelt(runs: dict[str, tuple[Path, Record]]) -> None:
    folder, record = runs[TAGS]
    bio = {"FILM-B": "B-X", "FILM-I": "I-X", "O": "O"}
    scores = {}
    for entry in record["arms"]:
        arm = folder / "arms" / f"{entry['arm']}-seed{entry['seed']}"
        table = pq.read_table(arm / "predictions.parquet", filters=[("split", "=", "test")])
        pair = [[[bio[tag] for tag in row] for row in table[column].to_pylist()]
                for column in ("label", "prediction")]  # fmt: skip
        scores[entry["arm"], entry["seed"]] = f1_score(*pair)
        assert entry["metrics"]["test"]["f1"] == pytest.approx(f1_score(*pair))
    assert scores["majority", 0] == 0.0, "what predicts no entity scores nothing"
    assert 0 < scores["classical", 0]
    assert record["data"]["tag_scheme"]["name"] == "BIO"
    assert [row["label"] for row in record["classes"]["rows"]] == ["FILM"]
    assert "read from BIO tags" in (folder / "publish" / "README.md").read_text()
    published = scores["full", record["published_seed"]]
    assert f" {published:.3f} [" in compare_models([str(folder)], None, None)


def test_words_that_are_cut_count_as_missed(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": [*"the a plot of it is and".split(), str(i), "film"],
             "label": ["O", "O", "B-FILM", *["O"] * 5, "B-FILM"]} for i in range(40)]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe(bert, path, TAGS, measure={"seeds": [0]}, length=8)
    record = pipeline.run(recipe, tmp_path / "run", until="measure")
    assert record is not None
    assert any("are cut" in warning for warning in record["check"]["warnings"])
    metrics = record["arms"][0]["metrics"]["test"]
    assert metrics["recall"] == pytest.approx(0.5), "one of two lies behind the cut"
    assert metrics["precision"] == pytest.approx(1.0)


# Tables


def test_columns_of_zero_and_one_equal_lists(tmp_path: Path) -> None:
    rows = make_moods(60)
    cells = [(r["text"], int("sad" in r["label"]), int("warm" in r["label"])) for r in rows]
    table = write_csv(tmp_path / "rows.csv", ["text", "sad", "warm"], cells)
    train = {"path": str(table), "label": ["warm", "sad"]}
    columns = prepare_data(Data.model_validate({"task": MOODS, "train": train}))
    lists = prepare_moods(tmp_path, rows)
    assert columns.facts.fingerprint == lists.facts.fingerprint
    assert columns.names == lists.names == ["sad", "warm"]


def test_multi_label_shots_hold_each_class_and_nest(tmp_path: Path) -> None:
    prepared = prepare_moods(tmp_path, make_moods(120))
    few, more = prepared.draw_train_rows(5, 0), prepared.draw_train_rows(9, 0)
    assert {row.content for row in few} <= {row.content for row in more}
    for name in ("sad", "warm"):
        assert sum(name in row.label for row in few) >= 5  # pyright: ignore
    assert len(few) <= 10


def test_rows_of_two_labels_make_draws_of_other_sizes(tmp_path: Path) -> None:
    prepared = prepare_moods(tmp_path, make_moods(120))
    draws = {seed: prepared.draw_train_rows(9, seed) for seed in range(6)}
    recipe = make_recipe(tmp_path, tmp_path / "moods.jsonl", MOODS, {}, {"seeds": [*draws]})
    context: Any = SimpleNamespace(prepared=prepared, select_train_rows=draws.__getitem__)
    read = build_data_section(recipe, context).labels_read
    sizes = [len(rows) for rows in draws.values()]
    assert read is not None and len(set(sizes)) > 1
    assert (read.train_per_seed, read.train_spread) == (sizes[0], (min(sizes), max(sizes)))


def test_rare_names_stay_in_train_with_their_group(tmp_path: Path) -> None:
    rows = make_moods(60)
    for number, row in enumerate(rows):
        row["who"] = f"author {number // 4}"
    for number in (8, 9, 33):
        rows[number]["label"].append(f"rare {number % 2}")
    for seed in range(6):
        splits = prepare_moods(tmp_path, rows, group="who", seed=seed).rows
        groups = {split: {row.group for row in rows} for split, rows in splits.items()}
        assert not groups["train"] & (groups["test"] | groups["validation"])
        assert not groups["test"] & groups["validation"]
        assert sum("rare 0" in row.label for row in splits["train"]) == 1  # pyright: ignore


def test_column_that_is_never_on_is_named(tmp_path: Path) -> None:
    rows = [(f"text {i}", i % 2, (i + 1) % 2, 0) for i in range(40)]
    table = write_csv(tmp_path / "t.csv", ["text", "a", "b", "c"], rows)
    train = {"path": str(table), "label": ["a", "b", "c"]}
    with pytest.raises(DataError, match="label column 'c' is never 1"):
        prepare_data(Data.model_validate({"task": MOODS, "train": train}))


# Refusals


def test_tags_that_are_ids_are_refused_before_training(bert: Path, tmp_path: Path) -> None:
    ids = {"O": 0, "B-FILM": 1, "I-FILM": 2}
    rows = [row | {"label": [ids[tag] for tag in row["label"]]} for row in make_tagged(40)]
    recipe = make_recipe(bert, write_rows(tmp_path / "rows.jsonl", rows), TAGS)
    message = r"data\.train\.label: tags are ids \(0, 1, 2\).*Write the tags' names"
    with pytest.raises(DataError, match=message):
        pipeline.check_recipe(recipe)
    with pytest.raises(DataError, match=message):
        pipeline.run(recipe, tmp_path / "run")


def test_refuses_words_that_cannot_be_read(bert: Path, tmp_path: Path) -> None:
    rows = make_tagged(40)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError, match=r"^recipe: finetune\.pooling=mean makes one vec"):
        make_recipe(bert, path, TAGS, {"pooling": "mean"})
    with pytest.raises(RecipeError, match="max_length=2 leaves no room .* Use more than 2"):
        bench_of(make_recipe(bert, path, TAGS, length=2))
    rows[3]["label"].append("O")
    words = len(rows[3]["text"])
    recipe = make_recipe(bert, write_rows(path, rows), TAGS)
    with pytest.raises(DataError, match=rf"line 4: {words + 1} labels for {words} words"):
        bench_of(recipe)


@pytest.mark.parametrize("task", ["classification", MOODS, TAGS])
def test_outputs_that_are_not_finite_are_refused(task: str, bert: Path, tmp_path: Path) -> None:
    rows = make_tagged(40) if task == TAGS else make_moods(40)
    if task == "classification":
        rows = [{**row, "label": str(len(row["label"]))} for row in rows]
    context = bench_of(make_recipe(bert, write_rows(tmp_path / "rows.jsonl", rows), task))
    built = context.build_model("native", 0)
    with torch.no_grad():
        built.last_linear.bias.fill_(float("nan"))
    encoded = context.encode_rows(context.prepared.rows["test"])
    with pytest.raises(NumericError, match="not finite"):
        predict_logits(built.model, encoded, context.inputs, "cpu")
