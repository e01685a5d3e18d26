"""Decide whether to publish or to hold, with reasons."""

from dataclasses import dataclass
from typing import Protocol

from hftl.measure.facts import MIN_JUDGED_ROWS, Interval, SliceScore, SliceSection
from hftl.measure.record import AdaptStage, BaselineGain, Gain, Verdict

RELOAD_TOLERANCE = 1e-5

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
class Estimate:
    """Hold a value and its 95 % interval; None where there is none."""

    value: float
    ci95: Interval | None


def decide_verdict(
    gain: BaselineGain | None,
    over_head: Gain | None,
    reload_difference: float,
    over_source: Gain | None = None,
    over_zero_shot: Gain | None = None,
    slices: SliceSection | None = None,
) -> Verdict:
    """Publish only when the gain is beyond noise, neither `head`, `zero_shot` nor the recipe
    without adaptation is better beyond noise, no slice loses, and the reload is proved.

    A model that is not better than `head` says so first, whatever the decision: the gain over a
    baseline that was not pretrained does not show that training the encoder was worth it.

    Args:
        gain: the transfer gain, or None where no baseline ran.
        over_head: the own arm's gain over `head`, or None where it is head or head did not run.
        reload_difference: largest difference of logits after a reload in a fresh process,
            relative to the largest logit where that is above 1.
        over_source: the own arm's gain over the same without adaptation, where it is adapted.
        over_zero_shot: the own arm's gain over `zero_shot`, where that ran beside it.
        slices: scores and gains of the recipe's slices, where it names some.

    Returns:
        The verdict; on publish the reasons say what speaks for it.
    """
    head_holds, head_reason = _judge_head(over_head)
    ahead = over_head is None or is_better(over_head)
    checks = [
        _judge_gain(gain), _judge_zero_shot(over_zero_shot), _judge_adaptation(over_source),
        _judge_slices(slices, None if gain is None else gain.metric),
        _judge_reload(reload_difference),
    ]  # fmt: skip
    checks.insert(1 if ahead else 0, (head_holds, head_reason))
    against = [reason for holds, reason in checks if not holds]
    if not against:
        return Verdict(decision="publish", reasons=[reason for _, reason in checks if reason])
    level = not ahead and head_holds
    return Verdict(decision="hold", reasons=[head_reason, *against] if level else against)


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
        return False, "no baseline was run, so nothing says what the transfer is worth"
    text = f"{format_gain(gain)} {gain.metric} over {gain.baseline}"
    if gain.ci95 is None:
        single = "one seed" if gain.seeds == 1 else "one group of test rows"
        return False, f"the gain {text} rests on {single}, which cannot tell gain from luck"
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


def _judge_head(over_head: Gain | None) -> Judgement:
    if over_head is None:
        return True, ""
    text = f"{format_gain(over_head)} {over_head.metric}"
    if is_worse(over_head):
        return False, f"the frozen encoder with a linear head is better: {text} against head"
    if not is_better(over_head):
        return True, f"not better than head, the frozen encoder with a linear head: {text}"
    return True, f"better than head: {text}"


def _judge_zero_shot(over_zero_shot: Gain | None) -> Judgement:
    if over_zero_shot is None or not is_worse(over_zero_shot):
        return True, ""
    text = f"{format_gain(over_zero_shot)} {over_zero_shot.metric}"
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


def _judge_reload(difference: float) -> Judgement:
    proved = difference <= RELOAD_TOLERANCE
    text = f"largest logit difference {difference:.1e} in a fresh process"
    return proved, f"reload proved: {text}" if proved else f"the reload is not the same: {text}"
