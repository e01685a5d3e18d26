"""Decide to publish or to hold: every outcome x head x reload, and the reasons given."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from support.records import make_record
from typer.testing import CliRunner

from hftl.measure.facts import CalibrationSection, Estimate
from hftl.measure.forgetting_facts import Forgotten
from hftl.measure.record import BaselineGain, Gain, Record, Verdict
from hftl.measure.verdict import (
    LEVEL_NOTES,
    RELOAD_TOLERANCE,
    ForgettingBudget,
    Leakage,
    VerdictEvidence,
    decide_verdict,
    format_gain,
    judge_record,
)

pytestmark = pytest.mark.usefixtures("fast_reload")

GAINS: dict[str, dict[str, Any] | None] = {
    "positive": {"value": 0.1, "ci95": [0.05, 0.15]},
    "equivalent": {"value": 0.001, "ci95": [-0.003, 0.005]},
    "negative": {"value": -0.1, "ci95": [-0.15, -0.05]},
    "undetermined": {"value": 0.02, "ci95": [-0.05, 0.09]},
    "one seed": {"value": 0.3, "ci95": None, "outcome": "undetermined", "seeds": 1},
    "one group": {"value": 0.3, "ci95": None, "outcome": "undetermined", "seeds": 3},
    "no baseline": None,
}
SAYS = {
    "positive": "the gain +0.100 [+0.050, +0.150] accuracy over scratch is beyond noise",
    "equivalent": "+0.001 [-0.003, +0.005] accuracy over scratch is practically none",
    "negative": "negative transfer: -0.100 [-0.150, -0.050] accuracy over scratch",
    "undetermined": "+0.020 [-0.050, +0.090] accuracy over scratch is within noise",
    "one seed": "+0.300 accuracy over scratch rests on one seed",
    "one group": "+0.300 accuracy over scratch rests on one group of test rows",
    "no baseline": "no baseline that learns the task (scratch, classical) was run",
}
HEADS: dict[str, dict[str, Any] | None] = {
    "absent": None,
    "behind": {"value": 0.05, "ci95": [0.01, 0.09]},
    "level": {"value": -0.01, "ci95": [-0.04, 0.02]},
    "ahead": {"value": -0.05, "ci95": [-0.09, -0.01]},
    "one seed behind": {"value": 0.02, "ci95": None},
    "one seed ahead": {"value": -0.02, "ci95": None},
}
HEAD_AHEAD = ("ahead", "one seed ahead")
RELOADS = {0.0: True, RELOAD_TOLERANCE: True, 2 * RELOAD_TOLERANCE: False, float("nan"): False}


COMMON = {"metric": "accuracy", "seeds": 3, "p_value": None, "relative_error_reduction": None}


def full(name: str, **changes: Any) -> BaselineGain | None:
    facts = GAINS[name]
    if facts is None:
        return None
    default = {"baseline": "scratch", "baselines": {}, "outcome": name}
    return BaselineGain.model_validate(COMMON | default | facts | changes)


def head(facts: dict[str, Any] | None) -> Gain | None:
    return None if facts is None else Gain.model_validate(COMMON | {"outcome": "negative"} | facts)


def decide(
    gain: BaselineGain | None, over_head: Gain | None = None,
    reload_difference: float | None = 0.0, **others: Any,
) -> Verdict:  # fmt: skip
    return decide_verdict(VerdictEvidence(
        gain=gain, over_head=over_head, reload_difference=reload_difference, **others
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "over_head", "reload"), list(itertools.product(GAINS, HEADS, RELOADS))
)
def test_publishes_only_when_all_three_hold(gain: str, over_head: str, reload: float) -> None:
    verdict = decide(full(gain), head(HEADS[over_head]), reload)
    against = [gain != "positive", over_head in HEAD_AHEAD, not RELOADS[reload]]
    assert verdict.decision == ("hold" if any(against) else "publish")
    reasons = " / ".join(verdict.reasons)
    level = over_head == "level"
    luck = over_head == "one seed ahead"
    note = LEVEL_NOTES[verdict.decision]
    assert verdict.reasons[0].endswith(f"; {note}") == level, "which way it points"
    assert sum(note in reasons for note in LEVEL_NOTES.values()) == level
    assert ("not better than head" in verdict.reasons[0]) == (level or luck)
    # One seed shows neither that head is better nor that it is not.
    single = [r for r in verdict.reasons if "than head" in r and "rests on" in r]
    assert len(single) == (luck or (over_head == "one seed behind" and not any(against)))
    if any(against):
        assert len(verdict.reasons) == sum(against) + level
        assert (SAYS[gain] in reasons) == against[0]
        assert ("linear head is better" in reasons) == (over_head == "ahead")
        assert ("the reload is not the same" in reasons) == against[2]
        assert f"difference {reload:.1e}" in reasons or not against[2]
    else:
        assert SAYS["positive"] in reasons and "reload proved" in reasons
        behind = [reason.startswith("better than head") for reason in verdict.reasons]
        assert any(behind) == (over_head == "behind")


def test_a_reload_that_nobody_measured_is_not_proved() -> None:
    verdict = decide(full("positive"), reload_difference=None)
    assert verdict.decision == "hold"
    assert verdict.reasons == ["no reload in a fresh process is recorded"]


@pytest.mark.parametrize("decision_gain", ["positive", "undetermined", "no baseline"])
@pytest.mark.parametrize(("over_head", "words"), [
    ({"value": -0.005, "ci95": [-0.021, 0.011]}, "not better than head"),
    ({"value": 0.0, "ci95": [0.0, 0.0]}, "not better than head"),
    ({"value": -0.05, "ci95": [-0.09, -0.01]}, "the frozen encoder with a linear head is better"),
])  # fmt: skip
def test_a_model_that_is_not_better_than_head_says_so_first(
    over_head: dict[str, Any], words: str, decision_gain: str
) -> None:
    """A LoRA at -.005 of head was published for its gain over scratch, and said so alone."""
    verdict = decide(full(decision_gain), head(over_head))
    assert verdict.reasons[0].startswith(words)
    assert format_gain(Estimate(over_head["value"], tuple(over_head["ci95"]))) in verdict.reasons[0]


def test_a_gain_over_one_baseline_alone_is_within_noise() -> None:
    known = COMMON | {"value": 0.1, "ci95": [0.05, 0.15]} | {"outcome": "positive"}
    unsure = COMMON | {"value": 0.2, "ci95": [-0.1, 0.5], "outcome": "undetermined"}
    baselines = {"scratch": unsure, "classical": known}
    both = full("positive", baseline="classical", baselines=baselines, outcome="undetermined")
    verdict = decide(both)
    assert verdict.decision == "hold"
    assert (
        "over classical is beyond noise, but +0.200 [-0.100, +0.500] over scratch is not"
        in verdict.reasons[0]
    )


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [(0.1049, [0.071, 0.139], "+0.105 [+0.071, +0.139]"), (-0.2, [-0.3, 0.0], "-0.200 [-0.300, "
     "+0.000]"), (0.5, None, "+0.500")],
)  # fmt: skip
def test_interval_text(value: float, interval: list[float] | None, text: str) -> None:
    assert format_gain(Estimate(value, interval and (interval[0], interval[1]))) == text


def forget(value: float, interval: tuple[float, float] | None) -> Forgotten:
    return Forgotten(value=value, ci95=interval, per_seed=[value])


@pytest.mark.parametrize(
    ("forgotten", "holds", "words"),
    [
        (None, True, "give data.general"),
        (forget(0.08, (0.06, 0.1)), True, "forgotten +0.080 [+0.060, +0.100] is beyond"),
        (forget(0.08, (0.04, 0.12)), False, "is not beyond measure.forgetting_budget=0.05"),
        (forget(0.06, None), True, "is beyond measure.forgetting_budget=0.05"),
    ],
)
def test_forgetting_beyond_its_budget_holds(
    forgotten: Forgotten | None, holds: bool, words: str
) -> None:
    budget = ForgettingBudget(0.05, forgotten)
    verdict = decide(full("positive"), forgetting=budget)
    assert (verdict.decision == "hold") == holds and words in " / ".join(verdict.reasons)


@pytest.mark.parametrize(("rows", "holds"), [(4, False), (5, True), (60, True)])
def test_near_copies_that_could_make_the_gain_hold(rows: int, holds: bool) -> None:
    verdict = decide(full("positive"), leakage=Leakage(rows, 100))
    assert (verdict.decision == "hold") == holds
    assert f"{rows} of 100 test rows ({rows}.0%)" in " / ".join(verdict.reasons)


def test_near_copies_do_not_bound_a_gain_that_is_no_share_of_rows() -> None:
    leakage = Leakage(60, 100, is_share=False)
    verdict = decide(full("positive"), leakage=leakage)
    assert verdict.decision == "publish" and "is not known" in " / ".join(verdict.reasons)


def calibrate(change: tuple[float, float] | None) -> CalibrationSection:
    """Return a calibration whose Brier score changes by the middle of an interval."""

    def score(value: float, reach: float = 0.02) -> dict[str, Any]:
        estimate = {"value": value, "ci95": (value - reach, value + reach)}
        return {"ece": estimate, "brier": estimate}

    middle = 0.0 if change is None else sum(change) / 2
    return CalibrationSection.model_validate(
        {"temperature": 2.0, "bins": 5, "before": score(0.3), "after": score(0.3 + middle),
         "change": {"value": middle, "ci95": change}}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ((-0.09, -0.01), False),
        ((-0.01, 0.03), False),
        ((0.001, 0.009), False),
        ((0.009, 0.03), False),
        ((0.011, 0.03), True),
        (None, False),
    ],
)
def test_calibration_that_is_worse_beyond_noise_and_margin_holds(
    change: tuple[float, float] | None, holds: bool
) -> None:
    verdict = decide(full("positive"), calibration=calibrate(change))
    assert (verdict.decision == "hold") == holds
    assert ("calibration made probabilities worse" in " / ".join(verdict.reasons)) == holds


def test_a_record_without_the_change_of_the_calibration_says_nothing_of_it() -> None:
    older = calibrate((0.03, 0.05)).model_copy(update={"change": None})
    assert decide(full("positive"), calibration=older).decision == "publish"


@pytest.mark.parametrize("case", ["positive", "negative", "undetermined", "no baseline"])
def test_a_record_is_judged_from_its_figures_alone(case: str) -> None:
    tree = make_record(case)
    record = Record.parse(tree)
    assert judge_record(record) == record.verdict
    tree["recipe"]["measure"]["forgetting_budget"] = 0.05
    tree["check"]["findings"] = [
        {"kind": "leakage", "what": "a", "confidence": "likely", "fix": "b", "rows": 900}
    ]
    reasons = " / ".join(judge_record(Record.parse(tree)).reasons)
    assert "give data.general" in reasons
    assert (f"900 of {record.data.splits['test']:,} test rows" in reasons) == (case == "positive")


@pytest.mark.parametrize(("case", "code"), [("positive", 0), ("negative", 9)])
def test_verdict_is_replayed_from_the_record_and_exits_by_it(
    case: str, code: int, tmp_path: Path
) -> None:
    from hftl.cli import app

    tree = make_record(case)
    tree["verdict"] = {"decision": "publish", "reasons": ["forged"]}
    (tmp_path / "record.json").write_text(json.dumps(tree), "utf-8")
    result = CliRunner().invoke(app, ["verdict", str(tmp_path)])
    assert result.exit_code == code and "forged" not in result.output
    assert ("negative transfer" in result.output) == (case == "negative")


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("regression", {"r2": -3.2}, "always the mean of the test targets: test r2 -3.200 against"),
        ("regression", {"r2": 0.1}, None),
        ("regression", {"r2": None}, None),
        ("classification", {"accuracy": 0.6}, "always 'a', the commonest label: test accuracy 0.6"),
        ("classification", {"accuracy": 0.9}, None),
    ],
)
def test_holds_a_model_that_is_worse_than_one_answer_to_all(
    task: str, changes: dict[str, float | None], reason: str | None
) -> None:
    """A gain over scratch in pearson or over one in accuracy does not show it."""
    counts = {"test": {"a": 75, "b": 25}}
    tree = make_record(task=task, label_counts=None if task == "regression" else counts)
    verdict = judge_record(Record.parse(tree | {"test_metrics": changes}))
    assert verdict.decision == ("publish" if reason is None else "hold")
    assert any((reason or "reload proved") in line for line in verdict.reasons)
