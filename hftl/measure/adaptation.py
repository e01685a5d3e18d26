"""What an adaptation did: its losses before and after, and what it was worth to the task."""

import math
from typing import Any

LARGEST = 700.0
"""Above this loss exp leaves the range of floats."""


def figures(told: dict[str, Any]) -> dict[str, Any]:
    """The record of one adaptation, from the evaluations it was judged by.

    Args:
        told: `history`, a list of {step, target, general, guard} whose first is the start, the
            `step` that was kept, and how it was made, which is taken over.

    Returns:
        `loss` {before, after, fall: the share by which it fell} on held-out corpus, `general` the
        same on general data, `guard` {kind, tolerance, before, after}; with mlm each loss has its
        `perplexity` [before, after] a hidden token.
    """
    history = told["history"]
    start = history[0]
    kept = next(seen for seen in history if seen["step"] == told["step"])
    words = told["objective"] == "mlm"
    guarded = {"kind": told["guard"], "tolerance": told["tolerance"]}
    more: dict[str, Any] = {"loss": _losses(start["target"], kept["target"], words)}
    more["general"] = (
        None if start["general"] is None else _losses(start["general"], kept["general"], words)
    )
    return told | more | {
        "guard": guarded | {"before": start["guard"], "after": kept["guard"]}
    }  # fmt: skip


def helped(stages: list[dict[str, Any]], gain: dict[str, Any] | None) -> str:
    """Whether adaptation beat no adaptation, in plain words.

    Args:
        stages: the record's adaptations.
        gain: the own arm's gain over `source`, the same without adaptation; None without a task.
    """
    if all(stage["kept"] == "original" for stage in stages):
        return f"Adaptation was undone: {stages[-1]['why']}; the original weights were kept"
    if gain is None:
        return "Whether adaptation helps a task was not measured: the recipe has none"
    if gain["ci95"] is None:
        return "Whether adaptation beat no adaptation is not known: no interval could be made"
    return {
        "positive": "Adaptation helped",
        "equivalent": "Adaptation made practically no difference",
        "negative": "Adaptation did harm: without it the model is better",
        "undetermined": "Adaptation did not beat no adaptation beyond noise",
    }[gain["outcome"]]


def _losses(before: float, after: float, words: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"before": before, "after": after, "fall": 1 - after / before}
    if words:
        found["perplexity"] = [_perplexity(before), _perplexity(after)]
    return found


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < LARGEST else None
