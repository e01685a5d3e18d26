"""The verdict: publish or hold, with reasons."""

from typing import Any

RELOAD_TOLERANCE = 1e-5


def decide_verdict(
    gain: dict[str, Any] | None,
    over_head: dict[str, Any] | None,
    reload_difference: float,
    over_source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish only when the gain is beyond noise, neither `head` nor the recipe without adaptation
    is better beyond noise, and the reload is proved.

    A model that is not better than `head` says so first, whatever the decision: the gain over a
    baseline that was not pretrained does not show that training the encoder was worth it.

    Args:
        gain: the transfer gain, or None where no baseline ran.
        over_head: the own arm's gain over `head`, or None where it is head or head did not run.
        reload_difference: largest difference of logits after a reload in a fresh process,
            relative to the largest logit where that is above 1.
        over_source: the own arm's gain over the same without adaptation, where it is adapted.

    Returns:
        `{decision: publish | hold, reasons: [...]}`; on publish the reasons say what speaks for it.
    """
    head_holds, head_reason = _judge_head(over_head)
    ahead = over_head is None or is_better(over_head)
    checks = [_judge_gain(gain), _judge_adaptation(over_source), _judge_reload(reload_difference)]
    checks.insert(1 if ahead else 0, (head_holds, head_reason))
    against = [reason for holds, reason in checks if not holds]
    if not against:
        return {"decision": "publish", "reasons": [reason for _, reason in checks if reason]}
    level = not ahead and head_holds
    return {"decision": "hold", "reasons": [head_reason, *against] if level else against}


def decide_adaptation_verdict(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on adaptations without a task: publish what lowered its loss under its guard.

    Args:
        stages: see `measure.adaptation.figures`.
    """
    kept = [stage for stage in stages if stage["kept"] == "adapted"]
    if not kept:
        return {"decision": "hold", "reasons": [stage["why"] for stage in stages]}
    last = kept[-1]
    fell = f"the held-out loss fell by {last['loss']['fall']:.1%}"
    if any(stage["guard"]["kind"] == "off" for stage in kept):
        return {"decision": "hold", "reasons": [f"{fell}, but nothing guarded it"]}
    return {"decision": "publish", "reasons": [f"{fell}, and the guard held"]}


def is_better(gain: dict[str, Any]) -> bool:
    """Tell whether a gain is above zero beyond noise; without an interval, above zero at all."""
    return (gain["value"] if gain["ci95"] is None else gain["ci95"][0]) > 0


def is_worse(gain: dict[str, Any]) -> bool:
    """Tell whether a gain is below zero beyond noise; without an interval, below zero at all."""
    return (gain["value"] if gain["ci95"] is None else gain["ci95"][1]) < 0


def format_gain(gain: dict[str, Any]) -> str:
    """`+0.105 [+0.071, +0.139]`, or the value alone where there is no interval."""
    value = f"{gain['value']:+.3f}"
    if gain["ci95"] is None:
        return value
    low, high = gain["ci95"]
    return f"{value} [{low:+.3f}, {high:+.3f}]"


def _judge_gain(gain: dict[str, Any] | None) -> tuple[bool, str]:
    if gain is None:
        return False, "no baseline was run, so nothing says what the transfer is worth"
    told = f"{format_gain(gain)} {gain['metric']} over {gain['baseline']}"
    if gain["ci95"] is None:
        lone = "one seed" if gain["seeds"] == 1 else "one group of test rows"
        return False, f"the gain {told} rests on {lone}, which cannot tell gain from luck"
    if gain["outcome"] == "undetermined" and gain["ci95"][0] > 0:
        unsure = next(
            f"{format_gain(found)} over {name}"
            for name, found in gain["baselines"].items()
            if found["outcome"] != "positive"
        )
        return False, f"the gain {told} is beyond noise, but {unsure} is not"
    words = {
        "positive": f"the gain {told} is beyond noise",
        "equivalent": f"the gain {told} is practically none",
        "negative": f"negative transfer: {told}",
        "undetermined": f"the gain {told} is within noise",
    }
    return gain["outcome"] == "positive", words[gain["outcome"]]


def _judge_head(over_head: dict[str, Any] | None) -> tuple[bool, str]:
    if over_head is None:
        return True, ""
    told = f"{format_gain(over_head)} {over_head['metric']}"
    if is_worse(over_head):
        return False, f"the frozen encoder with a linear head is better: {told} against head"
    if not is_better(over_head):
        return True, f"not better than head, the frozen encoder with a linear head: {told}"
    return True, f"better than head: {told}"


def _judge_adaptation(over_source: dict[str, Any] | None) -> tuple[bool, str]:
    if over_source is None or over_source["outcome"] != "negative":
        return True, ""
    told = f"{format_gain(over_source)} {over_source['metric']}"
    return False, f"adaptation did harm: {told} against source, the same without it"


def _judge_reload(difference: float) -> tuple[bool, str]:
    proved = difference <= RELOAD_TOLERANCE
    told = f"largest logit difference {difference:.1e} in a fresh process"
    return proved, f"reload proved: {told}" if proved else f"the reload is not the same: {told}"
