"""Hold how often intervals cover the truth in simulation against the level that they name."""

LOWEST, HIGHEST = 0.93, 0.97
"""Coverage of a 95 % interval that counts as right."""


def is_covered(share: float, trials: int) -> bool:
    """Return whether a share of so many trials lies within two standard errors of the bounds."""
    noise = 2 * (0.95 * 0.05 / trials) ** 0.5
    return LOWEST - noise <= share <= HIGHEST + noise
