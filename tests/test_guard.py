"""The guard's rule against a plain loop, and the callback that keeps what the rule says."""

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hftl.adapt.guard import GuardedCheckpoint, GuardEvaluation, GuardRule, find_complete_checkpoint
from hftl.errors import NumericError

GUARDS = ("probe", "general", "neighbours", "off")


def rules() -> list[GuardRule]:
    kinds = itertools.product(GUARDS, (0.0, 0.125), (False, True))
    return [GuardRule(guard, tolerance, by_guard) for guard, tolerance, by_guard in kinds]


def history_of(draw: random.Random) -> list[GuardEvaluation]:
    """Few values, so that ties and the edge of the tolerance are common; exact in binary."""
    pairs = [(draw.randint(0, 3) / 2, draw.randint(0, 4) / 16) for _ in range(draw.randint(1, 6))]
    return [
        GuardEvaluation(step, target, None, guard) for step, (target, guard) in enumerate(pairs)
    ]


def best_by_hand(rule: GuardRule, history: list[GuardEvaluation]) -> GuardEvaluation:
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


@pytest.mark.parametrize("rule", rules(), ids=str)
def test_the_kept_evaluation_is_that_of_a_plain_loop(rule: GuardRule) -> None:
    draw = random.Random(0)
    kept = set()
    for _ in range(400):
        history = history_of(draw)
        best = rule.select_best(history)
        assert best is best_by_hand(rule, history)
        kept.add(best.step)
    assert kept >= {0, 1, 2, 3}


def test_a_later_stage_is_held_to_the_source() -> None:
    start, seen = GuardEvaluation(0, 2.0, None, 0.8), GuardEvaluation(1, 1.0, None, 0.795)
    assert GuardRule("probe", 0.01).allows(seen, start)
    assert not GuardRule("probe", 0.01, origin=0.81).allows(seen, start)
    assert GuardRule("probe", 0.02, origin=0.81).allows(seen, start)


def test_a_relative_tolerance_is_a_share_of_the_start() -> None:
    start, seen = GuardEvaluation(0, 2.0, None, -50.0), GuardEvaluation(1, 1.0, None, -50.4)
    assert GuardRule("probe", 0.01, relative=True).allows(seen, start)
    assert not GuardRule("probe", 0.01).allows(seen, start)
    assert not GuardRule("probe", 0.005, relative=True).allows(seen, start)


@pytest.mark.parametrize("rule", rules(), ids=str)
def test_why_the_start_is_kept_is_true(rule: GuardRule) -> None:
    draw, reasons = random.Random(1), set()
    for _ in range(400):
        history = history_of(draw)
        if len(history) < 2 or rule.select_best(history).step:
            continue
        start, later = history[0], history[1:]
        fallen = [seen for seen in later if seen.target < start.target]
        why = rule.explain(history)
        found = re.fullmatch(
            r"the guard \((\w+)\) was below (\S+) wherever the held-out loss had fallen; "
            r"its best there was (\S+)", why,
        )  # fmt: skip
        if why == "the held-out loss never fell below its start":
            assert not fallen
        elif found:
            guard, least, best = found.groups()
            assert guard == rule.guard and start.guard is not None
            assert float(least) == pytest.approx(start.guard - rule.tolerance, rel=1e-3)
            measured = [seen.guard for seen in fallen if seen.guard is not None]
            assert float(best) == pytest.approx(max(measured), rel=1e-3)
            assert max(measured) < start.guard - rule.tolerance
        else:
            assert why == f"the guard ({rule.guard}) was never better than at the start"
            assert rule.by_guard and max(s.guard or 0 for s in fallen) < (start.guard or 0)
        reasons.add(why.split("(")[0] + str(bool(found)))
    allowed = rule.tolerance > 0 and rule.by_guard
    assert len(reasons) == (1 if rule.guard == "off" else 2 + allowed)


def test_the_edge_of_the_tolerance_is_inside_and_an_equal_loss_is_not_lower() -> None:
    start = GuardEvaluation(0, 2.0, None, 0.5)
    for rule in (GuardRule("probe", 0.25), GuardRule("neighbours", 0.25)):
        assert rule.allows(GuardEvaluation(1, 1.0, None, 0.25), start)
        assert not rule.allows(GuardEvaluation(1, 1.0, None, 0.2499), start)
        assert not rule.allows(GuardEvaluation(1, 2.0, None, 0.9), start)
    assert GuardRule("off", 0.0).allows(GuardEvaluation(1, 1.0), GuardEvaluation(0, 2.0))


def test_a_guard_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing guarded the evaluation at step 1"):
        GuardRule("probe", 0.1).allows(GuardEvaluation(1, 1.0), GuardEvaluation(0, 2.0, None, 0.5))


# The callback


class Course:
    """Evaluations in the order of a training, one a step; the weight is the step's number."""

    def __init__(self, rule: GuardRule, patience: int | None = None) -> None:
        self.model = nn.Linear(1, 1)
        self.model.bias.requires_grad = False
        self.guard = 0.0
        measure = (lambda: self.guard) if rule.guard in ("probe", "neighbours") else None
        self.keep = GuardedCheckpoint(rule, measure, patience)
        self.control = SimpleNamespace(should_training_stop=False, should_evaluate=False)
        self.state = SimpleNamespace(global_step=0, max_steps=100)

    def see(self, step: int, target: float, guard: float = 0.0, general: Any = None) -> bool:
        """One evaluation; whether training stops."""
        self.state.global_step, self.guard = step, guard
        nn.init.constant_(self.model.weight, step)
        for name, value in (("general", general), ("target", target)):
            if value is not None:
                metrics = {f"eval_{name}_loss": value}
                self.keep.on_evaluate(None, self.state, self.control, self.model, metrics)
        return self.control.should_training_stop

    def save(self, folder: Path) -> Path:
        """A checkpoint of this step."""
        made = folder / f"checkpoint-{self.state.global_step}"
        made.mkdir(parents=True)
        self.keep.on_save(SimpleNamespace(output_dir=str(folder)), self.state, self.control)
        return made


def test_restored_weights_are_those_of_the_kept_evaluation() -> None:
    course = Course(GuardRule("probe", 0.125))
    for step, (target, guard) in enumerate([(3, 0.5), (2, 0.5), (1.5, 0.375), (1, 0.25)]):
        course.see(step, target, guard)
    nn.init.constant_(course.model.bias, 7)
    assert course.keep.best.step == 2 and course.keep.restore(course.model)
    assert course.model.weight.item() == 2 and course.model.bias.item() == 7


def test_where_the_start_is_kept_nothing_is_restored() -> None:
    course = Course(GuardRule("probe", 0.0))
    course.see(0, 3.0, 0.5)
    course.see(1, 2.0, 0.4)
    assert not course.keep.restore(course.model) and course.model.weight.item() == 1
    assert course.keep.best == course.keep.history[0]


def test_the_general_loss_comes_first_and_is_the_guard_turned_round() -> None:
    course = Course(GuardRule("general", 0.125))
    course.see(0, 3.0, general=1.0)
    course.see(1, 2.0, general=1.125)
    course.see(2, 1.0, general=1.25)
    assert [(s.general, s.guard) for s in course.keep.history] == [
        (1.0, -1.0), (1.125, -1.125), (1.25, -1.25)
    ]  # fmt: skip
    assert course.keep.best.step == 1


def test_a_general_loss_beside_another_guard_is_only_told() -> None:
    course = Course(GuardRule("neighbours", 0.5))
    course.see(0, 3.0, 1.0, general=1.0)
    course.see(1, 2.0, 0.75, general=9.0)
    assert (
        course.keep.history[1] == GuardEvaluation(1, 2.0, 9.0, 0.75) and course.keep.best.step == 1
    )


def test_patience_counts_from_the_best() -> None:
    course = Course(GuardRule("off", 0.0), patience=2)
    assert not course.see(0, 3.0)
    assert not course.see(1, 4.0)
    assert not course.see(2, 2.0)
    assert not course.see(3, 2.0)
    assert course.see(4, 2.5) and course.keep.is_exhausted
    assert course.keep.best.step == 2


def test_patience_counts_from_the_start_where_the_guard_never_holds() -> None:
    course = Course(GuardRule("probe", 0.0), patience=2)
    course.see(0, 3.0, 0.5)
    assert not course.see(1, 2.0, 0.4)
    assert course.see(2, 1.0, 0.3)


def test_without_patience_it_never_stops() -> None:
    course = Course(GuardRule("off", 0.0))
    course.see(0, 1.0)
    assert not any(course.see(step, 2.0) for step in range(1, 50))


def test_the_same_step_is_looked_at_once_and_the_last_one_always() -> None:
    course = Course(GuardRule("off", 0.0))
    course.see(0, 3.0)
    course.see(5, 2.0)
    course.see(5, 1.0)
    assert [seen.target for seen in course.keep.history] == [3.0, 2.0]
    for step, last in ((99, False), (100, True)):
        course.state.global_step = step
        course.keep.on_step_end(None, course.state, course.control)
        assert course.control.should_evaluate == last


@pytest.mark.parametrize("broken", [{"target": float("nan")}, {"guard": float("nan")},
    {"general": float("nan")}])  # fmt: skip
def test_a_number_that_is_none_stops(broken: dict[str, float]) -> None:
    course = Course(GuardRule("probe", 0.0))
    course.see(0, 3.0, 0.5, general=1.0)
    with pytest.raises(NumericError, match="the held-out loss is NaN at step 1"):
        course.see(1, **({"target": 2.0, "guard": 0.5, "general": 1.0} | broken))
    assert len(course.keep.history) == 1


def test_a_checkpoint_takes_along_what_is_kept(tmp_path: Path) -> None:
    course = Course(GuardRule("probe", 0.125), patience=2)
    course.see(0, 3.0, 0.5)
    empty = course.save(tmp_path)
    course.see(1, 2.0, 0.5)
    course.see(2, 1.0, 0.25)
    folder = course.save(tmp_path)
    assert not (empty / "kept.safetensors").exists()
    assert torch.equal(load_file(folder / "kept.safetensors")["weight"], torch.ones(1, 1))
    other = Course(GuardRule("probe", 0.125), patience=2)
    other.keep.resume(folder)
    assert other.keep.history == course.keep.history
    assert other.see(3, 1.0, 0.25), "the look before the stop counts"
    assert other.keep.restore(other.model) and other.model.weight.item() == 1
    fresh = Course(GuardRule("probe", 0.125))
    fresh.keep.resume(empty)
    assert not fresh.keep.restore(fresh.model)


def test_the_newest_complete_checkpoint_is_taken(tmp_path: Path) -> None:
    assert find_complete_checkpoint(tmp_path) is None
    course = Course(GuardRule("off", 0.0))
    course.see(0, 3.0)
    for step in (9, 10, 100):
        course.state.global_step = step
        made = course.save(tmp_path)
    (made / "seen.json").unlink()
    (tmp_path / "checkpoint-1000").mkdir()
    assert find_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
