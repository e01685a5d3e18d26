"""Hold how often intervals cover the truth in simulation against the level that they name."""

LOWEST, HIGHEST = 0.93, 0.97
"""Coverage of a 95 % interval that counts as right."""


def is_covered(share: float) -> bool:
    """Return whether a share of trials lies within the bounds; draws are seeded, so it is fixed."""
    return LOWEST <= share <= HIGHEST
