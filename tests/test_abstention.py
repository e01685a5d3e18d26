"""Measure what leaving the least sure inputs unanswered gains."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from support.records import make_record, render

from hftl.card.plots import plot_abstention
from hftl.measure.abstention import compute_aurc, measure_abstention
from hftl.measure.record import Record


def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(0, 1.5, (rows, 3))
    chances = softmax(logits, axis=1).cumsum(1)
    return logits, (rng.random((rows, 1)) > chances).sum(1).clip(max=2)


def test_the_area_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.random(80), rng.random(80) < 0.8
    order = np.argsort(-scores)
    risks = [1 - right[order[:k]].mean() for k in range(1, 81)]
    assert compute_aurc(scores, right) == pytest.approx(np.mean(risks))


def test_rows_of_one_score_count_at_their_mean() -> None:
    right = np.array([True, False, True, True])
    assert compute_aurc(np.ones(4), right) == pytest.approx(0.25)
    assert compute_aurc(np.array([2, 1, 1, 1]), right) == pytest.approx(
        np.mean([0, 1 / 6, 2 / 9, 1 / 4])
    )


def test_scores_that_know_their_mistakes_have_the_least_area() -> None:
    rng = np.random.default_rng(1)
    logits, labels = draw(rng, 600)
    section = measure_abstention(logits, labels, None, np.arange(600))
    assert section is not None
    error = 1 - np.mean(logits.argmax(1) == labels)
    assert section.best_aurc < section.aurc.value < error
    # With m mistakes of n, all last: the sum over j = 1..m of j / (n - m + j), over n.
    mistakes = round(error * 600)
    steps = np.arange(1, mistakes + 1)
    assert section.best_aurc == pytest.approx(np.sum(steps / (600 - mistakes + steps)) / 600)
    assert section.aurc.ci95 is not None
    assert section.aurc.ci95[0] < section.aurc.value < section.aurc.ci95[1]


def test_points_are_the_surest_shares() -> None:
    logits, labels = draw(np.random.default_rng(2), 400)
    section = measure_abstention(logits, labels, 2.0, np.arange(400))
    assert section is not None
    assert [point.share for point in section.points] == pytest.approx(np.arange(1, 21) / 20)
    scores = softmax(logits / 2, axis=1).max(1)
    for point in (section.points[3], section.points[-1]):
        surest = scores >= point.score
        assert surest.sum() == round(point.share * 400)
        right = logits[surest].argmax(1) == labels[surest]
        assert point.accuracy.value == pytest.approx(right.mean())
        assert point.accuracy.ci95 is not None


def test_few_rows_have_no_curve() -> None:
    assert measure_abstention(*draw(np.random.default_rng(3), 99), None, np.arange(99)) is None


def test_the_card_and_its_picture_show_the_curve(tmp_path: Path) -> None:
    section = measure_abstention(*draw(np.random.default_rng(4), 200), None, np.arange(200))
    assert section is not None
    tree = make_record() | {"abstention": section.to_dict()}
    text = render(tree)
    assert "assets/abstention.png" in text and "assets/abstention.png" not in render(make_record())
    assert f"risk-coverage curve {section.aurc.value:.3f} [" in text
    share = next(p.accuracy.value for p in section.points if p.share == 0.8)
    assert f"{share:.3f} [" in text and "of the surest 80%" in text
    plot_abstention(Record.parse(tree), tmp_path / "abstention.png")
    assert (tmp_path / "abstention.png").read_bytes().startswith(b"\x89PNG")
