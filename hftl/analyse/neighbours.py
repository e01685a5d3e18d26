"""Do the same items still lie beside each other? Neighbours in features before and after."""

import numpy as np

from hftl.errors import DataError

CHUNK = 512
"""Rows whose similarities to all others are held at once."""


def agreement(before: np.ndarray, after: np.ndarray, k: int = 10) -> float:
    """The mean share of each row's k nearest neighbours that are the same, see `shared`."""
    return float(shared(before, after, k).mean())


def shared(before: np.ndarray, after: np.ndarray, k: int = 10) -> np.ndarray:
    """(n,) the share of each row's k nearest neighbours that are the same before and after.

    Nearest by cosine, a row itself left out: the mutual k-nearest-neighbour alignment of Huh et
    al. 2024 (arXiv:2405.07987, appendix A). 1 for equal features, or rotated ones, or rows of
    other lengths; about k / (n - 1) for unrelated ones.

    Args:
        before: features (n, d) of the same rows as `after`, in the same order.
        after: features (n, e).
        k: how many neighbours.

    Raises:
        DataError: if there are not more than k rows, their numbers differ, or a feature is not
            finite.
    """
    rows = len(before)
    if rows != len(after):
        raise DataError(
            f"{rows} rows before and {len(after)} after cannot be compared", "Use the same rows"
        )
    if rows <= k:
        raise DataError(f"{rows} rows have no {k} neighbours each", f"Give more than {k} rows")
    sides = directions(before), directions(after)
    found = []
    for start in range(0, rows, CHUNK):
        one, other = (nearest(side, start, k) for side in sides)
        member = np.zeros((len(one), rows), dtype=bool)
        np.put_along_axis(member, one, True, axis=1)
        found.append(np.take_along_axis(member, other, axis=1).mean(1))
    return np.concatenate(found)


def directions(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays one."""
    wide = features.astype(np.float64)
    if not np.isfinite(wide).all():
        row = int(np.argmin(np.isfinite(wide).all(1)))
        raise DataError(f"the features of row {row} are not finite", "Look for a diverged model")
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, 1)


def nearest(rows: np.ndarray, start: int, k: int) -> np.ndarray:
    """Indices (chunk, k) of the nearest rows to those from `start`, in no order; see
    `directions`."""
    similar = rows[start : start + CHUNK] @ rows.T
    chunk = np.arange(len(similar))
    similar[chunk, start + chunk] = -np.inf
    return np.argpartition(similar, -k, axis=1)[:, -k:]
