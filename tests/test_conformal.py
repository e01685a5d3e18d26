"""Make prediction sets of a coverage, and refuse those that nothing stands for."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import beta
from support.records import make_record, render
from torch import nn

from hftl.errors import RecipeError
from hftl.inference import predict
from hftl.inference.predict import Predictor
from hftl.inference.predict_table import predict_table
from hftl.inference.published_scores import find_set_quantile
from hftl.measure.conformal import (
    MAX_SCORES,
    compute_distances,
    compute_scores,
    count_rows_needed,
    estimate_spread,
    find_members,
    find_quantile,
    find_stored_rank,
    select_scores,
)
from hftl.measure.coverage import measure_conformal
from hftl.publish.published_metadata import PublishedConformal


def draw(rng: np.random.Generator, rows: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels, and the logits of a model that is too sure, or a number and its estimate."""
    logits = rng.normal(0, 1.5, (rows, 4))
    if task == "regression":
        return logits[:, :1], logits[:, 0] + rng.gumbel(0, 2, rows)
    if task == "multi-label":
        return 3 * logits, (rng.random(logits.shape) < expit(logits)).astype(int)
    chances = softmax(logits, axis=1).cumsum(1)
    return 3 * logits, (rng.random((rows, 1)) > chances).sum(1).clip(max=3)


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
@pytest.mark.parametrize("rows", [60, 900])
def test_sets_hold_the_truth_as_often_as_they_say(task: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    shares, scores = [], []
    for _ in range(200):
        scores = select_scores(compute_scores(*draw(rng, rows, task), task))
        quantile = find_quantile(rows, scores, 0.9)
        assert quantile is not None
        shares.append(np.mean(compute_scores(*draw(rng, 500, task), task) <= quantile))
    assert 0.88 < np.mean(shares) < 0.92
    rank = find_stored_rank(rows, len(scores), 0.9)
    assert rank is not None
    low, high = estimate_spread(rows, rank)
    within = np.mean([low - 0.026 <= share <= high + 0.026 for share in shares])
    assert within > 0.95, "beside the spread each share has an error of .013 over its 500 rows"


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("rows", [19, 100, 500])
def test_the_quantile_is_that_of_its_rank(rows: int, coverage: float) -> None:
    values = np.random.default_rng(1).random(rows)
    rank = math.ceil(round((rows + 1) * coverage, 9))
    assert find_quantile(rows, select_scores(values), coverage) == np.sort(values)[rank - 1]


@pytest.mark.parametrize("rows", [501, 1203, 70_001])
def test_of_many_rows_the_next_greater_stored_score_counts(rows: int) -> None:
    values = np.arange(1, rows + 1) / rows
    stored = select_scores(values)
    assert len(stored) == MAX_SCORES and stored[-1] == 1
    for coverage in (0.01, 0.5, 0.9, 0.99):
        quantile = find_quantile(rows, stored, coverage)
        exact = math.ceil((rows + 1) * coverage) / rows
        assert quantile is not None and exact <= quantile + 1e-12 < exact + 1 / MAX_SCORES
        assert find_stored_rank(rows, MAX_SCORES, coverage) == round(quantile * rows)


def test_the_spread_is_that_of_the_score_in_use() -> None:
    stored = PublishedConformal(rows=70_001, scores=select_scores(np.arange(1, 70_002) / 70_001))
    quantile, basis = find_set_quantile(stored, "classification", 0.9011)
    rank = round(quantile * 70_001)
    assert rank == 63_141, "the exact rank is 63 079"
    low, high = beta(rank, 70_002 - rank).interval(0.95)
    assert f"({low:.3f} to {high:.3f} in 95 of 100 such splits)" in basis
    assert estimate_spread(70_001, rank) == pytest.approx((low, high))
    assert f"{low:.3f}" != f"{beta(63_079, 70_002 - 63_079).ppf(0.025):.3f}"


@pytest.mark.parametrize(("coverage", "rows"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19)])
def test_fewest_rows_of_a_coverage(coverage: float, rows: int) -> None:
    assert count_rows_needed(coverage) == rows
    assert find_quantile(rows, list(range(rows)), coverage) is not None
    assert rows == 1 or find_quantile(rows - 1, list(range(rows - 1)), coverage) is None


def test_the_section_says_how_often_sets_held() -> None:
    rng = np.random.default_rng(2)
    validation, test = (draw(rng, 300, "classification") for _ in range(2))
    section = measure_conformal(validation, test, "classification", np.arange(300), None)
    by_coverage = {figure.coverage: figure for figure in section.test}
    assert list(by_coverage) == [0.8, 0.9, 0.95] and section.rows == len(section.scores) == 300
    quantile = find_quantile(300, section.scores, 0.9)
    members = 1 - softmax(test[0], axis=1) <= quantile
    assert members.any(1).all(), "so that these sets are those of the definition alone"
    assert by_coverage[0.9].size == pytest.approx(members.sum(1).mean())
    held = members[np.arange(300), test[1]].mean()
    assert by_coverage[0.9].held.value == pytest.approx(held)
    text = render(make_record() | {"conformal": section.to_dict()})
    assert f"held it for {held:.3f} [" in text and "--coverage 0.9" in text
    assert "like the 300 rows of validation (approximate, as validation also chose" in text
    grouped = render(make_record() | {"conformal": section.to_dict() | {"groups": 40}})
    assert "like the 300 rows of validation in 40 groups (approximate" in grouped
    sure = make_record(own="head") | {"conformal": section.to_dict()}
    sure["recipe"]["measure"]["seeds"], sure["published_seed"] = [0], 0
    assert "like the 300 rows of validation: on test they held" in render(sure)
    few = measure_conformal((validation[0][:8], validation[1][:8]), test, "classification",
                            np.arange(300), None)  # fmt: skip
    assert [figure.coverage for figure in few.test] == [0.8]
    assert "--coverage" not in render(make_record() | {"conformal": few.to_dict()})


def test_a_model_that_is_nearly_always_right_gives_no_empty_sets() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 400)
    logits = np.eye(3)[labels] * rng.uniform(9, 15, (400, 1))
    validation, test = (logits[:200], labels[:200]), (logits[200:], labels[200:])
    section = measure_conformal(validation, test, "classification", np.arange(200), None)
    quantile = find_quantile(200, section.scores, 0.8)
    assert quantile is not None and quantile < 1e-3
    bare = compute_distances(test[0], "classification") <= quantile
    assert 20 < (~bare.any(1)).sum() < 60, "a fifth would be empty"
    assert [(f.held.value, f.size) for f in section.test] == [(1.0, 1.0)] * 3
    members = find_members(test[0], "classification", quantile)
    assert (members.argmax(1) == labels[200:]).all() and (members.sum(1) == 1).all()
    assert (members[bare.any(1)] == bare[bare.any(1)]).all()
    wrong = find_members(-np.abs(logits[:5]), "multi-label", quantile)
    assert not wrong.any(), "of several labels none may hold"


STORED = PublishedConformal(rows=19, scores=[n / 20 for n in range(1, 20)])


@pytest.mark.parametrize(
    ("conformal", "task", "coverage", "said"),
    [(STORED, "classification", 1.0, "coverage is 1, expected a share"),
     (STORED, "classification", -0.1, "expected a share"),
     (STORED, "token-classification", 0.9, "the words of a row depend"),
     (None, "classification", 0.9, "does not say how far .* trained again .* with --restart"),
     (STORED, "regression", 0.99, "needs at least 99 rows of validation, .* measured on 19")],
)  # fmt: skip
def test_sets_that_nothing_stands_for_are_refused(
    conformal: PublishedConformal | None, task: str, coverage: float, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        find_set_quantile(conformal, task, coverage)


def test_the_basis_says_rows_groups_and_spread() -> None:
    quantile, basis = find_set_quantile(STORED, "classification", 0.9)
    assert quantile == 18 / 20
    assert "19 rows of validation (0.740 to 0.987 in 95 of 100" in basis and "approximate" in basis
    grouped = STORED.model_copy(update={"groups": 5})
    assert "in 5 groups" in find_set_quantile(grouped, "classification", 0.9)[1]


def test_sets_are_refused_with_a_prior() -> None:
    with pytest.raises(RecipeError, match="--coverage: sets cover .* --prior gives others"):
        predict_table("run", "rows.csv", None, prior="auto", coverage=0.9)


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
def test_predictions_carry_sets(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.array([[4.0, -4.0], [0.1, 0.0], [-4.0, -3.9]], dtype=np.float32)
    monkeypatch.setattr(predict, "predict_logits", lambda *_: logits)
    inputs: Any = object()
    names = [] if task == "regression" else ["1", "2"]
    model = Predictor(nn.Identity(), inputs, task, names, ["text"], "cpu",
                      label_type="integer", conformal=STORED)  # fmt: skip
    encoded: Any = [({}, 1)] * 3
    plain, rows = model.predict_encoded(encoded), model.predict_encoded(encoded, 0.6)
    assert [row["label"] for row in rows] == [row["label"] for row in plain]
    assert not any("set" in row or "interval" in row for row in plain)
    if task == "regression":
        assert [row.get("interval") for row in rows] == [
            (value - 0.6, value + 0.6) for value in logits[:, 0].tolist()
        ]
        return
    expected = [[1], [1, 2], [1, 2]] if task == "classification" else [[1], [1, 2], []]
    assert [row.get("set") for row in rows] == expected


@pytest.mark.slow
@pytest.mark.parametrize("rows", [25, 400])
def test_sets_are_those_of_mapie(rows: int) -> None:
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    features, labels = draw(rng, 500 + rows, "classification")
    fit, calibrate = slice(0, 300), slice(300, 300 + rows)
    model = LogisticRegression().fit(features[fit], labels[fit])
    test = features[300 + rows :]
    reference = mapie.SplitConformalClassifier(
        model, confidence_level=0.9, conformity_score="lac", prefit=True
    ).conformalize(features[calibrate], labels[calibrate])
    _, expected = reference.predict_set(test)
    logits = [np.log(model.predict_proba(part)) for part in (features[calibrate], test)]
    scores = select_scores(compute_scores(logits[0], labels[calibrate], "classification"))
    quantile = find_quantile(rows, scores, 0.9)
    assert quantile is not None
    sets = find_members(logits[1], "classification", quantile + 1e-12)
    is_empty = ~expected[:, :, 0].any(1)
    assert (sets == expected[:, :, 0])[~is_empty].all()
    assert (sets[is_empty].sum(1) == 1).all(), "the likeliest class stands in an empty set"
