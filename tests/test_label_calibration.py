"""Calibrate the probabilities of several labels: Platt's method, isotonic, and their errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss
from support.records import make_record, render

from hftl.errors import RunFolderError
from hftl.inference.published_scores import read_label_curves
from hftl.measure.facts import LabelCurve
from hftl.measure.label_calibration import (
    compute_probabilities,
    fit_isotonic,
    fit_label_curves,
    fit_platt,
    measure_label_calibration,
)
from hftl.publish.published_metadata import PublishedMetadata


def draw(
    rng: np.random.Generator,
    rows: int,
    slope: float = 0.4,
    intercept: float = -0.5,
    labels: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels whose log-odds are a line of the logits."""
    logits = rng.normal(0, 3, (rows, labels)).astype(np.float32)
    holds = rng.random(logits.shape) < expit(slope * logits + intercept)
    return logits, holds.astype(np.float64)


class Raw(ClassifierMixin, BaseEstimator):
    """Return the only feature as the decision."""

    classes_ = np.array([0, 1])

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, inputs: Any, targets: Any) -> "Raw":
        return self

    def predict(self, inputs: Any) -> np.ndarray:
        return (self.decision_function(inputs) > 0).astype(int)

    def decision_function(self, inputs: Any) -> np.ndarray:
        return np.asarray(inputs)[:, 0]


def test_platt_is_that_of_scikit_learn() -> None:
    logits, labels = draw(np.random.default_rng(0), 300, labels=1)
    x, y = logits[:, 0].astype(np.float64), labels[:, 0].astype(int)
    curve = fit_platt(x, y > 0)
    assert curve is not None and curve.method == "platt"
    frozen = FrozenEstimator(Raw())
    reference = CalibratedClassifierCV(frozen, method="sigmoid").fit(x[:, None], y)
    expected = reference.predict_proba(x[:, None])[:, 1]
    np.testing.assert_allclose(compute_probabilities(logits, [curve])[:, 0], expected, atol=2e-4)


@pytest.mark.parametrize(("slope", "intercept"), [(0.3, -1.0), (2.0, 0.5)])
def test_the_line_of_the_draw_is_recovered(slope: float, intercept: float) -> None:
    logits, labels = draw(np.random.default_rng(1), 20_000, slope, intercept, 1)
    curve = fit_platt(logits[:, 0].astype(np.float64), labels[:, 0] > 0)
    assert curve is not None
    assert curve.slope == pytest.approx(slope, rel=0.06)
    assert curve.intercept == pytest.approx(intercept, abs=0.06)


def test_rows_that_a_threshold_separates_keep_a_finite_slope() -> None:
    logits = np.array([-3.0, -2, -1, 1, 2, 3])
    curve = fit_platt(logits, logits > 0)
    assert curve is not None and 0 < curve.slope < 10
    probabilities = compute_probabilities(logits[:, None], [curve])
    assert 0.5 < probabilities.max() < 0.9, "three rows say no more"


@pytest.mark.parametrize(
    ("rows", "positives", "method"),
    [(400, 200, "platt"), (1000, 100, "isotonic"), (1000, 99, "platt"), (999, 400, "platt"),
     (400, 4, "none"), (400, 396, "none")],
)  # fmt: skip
def test_the_method_follows_from_the_rows(rows: int, positives: int, method: str) -> None:
    logits = np.linspace(4, -4, rows)[:, None]
    labels = (np.arange(rows) < positives)[:, None].astype(np.float64)
    assert [curve.method for curve in fit_label_curves(logits, labels)] == [method]


@pytest.mark.parametrize("rows", [100, 1200])
def test_logits_that_fall_with_the_label_give_no_curve(rows: int) -> None:
    logits, labels = draw(np.random.default_rng(2), rows, slope=-3.0, labels=1)
    assert fit_label_curves(logits, labels) == [LabelCurve(method="none")]


def test_isotonic_rises_and_is_never_sure() -> None:
    logits, labels = draw(np.random.default_rng(3), 1500, slope=2.0, labels=1)
    curve = fit_isotonic(logits[:, 0].astype(np.float64), labels[:, 0] > 0)
    assert curve is not None
    inputs = np.linspace(-30, 30, 500)[:, None]
    outputs = compute_probabilities(inputs, [curve])[:, 0]
    assert (np.diff(outputs) >= 0).all() and 0 < outputs[0] < 0.01 and 0.99 < outputs[-1] < 1


def test_the_error_is_its_definition() -> None:
    logits, labels = draw(np.random.default_rng(4), 203, labels=3)
    split = logits, labels
    section = measure_label_calibration(split, split, ["a", "b", "c"], np.arange(203))
    errors = []
    for p, y in zip(expit(logits.astype(np.float64)).T, labels.T, strict=True):
        parts = np.array_split(np.argsort(p, kind="stable"), section.bins)
        errors.append(sum(len(part) / 203 * abs(y[part].mean() - p[part].mean()) for part in parts))
    assert section.bins > 5 and section.before.ece.value == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("rows", [300, 2000])
def test_curves_bring_the_scores_back(rows: int) -> None:
    rng = np.random.default_rng(5)
    validation, test = draw(rng, rows), draw(rng, 1000)
    section = measure_label_calibration(validation, test, ["a", "b"], np.arange(1000))
    assert section.after is not None and section.temperature is None and section.labels is not None
    assert section.before.ece.value > 0.1 and section.after.ece.value < 0.06
    assert section.after.brier.value < section.before.brier.value
    for scores in (section.before, section.after):
        for score in (scores.ece, scores.brier):
            assert score.ci95 is not None and score.ci95[0] <= score.value <= score.ci95[1]
    probabilities = compute_probabilities(test[0], list(section.labels.values()))
    expected = [brier_score_loss(y, p) for y, p in zip(test[1].T, probabilities.T, strict=True)]
    assert section.after.brier.value == pytest.approx(np.mean(expected))
    assert section.change is not None and section.change.ci95 is not None
    change = section.after.brier.value - section.before.brier.value
    assert section.change.value == pytest.approx(change) and section.change.ci95[1] < 0


def test_the_card_says_how_labels_are_calibrated() -> None:
    rng = np.random.default_rng(6)
    section = measure_label_calibration(
        draw(rng, 300), draw(rng, 200), ["negative", "positive"], np.arange(200)
    )
    text = render(make_record() | {"calibration": section.to_dict()})
    assert "each label calibrated by Platt's method (2 of 2), fitted on validation" in text
    assert "15 bins of equal mass, means over labels" in text
    none = section.model_copy(update={"after": None})
    assert "gave no curves" in render(make_record() | {"calibration": none.to_dict()})


def test_curves_are_read_in_the_order_of_the_labels(tmp_path: Path) -> None:
    platt = '{"method": "platt", "slope": 2, "intercept": -1.0, "later": 1}'
    isotonic = '{"method": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.1, 0.9]}'
    path = tmp_path / "hftl.json"
    path.write_text(f'{{"calibration": {{"labels": {{"b": {platt}, "a": {isotonic}}}}}}}')
    metadata = PublishedMetadata.read(tmp_path)
    curves = read_label_curves(tmp_path, metadata, "multi-label", ["a", "b"])
    assert curves is not None
    values = compute_probabilities(np.array([[0.5, 0.5], [9.0, 1.0]]), curves)
    np.testing.assert_allclose(values, [[0.5, 0.5], [0.9, expit(1)]])
    assert read_label_curves(tmp_path, metadata, "classification", ["a", "b"]) is None
    with pytest.raises(RunFolderError, match="calibrates b, a, and the labels are a, c"):
        read_label_curves(tmp_path, metadata, "multi-label", ["a", "c"])
