"""Check what is said of other classes and other inputs in test and unlabelled rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import bench_of, sentences, write_csv

from hftl import Recipe
from hftl.analysis.domains import Domain
from hftl.analysis.facts import ClassShare, Estimate, SetShift, ShiftAnalysis, SiteFacts
from hftl.analysis.shift import TrainClasses, compare_sets, decide_outcome, match_shares
from hftl.analysis.tables import format_shift
from hftl.analysis.two_sample import _draw_half, compare_by_classifier
from hftl.card.analysis_plots import plot_shift
from hftl.card.evidence import describe_shift
from hftl.data.rows import Row


def test_p_values_of_one_distribution_are_uniform() -> None:
    draw = np.random.default_rng(0)
    p_values = [
        compare_by_classifier(draw.normal(size=(60, 5)), draw.normal(size=(80, 5)), seed=i).p_value
        for i in range(60)
    ]
    assert 0.35 < np.mean(p_values) < 0.65 and np.mean(np.array(p_values) < 0.1) < 0.22


def test_another_mean_is_found_and_documents_count_once() -> None:
    draw = np.random.default_rng(0)
    moved = compare_by_classifier(draw.normal(size=(200, 5)), draw.normal(0.5, size=(200, 5)))
    assert moved.p_value < 0.01 and moved.auc > 0.65
    # 20 documents of 20 equal rows each: as rows they differ, as documents by chance.
    centres = draw.normal(size=(40, 5))
    groups = np.repeat(np.arange(40), 20)
    rows = centres[groups] + 0.01 * draw.normal(size=(800, 5))
    assert compare_by_classifier(rows[:400], rows[400:], groups).p_value > 0.01


def test_rows_are_drawn_in_other_shares() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    picked = match_shares(labels, np.array([0.2, 0.2, 0.6]))
    assert np.bincount(labels[picked]).tolist() == [6, 6, 20] and len(set(picked)) == 32
    whole = match_shares(labels, np.array([0.5, 0.3, 0.2]))
    assert np.bincount(labels[whole]).tolist() == [50, 30, 20]
    assert np.bincount(labels[match_shares(labels, np.array([1.0, 0, 0]))]).tolist() == [50]


@pytest.mark.parametrize(
    ("label", "inputs", "matched", "outcome"),
    [
        (0.5, 0.5, 0.5, "none"), (0.001, 0.001, 0.5, "label shift"),
        (0.5, 0.001, 0.001, "covariate shift"), (0.001, 0.001, 0.001, "both"),
        (None, 0.001, None, "covariate shift"), (0.001, 0.001, None, "label shift"),
        (0.001, 0.5, None, "label shift"), (0.5, 0.001, None, "covariate shift"),
    ],
)  # fmt: skip
def test_outcome(label: float | None, inputs: float, matched: float | None, outcome: str) -> None:
    assert decide_outcome(label, inputs, matched) == outcome


def test_without_a_matched_test_other_inputs_are_not_known() -> None:
    shares = [
        ClassShare(label=name, train=0.5, estimated=None, labelled=None) for name in ("a", "b")
    ]
    one = SetShift(
        name="unlabeled", rows=50, shares=shares, label_p_value=0.001,
        mmd=Estimate(value=0.1, ci95=(0.0, 0.2)), mmd_p_value=0.5, auc=0.7, auc_p_value=0.001,
        matched_p_value=None, outcome=decide_outcome(0.001, 0.001, None),
    )  # fmt: skip
    facts = ShiftAnalysis(
        source="s", site=SiteFacts(layer=1, pooling="mean"), train_rows=50, separability=0.1,
        sets=[one],
    )  # fmt: skip
    assert "whether the inputs of each class differ, too, is not known" in describe_shift(facts)
    advice = format_shift(facts)
    assert "hftl predict --prior auto" in advice and "inputs differ, too, is not known" in advice


@pytest.mark.parametrize("grouped", [False, True])
def test_documents_of_train_count_once_in_the_test_of_classes(grouped: bool) -> None:
    from hftl.analysis.shift import _compare_classes

    # 40 documents of ten equal labels in train, 26 of them of one class, and 400 rows of 200 each.
    labels = [np.repeat([0, 1], [260, 140]), np.repeat([0, 1], [200, 200])]
    context: Any = SimpleNamespace(
        prepared=SimpleNamespace(
            names=["a", "b"], encode_targets=lambda rows: np.array([int(r.label) for r in rows])
        ),
        group_outputs=lambda rows: (
            None if rows[0].group is None else np.array([row.group for row in rows])
        ),
    )
    sets = []
    for name, own in zip(("train", "unlabeled"), labels, strict=True):
        is_grouped = grouped and name == "train"
        rows = [
            Row((f"{name} {i}",), str(label), str(i // 10) if is_grouped else None, i, "")
            for i, label in enumerate(own)
        ]
        noise = np.random.default_rng(0).normal(size=(400, 4))
        features = 8 * np.eye(2, 4)[own] + noise
        sets.append(Domain(name, rows, features.astype(np.float32)))
    p_value, _, _ = _compare_classes(sets[1], TrainClasses(sets[0], context), context)
    assert (p_value > 0.01) == grouped


def test_groups_are_dealt_once_and_every_second_is_held_out() -> None:
    draw = np.random.default_rng(0)
    # 40 groups on both sides, 20 on the first alone and 60 on the second alone.
    names = np.concatenate([np.arange(60), np.arange(20, 120)])
    sides = np.repeat([0, 1], [60, 100])
    is_held = _draw_half(sides, names, draw)
    held = set(names[is_held])
    assert len(held) == 60 and not held & set(names[~is_held])
    assert is_held[sides == 0].sum() == 30 and is_held[sides == 1].sum() == 50


def compare(
    folder: Path, model: Path, unlabeled: list[Any], test: float = 0.2, **more: Any
) -> ShiftAnalysis:
    rows = [(f"{text}", label) for text, label in sentences(500)]
    data: dict[str, Any] = {
        "train": {"path": str(write_csv(folder / "a.csv", ["text", "label"], rows))},
        "unlabeled": {"path": str(write_csv(folder / "u.csv", ["text"], unlabeled))},
        "test": {"fraction": test}, "max_length": 16,
    }  # fmt: skip
    recipe = Recipe.parse(
        {
            "source": {"model": str(model)}, "data": data, "finetune": {"pooling": "mean"},
            "adapt": {"objective": "mlm"}, "measure": {"seeds": [0]}, **more,
        }
    )  # fmt: skip
    return compare_sets(recipe, bench_of(recipe), folder / "features", 500)


def test_other_shares_are_no_other_inputs(tiny_model: Any, tmp_path: Path) -> None:
    rows = [(text, label) for text, label in sentences(1400)[500:]]
    mostly = [(t,) for t, label in rows if label == "positive"]
    mostly += [(t,) for t, label in rows if label == "negative"][: len(mostly) // 4]
    facts = compare(tmp_path, tiny_model(), mostly)
    test, unlabeled = facts.sets
    assert test.outcome == "none" and unlabeled.outcome == "label shift"
    positive = next(row for row in unlabeled.shares if row.label == "positive")
    assert positive.estimated is not None and positive.estimated.ci95 is not None
    low, high = positive.estimated.ci95
    assert low <= 0.8 <= high and high - low < 0.2 and positive.labelled is None
    bbse, rlls = (positive.bbse, positive.bbse_ci95), (positive.rlls, positive.rlls_ci95)
    for share, interval in (bbse, rlls):
        assert share is not None and low <= share <= high
        assert interval is not None and interval[0] <= 0.8 <= interval[1]
    assert sum(row.rlls or 0 for row in unlabeled.shares) == pytest.approx(1)
    assert all(row.labelled is not None for row in test.shares)
    shown = format_shift(facts)
    assert "hftl predict --prior auto" in shown
    assert f"{positive.bbse:.3f} [" in shown and f"{positive.rlls:.3f} [" in shown
    assert "other shares" in describe_shift(facts) and "within noise" in describe_shift(facts)
    plot_shift(facts, tmp_path / "shift.png")
    assert (tmp_path / "shift.png").stat().st_size > 5000


def test_other_inputs_are_found(tiny_model: Any, tmp_path: Path) -> None:
    others = [(f"{text} actor actor scene",) for text, _ in sentences(900)[500:]]
    facts = compare(tmp_path, tiny_model(), others)
    assert facts.sets[1].outcome in ("covariate shift", "both") and facts.sets[1].auc > 0.9
    assert "other inputs" in format_shift(facts)


def test_a_set_of_few_rows_is_left_out(tiny_model: Any, tmp_path: Path) -> None:
    few = [(text,) for text, _ in sentences(560)[500:]]
    facts = compare(tmp_path, tiny_model(), few, test=0.06)
    assert [one.name for one in facts.sets] == ["unlabeled"]
    [words] = facts.left_out
    assert words.startswith("test has ") and words.endswith(" rows to compare, fewer than 40")
    assert f"left out: {words}" in format_shift(facts)


@pytest.mark.slow
def test_false_alarms_in_200() -> None:
    draw = np.random.default_rng(0)
    context: Any = SimpleNamespace(group_outputs=lambda rows: None)
    context.prepared = SimpleNamespace(
        names=["a", "b", "c"], encode_targets=lambda rows: np.array([r.index for r in rows])
    )
    from hftl.analysis.shift import _compare_classes, _compare_matched

    alarms = np.zeros(2)
    for _ in range(200):
        sets = []
        for count, shares in ((300, [0.5, 0.3, 0.2]), (200, [0.5, 0.3, 0.2])):
            labels = draw.choice(3, count, p=shares)
            rows = [Row((f"{draw.random()}",), "", None, int(i), "") for i in labels]
            features = 1.5 * np.eye(3)[labels] @ np.eye(3, 8) + draw.normal(size=(count, 8))
            sets.append(Domain("unlabeled", rows, features.astype(np.float32)))
        classes = TrainClasses(sets[0], context)
        p_value, estimate, _ = _compare_classes(sets[1], classes, context)
        assert estimate is not None
        matched = _compare_matched(sets[0], sets[1], classes.labels, estimate.shares)
        alarms += [p_value < 0.01, matched is not None and matched < 0.01]
    assert (alarms <= 10).all(), alarms
