"""Guard an adaptation: choose the weights that may be used, and when training stops.

Adaptation lowers its own loss long after it has begun to destroy what the source model knew, so
the loss alone must not choose. Every evaluation is held against the start, the original weights
under a warmed head; those that fail the guard are out, and the original stays where none is left.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hftl.adapt.facts import AdaptEvaluation, AdaptStage, CorpusFacts, GuardFigures, LossChange
from hftl.config.adapt import Method, Objective
from hftl.data.facts import OpenPart
from hftl.errors import NumericError
from hftl.runtime.distributed import broadcast_from_main
from hftl.train.checkpoint import (
    CallbackState,
    StatefulCallback,
    copy_trainable,
    iterate_trainable,
)
from hftl.train.facts import Number

MAX_EXPONENT = 700.0
"""Above this loss exp leaves the range of floats."""


@dataclass(frozen=True)
class AdaptationEvaluation:
    """Describe one evaluation.

    `step` 0 is the start. `target` and `general` are held-out losses, `guard` is better when
    greater; each None where it is not measured.
    """

    step: int
    target: float
    general: float | None = None
    guard: float | None = None


@dataclass(frozen=True)
class GuardRule:
    """Decide which weights are allowed.

    Args:
        guard: probe, general, neighbours or off; of `general` the guard is minus the general loss.
        tolerance: by how much the guard may be below its start.
        by_guard: choose the best guard, not the lowest target loss: what masked images are
            reconstructed like says little about what their encoder is good for.
        relative: the tolerance is a share of the start, which has a unit of its own.
        origin: the guard of the source model, where an adaptation came before; None: the start's.
    """

    guard: str
    tolerance: float
    by_guard: bool = False
    relative: bool = False
    origin: float | None = None

    def allows(self, seen: AdaptationEvaluation, start: AdaptationEvaluation) -> bool:
        """Return whether the guard holds and the target loss is below its start."""
        lower = seen.target < start.target
        if self.guard == "off":
            return lower
        return lower and _get_guard(seen) >= self._least(start)

    def select_best(self, history: list[AdaptationEvaluation]) -> AdaptationEvaluation:
        """Return the best evaluation, the first of equals; the start where no other is allowed."""
        start = history[0]
        allowed = [seen for seen in history[1:] if self.allows(seen, start)]
        if not self.by_guard or self.guard == "off":
            return min([start, *allowed], key=lambda seen: seen.target)
        return max([start, *allowed], key=lambda seen: (_get_guard(seen), -seen.target))

    def explain(self, history: list[AdaptationEvaluation]) -> str:
        """Return why no evaluation after the start is allowed, for the record."""
        start, later = history[0], history[1:]
        if all(seen.target >= start.target for seen in later):
            return "the held-out loss never fell below its start"
        if any(self.allows(seen, start) for seen in later):
            return f"the guard ({self.guard}) was never better than at the start"
        highest = max(_get_guard(seen) for seen in later if seen.target < start.target)
        return (
            f"the guard ({self.guard}) was below {self._least(start):.4g} wherever the held-out "
            f"loss had fallen; its best there was {highest:.4g}"
        )

    def _least(self, start: AdaptationEvaluation) -> float:
        """Return the least guard that is allowed."""
        origin = _get_guard(start) if self.origin is None else self.origin
        return origin - self.tolerance * (abs(origin) if self.relative else 1.0)


def _get_guard(seen: AdaptationEvaluation) -> float:
    if seen.guard is None:
        raise ValueError(f"nothing guarded the evaluation at step {seen.step}")
    return seen.guard


class GuardedCheckpoint(StatefulCallback):
    """Hold the trainable weights of the best allowed evaluation; stop when none improves.

    The first evaluation is the start.

    Args:
        rule: decides which weights are allowed.
        measure: the guard's value now; None where it is the general loss, or off.
        patience: evaluations that are not the best so far before training stops; None: never.
    """

    def __init__(
        self, rule: GuardRule, measure: Callable[[], float] | None, patience: int | None
    ) -> None:
        self.rule = rule
        self.measure = measure
        self.patience = patience
        self.history: list[AdaptationEvaluation] = []
        self._general: float | None = None
        self._weights: dict[str, Tensor] = {}

    @property
    def best(self) -> AdaptationEvaluation:
        """Return the evaluation whose weights are held."""
        return self.rule.select_best(self.history)

    @property
    def is_exhausted(self) -> bool:
        """Return whether patience is used up."""
        waited = len(self.history) - 1 - self.history.index(self.best)
        return self.patience is not None and waited >= self.patience

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate at the last step too."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **_: Any
    ) -> None:
        """Judge an evaluation; the general loss comes before the target's."""
        if "eval_general_loss" in metrics:
            self._general = broadcast_from_main(lambda: float(metrics["eval_general_loss"]))
            return
        if any(seen.step == state.global_step for seen in self.history):
            return
        # Rank 0's number decides for all: the last bit may differ between machines.
        target = broadcast_from_main(lambda: float(metrics["eval_target_loss"]))
        guard = self.measure() if self.measure else None
        if self.rule.guard == "general" and self._general is not None:
            guard = -self._general
        now = AdaptationEvaluation(state.global_step, target, self._general, guard)
        values = [value for value in (target, self._general, guard) if value is not None]
        if not all(map(math.isfinite, values)):
            shown = "NaN" if any(map(math.isnan, values)) else "infinite"
            raise NumericError(
                f"the held-out loss is {shown} at step {now.step}",
                "Lower adapt.training.learning_rate",
            )
        self.history.append(now)
        if self.best is now and now.step:
            copy_trainable(model, self._weights)
        if self.is_exhausted:
            control.should_training_stop = True

    def dump_state(self) -> CallbackState:
        """Return the evaluations, and the held weights."""
        history = [asdict(evaluation) for evaluation in self.history]
        return {"history": history, "general": self._general}, self._weights

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `dump_state` returned."""
        self.history = [AdaptationEvaluation(**row) for row in values["history"]]
        self._general, self._weights = values["general"], tensors

    def restore(self, model: nn.Module) -> bool:
        """Restore the held weights; return False if the start, the source's weights, is best."""
        if self.best.step == 0:
            return False
        for name, parameter in iterate_trainable(model):
            parameter.copy_(self._weights[name])
        return True


class HeadTraining(OpenPart):
    """Describe the training of a new head; `loss` is held out, first and best."""

    steps: int
    loss: tuple[float, float] | None


class AdaptationResult(OpenPart):
    """Describe a training under its guard, and the evaluation whose weights were taken."""

    kept: Literal["adapted", "original"]
    why: str | None
    """The reason where the original weights were taken."""
    step: int
    steps: int
    epochs: Number | None
    history: list[AdaptEvaluation]
    """The first is the start. Losses are in nats per predicted token or per pixel of a hidden
    patch."""
    learning_rate: Number
    precision: str
    trainable_parameters: int
    micro_batch: int | None = None
    """Rows that ran at once since memory ran out; a step held as many as before."""


class AdaptationFacts(AdaptationResult):
    """Describe a finished adaptation: how it was made, from what, and its result."""

    objective: Objective
    method: Method
    guard: str
    tolerance: Number
    relative: bool = False
    transductive: bool
    corpus: CorpusFacts
    warmed: HeadTraining
    weights_sha256: str | None = None
    """Of the adapted encoder."""


def summarize_adaptation(facts: AdaptationFacts) -> AdaptStage:
    """Return the record of one adaptation, from the evaluations that it was judged by."""
    start = facts.history[0]
    end = next(evaluation for evaluation in facts.history if evaluation.step == facts.step)
    words = facts.objective != "mae"
    general = None
    if start.general is not None and end.general is not None:
        general = _compare_losses(start.general, end.general, words)
    guard = GuardFigures(
        kind=facts.guard, tolerance=facts.tolerance, before=start.guard, after=end.guard
    )
    changes = {
        "loss": _compare_losses(start.target, end.target, words), "general": general,
        "guard": guard,
    }  # fmt: skip
    return AdaptStage.model_validate(facts.to_dict() | changes)


def _compare_losses(before: float, after: float, words: bool) -> LossChange:
    fall = 1 - after / before
    if not words:
        return LossChange(before=before, after=after, fall=fall)
    perplexity = (_perplexity(before), _perplexity(after))
    return LossChange(before=before, after=after, fall=fall, perplexity=perplexity)


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < MAX_EXPONENT else None
