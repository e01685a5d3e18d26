"""Fit thresholds of several labels on validation, and refuse those that make no sense."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import f1_score
from support.records import make_record, render

from hftl.config.recipe import Recipe
from hftl.errors import RecipeError, RunFolderError
from hftl.inference.published_scores import read_thresholds
from hftl.measure.facts import LabelCurve
from hftl.measure.label_calibration import compute_probabilities, fit_label_curves, invert_curve
from hftl.measure.metrics import micro_f1, multi_label_f1
from hftl.measure.thresholds import fit_threshold, fit_thresholds, measure_thresholds


def draw(
    rng: np.random.Generator, rows: int, rates: tuple[float, ...] = (0.1, 0.5)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels of some rates, and logits that say too seldom that they hold."""
    labels = (rng.random((rows, len(rates))) < rates).astype(np.float64)
    return (2 * labels - 3 + rng.normal(0, 1, labels.shape)).astype(np.float32), labels


def test_no_other_threshold_has_a_greater_f1() -> None:
    logits, labels = draw(np.random.default_rng(0), 120)
    for x, y in zip(logits.T, labels.T, strict=True):
        threshold = fit_threshold(x, y > 0)
        best = f1_score(y, expit(x) > threshold)
        others = [f1_score(y, x >= value) for value in x]
        assert best == pytest.approx(max(others)) and threshold != 0.5
        assert np.abs(expit(x) - threshold).min() > 1e-9, "rounding does not decide"


def draw_miscalibrated(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels, and logits of which each label's are off by a line of its own."""
    odds = rng.normal(-1, 2, (rows, 3))
    labels = (rng.random(odds.shape) < expit(odds)).astype(np.float64)
    return (odds * [0.5, 1, 2] + [-2, 0, 3]).astype(np.float32), labels


@pytest.mark.parametrize(("rows", "method"), [(400, "platt"), (3000, "isotonic")])
def test_micro_f1_has_one_threshold_of_calibrated_probabilities(rows: int, method: str) -> None:
    rng = np.random.default_rng(1)
    logits, labels = draw_miscalibrated(rng, rows)
    thresholds = fit_thresholds(logits, labels, "micro_f1")
    curves = fit_label_curves(logits, labels)
    assert {curve.method for curve in curves} == {method}
    # What is decided on validation is one cut through the probabilities of all labels.
    probabilities = compute_probabilities(logits, curves)
    above = expit(logits.astype(float)) > thresholds
    assert probabilities[above].min() > probabilities[~above].max()
    cuts = [
        micro_f1(labels, (probabilities > cut).astype(float)) for cut in np.arange(0.1, 1, 0.02)
    ]
    assert micro_f1(labels, above.astype(float)) > max(cuts) - 1e-9
    # A single threshold of the sigmoid is worse on other rows, even the best for them.
    logits, labels = draw_miscalibrated(rng, 3000)
    single = [micro_f1(labels, (logits > cut).astype(float)) for cut in np.arange(-5, 5, 0.1)]
    assert micro_f1(labels, (expit(logits) > thresholds).astype(float)) > max(single) + 0.03


def test_micro_f1_of_few_labels_keeps_half() -> None:
    logits, labels = draw(np.random.default_rng(3), 300)
    labels[9:] = 0
    assert fit_thresholds(logits, labels * [1, 0], "micro_f1").tolist() == [0.5, 0.5]


def test_a_curve_is_inverted_where_it_passes_the_probability() -> None:
    platt = LabelCurve(method="platt", slope=2.0, intercept=-1.0)
    assert compute_probabilities(np.array([[invert_curve(platt, 0.3)]]), [platt])[0, 0] == (
        pytest.approx(0.3)
    )
    assert invert_curve(LabelCurve(method="none"), 0.5) == 0
    flat = LabelCurve(method="isotonic", logits=[-2.0, 0.0, 1.0, 3.0],
                      probabilities=[0.1, 0.1, 0.6, 0.6])  # fmt: skip
    inverses = [invert_curve(flat, probability) for probability in (0.05, 0.1, 0.5, 0.6, 0.9)]
    assert inverses == [-np.inf, 0.5, 0.5, np.inf, np.inf]


def test_rows_of_one_logit_are_predicted_together() -> None:
    logits = np.repeat([1.0, -1.0, -2.0], 12)
    holds = np.arange(36) < 20
    threshold = fit_threshold(logits, holds)
    assert expit(-2) < threshold < expit(-1)


@pytest.mark.parametrize(
    ("logits", "holds"),
    [(np.linspace(-3, 3, 40), np.linspace(-3, 3, 40) > 0),
     (np.linspace(-3, 3, 40), np.arange(40) == 0),
     (np.linspace(-3, 3, 40), np.zeros(40, dtype=bool))],
    ids=["half is best", "too few rows", "no row"],
)  # fmt: skip
def test_half_stays_where_nothing_speaks_for_another(logits: np.ndarray, holds: np.ndarray) -> None:
    assert fit_threshold(logits, holds) == 0.5


def test_thresholds_are_measured_on_rows_they_were_not_fitted_on() -> None:
    rng = np.random.default_rng(2)
    thresholds = fit_thresholds(*draw(rng, 400), "f1")
    logits, labels = draw(rng, 500)
    section = measure_thresholds(thresholds, "f1", logits, labels, ["rare", "half"], np.arange(500))
    plain, fitted = ((expit(logits) > limit).astype(float) for limit in (0.5, thresholds))
    assert section.before["f1"].value == pytest.approx(multi_label_f1(labels, plain))
    assert section.after["f1"].value == pytest.approx(multi_label_f1(labels, fitted))
    assert set(section.after) == {"f1", "micro_f1", "accuracy"}
    assert section.gain.value == pytest.approx(
        section.after["f1"].value - section.before["f1"].value
    )
    assert section.gain.ci95 is not None and section.gain.ci95[0] > 0
    text = render(make_record() | {"thresholds": section.to_dict()})
    assert f"f1 on test {section.after['f1'].value:.3f} [" in text
    assert f"rare {thresholds[0]:.3g}" in text and "other scores and gains" in text


def test_thresholds_of_the_config_are_read_in_the_order_of_the_labels() -> None:
    config = SimpleNamespace(label_thresholds={"b": 0.25, "a": 0.5})
    read = read_thresholds(Path("x"), config, "multi-label", ["a", "b"])
    assert read is not None and read.tolist() == [0.5, 0.25]
    assert read_thresholds(Path("x"), config, "classification", ["a", "b"]) is None
    assert read_thresholds(Path("x"), SimpleNamespace(), "multi-label", ["a", "b"]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [({"a": 0.5}, "no threshold for each"), ([0.5, 0.5], "no threshold for each"),
     ({"a": 0.5, "b": 1.0}, "is 1.0 for 'b'"), ({"a": 0.5, "b": "low"}, "is 'low' for 'b'")],
)  # fmt: skip
def test_thresholds_that_make_no_sense_are_refused(given: object, said: str) -> None:
    config = SimpleNamespace(label_thresholds=given)
    with pytest.raises(RunFolderError, match=said):
        read_thresholds(Path("x"), config, "multi-label", ["a", "b"])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_thresholds_of_other_tasks_are_refused(task: str) -> None:
    tree = {
        "source": {"model": "bert"},
        "data": {"train": {"path": "a.csv"}, "task": task},
        "measure": {"thresholds": "f1"},
    }
    with pytest.raises(RecipeError, match=f"measure.thresholds=f1 .* data.task={task}"):
        Recipe.parse(tree)
