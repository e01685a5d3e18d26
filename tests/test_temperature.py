"""Calibrate probabilities: the temperature, ECE and Brier score, and predictions with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import sentences, write_csv
from scipy.special import log_softmax, softmax
from scipy.stats import ttest_1samp
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from support.records import make_record, render
from torch import nn

import hftl
from hftl.config.recipe import Recipe
from hftl.data.prepare import read_prepared_data
from hftl.finetune.arm_files import read_logits
from hftl.inference import predict
from hftl.inference.predict import Predictor
from hftl.inference.predict_table import predict_table
from hftl.measure.calibration import (
    PRIOR_SPREAD,
    compute_brier,
    compute_ece,
    fit_temperature,
    measure_calibration,
)
from hftl.measure.conformal import find_quantile
from hftl.publish.published_metadata import PublishedMetadata


def draw(
    rng: np.random.Generator, rows: int, temperature: float, classes: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels from the probabilities of logits, and return these times `temperature`."""
    logits = rng.normal(0, 2, (rows, classes))
    chances = softmax(logits, axis=1).cumsum(1)
    labels = (rng.random((rows, 1)) > chances).sum(1).clip(max=classes - 1)
    return logits * temperature, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_the_draw_is_recovered(temperature: float) -> None:
    logits, labels = draw(np.random.default_rng(0), 20_000, temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.04)


def test_no_temperature_near_the_fitted_one_is_more_likely() -> None:
    logits, labels = draw(np.random.default_rng(1), 60, 2.0)
    fitted = fit_temperature(logits, labels)
    assert fitted is not None

    def loss(temperature: float) -> float:
        return -log_softmax(logits / temperature, axis=1)[np.arange(60), labels].mean()

    assert loss(fitted) < min(loss(fitted * 0.98), loss(fitted * 1.02))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_temperature_is_that_of_scikit_learn_on_the_same_folds(classes: int) -> None:
    rng = np.random.default_rng(11)
    labels = np.arange(240) % classes
    features = 0.9 * np.eye(classes, 6)[labels] + rng.normal(size=(240, 6))
    folds = StratifiedKFold(5)
    model = LogisticRegression(C=100.0)
    one_fit: Any = {"ensemble": False}
    theirs = CalibratedClassifierCV(model, method="temperature", cv=folds, **one_fit)
    theirs.fit(features, labels)
    held_out = cross_val_predict(model, features, labels, cv=folds, method="decision_function")
    new = np.asarray(model.fit(features, labels).decision_function(features))
    if classes == 2:
        held_out, new = (np.stack([0 * logit, logit], axis=1) for logit in (held_out, new))
    fitted = fit_temperature(np.asarray(held_out), labels)
    assert fitted is not None and abs(fitted - 1) > 0.02
    np.testing.assert_allclose(
        softmax(new / fitted, axis=1), theirs.predict_proba(features), atol=1e-4
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_temperature_of_few_rows_is_drawn_towards_1(temperature: float) -> None:
    """Of 40 rows the likeliest one made the calibration error on test .151 instead of .115."""
    test = draw(np.random.default_rng(8), 4000, temperature)

    def compute_loss(fitted: float) -> float:
        return -log_softmax(test[0] / fitted, axis=1)[np.arange(4000), test[1]].mean()

    costs: dict[float | None, list[float]] = {None: [], PRIOR_SPREAD: []}
    for seed in range(30):
        validation = draw(np.random.default_rng(seed), 40, temperature)
        for spread, rows in costs.items():
            rows.append(compute_loss(fit_temperature(*validation, spread) or 1.0))
    alone, drawn = (np.mean(rows) - compute_loss(1.0) for rows in costs.values())
    assert drawn < 0.5 * alone if temperature == 1.0 else drawn < 0
    assert temperature > 1 or max(costs[PRIOR_SPREAD]) < max(costs[None])


def test_many_rows_keep_their_temperature() -> None:
    validation = draw(np.random.default_rng(9), 5000, 2.0)
    alone, drawn = (fit_temperature(*validation, spread) for spread in (None, PRIOR_SPREAD))
    assert alone is not None and drawn is not None
    assert drawn == pytest.approx(alone, rel=0.01) and drawn < alone


@pytest.mark.parametrize("scale", [5.0, 0.0], ids=["all right", "nothing said"])
def test_rows_that_no_temperature_fits_give_none(scale: float) -> None:
    labels = np.arange(40) % 2
    assert fit_temperature(scale * np.eye(2)[labels], labels) is None


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_is_its_definition(bins: int) -> None:
    logits, labels = draw(np.random.default_rng(2), 203, 2.0)
    probabilities = softmax(logits, axis=1)
    order = sorted(range(203), key=lambda i: probabilities[i].max())
    size, more = divmod(203, bins)
    total, start = 0.0, 0
    for number in range(bins):
        members = order[start : start + size + (number < more)]
        start += len(members)
        right = np.mean([probabilities[i].argmax() == labels[i] for i in members])
        sure = np.mean([probabilities[i].max() for i in members])
        total += len(members) / 203 * abs(right - sure)
    assert compute_ece(probabilities, labels, bins) == pytest.approx(total)


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_is_that_of_scikit_learn(classes: int) -> None:
    logits, labels = draw(np.random.default_rng(3), 100, 1.0, classes)
    probabilities = softmax(logits, axis=1)
    # Of two classes scikit-learn counts one, of each row; both are off by the same.
    expected = sum(brier_score_loss(labels == c, probabilities[:, c]) for c in range(classes))
    assert compute_brier(probabilities, labels) == pytest.approx(expected)


def test_a_temperature_brings_overconfident_scores_back() -> None:
    rng = np.random.default_rng(4)
    validation, (logits, labels) = draw(rng, 2000, 4.0), draw(rng, 2000, 4.0)
    section = measure_calibration(validation, (logits, labels), np.arange(2000))
    assert section.temperature is not None and section.after is not None and section.change
    before, after = (
        np.sum((softmax(logits / t, axis=1) - np.eye(3)[labels]) ** 2, axis=1)
        for t in (1.0, section.temperature)
    )
    paired = ttest_1samp(after - before, 0).confidence_interval()
    assert section.change.value == pytest.approx((after - before).mean())
    assert section.change.value == pytest.approx(
        section.after.brier.value - section.before.brier.value
    )
    assert section.change.ci95 == pytest.approx((paired.low, paired.high), rel=0.02)
    assert section.bins == 15
    assert section.before.ece.value > 0.1 and section.after.ece.value < 0.03
    assert section.after.brier.value < section.before.brier.value
    for scores in (section.before, section.after):
        for score in (scores.ece, scores.brier):
            assert score.ci95 is not None and score.ci95[0] <= score.value <= score.ci95[1]


def test_few_rows_have_few_bins_and_one_group_no_interval() -> None:
    rng = np.random.default_rng(5)
    section = measure_calibration(draw(rng, 50, 1.0), draw(rng, 34, 1.0), np.zeros(34, int))
    assert section.bins == 3 and section.before.ece.ci95 is None


def make_predictor(temperature: float | None) -> Predictor:
    inputs = object()
    return Predictor(
        nn.Identity(), inputs, "classification", ["a", "b"], ["text"], "cpu", "text", temperature,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def test_a_temperature_changes_scores_and_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(6).normal(0, 3, (200, 2)).astype(np.float32)
    logits[0] = [1.0, np.nextafter(np.float32(1), np.float32(2))]
    monkeypatch.setattr(predict, "predict_logits", lambda *_: logits)
    encoded = [({}, 1)] * len(logits)
    plain, calibrated, cold = (
        make_predictor(t).predict_encoded(encoded) for t in (None, 2.5, 20.0)
    )
    assert [row["label"] for row in plain] == [row["label"] for row in calibrated]
    assert [row["label"] for row in plain] == [row["label"] for row in cold]
    assert plain[0]["label"] == "b"
    for row, one in zip(logits, calibrated, strict=True):
        expected = softmax(row.astype(np.float64) / 2.5)
        assert list(one.get("scores", {}).values()) == pytest.approx(expected.tolist())


@pytest.mark.usefixtures("fast_reload")
def test_a_run_predicts_with_the_temperature_of_its_validation(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    flipped = {"positive": "negative", "negative": "positive"}
    rows = [
        (text, flipped[label] if i % 4 == 0 else label)
        for i, (text, label) in enumerate(sentences(150))
    ]
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model())},
        "data": {"train": {"path": str(write_csv(tmp_path / "a.csv", ["text", "label"], rows))},
                 "max_length": 16},
        "finetune": {"strategy": "head"},
        "measure": {"seeds": [0], "arms": []},
    }  # fmt: skip
    record = hftl.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None and record.calibration is not None
    arm = tmp_path / "run" / "arms" / "head-seed0"
    prepared = read_prepared_data(tmp_path / "run" / "phases" / "data")
    validation = prepared.encode_for_metrics(prepared.rows["validation"])
    temperature = fit_temperature(read_logits(arm, "validation"), validation, PRIOR_SPREAD)
    assert record.calibration.temperature == temperature is not None
    predictions = hftl.load(tmp_path / "run").predict(
        [row.content[0] for row in prepared.rows["test"]], 0.8
    )
    scores = [list(row.get("scores", {}).values()) for row in predictions]
    expected = softmax(read_logits(arm, "test") / temperature, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    stored = pq.read_table(arm / "predictions.parquet", filters=[("split", "=", "test")])
    assert [row["label"] for row in predictions] == stored["prediction"].to_pylist()
    raw = softmax(read_logits(arm, "test").astype(np.float64), axis=1)
    np.testing.assert_allclose(stored["scores"].to_pylist(), raw, atol=1e-6)
    assert record.conformal is not None and record.conformal.rows == len(validation)
    quantile = find_quantile(len(validation), record.conformal.scores, 0.8)
    members = 1 - raw <= quantile
    assert [row.get("set") for row in predictions] == [
        [name for name, inside in zip(prepared.names, row, strict=True) if inside]
        for row in members
    ]
    (figure,) = (f for f in record.conformal.test if f.coverage == 0.8)
    assert figure.size == pytest.approx(members.sum(1).mean())
    notes: list[str] = []
    table = predict_table(
        str(tmp_path / "run"), "the film was warm", None, say=notes.append, coverage=0.8
    )
    assert str(table).splitlines()[0] == "text,label,score,set,negative,positive"
    assert notes[0].startswith("coverage: 0.8 for inputs like the 30 rows of validation")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{}", None), ('{"calibration": null}', None),
     ('{"calibration": {"temperature": 1.5, "bins": 15}}', 1.5),
     ('{"calibration": {"temperature": null}}', None)],
)  # fmt: skip
def test_the_temperature_is_read_from_the_published_record(
    tmp_path: Path, text: str, expected: float | None
) -> None:
    (tmp_path / "hftl.json").write_text(text)
    calibration = PublishedMetadata.read(tmp_path).calibration
    assert (calibration and calibration.temperature) == expected


def test_the_card_says_how_far_probabilities_are_off() -> None:
    rng = np.random.default_rng(7)
    section = measure_calibration(draw(rng, 500, 4.0), draw(rng, 500, 4.0), np.arange(500))
    text = render(make_record() | {"calibration": section.to_dict()})
    assert section.after is not None and section.likeliest is not None
    assert f"({section.likeliest:.3g} before a prior drew it towards 1), fitted on" in text
    many = section.model_copy(update={"likeliest": section.temperature})
    assert "a prior" not in render(make_record() | {"calibration": many.to_dict()})
    assert f"expected calibration error {section.before.ece.value:.3f} [" in text
    assert f"divided by the temperature {section.temperature:.3g}" in text
    assert f"{section.after.ece.value:.3f} [" in text and "15 bins of equal mass" in text
    assert section.change and f"Brier score changed by {section.change.value:+.3f} [" in text
    older = section.model_copy(update={"change": None})
    assert "changed by" not in render(make_record() | {"calibration": older.to_dict()})
    none = section.model_copy(update={"temperature": None, "after": None})
    assert "gave no temperature" in render(make_record() | {"calibration": none.to_dict()})
    assert "calibration error" not in render(make_record())
