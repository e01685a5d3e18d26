"""Compare the record of an adaptation with numbers worked out by hand."""

import math
from typing import Any

import pytest

from hftl.adapt.facts import AdaptStage
from hftl.adapt.guard import AdaptationFacts, summarize_adaptation
from hftl.measure.gain import describe_adaptation_outcome
from hftl.measure.record import Gain

CORPUS = {"from": "train", "documents": 9, "leaked": 0, "transductive": False, "fingerprint": "0"}
GAIN = {"metric": "accuracy", "value": 0.1, "seeds": 2, "p_value": None,
        "relative_error_reduction": None}  # fmt: skip


def evaluation(step: int, target: float, general: Any = None, guard: Any = None) -> dict[str, Any]:
    return {"step": step, "target": target, "general": general, "guard": guard}


def make_facts(
    history: list[dict[str, Any]], step: int, objective: str = "mlm", why: str | None = None
) -> AdaptationFacts:
    return AdaptationFacts.model_validate({
        "objective": objective, "guard": "probe", "tolerance": 0.01, "history": history,
        "step": step, "kept": "adapted" if step else "original", "why": why, "seed": 5,
        "method": "full", "steps": 20, "learning_rate": 1e-4, "transductive": False,
        "relative": False, "corpus": CORPUS, "epochs": 2, "precision": "fp32",
        "trainable_parameters": 1, "warmed": {"steps": 0, "loss": None},
    })  # fmt: skip


def test_figures_of_masked_words() -> None:
    history = [
        evaluation(0, 4.0, 2.0, 0.75),
        evaluation(10, 3.0, 2.5, 0.875),
        evaluation(20, 5.0, 9.0, 0.1),
    ]
    facts = make_facts(history, 10)
    before = facts.model_copy(deep=True)
    stage = summarize_adaptation(facts)
    assert facts == before
    assert stage["loss"] == {
        "before": 4.0, "after": 3.0, "fall": 0.25,
        "perplexity": [pytest.approx(54.59815), pytest.approx(20.085537)],
    }  # fmt: skip
    assert stage["general"]["fall"] == -0.25
    perplexity = [pytest.approx(7.389056), pytest.approx(12.182494)]
    assert stage["general"]["perplexity"] == perplexity
    assert stage["guard"] == {"kind": "probe", "tolerance": 0.01, "before": 0.75, "after": 0.875}
    assert stage["seed"] == 5 and stage["history"] == history


def test_figures_of_masked_images_have_no_perplexity() -> None:
    history = [evaluation(0, 0.8, None, 0.75), evaluation(7, 0.6, None, 0.7)]
    stage = summarize_adaptation(make_facts(history, 7, "mae"))
    assert stage["loss"] == {"before": 0.8, "after": 0.6, "fall": pytest.approx(0.25)}
    assert stage["general"] is None


def test_where_the_original_stays_after_is_before() -> None:
    history = [evaluation(0, 4.0, 2.0, 0.75), evaluation(10, 3.0, 2.5, 0.1)]
    stage = summarize_adaptation(make_facts(history, 0))
    assert stage["loss"]["before"] == stage["loss"]["after"] and stage["loss"]["fall"] == 0
    assert stage["general"]["fall"] == 0
    assert stage["guard"]["before"] == stage["guard"]["after"] == 0.75


def test_perplexity_beyond_floats_is_none() -> None:
    stage = summarize_adaptation(make_facts([evaluation(0, 800.0), evaluation(1, 699.0)], 1))
    assert stage["loss"]["perplexity"] == [None, math.exp(699.0)]


def make_stage(outcome: str, why: str | None = None) -> AdaptStage:
    history = [evaluation(0, 4.0, None, 0.5), evaluation(1, 3.0, None, 0.5)]
    return summarize_adaptation(make_facts(history, int(outcome == "adapted"), why=why))


@pytest.mark.parametrize("outcome, words", [
    ("positive", "Adaptation helped"), ("equivalent", "practically no difference"),
    ("negative", "did harm"), ("undetermined", "did not beat no adaptation beyond noise"),
])  # fmt: skip
def test_sentence_states_the_outcome(outcome: str, words: str) -> None:
    gain = Gain.model_validate(GAIN | {"outcome": outcome, "ci95": [0.0, 1.0]})
    assert words in describe_adaptation_outcome([make_stage("adapted")], gain)
    both = [make_stage("adapted"), make_stage("original", "the loss rose")]
    assert words in describe_adaptation_outcome(both, gain), "one of two still counts"


def test_sentence_of_an_undone_or_unmeasured_adaptation() -> None:
    undone = [make_stage("original", "first"), make_stage("original", "second")]
    unsure = Gain.model_validate(GAIN | {"outcome": "undetermined", "ci95": None})
    sentence = "Adaptation was undone: second; the original weights were kept"
    assert describe_adaptation_outcome(undone, unsure) == sentence
    assert describe_adaptation_outcome(undone, None) == sentence
    adapted = [make_stage("adapted")]
    assert "was not measured" in describe_adaptation_outcome(adapted, None)
    assert "is not known" in describe_adaptation_outcome(adapted, unsure)
