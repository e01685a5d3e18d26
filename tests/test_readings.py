"""Check the other readings of rows: which are tried, and which of them are faults."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import bench_of, sentences, write_csv

from hftl import Recipe
from hftl.analysis import own_labels
from hftl.analysis.fingerprints import CLIP, HALF, IMAGENET, Normalization
from hftl.analysis.own_labels import check_own_labels, match_own_names, predict_own
from hftl.analysis.readings import Reading, list_other_normalizations, list_readings, swap_channels
from hftl.analysis.source_faults import (
    MeasuredReading,
    add_costs,
    check_readings,
    examine_rows,
    score_rows,
)
from hftl.config.data import Data, Table
from hftl.data.image_inputs import ImageInputs
from hftl.train.facts import Finding


@pytest.mark.parametrize(
    ("family", "own", "others"),
    [
        ("dinov2", IMAGENET, []),
        ("dinov2", HALF, ["ImageNet"]),
        ("vit", HALF, ["ImageNet"]),
        ("clip", IMAGENET, ["CLIP"]),
        ("unknown", IMAGENET, ["-1 to 1", "0 to 1"]),
        ("unknown", CLIP, ["-1 to 1", "0 to 1"]),
    ],
)
def test_normalizations_are_those_of_the_family(
    family: str, own: Normalization, others: list[str]
) -> None:
    assert [*list_other_normalizations(family, own)] == others


def read_pictures(red: float, blue: float, **settings: Any) -> list[Reading]:
    """Return the readings of 40 noisy pictures of so much red and blue."""
    from transformers import ViTImageProcessorPil

    draw = np.random.default_rng(0)
    shades = draw.normal(128, 20, (40, 1, 1, 1)) + np.array([red, 0, blue])[:, None, None]
    noise = draw.normal(0, 5, (40, 1, 1, 1)) * np.array([1, 0, 0])[:, None, None]
    pixels = np.clip(shades + (noise if red or blue else 0), 0, 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (40, 3, 16, 16))
    usual = {"image_mean": [*IMAGENET.mean], "image_std": [*IMAGENET.std], **settings}
    processor: Any = ViTImageProcessorPil(size={"height": 16, "width": 16}, **usual)
    inputs = ImageInputs(Data(train=Table(path=".")), processor, {}, 8)
    rows: Any = range(40)
    return list_readings(
        inputs, "dinov2", rows, lambda rows: [{"pixel_values": own} for own in pixels]
    )


def test_exchanged_channels_are_probable_where_pictures_are_blue() -> None:
    (red,), (blue,) = read_pictures(20, 0), read_pictures(0, 20)
    assert red.kind == blue.kind == "channels"
    assert red.level < blue.level and red.min_cost > blue.min_cost
    assert "of 255 levels more blue" in blue.evidence and red.evidence == ""
    assert read_pictures(0, 0) == [], "grey pictures are the same either way"
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert np.array_equal(swap_channels({"pixel_values": pixels})["pixel_values"], pixels[::-1])


def test_a_processor_that_is_not_the_familys_is_read_by_the_familys() -> None:
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert [r.kind for r in read_pictures(0, 0, **half)] == ["normalization"]
    twice = read_pictures(0, 0, rescale_factor=1 / 255**2)
    assert [r.kind for r in twice] == ["rescale"] and "ImageNet" in twice[0].name


def measure(p_value: float, cost: float, **changes: Any) -> MeasuredReading:
    reading: dict[str, Any] = {"kind": "normalization", "name": "by ImageNet", "what": "w"}
    reading |= {"fix": "f", "encode": list, "inputs": None, **changes}
    return MeasuredReading(Reading(**reading), p_value, cost, 400)


def examined_by(*measured: MeasuredReading) -> Any:
    return SimpleNamespace(measured=[*measured])


@pytest.mark.parametrize(
    ("p_value", "cost", "confidence"),
    [(0.001, 0.05, "likely"), (0.03, 0.05, "possible"), (0.06, 0.05, None), (0.001, 0.01, None)],
)
def test_a_better_reading_is_a_fault(p_value: float, cost: float, confidence: str | None) -> None:
    findings = list(check_readings(examined_by(measure(p_value, cost))))
    assert [finding.confidence for finding in findings] == ([confidence] if confidence else [])
    assert all(finding.cost == cost and "+5.0%" in finding.evidence for finding in findings)
    # Of two readings each has half of the level.
    both = check_readings(examined_by(measure(p_value, cost), measure(0.9, -0.1)))
    assert bool(list(both)) == (p_value < 0.025 and cost > 0.02)


def test_declared_faults_get_the_points_that_they_cost() -> None:
    declared = [
        Finding(kind=kind, what="w", confidence="likely", evidence="declared", fix="f")
        for kind in ("normalization", "tokenizer")
    ]
    priced, untouched = add_costs(declared, examined_by(measure(0.01, 0.04)))
    assert priced.cost == 0.04 and priced.confidence == "likely" and untouched is declared[1]
    assert priced.evidence.startswith("declared; a probe of 400 rows is right in +4.0%")
    (doubtful, _) = add_costs(declared, examined_by(measure(0.99, -0.04)))
    assert doubtful.confidence == "possible" and doubtful.cost == -0.04
    assert add_costs(declared, examined_by()) == declared


def test_scores_are_those_of_rows_that_a_probe_has_not_seen() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 120)
    features = draw.normal(size=(120, 4)).astype(np.float32)
    own = score_rows(features, labels, 2, None)
    assert 0.3 < own.hits.mean() < 0.65 and set(np.unique(own.hits * 3).round(6)) <= {0, 1, 2, 3}
    groups = np.repeat(np.arange(30).astype(str), 4)
    assert set(score_rows(features, labels, 2, groups).hits) <= {0.0, 1.0}


# The source's own classifier.


@pytest.mark.parametrize(
    ("outputs", "names", "expected"),
    [
        (["NEGATIVE", "positive"], ["negative", "positive"], [0, 1]),
        (["positive", "negative"], ["negative", "positive"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["negative", "positive"], None),
        (["a", "b", "c"], ["a", "b"], None),
    ],
)
def test_outputs_are_matched_by_name(
    outputs: list[str], names: list[str], expected: list[int] | None
) -> None:
    order = match_own_names(dict(enumerate(outputs)), names)
    assert (None if order is None else order.tolist()) == expected


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("accuracy", [0.9, 0.34])
def test_labels_against_those_of_the_source(
    exchanged: bool, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 200)
    right = np.where(draw.random(200) < accuracy, labels, (labels + 1) % 3)
    if accuracy < 0.5:
        right = draw.integers(0, 3, 200)  # A head of another task says nothing of these classes.
    # Outputs stand for b, a, c in the config; exchanged, they are the classifier's a, b, c.
    outputs = right if exchanged else np.array([1, 0, 2])[right]
    monkeypatch.setattr(own_labels, "predict_own", lambda examined, count: np.eye(3)[outputs])
    examined: Any = SimpleNamespace(
        rows=[None] * 200, targets=labels,
        context=SimpleNamespace(
            prepared=SimpleNamespace(task="classification", names=["a", "b", "c"]),
            group_outputs=lambda rows: None,
            source=SimpleNamespace(config=SimpleNamespace(id2label={0: "b", 1: "a", 2: "c"})),
        ),
    )  # fmt: skip
    findings = list(check_own_labels(examined))
    assert len(findings) == (exchanged and accuracy > 0.5)
    for finding in findings:
        assert finding.kind == "label map" and "'b' for 'a'" in finding.what
        assert finding.cost and finding.cost > 0.4 and finding.confidence == "likely"


def test_own_classifier_is_read_where_its_weights_are(tiny_model: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, plain = tmp_path / "tuned", tiny_model()
    torch.manual_seed(0)
    names = {0: "positive", 1: "negative"}
    model = AutoModelForSequenceClassification.from_pretrained(plain, id2label=names)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table = write_csv(tmp_path / "t.csv", ["text", "label"], sentences(160))
    tree = {"data": {"train": {"path": str(table)}, "max_length": 16}, "measure": {"seeds": [0]}}
    recipe = Recipe.parse({"source": {"model": str(folder)}, **tree})
    examined = examine_rows(recipe, bench_of(recipe))
    assert examined is not None
    logits = predict_own(examined, 5)
    texts = [row.content[0] for row in examined.rows[:5]]
    with torch.no_grad():
        expected = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert logits is not None and np.allclose(logits, expected.numpy(), atol=1e-5)
    recipe = Recipe.parse({"source": {"model": str(plain)}, **tree})
    examined = examine_rows(recipe, bench_of(recipe))
    assert examined is not None and predict_own(examined, 5) is None
