"""The weight of KL, chosen: of a short grid the one that forgets least at an equal score."""

from collections.abc import Callable
from typing import Any

from hftl.sections import Retain
from hftl.statistics import one_standard_error

GRID = (0.03, 0.1, 0.3, 1.0)


def with_weight(retain: Retain, weight: float) -> Retain:
    """The section with a number for every weight that was to be chosen."""
    kls = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl for kl in retain.kls
    ]
    return retain.model_copy(update={"kl": kls})


def is_open(retain: Retain | None) -> bool:
    """Whether a weight is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kls)


def choose_weight(tried: Callable[[float], tuple[float, float, float]]) -> dict[str, Any]:
    """Tries the grid; the least forgetting within one standard error of the best score wins.

    The rule of Breiman et al. 1984 (CART, section 3.4.3), forgetting in the place of size.

    Args:
        tried: of a weight the score on validation, more is better, its standard error, and how
            much was forgotten.

    Returns:
        `weight`, and what was `tried`: {weight, score, error, forgotten} each.
    """
    seen = [tried(weight) for weight in GRID]
    chosen = one_standard_error(*(list(column) for column in zip(*seen, strict=True)))
    return {
        "weight": GRID[chosen],
        "tried": [
            {"weight": weight, "score": score, "error": error, "forgotten": forgotten}
            for weight, (score, error, forgotten) in zip(GRID, seen, strict=True)
        ],
    }
