"""Fit error = a * labels^-b + c to a few points, and extrapolate it with an interval.

Learning curves follow such a law over a range (Hestness et al. 2017, arXiv:1712.00409); no fit can
know that they do beyond it, so the interval also holds the miss at the largest size, predicted from
the smaller ones.
"""

from typing import NamedTuple

import numpy as np

EXPONENTS = np.linspace(0.02, 2.0, 100)
MIN_POINTS = 4
"""Points that three numbers are fitted to, at least."""


class PowerLaw(NamedTuple):
    """Hold the fits of one or many curves: a, b and c, (curves,) each; a and c are not negative."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    def predict(self, labels: float) -> np.ndarray:
        """Return the error at a number of labels, (curves,)."""
        return self.a * labels**-self.b + self.c

    def solve(self, error: np.ndarray) -> np.ndarray:
        """Return the labels at which the error is reached, (curves,); inf where it never is."""
        rest = error - self.c
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            labels = (self.a / rest) ** (1 / self.b)
        return np.where((rest > 0) & (self.a > 0), labels, np.inf)


def fit_power_law(labels: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> PowerLaw:
    """Fit by weighted least squares: for every exponent of a grid the best a and c, both >= 0.

    Args:
        labels: (points,).
        errors: (curves, points) at these labels, not negative.
        weights: (points,), the inverse variances.
    """
    share = weights / weights.sum()
    best_loss = np.full(len(errors), np.inf)
    best = np.zeros((3, len(errors)))
    mean = errors @ share
    for exponent in EXPONENTS:
        x = (labels / labels.min()) ** -exponent
        centre = share @ x
        slope = (errors - mean[:, None]) @ (share * (x - centre)) / (share @ (x - centre) ** 2)
        a = np.maximum(slope, 0.0)
        c = mean - a * centre
        # Where the floor would lie below 0 it is 0, and a is fitted alone.
        below = c < 0
        a = np.where(below, errors @ (share * x) / (share @ x**2), a)
        c = np.where(below, 0.0, c)
        loss = ((errors - a[:, None] * x - c[:, None]) ** 2) @ share
        better = loss < best_loss - 1e-15
        best_loss = np.where(better, loss, best_loss)
        scale = labels.min() ** exponent
        best = np.where(better, np.stack([a * scale, np.full(len(a), exponent), c]), best)
    return PowerLaw(*best)
