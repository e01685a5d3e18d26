"""Format the lines that a run prints."""

import pytest
from support.records import make_gain, make_record

from hftl import console
from hftl.measure.record import Record
from hftl.train.facts import ArmFile, SplitMetrics, TrainingFacts


def test_header_is_two_columns() -> None:
    assert console.format_header({"source": "a", "arms": "b c"}) == "  source  a\n  arms    b c"


@pytest.mark.parametrize(
    ("metrics", "score"),
    [({"accuracy": 0.7251}, "  test accuracy 0.725"), ({"other": 1.0}, "")],
    ids=["built in", "not computed yet"],
)
def test_arm_line(metrics: dict[str, float], score: str) -> None:
    report = ArmFile(
        arm="lora", seed=1, strategy="lora", metrics=SplitMetrics(validation={}, test=metrics),
        trainable_parameters=1, training=TrainingFacts(),
        timings={"train_seconds": 3.0, "predict_seconds": 1.2, "energy_kwh": 7},
    )  # fmt: skip
    expected = f"  [2/9] lora seed 1           {score}  5 s"
    assert console.format_arm_line(report, "accuracy", "2/9", 4.6) == expected
    report = report.model_copy(update={"timings": {"features_seconds": 51.2}})
    line = console.format_arm_line(report, "accuracy", "2/9", 52.0)
    assert line.endswith("  52 s, 51 s of it for features")


def test_table_aligns_and_rules() -> None:
    assert console.format_table([("arm", "score"), ("classical", "1"), ("a", "22")]) == (
        "  arm        score\n  ----------------\n  classical  1\n  a          22"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (40, "40 s"), (89, "89 s"), (90, "2 min"), (180, "3 min"), (5399, "90 min"),
     (5400, "1.5 h"), (9000, "2.5 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert console.format_duration(seconds) == text


def test_ladder_shows_every_arm_and_what_the_own_gains() -> None:
    gain = make_gain(0.105, [0.071, 0.139])
    ladder = [
        {"arm": "lora", "test": 0.7254, "sd": 0.0123, "gain_of_own": None},
        {"arm": "head", "test": 0.7, "sd": None, "gain_of_own": gain},
        {"arm": "scratch", "test": 0.6, "sd": 0.02, "gain_of_own": gain | {"ci95": None}},
    ]
    record = make_record() | {"ladder": [row | {"validation": 0.5} for row in ladder]}
    head, rule, *rows = console.format_ladder(Record.parse(record)).splitlines()
    assert head.split() == ["arm", "test", "accuracy", "sd", "lora", "gains"]
    assert set(rule.strip()) == {"-"}
    assert [row.split() for row in rows] == [
        ["lora", "0.725", "0.012"],
        ["head", "0.700", "-", "+0.105", "[+0.071,", "+0.139]"],
        ["scratch", "0.600", "0.020", "+0.105"],
    ]


@pytest.mark.parametrize("errors", [False, True])
def test_ladder_explains_a_wide_interval_between_arms_without_errors(errors: bool) -> None:
    ladder = [
        {"arm": "lora", "test": 1.0, "sd": 0.0, "validation": 1.0, "gain_of_own": None},
        {"arm": "head", "test": 0.9 if errors else 1.0, "sd": 0.0, "validation": 1.0,
         "gain_of_own": make_gain(0.0, [-0.25, 0.25])},
    ]  # fmt: skip
    text = console.format_ladder(Record.parse(make_record() | {"ladder": ladder}))
    assert ("no errors to compare" in text.splitlines()[-1]) != errors
