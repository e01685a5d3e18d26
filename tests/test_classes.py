"""Compute scores class by class as scikit-learn does."""

import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hftl.measure.error_analysis import (
    compute_class_gains,
    compute_class_scores,
    count_confusions,
    encode_one_hot,
)
from hftl.measure.gain import SplitPredictions, average_metrics
from hftl.train.facts import ArmEntry, SplitMetrics, TrainingFacts


@pytest.mark.parametrize("seed", range(20))
def test_scores_of_classes_are_those_of_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(2, 7))
    labels, predictions = draw.integers(0, classes, (2, int(draw.integers(1, 30))))
    scores = compute_class_scores(
        encode_one_hot(labels, classes), encode_one_hot(predictions, classes), "abcdef"[:classes]
    )
    expected = precision_recall_fscore_support(
        labels, predictions, labels=range(classes), zero_division=0.0
    )
    for key, values in zip(("precision", "recall", "f1", "rows"), expected, strict=True):
        np.testing.assert_allclose([getattr(row, key) for row in scores], values)
    np.testing.assert_array_equal(
        count_confusions(labels, predictions, classes),
        confusion_matrix(labels, predictions, labels=range(classes)),
    )


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_names_are_those_of_scikit_learn(seed: int) -> None:
    labels, predictions = np.random.default_rng(seed).integers(0, 2, (2, 12, 3))
    scores = compute_class_scores(labels, predictions, "abc")
    expected = precision_recall_fscore_support(labels, predictions, zero_division=0.0)
    for key, values in zip(("precision", "recall", "f1", "rows"), expected, strict=True):
        np.testing.assert_allclose([getattr(row, key) for row in scores], values)


def test_gains_of_classes_are_means_over_seeds() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 40)
    test = SplitPredictions(
        labels, np.arange(40), {a: draw.integers(0, 3, (2, 40)) for a in ("x", "y")}
    )
    gains = compute_class_gains(test, "x", "y", ["a", "b", "c"])
    assert gains is not None and gains.baseline == "y"
    for key, arm in (("own", "x"), ("baseline", "y")):
        expected = np.mean(
            [
                precision_recall_fscore_support(labels, p, labels=range(3), zero_division=0.0)[2]
                for p in test.predictions[arm]
            ],
            axis=0,
        )
        np.testing.assert_allclose([getattr(row, key) for row in gains.rows], expected)
    assert [row.rows for row in gains.rows] == np.bincount(labels, minlength=3).tolist()
    assert compute_class_gains(test, "x", None, ["a"]) is None
    assert compute_class_gains(test, "x", "y", []) is None


def test_mean_metrics_are_over_the_seeds_of_the_arm() -> None:
    entries = [
        ArmEntry(
            arm=arm,
            seed=0,
            strategy="full",
            trainable_parameters=1,
            training=TrainingFacts(),
            metrics=SplitMetrics(validation={}, test={"accuracy": value, "f1": value / 2}),
        )
        for arm, value in (("a", 0.5), ("a", 0.7), ("b", 0.1))
    ]
    assert average_metrics(entries, "a") == pytest.approx({"accuracy": 0.6, "f1": 0.3})
    undefined = SplitMetrics(validation={}, test={"accuracy": 0.9, "f1": math.nan})
    entries.append(entries[0].model_copy(update={"metrics": undefined}))
    means = average_metrics(entries, "a")
    assert means["accuracy"] == pytest.approx(0.7) and means["f1"] is None
