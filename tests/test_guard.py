"""Compare the guard's rule with a plain loop, and let its checkpoint restore what the rule says."""

import itertools
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hftl.adapt.guard import AdaptationEvaluation, GuardedCheckpoint, GuardRule
from hftl.errors import NumericError

GUARDS = ("probe", "general", "neighbours", "off")
RULES = [GuardRule(*kind) for kind in itertools.product(GUARDS, (0.0, 0.125), (False, True))]
OFF = GuardRule("off", 0.0)


def draw_history(draw: random.Random) -> list[AdaptationEvaluation]:
    """Return evaluations of few values, exact in binary, so that ties and edges are common."""
    pairs = [(draw.randint(0, 3) / 2, draw.randint(0, 4) / 16) for _ in range(draw.randint(1, 6))]
    return [AdaptationEvaluation(i, target, None, guard) for i, (target, guard) in enumerate(pairs)]


def select_by_loop(rule: GuardRule, history: list[AdaptationEvaluation]) -> AdaptationEvaluation:
    start, best = history[0], history[0]
    for seen in history[1:]:
        assert seen.guard is not None and best.guard is not None and start.guard is not None
        fell = seen.target < start.target
        holds = rule.guard == "off" or start.guard - seen.guard <= rule.tolerance
        if not (fell and holds):
            continue
        if rule.by_guard and rule.guard != "off" and seen.guard != best.guard:
            better = seen.guard > best.guard
        else:
            better = seen.target < best.target
        best = seen if better else best
    return best


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_best_evaluation_is_that_of_a_plain_loop(rule: GuardRule) -> None:
    draw = random.Random(0)
    steps = set()
    for _ in range(200):
        history = draw_history(draw)
        best = rule.select_best(history)
        assert best is select_by_loop(rule, history)
        steps.add(best.step)
    assert steps >= {0, 1, 2, 3}


def test_tolerance_is_of_the_start_or_of_the_source_and_absolute_or_a_share() -> None:
    start, seen = AdaptationEvaluation(0, 2.0, None, 0.8), AdaptationEvaluation(1, 1.0, None, 0.795)
    assert GuardRule("probe", 0.01).allows(seen, start)
    assert not GuardRule("probe", 0.01, origin=0.81).allows(seen, start)
    assert GuardRule("probe", 0.02, origin=0.81).allows(seen, start)
    start, seen = (
        AdaptationEvaluation(0, 2.0, None, -50.0),
        AdaptationEvaluation(1, 1.0, None, -50.4),
    )
    assert GuardRule("probe", 0.01, relative=True).allows(seen, start)
    assert not GuardRule("probe", 0.01).allows(seen, start)
    assert not GuardRule("probe", 0.005, relative=True).allows(seen, start)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_explanation_of_an_undone_adaptation_is_true(rule: GuardRule) -> None:
    draw, reasons = random.Random(1), set()
    for _ in range(200):
        history = draw_history(draw)
        if len(history) < 2 or rule.select_best(history).step:
            continue
        start, later = history[0], history[1:]
        fallen = [seen for seen in later if seen.target < start.target]
        why = rule.explain(history)
        match = re.fullmatch(
            r"the guard \((\w+)\) was below (\S+) wherever the held-out loss had fallen; "
            r"its best there was (\S+)", why,
        )  # fmt: skip
        if why == "the held-out loss never fell below its start":
            assert not fallen
        elif match:
            guard, least, best = match.groups()
            assert guard == rule.guard and start.guard is not None
            assert float(least) == pytest.approx(start.guard - rule.tolerance, rel=1e-3)
            measured = [seen.guard for seen in fallen if seen.guard is not None]
            assert float(best) == pytest.approx(max(measured), rel=1e-3)
            assert max(measured) < start.guard - rule.tolerance
        else:
            assert why == f"the guard ({rule.guard}) was never better than at the start"
            assert rule.by_guard and max(s.guard or 0 for s in fallen) < (start.guard or 0)
        reasons.add(why.split("(")[0] + str(bool(match)))
    allowed = rule.tolerance > 0 and rule.by_guard
    assert len(reasons) == (1 if rule.guard == "off" else 2 + allowed)


def test_edge_of_the_tolerance_is_inside_and_an_equal_loss_is_not_lower() -> None:
    start = AdaptationEvaluation(0, 2.0, None, 0.5)
    for rule in (GuardRule("probe", 0.25), GuardRule("neighbours", 0.25)):
        assert rule.allows(AdaptationEvaluation(1, 1.0, None, 0.25), start)
        assert not rule.allows(AdaptationEvaluation(1, 1.0, None, 0.2499), start)
        assert not rule.allows(AdaptationEvaluation(1, 2.0, None, 0.9), start)
    assert OFF.allows(AdaptationEvaluation(1, 1.0), AdaptationEvaluation(0, 2.0))
    with pytest.raises(ValueError, match="nothing guarded the evaluation at step 1"):
        GuardRule("probe", 0.1).allows(AdaptationEvaluation(1, 1.0), start)


# The checkpoint


class Course:
    """Evaluate in the order of a training, once a step; the weight is the step's number."""

    def __init__(self, rule: GuardRule, patience: int | None = None) -> None:
        self.model = nn.Linear(1, 1)
        self.model.bias.requires_grad = False
        self.guard = 0.0
        measure = (lambda: self.guard) if rule.guard in ("probe", "neighbours") else None
        self.checkpoint = GuardedCheckpoint(rule, measure, patience)
        self.control = SimpleNamespace(should_training_stop=False, should_evaluate=False)
        self.state = SimpleNamespace(global_step=0, max_steps=100)

    def evaluate(self, step: int, target: float, guard: float = 0.0, general: Any = None) -> bool:
        """Return whether training stops after this evaluation."""
        self.state.global_step, self.guard = step, guard
        nn.init.constant_(self.model.weight, step)
        for name, value in (("general", general), ("target", target)):
            if value is not None:
                metrics = {f"eval_{name}_loss": value}
                self.checkpoint.on_evaluate(None, self.state, self.control, self.model, metrics)
        return self.control.should_training_stop


def test_weights_of_the_best_evaluation_are_restored() -> None:
    course = Course(GuardRule("probe", 0.125))
    for step, (target, guard) in enumerate([(3, 0.5), (2, 0.5), (1.5, 0.375), (1, 0.25)]):
        course.evaluate(step, target, guard)
    nn.init.constant_(course.model.bias, 7)
    assert course.checkpoint.best.step == 2 and course.checkpoint.restore(course.model)
    assert course.model.weight.item() == 2 and course.model.bias.item() == 7


def test_nothing_is_restored_where_the_start_is_best() -> None:
    course = Course(GuardRule("probe", 0.0))
    course.evaluate(0, 3.0, 0.5)
    course.evaluate(1, 2.0, 0.4)
    assert not course.checkpoint.restore(course.model) and course.model.weight.item() == 1
    assert course.checkpoint.best == course.checkpoint.history[0]


def test_general_loss_guards_with_its_sign_turned_or_is_recorded_beside_another_guard() -> None:
    course = Course(GuardRule("general", 0.125))
    for step, general in enumerate((1.0, 1.125, 1.25)):
        course.evaluate(step, 3.0 - step, general=general)
    history = [(seen.general, seen.guard) for seen in course.checkpoint.history]
    assert history == [(1.0, -1.0), (1.125, -1.125), (1.25, -1.25)]
    assert course.checkpoint.best.step == 1
    course = Course(GuardRule("neighbours", 0.5))
    course.evaluate(0, 3.0, 1.0, general=1.0)
    course.evaluate(1, 2.0, 0.75, general=9.0)
    assert course.checkpoint.history[1] == AdaptationEvaluation(1, 2.0, 9.0, 0.75)
    assert course.checkpoint.best.step == 1


@pytest.mark.parametrize(
    ("rule", "patience", "evaluations", "stop"),
    [
        (OFF, 2, [(3.0, 0), (4.0, 0), (2.0, 0), (2.0, 0), (2.5, 0)], 4),
        # From the start, where the guard never holds.
        (GuardRule("probe", 0.0), 2, [(3.0, 0.5), (2.0, 0.4), (1.0, 0.3)], 2),
        (OFF, None, [(1.0, 0)] + [(2.0, 0)] * 49, None),
    ],
)  # fmt: skip
def test_patience_counts_from_the_best(
    rule: GuardRule, patience: int | None, evaluations: list[Any], stop: int | None
) -> None:
    course = Course(rule, patience)
    stops = [course.evaluate(step, *values) for step, values in enumerate(evaluations)]
    assert [step for step, stopped in enumerate(stops) if stopped] == (
        [] if stop is None else [stop]
    )
    assert course.checkpoint.is_exhausted == (stop is not None)


def test_a_step_is_evaluated_once_and_the_last_one_always() -> None:
    course = Course(OFF)
    for step, target in ((0, 3.0), (5, 2.0), (5, 1.0)):
        course.evaluate(step, target)
    assert [seen.target for seen in course.checkpoint.history] == [3.0, 2.0]
    for step, last in ((99, False), (100, True)):
        course.state.global_step = step
        course.checkpoint.on_step_end(None, course.state, course.control)
        assert course.control.should_evaluate == last


@pytest.mark.parametrize("broken", ["target", "guard", "general"])
def test_nan_stops(broken: str) -> None:
    course = Course(GuardRule("probe", 0.0))
    course.evaluate(0, 3.0, 0.5, general=1.0)
    with pytest.raises(NumericError, match="the held-out loss is NaN at step 1"):
        course.evaluate(1, **{"target": 2.0, "guard": 0.5, "general": 1.0, broken: float("nan")})
    assert len(course.checkpoint.history) == 1


def test_checkpoint_stores_history_and_best_weights() -> None:
    course = Course(GuardRule("probe", 0.125), patience=2)
    course.evaluate(0, 3.0, 0.5)
    empty = course.checkpoint.dump_state()
    assert empty[1] == {}
    course.evaluate(1, 2.0, 0.5)
    course.evaluate(2, 1.0, 0.25)
    state = course.checkpoint.dump_state()
    assert torch.equal(state[1]["weight"], torch.ones(1, 1))
    other = Course(GuardRule("probe", 0.125), patience=2)
    other.checkpoint.load_state(*state)
    assert other.checkpoint.history == course.checkpoint.history
    assert other.evaluate(3, 1.0, 0.25), "the evaluation before the stop counts"
    assert other.checkpoint.restore(other.model) and other.model.weight.item() == 1
    fresh = Course(GuardRule("probe", 0.125))
    fresh.checkpoint.load_state(*empty)
    assert not fresh.checkpoint.restore(fresh.model)
