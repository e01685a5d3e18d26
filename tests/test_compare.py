"""Compare several models on the same items, each base loaded once."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from conftest import pictures, sentences, tiny_tokenizer, write_csv
from support.planted_defects import rewrite, save, wrapped
from support.published_model import open_context, publish_model
from support.records import make_record

import hftl
from hftl import cli
from hftl.config.recipe import Recipe
from hftl.data import prepare
from hftl.errors import DataError, RecipeError
from hftl.inference.compare import compare_models, count_saved_parameters
from hftl.inference.multi_adapter import iterate_predictors
from hftl.measure.metrics import METRICS
from hftl.measure.scores import compare_pair, score_with_interval
from hftl.measure.statistics import estimate_item_error
from hftl.runtime import finished_files
from hftl.runtime.run_folder import to_json

pytestmark = pytest.mark.usefixtures("fast_reload")

NAMES = ["negative", "positive"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "two": {"target_modules": ["query", "value"]},
    "more": {"target_modules": ["key"], "use_rslora": True},
    "pooler": {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]},
    "bias": {"target_modules": ["query"], "bias": "lora_only"},
}


@pytest.fixture(scope="module")
def adapters(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return adapters on one BERT, and one whose labels are in another order."""
    place = tmp_path_factory.mktemp("adapters")
    base = tiny_model("bert")
    result = {}
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        model = wrapped(base, "bert", {"task_type": "SEQ_CLS", **settings}, seed=number)
        result[name] = save(model, place / name)
        name_labels(result[name], NAMES)
        rewrite(result[name] / "adapter_config.json", base_model_name_or_path=str(base),
                revision=None)  # fmt: skip
    result["turned"] = Path(shutil.copytree(result["two"], place / "turned"))
    name_labels(result["turned"], NAMES[::-1])
    return result


def name_labels(folder: Path, names: list[str]) -> None:
    rewrite(folder / "config.json", id2label={str(i): name for i, name in enumerate(names)},
            label2id={name: i for i, name in enumerate(names)})  # fmt: skip


@pytest.fixture
def loaded_from(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the folders that transformers loads models from."""
    from transformers import PreTrainedModel

    result: list[str] = []
    load = PreTrainedModel.from_pretrained.__func__

    def counted(kind: Any, place: Any, *args: Any, **more: Any) -> Any:
        result.append(str(place))
        return load(kind, place, *args, **more)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return result


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_each_predicts_as_it_does_alone_and_the_base_is_loaded_once(
    adapters: dict[str, Path], loaded_from: list[str], tiny_model: Callable[..., Path]
) -> None:
    folders = list(adapters.values())
    texts = [text for text, _ in sentences(12)]
    alone = [hftl.load(folder).predict(texts) for folder in folders]
    assert len(loaded_from) == len(folders)
    loaded_from.clear()
    together = {number: model.predict(texts) for number, model in iterate_predictors(folders)}
    assert loaded_from == [str(tiny_model("bert"))]
    assert sorted(together) == list(range(len(folders)))
    for number, expected in enumerate(alone):
        for mine, right in zip(together[number], expected, strict=True):
            assert mine["label"] == right["label"]
            assert mine["scores"] == pytest.approx(right["scores"], abs=1e-6)
    spread = {tuple(round(row["scores"]["positive"], 4) for row in result) for result in alone}
    assert len(spread) == len(folders), "the adapters must differ for this to mean anything"


def test_another_base_is_loaded_too(
    adapters: dict[str, Path],
    loaded_from: list[str],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    model = wrapped(tiny_model("bert"), "bert", {"task_type": "SEQ_CLS",
                                                 "target_modules": ["query"]})  # fmt: skip
    model.merge_and_unload().save_pretrained(whole)
    tiny_tokenizer(whole)
    name_labels(whole, NAMES)
    other = Path(shutil.copytree(adapters["pooler"], tmp_path / "other"))
    rewrite(other / "adapter_config.json", base_model_name_or_path=str(tiny_model("bert", True)))
    loaded_from.clear()
    folders = [adapters["two"], other, whole, adapters["more"]]
    assert sorted(number for number, _ in iterate_predictors(folders)) == [0, 1, 2, 3]
    assert len(loaded_from) == 3


def test_table_holds_the_scores_of_predict(
    adapters: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    models = [str(adapters[name]) for name in ("two", "turned", "pooler", "more")]
    text = compare_models(models, table, tmp_path / "compared.csv")
    lines = rows_of(tmp_path / "compared.csv")
    assert (tmp_path / "compared.png").stat().st_size > 1000
    right = np.array([label for _, label in sentences(160)])
    first = None
    for model, line in zip(models, lines, strict=True):
        answers = hftl.load(model).predict([text for text, _ in sentences(160)])
        hits = (np.array([row["label"] for row in answers]) == right).astype(float)
        first = hits if first is None else first
        assert float(line["value"]) == pytest.approx(hits.mean())
        assert line["metric"] == "accuracy" and f"{hits.mean():.3f}" in text
        interval = scipy.stats.binomtest(int(hits.sum()), 160).proportion_ci(method="wilson")
        assert [float(line["low"]), float(line["high"])] == pytest.approx(interval)
        if model != models[0]:
            apart = hits - first
            assert float(line["difference"]) == pytest.approx(apart.mean())
            interval = scipy.stats.t.interval(0.95, 159, apart.mean(), apart.std(ddof=1) / 160**0.5)
            result = [float(line["difference_low"]), float(line["difference_high"])]
            assert result == pytest.approx(interval)
    # Labels in another order are the other answer, not another name of the same.
    assert float(lines[0]["value"]) + float(lines[1]["value"]) == pytest.approx(1)
    assert int(lines[0]["parameters"]) == 3 * 2 * 2 * 4 * 16 + 2 * 17
    assert "160 items" in text


def test_parameters_are_those_of_the_folder(adapters: dict[str, Path]) -> None:
    assert count_saved_parameters(adapters["pooler"]) == 3 * 2 * 4 * 16 + 16 * 17 + 2 * 17


# --- runs --------------------------------------------------------------------------------------


def as_run(folder: Path, model: Path, task: str, data: dict[str, Any], pooling: str) -> Path:
    """Write a run folder without training."""
    folder.mkdir(parents=True)
    bench, recipe = open_context(model, folder, pooling, "lora", data)
    publish_model(bench, recipe, folder)
    rows = folder / "phases" / "data"
    rows.mkdir(parents=True)
    prepare.write_prepared_data(bench.prepared, rows, "")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    facts = {"task": task, "labels": bench.prepared.names,
             "fingerprint": bench.prepared.facts.fingerprint}  # fmt: skip
    record = {"data": facts, "metric": "f1", "recipe": recipe.to_dict(), "source": {}}
    whole = make_record(task=task)
    whole |= {"data": whole["data"] | facts, "recipe": recipe.to_dict()}
    (folder / "record.json").write_text(to_json(whole))
    (folder / "publish" / "hftl.json").write_text(to_json(record))
    finished_files.write_finished_files(folder)
    return folder


def test_runs_of_the_same_data_are_scored_on_their_test_items(
    table: Path, tiny_model: Callable[..., Path], loaded_from: list[str], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "max_length": 16}
    poolings = ("mean", "cls", "native")
    runs = [as_run(tmp_path / p, tiny_model(), "classification", data, p) for p in poolings]
    loaded_from.clear()
    compare_models([str(run) for run in runs], None, tmp_path / "c.csv")
    # The encoder alone, and the stock class around it.
    assert len(loaded_from) == 2
    lines = rows_of(tmp_path / "c.csv")
    rows = prepare.read_prepared_data(runs[0] / "phases" / "data").rows["test"]
    labels = np.array([int(row.label == "positive") for row in rows])
    for run, line in zip(runs, lines, strict=True):
        answers = hftl.load(run).predict([row.content[0] for row in rows])
        result = np.array([int(row["label"] == "positive") for row in answers])
        assert line["metric"] == "f1"
        assert float(line["value"]) == pytest.approx(
            METRICS["classification"]["f1"].score(labels, result)
        )


def test_runs_of_pictures(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 14)
    data = {"train": {"path": str(folder)}}
    run = as_run(tmp_path / "run", tiny_model("vit"), "classification", data, "native")
    by_itself = compare_models([str(run), str(run / "publish")], folder, tmp_path / "c.csv")
    assert "28 items" in by_itself
    splits = prepare.read_prepared_data(run / "phases" / "data").rows
    known = len(splits["train"]) + len(splits["validation"])
    assert 0 < known < 28
    assert by_itself.count("warning") == 1
    assert f"{known} of these items are in train or validation of {run}," in by_itself
    answers = hftl.load(run).predict(sorted(folder.rglob("*.png")))
    truth = [path.parent.name for path in sorted(folder.rglob("*.png"))]
    labels, result = (np.array([int(name == "light") for name in names])
                     for names in (truth, [row["label"] for row in answers]))  # fmt: skip
    expected = METRICS["classification"]["f1"].score(labels, result)
    assert [float(line["value"]) for line in rows_of(tmp_path / "c.csv")] == pytest.approx(
        [expected] * 2
    )
    assert "items" in compare_models([str(run)], None, None)


@pytest.mark.slow
def test_trained_run_scores_as_in_its_record(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    recipe_tree["measure"] |= {"seeds": [0], "arms": ["head"]}
    runs = []
    for r in (2, 8):
        recipe_tree["finetune"]["lora"] = {"r": r}
        runs.append(str(tmp_path / f"r{r}"))
        hftl.run(Recipe.parse(recipe_tree), runs[-1])
    compare_models(runs, None, tmp_path / "c.csv")
    for run, line in zip(runs, rows_of(tmp_path / "c.csv"), strict=True):
        record = json.loads((Path(run) / "record.json").read_text())
        (own,) = [arm for arm in record["arms"] if arm["arm"] == record["own_arm"]]
        assert float(line["value"]) == pytest.approx(own["metrics"]["test"][line["metric"]])


def test_incomparable_models_are_refused(
    adapters: dict[str, Path], table: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    two = str(adapters["two"])
    with pytest.raises(RecipeError, match="Give a table"):
        compare_models([two], None, None)
    with pytest.raises(RecipeError, match="suffix"):
        compare_models([two], table, tmp_path / "c.pdf")
    with pytest.raises(DataError, match="does not exist"):
        compare_models([two], tmp_path / "none.csv", None)
    other = Path(shutil.copytree(adapters["two"], tmp_path / "other"))
    name_labels(other, ["negative", "neutral"])
    with pytest.raises(RecipeError, match="has the labels negative, neutral, and the first"):
        compare_models([two, str(other)], table, None)
    strange = write_csv(tmp_path / "s.csv", ["text", "label"], [("a film", "odd"), ("b", "bad")])
    with pytest.raises(DataError, match="the label 'odd' is none of the model's"):
        compare_models([two], strange, None)
    data = {"train": {"path": str(table)}, "max_length": 16}
    runs = [as_run(tmp_path / f"run{seed}", tiny_model(), "classification",
                   data | {"seed": seed}, "mean") for seed in (0, 1)]  # fmt: skip
    with pytest.raises(RecipeError, match="other data or splits"):
        compare_models([str(run) for run in runs], None, None)
    record = json.loads((runs[1] / "record.json").read_text("utf-8"))
    record["data"]["task"] = "regression"
    (runs[1] / "record.json").write_text(json.dumps(record), "utf-8")
    finished_files.write_finished_files(runs[1])
    with pytest.raises(RecipeError, match="is of the task classification and .* of regression"):
        compare_models([str(run) for run in runs], None, None)
    tagger = {"task_type": "TOKEN_CLS", "target_modules": ["query"]}
    words = save(wrapped(tiny_model(), "bert", tagger), tmp_path / "words")
    rewrite(words / "adapter_config.json", base_model_name_or_path=str(tiny_model()), revision=None)
    rewrite(words / "config.json", architectures=["BertForTokenClassification"])
    name_labels(words, NAMES)
    with pytest.raises(RecipeError, match="Compare models of one task"):
        compare_models([two, str(words)], table, None)


def test_exit_codes(
    adapters: dict[str, Path], table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def call(*words: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["hftl", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(str(stop.value.code))

    two, more = adapters["two"], adapters["more"]
    assert call(two, more, "--data", table, "--output", tmp_path / "c.png") == 0
    assert (tmp_path / "c.png").exists() and not (tmp_path / "c.csv").exists()
    assert "against the first" in capsys.readouterr().out
    assert call(two, more) == 2
    assert call(two, tmp_path / "no" / "where", "--data", table) == 2
    assert call(two, "--data", tmp_path / "none.csv") == 3
    assert call(two, "somebody/unknown", "--data", table) == 5


# --- figures -----------------------------------------------------------------------------------


def test_error_over_items_is_students_t() -> None:
    draw = np.random.default_rng(0)
    for size in (2, 3, 50):
        values = draw.normal(3, 2, size)
        expected = scipy.stats.t.interval(
            0.9, size - 1, values.mean(), values.std(ddof=1) / size**0.5
        )
        error = estimate_item_error(values)
        assert error is not None
        assert error.interval(values.mean(), 0.9) == pytest.approx(expected)
    assert estimate_item_error(np.array([1.0])) is None
    for wrong in (np.zeros((2, 2)), np.array([1.0, np.nan])):
        with pytest.raises(ValueError):
            estimate_item_error(wrong)
    with pytest.raises(ValueError):
        error.interval(0.0, 1)


def test_equal_predictions_keep_an_interval() -> None:
    metric = METRICS["classification"]["accuracy"]
    labels, units = np.arange(60) % 2, np.arange(60)
    result = score_with_interval(metric, labels, labels, units)
    wilson = scipy.stats.binomtest(60, 60).proportion_ci(method="wilson")
    assert result.value == 1 and result.ci95 == pytest.approx(wilson)
    same = compare_pair(metric, labels, labels, labels, units)
    assert (same.value, same.ci95) == (0.0, (-0.05, 0.05))
    assert score_with_interval(metric, labels, labels, np.zeros(60, dtype=int)).ci95 is None


@pytest.mark.parametrize(("rows", "right"), [(100, 0.97), (100, 0.9), (400, 0.97), (60, 0.5)])
def test_the_interval_of_an_accuracy_covers_it(rows: int, right: float) -> None:
    # The t interval covers .84 at .97 of 100 rows.
    metric, labels = METRICS["classification"]["accuracy"], np.zeros(rows, int)
    covered = 0.0
    for hits in range(rows + 1):
        result = score_with_interval(
            metric, labels, (np.arange(rows) >= hits).astype(int), np.arange(rows)
        )
        low, high = result.ci95
        assert 0 <= low <= high <= 1
        covered += scipy.stats.binom.pmf(hits, rows, right) * (low <= right <= high)
    assert 0.93 <= covered <= 0.985


@pytest.mark.parametrize("right", [0.5, 0.93])
def test_the_interval_of_an_accuracy_over_groups_covers_it(right: float) -> None:
    # 40 groups of 1 to 9 rows that are right together, a fifth of the time.
    draw = np.random.default_rng(0)
    units = np.repeat(np.arange(40), 1 + np.arange(40) % 9)
    metric, labels = METRICS["classification"]["accuracy"], np.zeros(len(units), int)
    covered = 0
    for _ in range(300):
        whole, single = draw.random(40)[units] < right, draw.random(len(units)) < right
        hits = np.where(draw.random(40)[units] < 0.2, whole, single)
        low, high = score_with_interval(metric, labels, 1 - hits.astype(int), units).ci95
        covered += low <= right <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_the_interval_of_another_share_stays_between_0_and_1() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(3, size=80)
    predictions = np.where(draw.random(80) < 0.97, labels, (labels + 1) % 3)
    for name in ("f1", "balanced_accuracy"):
        result = score_with_interval(
            METRICS["classification"][name], labels, predictions, np.arange(80)
        )
        low, high = result.ci95
        assert 0.85 < low < result.value < high < 1


def test_differences_are_positive_where_the_model_is_better() -> None:
    draw = np.random.default_rng(1)
    labels = draw.normal(size=80)
    near, far = labels + 0.1, labels + draw.normal(size=80)
    rmse = METRICS["regression"]["rmse"]
    result = compare_pair(rmse, labels, near, far, np.arange(80))
    assert result.value > 0 and result.ci95[0] > 0
    turned = compare_pair(rmse, labels, far, near, np.arange(80))
    assert turned.value == -result.value
    assert turned.ci95 == pytest.approx([-result.ci95[1], -result.ci95[0]])


def test_rows_of_one_group_count_as_one_unit() -> None:
    metric = METRICS["classification"]["accuracy"]
    labels = np.zeros(40, dtype=int)
    predictions = np.repeat(np.arange(4) % 2, 10)
    widths = []
    for units in (np.arange(40), np.repeat(np.arange(4), 10)):
        low, high = score_with_interval(metric, labels, predictions, units).ci95
        widths.append(high - low)
    assert widths[1] > 2.5 * widths[0]
