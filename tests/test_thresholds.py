"""Fit thresholds of several labels on validation, and refuse those that make no sense."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import f1_score
from support.records import make_record, render

from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.inference.published_scores import read_thresholds
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


def test_micro_f1_has_one_threshold_for_all_labels() -> None:
    logits, labels = draw(np.random.default_rng(1), 300, (0.1, 0.3, 0.6))
    thresholds = fit_thresholds(logits, labels, "micro_f1")
    assert len(set(thresholds)) == 1
    best = micro_f1(labels, (expit(logits) > thresholds).astype(float))
    others = [micro_f1(labels, (logits >= value).astype(float)) for value in logits.ravel()]
    assert best == pytest.approx(max(others))


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
    read = read_thresholds(config, "multi-label", ["a", "b"])
    assert read is not None and read.tolist() == [0.5, 0.25]
    assert read_thresholds(config, "classification", ["a", "b"]) is None
    assert read_thresholds(SimpleNamespace(), "multi-label", ["a", "b"]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [({"a": 0.5}, "no threshold for each"), ([0.5, 0.5], "no threshold for each"),
     ({"a": 0.5, "b": 1.0}, "is 1.0 for 'b'"), ({"a": 0.5, "b": "low"}, "is 'low' for 'b'")],
)  # fmt: skip
def test_thresholds_that_make_no_sense_are_refused(given: object, said: str) -> None:
    config = SimpleNamespace(label_thresholds=given)
    with pytest.raises(ValueError, match=said):
        read_thresholds(config, "multi-label", ["a", "b"])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_thresholds_of_other_tasks_are_refused(task: str) -> None:
    tree = {
        "source": {"model": "bert"},
        "data": {"train": {"path": "a.csv"}, "task": task},
        "measure": {"thresholds": "f1"},
    }
    with pytest.raises(RecipeError, match=f"measure.thresholds=f1 .* data.task={task}"):
        Recipe.parse(tree)
