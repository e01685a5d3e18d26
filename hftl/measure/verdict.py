"""Decide whether to publish or to hold, with reasons."""

from dataclasses import dataclass
from typing import Protocol

from hftl.adapt.facts import AdaptStage
from hftl.finetune.strategies import PROBE_ARM, ZERO_SHOT_ARM
from hftl.measure.facts import (
    MIN_JUDGED_ROWS,
    CalibrationSection,
    Estimate,
    Interval,
    SliceScore,
    SliceSection,
)
from hftl.measure.forgetting_facts import Forgotten
from hftl.measure.record import BaselineGain, Gain, Record, Verdict

RELOAD_TOLERANCE = 1e-5
ROW_SHARES = ("accuracy", "evaluate:accuracy")
"""Metrics that are a share of rows, so that a share of leaked rows bounds what they gain."""

CALIBRATION_MARGIN = 0.01
"""Of the Brier score: what is not worse by more is not worse, as gains within `gain.MARGIN` are
none."""

LEVEL_NOTES = {
    "publish": "nor is head better, so that this does not hold it",
    "hold": "this alone would not hold it",
}
"""Which way it points that a model is neither better nor worse than `head`, by the decision."""

Judgement = tuple[bool, str]
"""Whether it speaks for publishing, and the reason; '' where there is nothing to say."""


class IntervalEstimate(Protocol):
    """Describe a difference with its 95 % interval: a gain, what was forgotten, a change."""

    @property
    def value(self) -> float:
        """Return the difference."""
        ...

    @property
    def ci95(self) -> Interval | None:
        """Return its interval; None where there is none."""
        ...


@dataclass(frozen=True)
class ForgettingBudget:
    """Hold the most that may be forgotten, and what was; None where nothing was measured."""

    budget: float
    forgotten: Forgotten | None


@dataclass(frozen=True)
class Leakage:
    """Count the rows of test that are near copies of one in another split.

    `is_share` says whether the gain is one of shares of rows, which a count of rows compares with.
    """

    rows: int
    measured: int
    is_share: bool = True

    @property
    def share(self) -> float:
        """Return the share of the rows that measure."""
        return self.rows / max(1, self.measured)


@dataclass(frozen=True)
class ConstantScore:
    """Compare a model with one answer to all rows of test, in a metric of which more is better."""

    answer: str
    metric: str
    constant: float
    own: float


@dataclass(frozen=True, kw_only=True)
class VerdictEvidence:
    """Hold what a verdict on a trained model rests on; None where it was not measured."""

    gain: BaselineGain | None
    """The transfer gain; None where no baseline ran."""
    over_head: Gain | None
    """The own arm's gain over `head`; None where it is head or head did not run."""
    reload_difference: float | None
    """The largest difference of logits after a reload in a fresh process, relative to the largest
    logit where that is above 1."""
    over_source: Gain | None = None
    """The own arm's gain over the same without adaptation, where it is adapted."""
    over_zero_shot: Gain | None = None
    slices: SliceSection | None = None
    forgetting: ForgettingBudget | None = None
    """What may be forgotten and was, where the recipe sets a budget."""
    calibration: CalibrationSection | None = None
    """Of the published weights, where there are probabilities."""
    leakage: Leakage | None = None
    constant: ConstantScore | None = None


def judge_record(record: Record) -> Verdict:
    """Return the verdict of a record, from its figures alone."""
    if record.own_arm is None:
        return decide_adaptation_verdict(record.stages)
    over = {row.arm: row.gain_of_own for row in record.ladder}
    evidence = VerdictEvidence(
        gain=record.transfer_gain,
        over_head=over.get(PROBE_ARM),
        reload_difference=record.reload_difference,
        over_source=over.get("source"),
        over_zero_shot=over.get(ZERO_SHOT_ARM),
        slices=record.slices,
        forgetting=_read_budget(record),
        calibration=record.calibration,
        leakage=_count_leakage(record),
        constant=_compare_with_constant(record),
    )
    return decide_verdict(evidence)


def _read_budget(record: Record) -> ForgettingBudget | None:
    """Return the recipe's budget of forgetting, and what the own arm forgot; None without one."""
    budget = record.recipe.measure.forgetting_budget
    if budget is None:
        return None
    arms = [] if record.forgetting is None else record.forgetting.arms
    own = next((arm.forgotten for arm in arms if arm.arm == record.own_arm), None)
    return ForgettingBudget(budget, own)


def _count_leakage(record: Record) -> Leakage | None:
    counts = [f.rows for f in record.check.findings if f.kind == "leakage" and f.rows is not None]
    if not sum(counts) or record.transfer_gain is None:
        return None
    is_share = record.transfer_gain.metric in ROW_SHARES
    return Leakage(sum(counts), record.data.splits.get("test", 0), is_share)


def _compare_with_constant(record: Record) -> ConstantScore | None:
    """Return the own arm's R2 beside the mean's, or its accuracy beside the commonest label's."""
    scores = record.test_metrics or {}
    r2, accuracy = scores.get("r2"), scores.get("accuracy")
    if record.data.task == "regression" and r2 is not None:
        return ConstantScore("the mean of the test targets", "r2", 0.0, r2)
    counts = (record.data.label_counts or {}).get("test")
    # Another metric may be worth fewer rows that are right, as that of balanced classes is.
    is_share = record.data.task == "classification" and record.metric in ROW_SHARES
    if not is_share or accuracy is None or not counts:
        return None
    label = max(counts, key=lambda name: counts[name])
    share = counts[label] / sum(counts.values())
    return ConstantScore(f"{label!r}, the commonest label", "accuracy", share, accuracy)


def decide_verdict(evidence: VerdictEvidence) -> Verdict:
    """Publish only when the gain is beyond noise and beyond what leakage could make, neither
    `head`, `zero_shot` nor the recipe without adaptation is better beyond noise, no slice loses,
    one answer to all rows is not better, forgetting is within its budget, calibration is not
    worse, and the reload is proved.

    A model that is not better than `head` says so first, whatever the decision: the gain over a
    baseline that was not pretrained does not show that training the encoder was worth it.

    Returns:
        The verdict; on publish the reasons say what speaks for it.
    """
    gain, over_head = evidence.gain, evidence.over_head
    head_holds, head_reason = _judge_head(over_head)
    ahead = over_head is None or is_better(over_head)
    checks = [
        _judge_gain(gain), _judge_constant(evidence.constant),
        _judge_zero_shot(evidence.over_zero_shot), _judge_adaptation(evidence.over_source),
        _judge_slices(evidence.slices, None if gain is None else gain.metric),
        _judge_leakage(evidence.leakage, gain), _judge_forgetting(evidence.forgetting),
        _judge_calibration(evidence.calibration), _judge_reload(evidence.reload_difference),
    ]  # fmt: skip
    checks.insert(1 if ahead else 0, (head_holds, head_reason))
    against = [reason for holds, reason in checks if not holds]
    level = not ahead and head_holds
    if level:
        note = LEVEL_NOTES["hold" if against else "publish"]
        checks[0] = head_holds, f"{head_reason}; {note}"
    if not against:
        return Verdict(decision="publish", reasons=[reason for _, reason in checks if reason])
    return Verdict(decision="hold", reasons=[checks[0][1], *against] if level else against)


def decide_adaptation_verdict(stages: list[AdaptStage]) -> Verdict:
    """Return the verdict on adaptations without a task: publish what lowered its loss under its
    guard."""
    accepted = [stage for stage in stages if stage.kept == "adapted"]
    if not accepted:
        return Verdict(decision="hold", reasons=[str(stage.why) for stage in stages])
    fell = f"the held-out loss fell by {accepted[-1].loss.fall:.1%}"
    if any(stage.guard.kind == "off" for stage in accepted):
        return Verdict(decision="hold", reasons=[f"{fell}, but nothing guarded it"])
    return Verdict(decision="publish", reasons=[f"{fell}, and the guard held"])


def is_better(gain: IntervalEstimate) -> bool:
    """Return whether a gain is above zero beyond noise; without an interval, above zero at all."""
    return (gain.value if gain.ci95 is None else gain.ci95[0]) > 0


def is_worse(gain: IntervalEstimate) -> bool:
    """Return whether a gain is below zero beyond noise; without an interval, below zero at all."""
    return (gain.value if gain.ci95 is None else gain.ci95[1]) < 0


def format_gain(gain: IntervalEstimate) -> str:
    """Return `+0.105 [+0.071, +0.139]`, or the value alone where there is no interval."""
    value = f"{gain.value:+.3f}"
    if gain.ci95 is None:
        return value
    low, high = gain.ci95
    return f"{value} [{low:+.3f}, {high:+.3f}]"


def _judge_gain(gain: BaselineGain | None) -> Judgement:
    if gain is None:
        return False, (
            "no baseline that learns the task (scratch, classical) was run, so nothing says what "
            "the transfer is worth"
        )
    text = f"{format_gain(gain)} {gain.metric} over {gain.baseline}"
    if gain.ci95 is None:
        return False, f"the gain {text} {_format_luck(gain)}"
    if gain.outcome == "undetermined" and gain.ci95[0] > 0:
        unsure = next(
            f"{format_gain(other)} over {name}"
            for name, other in gain.baselines.items()
            if other.outcome != "positive"
        )
        return False, f"the gain {text} is beyond noise, but {unsure} is not"
    reasons = {
        "positive": f"the gain {text} is beyond noise",
        "equivalent": f"the gain {text} is practically none",
        "negative": f"negative transfer: {text}",
        "undetermined": f"the gain {text} is within noise",
    }
    return gain.outcome == "positive", reasons[gain.outcome]


def _format_luck(gain: Gain) -> str:
    """Say what a gain without an interval rests on."""
    single = "one seed" if gain.seeds == 1 else "one group of test rows"
    return f"rests on {single}, which cannot tell gain from luck"


def _judge_head(over_head: Gain | None) -> Judgement:
    """Hold where head is better, without an interval by the score alone, which is said."""
    if over_head is None:
        return True, ""
    text = f"{format_gain(over_head)} {over_head.metric}"
    if over_head.ci95 is None:
        better = "not shown to be" if over_head.value > 0 else "not"
        head = "head, the frozen encoder with a linear head"
        holds = not is_worse(over_head)
        return holds, f"{better} better than {head}: {text} {_format_luck(over_head)}"
    if is_worse(over_head):
        return False, f"the frozen encoder with a linear head is better: {text} against head"
    if not is_better(over_head):
        return True, f"not better than head, the frozen encoder with a linear head: {text}"
    return True, f"better than head: {text}"


def _judge_constant(constant: ConstantScore | None) -> Judgement:
    """Hold where one answer to every row of test is better; gains over baselines do not show it."""
    if constant is None or constant.own >= constant.constant:
        return True, ""
    return False, (
        f"worse than always {constant.answer}: test {constant.metric} {constant.own:.3f} against "
        f"{constant.constant:.3f}"
    )


def _judge_zero_shot(over_zero_shot: Gain | None) -> Judgement:
    if over_zero_shot is None or not is_worse(over_zero_shot):
        return True, ""
    text = f"{format_gain(over_zero_shot)} {over_zero_shot.metric}"
    if over_zero_shot.ci95 is None:
        words = "not better than words for the classes, without any label (zero_shot)"
        return False, f"{words}: {text} {_format_luck(over_zero_shot)}"
    return False, f"words for the classes are better without any label: {text} against zero_shot"


def _judge_adaptation(over_source: Gain | None) -> Judgement:
    if over_source is None or over_source.outcome != "negative":
        return True, ""
    text = f"{format_gain(over_source)} {over_source.metric}"
    return False, f"adaptation did harm: {text} against source, the same without it"


def _judge_slices(slices: SliceSection | None, metric: str | None) -> Judgement:
    """Hold where a slice of enough rows is worse than the baseline, and name the worst."""
    lost = [part for part in slices.losers if part.rows >= MIN_JUDGED_ROWS] if slices else []
    if slices is None or not lost:
        return True, ""
    several = f"{len(lost)} slices lose" if len(lost) > 1 else "a slice loses"
    return False, (
        f"{several} beyond noise{', most of all' if len(lost) > 1 else ':'} {lost[0].phrase}: "
        f"{format_slice_gain(lost[0])} {metric} over {slices.baseline} on {lost[0].rows:,} rows"
    )


def format_slice_gain(part: SliceScore) -> str:
    """Return a slice's gain with its interval; `-` where no baseline ran."""
    return "-" if part.gain is None else format_gain(Estimate(part.gain, part.gain_ci95))


def _judge_leakage(leakage: Leakage | None, gain: BaselineGain | None) -> Judgement:
    """Hold where near copies of rows could make all of the gain that is beyond noise."""
    if leakage is None or gain is None or gain.ci95 is None or gain.outcome != "positive":
        return True, ""
    text = (
        f"{leakage.rows} of {leakage.measured:,} test rows ({leakage.share:.1%}) are near copies "
        "of one in another split"
    )
    if not leakage.is_share:
        return (
            True,
            f"{text}; how much of the gain is theirs is not known, so that they do not hold it",
        )
    if gain.ci95[0] > leakage.share:
        return True, f"{text}, fewer than the gain"
    return False, f"{text}, as many as the gain's lower bound of {gain.ci95[0]:+.3f}"


def _judge_forgetting(forgetting: ForgettingBudget | None) -> Judgement:
    """Hold where more is forgotten than the budget, beyond noise."""
    if forgetting is None:
        return True, ""
    budget = f"measure.forgetting_budget={forgetting.budget:g}"
    if forgetting.forgotten is None:
        return False, f"nothing says what is forgotten, and {budget}; give data.general"
    text = f"forgotten {format_gain(forgetting.forgotten)}"
    least = forgetting.forgotten.value
    if forgetting.forgotten.ci95 is not None:
        least = forgetting.forgotten.ci95[0]
    if least > forgetting.budget:
        return False, f"{text} is beyond {budget}"
    return True, f"{text} is not beyond {budget}"


def _judge_calibration(calibration: CalibrationSection | None) -> Judgement:
    """Hold where calibration makes probabilities worse on test by more than the margin beyond
    noise.

    Where probabilities need no calibration, any that is fitted is worse than none, by thousandths
    that a few hundred rows of test tell from zero.
    """
    if calibration is None or calibration.after is None or calibration.change is None:
        return True, ""
    interval = calibration.change.ci95
    if interval is None or interval[0] <= CALIBRATION_MARGIN:
        return True, ""
    before, after = calibration.before.brier, calibration.after.brier
    return False, (
        f"calibration made probabilities worse: Brier score {before.value:.3f} before and "
        f"{after.value:.3f} after, {format_gain(calibration.change)}"
    )


def _judge_reload(difference: float | None) -> Judgement:
    if difference is None:
        return False, "no reload in a fresh process is recorded"
    proved = difference <= RELOAD_TOLERANCE
    text = f"largest logit difference {difference:.1e} in a fresh process"
    return proved, f"reload proved: {text}" if proved else f"the reload is not the same: {text}"
