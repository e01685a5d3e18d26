"""Compare the nearest neighbours of rows before and after training, with a block jackknife.

A row's neighbours depend on the other rows, so rows are not independent. A delete-one-block
jackknife sees that only if a block leaves the queries and the references alike: each `jackknife_`
function returns the mean over all rows and over the rows without each block. Blocks are (rows,)
int64 from 0 on, as of `hftl.measure.statistics.assign_blocks`.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from hftl.errors import DataError

NEIGHBOURS = 10
"""Nearest neighbours that are compared."""


class JackknifeEstimate(NamedTuple):
    """Hold a figure of all rows, and (blocks,) those without each block.

    `effects` is (blocks, blocks): by how much taking out the first block changes the figure through
    the remaining rows of the second; 0 where it was not computed.
    """

    value: float
    without: np.ndarray
    effects: np.ndarray | float = 0.0


def compute_jackknife_interaction_variance(effects: np.ndarray) -> float:
    """Return the variance that a jackknife counts twice: what a pair of blocks have in common
    beyond what each of them has (Efron & Stein 1981, Annals of Statistics 9:586-596).

    A row's answer that hangs on another document is luck of the pair, and is seen when either is
    taken out. What differs from seed to seed is counted with the seeds, so it is left out here.

    Args:
        effects: (seeds, blocks, blocks), see `JackknifeEstimate`; (seeds,) where they were not
            computed.
    """
    seeds = len(effects)
    common = seeds * effects.mean(0) ** 2 - (effects**2).mean(0)
    return max(0.0, float(np.sum(common)) / (seeds - 1))


def normalize_rows(features: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1, float64; a row of zeros stays one.

    Raises:
        DataError: naming the first row that is not finite.
    """
    wide = features.astype(np.float64)
    if not np.isfinite(wide).all():
        row = int(np.argmin(np.isfinite(wide).all(1)))
        raise DataError(f"the features of row {row} are not finite", "Look for a diverged model")
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, 1)


def rank_neighbours(features: np.ndarray, count: int) -> np.ndarray:
    """Return each row's `count` nearest other rows by cosine, (rows, count), the nearest first."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute")
    search.fit(normalize_rows(features))
    return cast(np.ndarray, search.kneighbors(return_distance=False))


def mean_shared_neighbours(before: np.ndarray, after: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Return the mean share of each row's k nearest neighbours that are the same before and after.

    The mutual k-nearest-neighbour alignment of Huh et al. 2024 (arXiv:2405.07987, appendix A): 1
    for features that are equal, rotated or of other lengths, about k / (n - 1) for unrelated ones.

    Args:
        before: features (n, d) of the same rows as `after`, in the same order.
        after: features (n, e).
        k: the number of neighbours.

    Raises:
        DataError: if there are not more than k rows, their numbers differ, or a feature is not
            finite.
    """
    if len(before) != len(after):
        raise DataError(
            f"{len(before)} rows before and {len(after)} after cannot be compared",
            "Use the same rows",
        )
    _check_row_count(len(before), k)
    return float(_share(*(rank_neighbours(side, k) for side in (before, after))).mean())


def count_needed_neighbours(blocks: np.ndarray, k: int) -> int:
    """Return how many nearest rows hold k that remain, whichever block is taken out.

    Raises:
        DataError: if there are not more than k rows.
    """
    _check_row_count(len(blocks), k)
    return min(len(blocks) - 1, k + int(np.bincount(blocks).max()))


def jackknife_shared_neighbours(
    before: np.ndarray, after: np.ndarray, blocks: np.ndarray, k: int = NEIGHBOURS
) -> JackknifeEstimate:
    """Return the jackknife of `mean_shared_neighbours`.

    Args:
        before: `rank_neighbours` of `count_needed_neighbours` rows.
        after: the same of the other features.
        blocks: see the module.
        k: the number of neighbours.
    """

    def compute(remaining: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _share(*(_select_nearest(side[rows], remaining, k) for side in (before, after)))

    return _jackknife_mean(compute, blocks, k)


def jackknife_neighbour_hits(
    order: np.ndarray, labels: np.ndarray, blocks: np.ndarray
) -> JackknifeEstimate:
    """Return the jackknife of the share of rows whose nearest other row has the same label.

    Args:
        order: `rank_neighbours` of `count_needed_neighbours` rows.
        labels: (rows,) of anything that can be compared.
        blocks: see the module.
    """

    def compute(remaining: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return labels[_select_nearest(order[rows], remaining, 1)[:, 0]] == labels[rows]

    return _jackknife_mean(compute, blocks, 1)


def _check_row_count(rows: int, k: int) -> None:
    if rows <= k:
        raise DataError(f"{rows} rows have no {k} neighbours each", f"Give more than {k} rows")


def _share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of each row's neighbours that are in both (rows, k) arrays, (rows,)."""
    return (first[:, :, None] == second[:, None, :]).any(2).mean(1)


def _select_nearest(order: np.ndarray, remaining: np.ndarray, k: int) -> np.ndarray:
    """Return the first k of each row's neighbours that remain, (rows, k)."""
    rank = np.where(remaining[order], np.arange(order.shape[1]), order.shape[1])
    return np.take_along_axis(order, np.sort(rank, axis=1)[:, :k], axis=1)


def _jackknife_mean(
    compute: Callable[[np.ndarray, np.ndarray], np.ndarray], blocks: np.ndarray, k: int
) -> JackknifeEstimate:
    """Return means over all rows and over the remaining ones, NaN where these are k or fewer."""
    count, rows = int(blocks.max()) + 1, len(blocks)
    whole = compute(np.ones(rows, dtype=bool), np.arange(rows)).astype(np.float64)
    without, effects = np.full(count, np.nan), np.zeros((count, count))
    for block in range(count):
        remaining = blocks != block
        if remaining.sum() > k:
            figures = compute(remaining, np.flatnonzero(remaining)).astype(np.float64)
            without[block] = figures.mean()
            change = figures - whole[remaining]
            effects[block] = np.bincount(blocks[remaining], change, minlength=count) / rows
    return JackknifeEstimate(float(whole.mean()), without, effects)
