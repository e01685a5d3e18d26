"""The record of an adaptation, against numbers worked out by hand."""

import math
from typing import Any

import pytest

from hftl.measure.gain import describe_adaptation_outcome, summarize_adaptation


def seen(step: int, target: float, general: Any = None, guard: Any = None) -> dict[str, Any]:
    return {"step": step, "target": target, "general": general, "guard": guard}


def told(history: list[dict[str, Any]], step: int, objective: str = "mlm") -> dict[str, Any]:
    return {
        "objective": objective, "guard": "probe", "tolerance": 0.01, "history": history,
        "step": step, "kept": "adapted" if step else "original", "why": None, "seed": 5,
    }  # fmt: skip


def test_figures_of_masked_words() -> None:
    history = [seen(0, 4.0, 2.0, 0.75), seen(10, 3.0, 2.5, 0.875), seen(20, 5.0, 9.0, 0.1)]
    found = summarize_adaptation(told(history, 10))
    assert found["loss"] == {
        "before": 4.0, "after": 3.0, "fall": 0.25,
        "perplexity": [pytest.approx(54.59815), pytest.approx(20.085537)],
    }  # fmt: skip
    assert found["general"]["fall"] == -0.25
    assert found["general"]["perplexity"] == [pytest.approx(7.389056), pytest.approx(12.182494)]
    assert found["guard"] == {
        "kind": "probe", "tolerance": 0.01, "before": 0.75, "after": 0.875
    }  # fmt: skip
    assert found["seed"] == 5 and found["history"] == history


def test_figures_of_masked_pictures_have_no_perplexity() -> None:
    history = [seen(0, 0.8, None, 0.75), seen(7, 0.6, None, 0.7)]
    found = summarize_adaptation(told(history, 7, "mae"))
    assert found["loss"] == {"before": 0.8, "after": 0.6, "fall": pytest.approx(0.25)}
    assert found["general"] is None


def test_where_the_original_is_kept_after_is_before() -> None:
    found = summarize_adaptation(told([seen(0, 4.0, 2.0, 0.75), seen(10, 3.0, 2.5, 0.1)], 0))
    assert found["loss"]["before"] == found["loss"]["after"] and found["loss"]["fall"] == 0
    assert found["general"]["fall"] == 0
    assert found["guard"]["before"] == found["guard"]["after"] == 0.75


def test_what_was_told_is_left_as_it_was() -> None:
    given = told([seen(0, 4.0), seen(1, 3.0)], 1)
    before = dict(given)
    summarize_adaptation(given)
    assert given == before


def test_a_perplexity_beyond_floats_is_none() -> None:
    found = summarize_adaptation(told([seen(0, 800.0), seen(1, 699.0)], 1))
    assert found["loss"]["perplexity"] == [None, math.exp(699.0)]


@pytest.mark.parametrize("outcome, words", [
    ("positive", "Adaptation helped"), ("equivalent", "practically no difference"),
    ("negative", "did harm"), ("undetermined", "did not beat no adaptation beyond noise"),
])  # fmt: skip
def test_helped_says_the_outcome(outcome: str, words: str) -> None:
    adapted = {"kept": "adapted", "why": None}
    undone = {"kept": "original", "why": "the loss rose"}
    assert words in describe_adaptation_outcome([adapted], {"outcome": outcome, "ci95": [0.0, 1.0]})
    assert words in describe_adaptation_outcome(
        [adapted, undone], {"outcome": outcome, "ci95": [0.0, 1.0]}
    ), "one of two still counts"


def test_helped_of_what_was_undone_or_not_measured() -> None:
    undone = [{"kept": "original", "why": "first"}, {"kept": "original", "why": "second"}]
    said = "Adaptation was undone: second; the original weights were kept"
    assert (
        describe_adaptation_outcome(undone, {"outcome": "equivalent", "ci95": None})
        == describe_adaptation_outcome(undone, None)
        == said
    )
    assert "was not measured" in describe_adaptation_outcome(
        [{"kept": "adapted", "why": None}], None
    )
    of_one_seed = {"outcome": "undetermined", "ci95": None}
    assert "is not known" in describe_adaptation_outcome(
        [{"kept": "adapted", "why": None}], of_one_seed
    )
