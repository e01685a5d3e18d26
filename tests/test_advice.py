"""Advise by rules and forecast, say where they differ, and hold them against what came."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.records import make_record, render
from test_forecast import TASK, constant, make_model
from typer.testing import CliRunner

from hftl import console
from hftl.analysis.advice import advise, apply_label_rule, choose_by_labels
from hftl.analysis.advice_facts import AdviceSection
from hftl.analysis.facts import AnalysisSection
from hftl.card.advice import describe_advice
from hftl.cli import app
from hftl.measure.advice_outcome import count_history, judge_advice
from hftl.measure.record import Record

LORA_ARM = (
    "{lora: {finetune.training.learning_rate: 0.001, finetune.training.num_train_epochs: 10}}"
)


@pytest.mark.parametrize(
    ("labels", "strategy", "words"),
    [
        (0, "zero_shot", "adaptation"),
        (99, "head", "a linear head"),
        (100, "partial", "one or two blocks"),
        (999, "partial", "one or two blocks"),
        (1000, "partial", "layer_decay"),
        (9999, "partial", "upper half"),
        (10_000, "full", "whole encoder"),
    ],
)
def test_rule_by_labels(labels: int, strategy: str, words: str) -> None:
    rule = apply_label_rule(labels, "a class")
    assert rule.strategy == strategy and words in rule.text and "arXiv" in rule.source
    assert labels == 0 or choose_by_labels(labels) == strategy


def make_section(**changes: Any) -> AdviceSection:
    """Return the advice for a task of 200 labels a class, whose recipe trains `head`."""
    task = TASK.model_copy(update=changes)
    return advise(200, "a class", task, make_model(), "head")


def test_the_forecast_wins_over_the_rule_of_thumb_and_both_are_named() -> None:
    section = make_section()
    assert section.strategy == "lora" and section.no_forecast is None
    assert [rule.name for rule in section.rules] == ["labels", "probe", "forecast"]
    thumb, own = section.conflicts
    assert "rule of thumb says partial, the forecast lora" in thumb
    assert "80%" in thumb and "10%" in thumb
    assert own == (
        "the recipe trains head, the advice is lora, 4.0 points ahead, to compare give "
        f"measure.arms: [{LORA_ARM}]"
    )


def test_another_kind_of_encoder_is_a_conflict_and_another_modality_has_no_forecast() -> None:
    section = make_section(encoder="roberta")
    assert section.forecast is not None and section.strategy == "lora"
    assert section.conflicts[0].startswith("extrapolates: the source is of type roberta")
    section = make_section(modality="image", encoder="vit")
    assert section.forecast is None and section.strategy == "partial"
    assert section.conflicts == ["the recipe trains head, the advice is partial"]


def test_the_forecast_names_its_runs_and_that_its_figures_are_optimistic() -> None:
    rule = make_section().rules[-1]
    assert rule.text == f"lora is expected at accuracy 0.750 [0.682, 0.818] as the arm {LORA_ARM}"
    assert "50 runs of 8 data sets; on 46 of them" in rule.source
    assert "were chosen with such figures in view" in rule.source


def test_without_a_forecast_the_labels_decide_and_the_reason_is_named() -> None:
    section = advise(200, "a class", "data.task is regression", make_model(), "partial")
    assert section.strategy == "partial" and section.forecast is None
    assert section.no_forecast == "data.task is regression" and section.conflicts == []
    assert "no forecast: data.task is regression" in console.format_advice(section, {})


@pytest.mark.parametrize(
    ("classical", "words"),
    [(0.6, "something to transfer"), (0.69, "within noise"), (0.8, "frozen, the source is worse")],
)
def test_the_probe_against_the_classical_model(classical: float, words: str) -> None:
    rule = make_section(classical=classical).rules[1]
    assert words in rule.text and "0.700" in rule.text and f"{classical:.3f}" in rule.text


def make_analyses(distance: float, then: float) -> AnalysisSection:
    """Return a distance from train to general, and a curve that rises to a score."""
    point = {"value": 0.7, "ci95": None}
    zero = {"value": 0.0, "ci95": None}
    return AnalysisSection.model_validate(
        {
            "distance": {
                "source": "s", "site": {"layer": 1, "pooling": "mean"}, "domains": [],
                "pairs": [{
                    "first": "train", "second": "general", "rows": 9, "saturated": False,
                    "a_distance": {"value": distance, "ci95": None}, "h_divergence": zero,
                    "mmd": zero, "mmd_p_value": 1.0, "frechet": zero, "word_overlap": None,
                    "word_divergence": None,
                }],
            },
            "curve": {
                "source": "s", "metric": "accuracy", "lower_is_better": False, "per_class": True,
                "sizes": [10], "draws": 2, "test_rows": 9, "labels": [],
                "arms": [{
                    "arm": "head", "points": [{"labels": 10, "score": point}], "area": 0.7,
                    "forecast": {
                        "a": 1, "b": 1, "c": 0, "labels": 20,
                        "predicted": {"value": then, "ci95": None}, "held_out": point,
                        "held_out_covered": None, "step": 0.01,
                        "next_point": {"value": None, "ci95": None},
                    },
                }],
            },
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("distance", "then", "far", "more"),
    [(1.8, 0.75, "far; adaptation", "worth more than"), (0.4, 0.71, "near;", "would add little")],
)
def test_distance_and_curve_are_read(distance: float, then: float, far: str, more: str) -> None:
    analyses = make_analyses(distance, then)
    rules = advise(200, "a class", TASK, make_model(), "head", analyses).rules
    texts = {rule.name: rule for rule in rules}
    assert far in texts["distance"].text and "0 of 7" in texts["distance"].source
    assert more in texts["curve"].text and f"{then:.3f}" in texts["curve"].text


def judge(tree: dict[str, Any], section: AdviceSection) -> dict[str, Any]:
    """Return the tree of a record with its advice, held against its arms."""
    record = Record.parse(tree)
    outcome = judge_advice(section, record.recipe.arms, record.arms)
    assert outcome is not None
    section = section.model_copy(update={"outcome": outcome})
    return tree | {"advice": section.to_dict()}


def test_after_the_run_the_record_says_what_was_right() -> None:
    tree = judge(make_record(), make_section())
    outcome = tree["advice"]["outcome"]
    # lora has .7254 and head .7041; classical .6204 and scratch .542 are its baselines.
    assert outcome["best"] == "lora" and outcome["gap"] == 0 and outcome["right"]
    rows = {row["strategy"]: row for row in outcome["strategies"]}
    assert rows["lora"]["score"] == pytest.approx(0.7254) and rows["lora"]["covered"]
    assert rows["lora"]["gain"] == pytest.approx(0.105)
    assert rows["head"]["arm"] == "head" and rows["head"]["score"] == pytest.approx(0.7041)
    rate, epochs = "finetune.training.learning_rate", "finetune.training.num_train_epochs"
    assert rows["lora"]["trained_with"] == {rate: 0.0005, epochs: 5}
    assert rows["head"]["trained_with"] == {}
    card = render(tree)
    assert "for `learning_rate` 0.001 and `num_train_epochs` 10. It was trained with" in card
    assert "`lora` was forecast at accuracy 0.750 [" in card and "it has 0.725, inside" in card
    assert "The strategy advised was `lora`, the best of those that ran." in card
    assert Record.parse(tree).advice == AdviceSection.model_validate(tree["advice"])


def test_a_worse_choice_and_a_missed_interval_are_wrong() -> None:
    model = make_model().model_copy(update={"over_head": {"lora": constant(-0.3)}})
    section = advise(200, "a class", TASK, model, "lora")
    outcome = judge(make_record(), section)["advice"]["outcome"]
    assert section.strategy == "head"
    assert not outcome["right"] and outcome["gap"] == pytest.approx(0.0213)
    card = render(judge(make_record(), section))
    assert "more than a point behind the best that ran, `lora` (0.021 of accuracy)." in card
    assert not next(row for row in outcome["strategies"] if row["strategy"] == "lora")["covered"]


def test_an_arm_with_retention_is_not_what_was_forecast() -> None:
    tree = make_record()
    tree["recipe"]["retain"] = {"l2sp": {"weight": 0.1}}
    record = Record.parse(tree)
    outcome = judge_advice(make_section(), record.recipe.arms, record.arms)
    assert outcome is not None and "lora" not in [row.strategy for row in outcome.strategies]
    assert outcome.right is None


def test_the_arm_that_trains_as_was_forecast_is_held_against_it() -> None:
    tree, forecast = make_record(), make_section().forecast
    assert forecast is not None
    settings = forecast.strategies[0].settings
    tree["recipe"]["measure"]["arms"] = [{"fast": {"finetune.strategy": "lora"} | settings}]
    for arm in [arm for arm in tree["arms"] if arm["arm"] == "lora"]:
        scores = {split: dict(values) for split, values in arm["metrics"].items()}
        scores["test"]["accuracy"] += 0.01
        tree["arms"].append(arm | {"arm": "fast", "metrics": scores})
    tree = judge(tree, make_section())
    row = next(r for r in tree["advice"]["outcome"]["strategies"] if r["strategy"] == "lora")
    assert row["arm"] == "fast" and row["trained_with"] == {}
    assert row["score"] == pytest.approx(0.7354)
    assert "(90 % interval); the arm `fast`, which trains so, has 0.735, inside" in render(tree)


def test_score_of_another_arm_is_not_said_to_be_the_models() -> None:
    tree = make_record()
    tree["recipe"]["retain"] = {"l2sp": {"weight": 0.1}}
    tree["recipe"]["measure"]["arms"] = [{"free": {"retain": None}}]
    tree["arms"] += [arm | {"arm": "free"} for arm in tree["arms"] if arm["arm"] == "lora"]
    tree = judge(tree, make_section())
    row = next(r for r in tree["advice"]["outcome"]["strategies"] if r["strategy"] == "lora")
    assert row["arm"] == "free" and row["trained_with"]
    text = describe_advice(Record.parse(tree))
    assert "10. The arm `free` was trained with" in text and "it has 0.725, inside" in text
    del row["trained_with"]
    assert "; the arm `free` has 0.725, inside" in describe_advice(Record.parse(tree))


def test_history_counts_runs_and_names_those_without(tmp_path: Path) -> None:
    good = judge(make_record(), make_section())
    model = make_model().model_copy(update={"over_head": {"lora": constant(-0.3)}})
    bad = judge(make_record(), advise(200, "a class", TASK, model, "lora"))
    runs = [good, bad, make_record()]
    history = count_history([Record.parse(tree) for tree in runs])
    assert (history.runs, history.without) == (3, 1)
    assert history.scores == (4, 3) and history.advised == (2, 1)
    assert history.errors["lora"] == pytest.approx(((0.7254 - 0.75) + (0.7254 - 0.41)) / 2)
    for number, tree in enumerate(runs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "record.json").write_text(json.dumps(tree), encoding="utf-8")
    folders = [str(tmp_path / str(number)) for number in range(3)]
    result = CliRunner().invoke(app, ["advise", "--history", *folders])
    assert result.exit_code == 0, result.output
    assert "3 runs, 1 without an outcome of advice" in result.output
    assert "3 of 4 scores were within the forecast's 90 % interval (75%)" in result.output
    assert "1 of 2 times the advised strategy was within a point" in result.output
    assert "2 of the scores are of arms that trained at other rates or epochs" in result.output
    missing = CliRunner().invoke(app, ["advise", "--history", str(tmp_path / "none")])
    assert "there is no run folder" in str(missing.exception)


def test_what_is_printed_has_every_strategy_with_its_cost() -> None:
    section = make_section()
    text = console.format_advice(section, {"lora": 75.0, "head": 0.0})
    lora = next(line for line in text.splitlines() if line.startswith("  lora"))
    assert "0.750" in lora and "+0.090" in lora and "75 s" in lora
    assert f"    - {LORA_ARM}" in text.splitlines() and "    - head" in text.splitlines()
    assert text.splitlines()[-1] == "advice: lora"
    header = console.summarize_advice(section)
    assert header["advice"].startswith("lora (lora is expected at ")
    assert list(header) == ["advice", "rule", "recipe"]
    assert header["recipe"].startswith("the recipe trains head, the advice is lora")
    assert f"  recipe: {header['recipe']}" in text.splitlines()
