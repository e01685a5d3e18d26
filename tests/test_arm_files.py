"""Write and read arms: scores are computed once, and missing ones added later."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences
from support.records import make_record, render
from test_baselines import build_context

from hftl.errors import NumericError
from hftl.finetune.arm_files import METRICS_FILE, read_metrics_file, read_predictions, write_arm
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import build_ladder, find_best_seed, read_arms
from hftl.measure.metrics import METRICS, Metric, accuracy
from hftl.measure.record import Record

BUILT_IN = METRICS["classification"]


@pytest.fixture(scope="module")
def context(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentContext:
    return build_context(bert, tmp_path_factory.mktemp("data"), sentences(80))


@pytest.fixture
def arm(context: ExperimentContext, tmp_path: Path) -> Path:
    """Write the folder of one arm and seed."""
    folder = tmp_path / "c-seed0"
    folder.mkdir()
    write_arm(folder, context.prepared, solve_classical(context, 0), "c", "c", 0)
    return folder


def count_errors(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.sum(labels != predictions))


def test_scores_of_an_arm_are_read_and_not_computed_again(
    context: ExperimentContext, arm: Path
) -> None:
    tree = json.loads((arm / METRICS_FILE).read_text("utf-8"))
    tree["metrics"]["test"]["accuracy"] = tree["metrics"]["validation"]["accuracy"] = 0.125
    (arm / METRICS_FILE).write_text(json.dumps(tree), encoding="utf-8")
    test, (file,) = read_arms({"c": [arm]}, context.prepared, BUILT_IN["accuracy"])
    assert file == read_metrics_file(arm) and file.get_score("test", "accuracy") == 0.125
    (row,) = build_ladder(BUILT_IN["accuracy"], [file], test, "c")
    assert row.test == row.validation == 0.125
    assert "timings" not in file.drop_timings().to_dict()


def test_metric_that_the_arm_did_not_compute_is_computed_from_its_predictions(
    context: ExperimentContext, arm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names another metric now, and hftl has got a new one since."""
    monkeypatch.setitem(BUILT_IN, "younger", Metric("younger", score=lambda *pair: 0.5))
    errors = Metric("evaluate:errors", lower_is_better=True, maximum=math.inf, score=count_errors)
    test, (file,) = read_arms({"c": [arm]}, context.prepared, errors)
    predictions = read_predictions(arm, context.prepared)
    for split, by_name in file.metrics.to_dict().items():
        labels = context.prepared.encode_for_metrics(context.prepared.rows[split])
        assert by_name["accuracy"] == accuracy(labels, predictions[split])
        assert by_name["evaluate:errors"] == count_errors(labels, predictions[split])
        assert by_name["younger"] == 0.5
    assert file.metrics.to_dict().keys() == {"validation", "test"}
    assert (test.predictions["c"] == predictions["test"]).all()
    assert "evaluate:errors" not in read_metrics_file(arm).metrics.test


def test_metric_that_is_not_finite_is_null_and_no_other_figure_is_lost(
    context: ExperimentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undefined = Metric("undefined", score=lambda *pair: math.nan)
    monkeypatch.setitem(BUILT_IN, "undefined", undefined)
    write_arm(tmp_path, context.prepared, solve_classical(context, 0), "c", "c", 0)
    test, (file,) = read_arms({"c": [tmp_path]}, context.prepared, BUILT_IN["accuracy"])
    assert file.metrics.test["undefined"] is None
    assert find_best_seed(BUILT_IN["accuracy"], [file], "c") == 0
    # Figures are not made of it.
    with pytest.raises(NumericError, match="c seed 0: undefined on validation is not"):
        build_ladder(undefined, [file], test, "c")


def test_undefined_metric_of_the_recipe_names_the_arm(
    context: ExperimentContext, arm: Path
) -> None:
    def refuse(labels: np.ndarray, predictions: np.ndarray) -> float:
        raise NumericError("measure.metric: evaluate:x is nan", "Use a built-in metric")

    with pytest.raises(NumericError, match="c seed 0 on validation: measure.metric: evaluate:x is"):
        read_arms({"c": [arm]}, context.prepared, Metric("evaluate:x", score=refuse))


def test_record_with_a_score_that_is_null_is_read_and_shown() -> None:
    tree = make_record()
    tree["arms"][0]["metrics"]["test"]["f1"] = None
    tree["test_metrics"] = {"accuracy": 0.7254, "f1": None}
    record = Record.parse(tree)
    assert json.loads(record.to_json())["arms"][0]["metrics"]["test"]["f1"] is None
    card = render(tree)
    assert "means over seeds: f1 -." in card and "name: test f1" not in card
