"""Forecast from the features of a task: regressions, intervals, reach, and the model that ships."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.linear_model import Ridge

from hftl.analysis.advice_facts import TaskFeatures
from hftl.analysis.forecast import (
    SPREAD,
    ForecastModel,
    LinearFit,
    Reach,
    TrainingSettings,
    compute_gain_error,
    compute_score_error,
    explain_extrapolation,
    explain_no_forecast,
    forecast_scores,
    list_settings,
    list_values,
    load_forecast_model,
)
from hftl.config.recipe import Recipe
from hftl.runtime.run_folder import to_json

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import forecast as fitting  # noqa: E402  # pyright: ignore[reportMissingImports]
import forecast_runs  # noqa: E402  # pyright: ignore[reportMissingImports]

TASK = TaskFeatures(
    modality="text", train_rows=400, read_rows=800, classes=2, probe=0.7, classical=0.6,
    encoder="bert",
)  # fmt: skip
REACH = Reach(
    labels=(10, 500), classes=(2, 10), probe=(0.4, 0.95), gap=(-0.3, 0.2), modalities=["text"],
    encoders=["bert", "dinov2"],
)  # fmt: skip
TRAINING = TrainingSettings(
    rates={"text": {"lora": 1e-3, "full": 2e-4, "gradual": 2e-4}}, epochs=[(100, 20), (400, 10)]
)


def constant(value: float) -> LinearFit:
    """Return a fit that reads nothing."""
    return LinearFit(center=[0.0] * 4, scale=[1.0] * 4, weights=[0.0] * 4, bias=value)


def make_model() -> ForecastModel:
    """Return a model whose figures are easy to follow by hand."""
    quantiles = {"head": 1.0, "lora": 2.0}
    return ForecastModel(
        head=constant(0.01), over_baseline=constant(0.05), over_head={"lora": constant(0.04)},
        score_quantile=quantiles, gain_quantile=quantiles, reach=REACH, training=TRAINING,
        runs=50, data_sets=8, judged=46, coverage=0.9, gain_coverage=0.9, within_point=0.8,
        rule_within_point=0.1, adaptations=7, adaptations_better=0,
    )  # fmt: skip


def test_scores_and_intervals_by_hand() -> None:
    forecast = forecast_scores(TASK, make_model())
    lora, head = forecast.strategies
    assert [lora.strategy, head.strategy] == ["lora", "head"]
    share = (0.7 * 800 + 1) / 802
    error = math.sqrt(share * (1 - share) / 800 + SPREAD**2)
    assert head.score == pytest.approx(0.71) and lora.score == pytest.approx(0.75)
    assert head.score_pi90 == pytest.approx((0.71 - error, 0.71 + error))
    assert lora.score_pi90 == pytest.approx((0.75 - 2 * error, 0.75 + 2 * error))
    assert lora.gain == pytest.approx(0.09)
    assert compute_score_error(TASK) == pytest.approx(error)
    assert lora.gain_pi90[1] == pytest.approx(0.09 + 2 * compute_gain_error(TASK))


def test_values_of_a_task() -> None:
    assert list_values(TASK) == pytest.approx([0.7, math.log(200), math.log(2), -0.1])


def test_scores_stay_within_accuracy() -> None:
    perfect = TASK.model_copy(update={"probe": 1.0})
    best = forecast_scores(perfect, make_model()).strategies[0]
    assert best.score == 1.0 and best.score_pi90[1] == 1.0 and best.score_pi90[0] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"train_rows": 39}, "39 training rows"),
        ({"train_rows": 1000}, None),
        ({"train_rows": 1002}, "number of labels a class 501 is outside 10 to 500"),
        ({"classes": 41}, "number of labels a class 9.7561 is outside"),
        ({"classes": 11}, "number of classes 11 is outside 2 to 10"),
        ({"probe": 0.96, "classical": 0.9}, "the probe's accuracy out of fold 0.96 is outside"),
        ({"probe": 0.39, "classical": 0.4}, "the probe's accuracy out of fold 0.39 is outside"),
        ({"classical": 0.91}, "minus the probe's 0.21 is outside -0.3 to 0.2"),
        ({"classical": 0.39}, "minus the probe's -0.31 is outside -0.3 to 0.2"),
        ({"modality": "image"}, "fitted on text alone, not on image"),
        ({"encoder": "roberta"}, None),
    ],
)
def test_a_task_out_of_reach_is_named(changes: dict[str, Any], words: str | None) -> None:
    reason = explain_no_forecast(TASK.model_copy(update=changes), make_model())
    assert (reason is None) if words is None else words in str(reason)


def test_every_feature_out_of_reach_is_named() -> None:
    task = TASK.model_copy(update={"probe": 0.99, "classical": 0.5, "classes": 20})
    reason = str(explain_no_forecast(task, make_model()))
    assert reason.count("of the fitted runs") == 3 and reason.count("; ") == 2


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("bert", None),
        (None, None),
        ("roberta", "type roberta, and the forecast was fitted on bert"),
    ],
)
def test_another_kind_of_encoder_extrapolates(encoder: str | None, words: str | None) -> None:
    task = TASK.model_copy(update={"encoder": encoder})
    text = explain_extrapolation(task, make_model())
    assert text is None if words is None else words in str(text)


def test_settings_are_those_of_the_runs_of_so_many_rows() -> None:
    rate, epochs = "finetune.training.learning_rate", "finetune.training.num_train_epochs"
    assert list_settings("full", "text", 100, TRAINING) == {rate: 2e-4, epochs: 20}
    assert list_settings("full", "text", 101, TRAINING) == {rate: 2e-4, epochs: 10}
    assert list_settings("lora", "text", 4000, TRAINING) == {rate: 1e-3, epochs: 10}
    assert list_settings("gradual", "text", 400, TRAINING) == {
        rate: 2e-4, "finetune.gradual.epochs": 1, "finetune.gradual.final_epochs": 5,
    }  # fmt: skip
    assert list_settings("head", "text", 400, TRAINING) == {}


def test_the_arm_lines_of_a_forecast_are_arms_of_a_recipe() -> None:
    task = TASK.model_copy(update={"train_rows": 300})
    rows = forecast_scores(task, load_forecast_model()).strategies
    lines = "".join(f"\n  - {row.format_arm()}" for row in rows if row.strategy != "lora")
    lora = next(row for row in rows if row.strategy == "lora")
    assert lora.format_arm() == (
        "{lora: {finetune.training.learning_rate: 0.001, finetune.training.num_train_epochs: 10}}"
    )
    tree = forecast_runs.build_recipe("movies", 150, 0, Path("a"), Path("b"))
    expected = Recipe.parse(tree)
    tree["measure"]["arms"] = ["scratch", *yaml.safe_load(lines)]
    arms = {arm.name: arm.finetune for arm in Recipe.parse(tree).arms}
    assert arms == {arm.name: arm.finetune for arm in expected.arms}
    assert arms["full"].training["learning_rate"] == 2e-4 and arms["gradual"].gradual.epochs == 1


def make_runs(count: int = 60) -> list[fitting.KeptRun]:
    """Return runs of six data sets: `lora` is as far ahead of `head` as the probe is wrong."""
    rng = np.random.default_rng(0)
    runs: list[fitting.KeptRun] = []
    for number in range(count):
        probe, rows = rng.uniform(0.5, 0.9), int(rng.integers(50, 900))
        task = TASK.model_copy(
            update={"probe": probe, "train_rows": rows, "classical": probe - rng.uniform(0, 0.2)}
        )
        head = probe + rng.normal(0, 0.02)
        scores = {name: head + rng.normal(0, 0.01) for name in fitting.STRATEGIES}
        scores |= {"head": head, "lora": head + 0.2 * (1 - probe), "classical": task.classical}
        runs.append(fitting.KeptRun(f"task {number}", f"set {number % 6}", task, scores))
    return runs


def test_ridge_is_that_of_scikit_learn() -> None:
    runs = make_runs()
    values = np.array([run.scores["lora"] for run in runs])
    weights = np.random.default_rng(1).uniform(0.5, 2, len(runs))
    varied = [
        replace(run, features=run.features.model_copy(update={"classes": 2 + n % 3}))
        for n, run in enumerate(runs)
    ]
    x = np.array([list_values(run.features) for run in varied])
    fit = fitting.fit_ridge(varied, values, weights)
    z = (x - np.array(fit.center)) / np.array(fit.scale)
    expected = Ridge(fitting.PENALTY).fit(z, values, weights / weights.mean())
    ours = [fit.predict(list_values(run.features)) for run in varied]
    np.testing.assert_allclose(ours, expected.predict(z), atol=1e-9)
    # Where all have two classes, the feature that does not vary must not divide by 0.
    assert fitting.fit_ridge(runs, values, weights).predict(list_values(runs[0].features)) < 2


def test_data_sets_left_out_are_covered_and_the_better_strategy_is_chosen() -> None:
    summary = fitting.summarize(fitting.leave_out_data_sets(make_runs()))
    assert summary["runs"] == 60 and summary["data_sets"] == 6
    assert 0.82 < summary["coverage"] <= 1
    assert summary["choices"]["forecast"]["within_point"] > 0.9
    assert summary["choices"]["always head"]["within_point"] < 0.2


def test_a_mixed_task_and_its_data_sets_are_left_out_together() -> None:
    names = ["domains", *forecast_runs.SENTENCES, "bbc"]
    runs = [replace(run, corpus=name) for run, name in zip(make_runs(6), names, strict=True)]
    others = {
        own[0].corpus: [run.corpus for run in rest] for own, rest in fitting.split_by_corpus(runs)
    }
    assert others["domains"] == ["bbc"]
    assert others["movies"] == ["tweets", "amazon", "nyt", "bbc"]
    assert others["bbc"] == ["domains", "movies", "tweets", "amazon", "nyt"]
    assert fitting.count_data_sets(runs) == 5


def test_a_run_has_no_part_in_its_own_forecast() -> None:
    runs = make_runs(18)
    before = fitting.leave_out_data_sets(runs)
    odd = replace(runs[0], scores={name: 0.0 for name in runs[0].scores})
    after = fitting.leave_out_data_sets([odd, *runs[1:]])
    same = [one.half_width for one in before if one.run.corpus == "set 0"]
    assert same == [one.half_width for one in after if one.run.corpus == "set 0"]


def test_the_model_that_ships_is_that_of_the_kept_runs() -> None:
    records, _ = fitting.read_records(fitting.RESULTS)
    runs = [*fitting.read_cheap_runs(fitting.RESULTS / "forecast_runs.json"), *records]
    fitted, shipped = fitting.fit_with_intervals(runs), load_forecast_model()
    for run in runs:
        ours, theirs = (forecast_scores(run.features, m).strategies for m in (fitted, shipped))
        assert [row.strategy for row in ours] == [row.strategy for row in theirs]
        assert [row.score_pi90 for row in ours] == [pytest.approx(r.score_pi90) for r in theirs]
        assert [row.gain_pi90 for row in ours] == [pytest.approx(r.gain_pi90) for r in theirs]
        assert (explain_no_forecast(run.features, shipped) is None) == (
            run.features.train_rows >= fitting.MIN_ROWS
        )
        assert explain_extrapolation(run.features, shipped) is None
    assert shipped.runs == len(runs) >= 40 and shipped.data_sets == 8
    assert shipped.judged == sum(run.features.train_rows >= fitting.MIN_ROWS for run in runs)
    assert shipped.training == forecast_runs.TRAINING
    assert to_json(shipped.to_dict()) == fitting.MODEL.read_text(encoding="utf-8")


def test_the_stored_figures_are_as_good_as_they_are_said_to_be() -> None:
    stored = json.loads((fitting.RESULTS / "forecast.json").read_text("utf-8"))
    shipped = load_forecast_model()
    assert stored["runs"] == shipped.judged >= 40 and stored["coverage"] == shipped.coverage
    assert 0.8 <= stored["coverage"] <= 0.97 and 0.8 <= stored["gain_coverage"] <= 0.97
    choices = stored["choices"]
    assert choices["forecast"]["within_point"] == shipped.within_point >= 0.8
    assert all(choices["forecast"]["mean_gap"] <= one["mean_gap"] for one in choices.values())


def test_the_stored_figures_are_those_of_the_kept_runs() -> None:
    stored = json.loads((fitting.RESULTS / "forecast.json").read_text("utf-8"))
    records, _ = fitting.read_records(fitting.RESULTS)
    runs = [*fitting.read_cheap_runs(fitting.RESULTS / "forecast_runs.json"), *records]
    summary = fitting.summarize(fitting.leave_out_data_sets(runs))
    for key in ("runs", "scores", "coverage", "gain_coverage", "half_width"):
        assert summary[key] == pytest.approx(stored[key]), key
    for name, choice in summary["choices"].items():
        assert choice == pytest.approx(stored["choices"][name]), name
