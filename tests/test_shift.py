"""Estimate class shares against known ones, and correct predictions by them."""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import softmax
from scipy.stats import norm
from sklearn.base import BaseEstimator

from hftl.errors import DataError, RecipeError
from hftl.inference.load_predictor import _read_confusion
from hftl.inference.predict import Predictor
from hftl.inference.prior import correct_predictions
from hftl.measure.calibration import fit_temperature
from hftl.measure.shift import (
    compute_conditionals,
    correct_probabilities,
    estimate_bbse,
    estimate_by_counts,
    estimate_em,
    estimate_rlls,
    estimate_shares,
    measure_separability,
)
from hftl.publish.published_metadata import PublishedMetadata

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import label_shift  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.usefixtures("fast_reload")

ASSETS = Path(os.environ.get("HFTL_ASSETS", Path(__file__).parent.parent / "assets"))
GAP = 2.0
"""Standard deviations between the two classes."""


def draw_scores(rng: np.random.Generator, rows: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return exact probabilities under equal shares, and the classes of rows drawn at `share`."""
    labels = (rng.random(rows) < share).astype(np.int64)
    x = rng.normal(GAP * labels, 1.0)
    ones = norm.pdf(x, GAP) / (norm.pdf(x, GAP) + norm.pdf(x, 0.0))
    return np.stack([1 - ones, ones], axis=1), labels


def count_confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    table = np.zeros((2, 2))
    np.add.at(table, (labels, probabilities.argmax(1)), 1)
    return table


def test_bbse_and_rlls_are_exact_with_the_true_confusion() -> None:
    rng = np.random.default_rng(0)
    conditionals = rng.dirichlet(np.ones(4), 4) * 0.4 + 0.6 * np.eye(4)
    shares = np.array([0.1, 0.2, 0.05, 0.65])
    confusion = conditionals * 1e9 * np.array([0.3, 0.2, 0.4, 0.1])[:, None]
    assert np.allclose(compute_conditionals(confusion), conditionals.T)
    assert np.allclose(estimate_bbse(confusion, conditionals.T @ shares), shares)
    assert np.allclose(estimate_rlls(confusion, conditionals.T @ shares), shares, atol=1e-3)


def draw_three(
    rng: np.random.Generator, rows: int, shares: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact probabilities under equal shares of three classes, and the classes."""
    labels = rng.choice(3, rows, p=shares)
    return softmax(1.5 * (1.5 * np.eye(3)[labels] + rng.normal(size=(rows, 3))), axis=1), labels


class GivenPosteriors(BaseEstimator):
    """Predict the posteriors that are given as inputs."""

    def fit(self, posteriors: np.ndarray, labels: np.ndarray) -> "GivenPosteriors":
        self.classes_ = np.unique(labels)
        return self

    def predict_proba(self, posteriors: np.ndarray) -> np.ndarray:
        return posteriors

    def predict(self, posteriors: np.ndarray) -> np.ndarray:
        return posteriors.argmax(1)


def test_bbse_and_em_are_those_of_quapy() -> None:
    quapy: Any = pytest.importorskip("quapy.method.aggregative")
    rng = np.random.default_rng(6)
    known, labels = draw_three(rng, 900, [0.5, 0.3, 0.2])
    new, _ = draw_three(rng, 700, [0.1, 0.3, 0.6])
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (labels, known.argmax(1)), 1)
    given: dict[str, Any] = {"fit_classifier": False, "val_split": None}
    bbse = estimate_bbse(confusion, np.bincount(new.argmax(1), minlength=3))
    classifier = GivenPosteriors().fit(known, labels)
    for method in (quapy.ACC, quapy.BBSEhard):
        quantifier = method(classifier, solver="exact-raise", **given)
        # BBSEhard estimates the matrix of predicted and true classes, ACC that of conditionals.
        theirs = quantifier.fit(known, labels).predict(new)
        np.testing.assert_allclose(bbse, theirs, atol=1e-9)
    source = np.bincount(labels) / len(labels)
    theirs, _ = quapy.EMQ.EM(source, new, 1e-12)
    np.testing.assert_allclose(estimate_em(new, source), theirs, atol=1e-6)
    # As it comes, quapy stops at steps of 1e-4.
    quantifier = quapy.EMQ(classifier, **given).fit(known, labels)
    np.testing.assert_allclose(estimate_em(new, source), quantifier.predict(new), atol=2e-3)


@pytest.mark.parametrize(
    ("classes", "rows", "right"), [(2, 60, 0.6), (5, 500, 0.5), (3, 40, 0.1), (4, 30, 0.05)]
)
def test_rlls_is_the_constrained_optimum_of_its_paper(
    classes: int, rows: int, right: float
) -> None:
    rng = np.random.default_rng(classes)
    chances = (right * np.eye(classes) + (1 - right) / classes) / classes
    confusion = rng.multinomial(rows, chances.ravel()).reshape(classes, classes) + 1e-3
    predicted = rng.multinomial(300, rng.dirichlet(np.ones(classes))).astype(np.float64)
    joint = confusion.T / confusion.sum()
    gap = predicted / predicted.sum() - joint.sum(1)
    log = np.log(2 * classes / 0.05)
    for strength in (0.01, 1.0):
        bound = 3 * (2 * log / (3 * confusion.sum()) + np.sqrt(2 * log / confusion.sum()))

        def loss(theta: np.ndarray, d: float = strength * bound) -> float:
            return float(np.linalg.norm(joint @ theta - gap) + d * np.linalg.norm(theta))

        starts = [np.full(classes, 0.1), np.linalg.lstsq(joint, gap, rcond=None)[0].clip(-1)]
        bounds = [(-1, None)] * classes
        optima = [
            minimize(loss, start, method="SLSQP", bounds=bounds, options={"ftol": 1e-14})
            for start in starts
        ]
        best = min(float(one.fun) for one in optima)
        shares = estimate_rlls(confusion, predicted, strength)
        # Shares are weights up to a factor: that of the least loss.
        own = shares / (confusion.sum(1) / confusion.sum())
        scale: Any = minimize_scalar(lambda c, w=own: loss(c * w - 1), bracket=(0.9, 1.1))
        assert scale.fun == pytest.approx(best, abs=1e-6)


def test_error_of_bbse_falls_as_one_over_the_root_of_rows() -> None:
    rng = np.random.default_rng(0)

    def measure(rows: int) -> float:
        errors = []
        for _ in range(200):
            confusion = count_confusion(*draw_scores(rng, rows, 0.5))
            predicted = np.bincount(draw_scores(rng, rows, 0.8)[0].argmax(1), minlength=2)
            errors.append(estimate_bbse(confusion, predicted)[1] - 0.8)
        return float(np.sqrt(np.mean(np.square(errors))))

    assert measure(400) / measure(6400) == pytest.approx(4, rel=0.25)


def test_em_recovers_the_multipliers_of_calibrated_probabilities_alone() -> None:
    probabilities, _ = draw_scores(np.random.default_rng(1), 40_000, 0.9)
    half = np.array([0.5, 0.5])
    assert estimate_em(probabilities, half) / half == pytest.approx([0.2, 1.8], abs=0.02)
    sharp = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    assert abs(estimate_em(sharp, half)[0] / 0.5 - 0.2) > 0.1
    known, labels = draw_scores(np.random.default_rng(9), 20_000, 0.5)
    temperature = fit_temperature(3 * np.log(known), labels)
    assert temperature == pytest.approx(3, rel=0.05)
    again = softmax(np.log(sharp) / temperature, axis=1)
    assert estimate_em(again, half) / half == pytest.approx([0.2, 1.8], abs=0.02)


def test_interval_holds_the_share_and_no_shift_is_no_alarm() -> None:
    rng = np.random.default_rng(2)
    for share in (0.5, 0.75):
        held = []
        for trial in range(5):
            known = draw_scores(rng, 300, 0.5)
            estimate = estimate_shares(
                count_confusion(*known), draw_scores(rng, 300, share)[0], trial
            )
            low, high = estimate.interval[1]
            held.append(low <= share <= high)
            assert high - low < 0.3
        assert sum(held) >= 4


def test_intervals_by_counts_hold_the_share_and_are_no_wider_than_they_need_be() -> None:
    rng = np.random.default_rng(8)
    shares, held, widths = [], 0, []
    for trial in range(60):
        confusion = count_confusion(*draw_scores(rng, 300, 0.5))
        predicted = np.bincount(draw_scores(rng, 300, 0.75)[0].argmax(1), minlength=2)
        bbse = estimate_by_counts(estimate_bbse, confusion, predicted, trial)
        np.testing.assert_array_equal(bbse.shares, estimate_bbse(confusion, predicted))
        low, high = bbse.interval[1]
        held += low <= 0.75 <= high
        shares.append(bbse.shares[1])
        widths.append(high - low)
        if trial < 2:
            # Far from a singular matrix both are the same.
            rlls = estimate_by_counts(estimate_rlls, confusion, predicted, trial)
            np.testing.assert_allclose(rlls.shares, bbse.shares, atol=1e-3)
            np.testing.assert_allclose(rlls.interval, bbse.interval, atol=0.01)
    assert held >= 53, held
    assert np.mean(widths) / 3.92 == pytest.approx(np.std(shares), rel=0.25)


def test_classes_that_a_draw_predicts_alike_have_wide_intervals() -> None:
    """Of a hundred rows a class some draws of the bootstrap have the same counts for both."""
    confusion, predicted = np.array([[56, 44], [44, 56]]), np.array([30, 20])
    for estimate in (estimate_bbse, estimate_rlls):
        shares = estimate_by_counts(estimate, confusion, predicted)
        assert shares.shares.sum() == pytest.approx(1)
        assert (shares.interval[:, 1] - shares.interval[:, 0] > 0.4).all()


def test_stored_shares_of_rebalanced_movies_are_near_held_and_worth_correcting() -> None:
    stored = json.loads(label_shift.RESULT.read_text("utf-8"))
    draws = stored["draws"]
    assert len(draws) == label_shift.DRAWS and stored["table"] == label_shift.format_table(draws)
    for draw in draws:
        assert draw["train"] == 0.75 and abs(draw["share"] - 0.5) < 0.06
        for name in label_shift.METHODS:
            low, high = draw[name]["ci95"]
            near = abs(draw[name]["share"] - draw["share"]) <= 0.05
            assert draw[name]["is_near"] == near
            assert draw[name]["is_held"] == (low <= draw["share"] <= high)
    for name in label_shift.METHODS:
        near, held = (sum(d[name][key] for d in draws) for key in ("is_near", "is_held"))
        better = sum(d[name]["accuracy"] > d["plain"] for d in draws)
        assert better == len(draws) and held >= 0.9 * len(draws), name
        # EM, which reads probabilities, is off by more where these are a little.
        assert near >= (0.7 if name == "em" else 0.9) * len(draws), name


@pytest.mark.slow
def test_shares_of_rebalanced_movies_are_estimated_and_corrected() -> None:
    path = ASSETS / "movies" / "movies.csv"
    if not path.exists():
        pytest.skip(f"build {path} with benchmarks/assets.py")
    opened = label_shift.open_movies(path)
    for seed in range(3):
        draw = label_shift.judge_draw(*opened, seed)
        for name in label_shift.METHODS:
            assert draw[name]["is_held"], (seed, name, draw)
            assert draw[name]["is_near"] or name == "em", (seed, name, draw)
            assert draw[name]["accuracy"] > draw["plain"], (seed, name, draw)


@pytest.mark.slow
def test_alarm_of_a_shift_that_is_none_is_rare() -> None:
    rng = np.random.default_rng(3)
    alarms = 0
    for trial in range(200):
        known = draw_scores(rng, 400, 0.5)
        confusion = count_confusion(*known)
        estimate = estimate_shares(confusion, draw_scores(rng, 400, 0.5)[0], trial)
        low, high = estimate.interval[1]
        alarms += not low <= 0.5 <= high
    assert alarms <= 10


def test_correction_is_that_of_bayes_and_gains_accuracy() -> None:
    probabilities, labels = draw_scores(np.random.default_rng(4), 20_000, 0.9)
    half, shares = np.array([0.5, 0.5]), np.array([0.1, 0.9])
    corrected = correct_probabilities(probabilities, half, shares)
    odds = corrected[:, 1] / corrected[:, 0]
    assert np.allclose(odds, 9 * probabilities[:, 1] / probabilities[:, 0], rtol=1e-6)
    plain, better = ((p.argmax(1) == labels).mean() for p in (probabilities, corrected))
    assert better > plain + 0.03
    assert corrected[:, 1].mean() == pytest.approx(0.9, abs=0.01)


def make_predictor(confusion: Any) -> Predictor:
    inputs: Any = SimpleNamespace()
    return Predictor(
        inputs, inputs, "classification", ["no", "yes"], ["text"], "cpu", "text", None,
        None if confusion is None else np.array(confusion),
    )  # fmt: skip


def predict_rows(rows: int) -> tuple[list[Any], np.ndarray]:
    probabilities, labels = draw_scores(np.random.default_rng(5), rows, 0.9)
    predictor = make_predictor(None)
    return [predictor.format_scores(row.tolist()) for row in probabilities], labels


def test_prior_is_estimated_or_read_and_said(tmp_path: Path) -> None:
    predictions, labels = predict_rows(800)
    predictor = make_predictor([[168, 32], [32, 168]])
    plain = np.mean(
        [p["label"] == ("no", "yes")[y] for p, y in zip(predictions, labels, strict=True)]
    )
    path = tmp_path / "shares.json"
    path.write_text(json.dumps({"yes": 9, "no": 1}), "utf-8")
    for prior in ("auto", str(path)):
        corrected, note = correct_predictions(predictor, predictions, prior)
        pairs = zip(corrected, labels, strict=True)
        assert np.mean([p["label"] == ("no", "yes")[y] for p, y in pairs]) > plain + 0.02
        assert (
            "for 0.500" in note and "labels changed" in note and ("[" in note) == (prior == "auto")
        )
        changed = sum(a["label"] != b["label"] for a, b in zip(corrected, predictions, strict=True))
        assert f"{changed} of 800 labels changed" in note
        assert Counter(p["label"] for p in corrected)["yes"] > 640


def test_estimated_prior_does_not_follow_probabilities_that_are_too_sure() -> None:
    """The labels, and so their counts, stay; EM reads shares from the probabilities themselves."""
    probabilities, _ = draw_scores(np.random.default_rng(5), 800, 0.9)
    odds = (probabilities[:, 1] / probabilities[:, 0]) ** 3
    sure = np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
    predictor = make_predictor([[168, 32], [32, 168]])
    said = []
    for rows in (probabilities, sure):
        predictions = [predictor.format_scores(row.tolist()) for row in rows]
        said.append(correct_predictions(predictor, predictions, "auto")[1].split(";")[0])
    assert said[0] == said[1]
    half = np.array([0.5, 0.5])
    assert abs(np.diff([estimate_em(p, half)[1] for p in (probabilities, sure)])) > 0.01


@pytest.mark.parametrize(
    ("confusion", "rows", "prior", "said"),
    [
        (None, 60, "auto", "does not say"),
        ([[100, 100], [90, 110]], 60, "auto", "cannot be estimated"),
        ([[200, 0], [0, 0]], 60, "auto", "no row of 'yes'"),
        ([[200, 0], [0, 0]], 60, {"yes": 1, "no": 1}, "no row of 'yes'"),
        ([[90, 10], [10, 90]], 20, "auto", "too few"),
        ([[90, 10], [10, 90]], 60, {"yes": 1}, "'no' no share"),
        ([[90, 10], [10, 90]], 60, {"yes": 1, "nay": 1}, "no label 'nay'"),
        ([[90, 10], [10, 90]], 60, {"yes": -1, "no": 1}, "no mapping"),
        ([[90, 10], [10, 90]], 60, {"yes": 10**400, "no": 1}, "no mapping"),
        ([[90, 10], [10, 90]], 60, "missing.json", "No such file"),
    ],
)
def test_prior_that_cannot_be_used_is_refused(
    confusion: Any, rows: int, prior: Any, said: str, tmp_path: Path
) -> None:
    if isinstance(prior, dict):
        (tmp_path / "p.json").write_text(json.dumps(prior), "utf-8")
        prior = str(tmp_path / "p.json")
    with pytest.raises((RecipeError, DataError), match=said):
        correct_predictions(make_predictor(confusion), predict_rows(rows)[0], prior)


def test_prior_of_a_model_without_one_class_an_input_is_refused() -> None:
    predictor = replace(make_predictor(None), task="regression")
    with pytest.raises(RecipeError, match="shares of classes, .* the model's task is regression"):
        correct_predictions(predictor, [], "auto")


def test_least_singular_value_is_one_of_no_error_and_zero_of_a_guess() -> None:
    assert measure_separability(np.diag([3.0, 5.0])) == pytest.approx(1)
    assert measure_separability(np.full((3, 3), 4.0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("recipe", "train", "is_read"),
    [
        ({}, [160, 40], True),
        ({}, [100, 100], False),
        ({"data": {"shots": 50}}, [160, 40], False),
        ({"finetune": {"class_weight": "balanced"}}, [160, 40], False),
    ],
)
def test_confusion_is_read_where_training_had_the_shares_of_validation(
    recipe: dict[str, Any], train: list[int], is_read: bool
) -> None:
    counts = {"train": dict(zip(("no", "yes"), train, strict=True))}
    metadata = PublishedMetadata.model_validate({
        "data": {"task": "classification", "label_counts": counts}, "recipe": recipe,
        "calibration": {"confusion": [[70, 10], [5, 15]]},
    })  # fmt: skip
    assert (_read_confusion(metadata, ["no", "yes"]) is not None) == is_read
