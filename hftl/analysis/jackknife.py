"""Figures of features with one block of rows taken out, from queries and references alike.

A row's nearest neighbours, its similarities and a probe of it depend on the other rows, so rows are
not independent. A delete-one-block jackknife sees that only if the block leaves the bank, too. Each
function returns the figure of all rows and, (blocks,), those without each block; blocks are
(rows,) int64 from 0 on, as of `hftl.measure.statistics.block_of_rows`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import GroupKFold

from hftl.analysis.drift import CHUNK_ROWS, FOLDS, compute_log_softmax, normalize_rows
from hftl.analysis.probe import Probe, fit_probe
from hftl.errors import DataError


class JackknifeEstimate(NamedTuple):
    """A figure of all rows, and (blocks,) those without each block.

    `effects` is (blocks, blocks): by how much taking out the first changes the figure through the
    rows of the second, which stay; 0 where it was not computed.
    """

    value: float
    without: np.ndarray
    effects: np.ndarray | float = 0.0


def rank_neighbours(features: np.ndarray, count: int) -> np.ndarray:
    """Return each row's `count` nearest other rows by cosine, (rows, count), the nearest first."""
    rows = normalize_rows(features)
    neighbours = []
    for start in range(0, len(rows), CHUNK_ROWS):
        similar = rows[start : start + CHUNK_ROWS] @ rows.T
        chunk = np.arange(len(similar))
        similar[chunk, start + chunk] = -np.inf
        near = np.argpartition(similar, -count, axis=1)[:, -count:]
        order = np.argsort(-np.take_along_axis(similar, near, axis=1), axis=1, kind="stable")
        neighbours.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(neighbours)


def count_needed_neighbours(blocks: np.ndarray, k: int) -> int:
    """Return how many nearest rows hold k that are left, whichever block is taken out.

    Raises:
        DataError: if there are not more than k rows.
    """
    if len(blocks) <= k:
        raise DataError(f"{len(blocks)} rows have no {k} neighbours each", f"Give more than {k}")
    return min(len(blocks) - 1, k + int(np.bincount(blocks).max()))


def jackknife_shared_neighbours(
    before: np.ndarray, after: np.ndarray, blocks: np.ndarray, k: int = 10
) -> JackknifeEstimate:
    """Return the mean share of the k nearest neighbours that are the same before and after.

    Args:
        before: `rank_neighbours` of `count_needed_neighbours` rows.
        after: the same of the other features.
        blocks: see the module.
        k: how many neighbours.
    """

    def values(left: np.ndarray, rows: np.ndarray) -> np.ndarray:
        sides = [_select_nearest(side[rows], left, k) for side in (before, after)]
        return (sides[0][:, :, None] == sides[1][:, None, :]).any(2).mean(1)

    return _jackknife_mean(values, blocks, k)


def jackknife_neighbour_hits(
    order: np.ndarray, labels: np.ndarray, blocks: np.ndarray
) -> JackknifeEstimate:
    """Return the share of rows whose nearest other row has the same label; see
    `jackknife_shared_neighbours`."""

    def values(left: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return labels[_select_nearest(order[rows], left, 1)[:, 0]] == labels[rows]

    return _jackknife_mean(values, blocks, 1)


def _select_nearest(order: np.ndarray, left: np.ndarray, k: int) -> np.ndarray:
    """The first k of each row's neighbours that are left, (rows, k)."""
    rank = np.where(left[order], np.arange(order.shape[1]), order.shape[1])
    return np.take_along_axis(order, np.sort(rank, axis=1)[:, :k], axis=1)


def _jackknife_mean(
    values: Callable[[np.ndarray, np.ndarray], np.ndarray], blocks: np.ndarray, k: int
) -> JackknifeEstimate:
    """The mean over all rows and over those left; NaN where these have no k neighbours each."""
    count, rows = int(blocks.max()) + 1, len(blocks)
    whole = values(np.ones(rows, dtype=bool), np.arange(rows)).astype(np.float64)
    without, effects = np.full(count, np.nan), np.zeros((count, count))
    for block in range(count):
        left = blocks != block
        if left.sum() > k:
            figures = values(left, np.flatnonzero(left)).astype(np.float64)
            without[block] = figures.mean()
            change = figures - whole[left]
            effects[block] = np.bincount(blocks[left], change, minlength=count) / rows
    return JackknifeEstimate(float(whole.mean()), without, effects)


def jackknife_relational_kl(
    before: np.ndarray, after: np.ndarray, tau: float, blocks: np.ndarray
) -> JackknifeEstimate:
    """Return the mean of `relational_kl`.

    A softmax without a block is the softmax over the rest, so sums over blocks suffice.
    """
    sides = normalize_rows(before), normalize_rows(after)
    count = int(blocks.max()) + 1
    member = np.eye(count)[blocks]
    rest = 1.0 - np.eye(count)
    values, sums = np.zeros(len(blocks)), np.zeros(count)
    for start in range(0, len(blocks), CHUNK_ROWS):
        old, new = (compute_log_softmax(side, start, tau) for side in sides)
        apart = np.where(np.isneginf(old), 0.0, old) - np.where(np.isneginf(new), 0.0, new)
        mass, other = np.exp(old), np.exp(new)
        place = slice(start, start + len(old))
        values[place] = np.maximum((mass * apart).sum(1), 0.0)
        mass_left, other_left = mass @ member @ rest, other @ member @ rest
        with np.errstate(divide="ignore", invalid="ignore"):  # a row that is left alone
            left = (mass * apart) @ member @ rest / mass_left
            left += np.log(other_left) - np.log(mass_left)
        sums += (np.maximum(left, 0.0) * (1 - member[place])).sum(0)
    return JackknifeEstimate(float(values.mean()), sums / (len(blocks) - np.bincount(blocks)))


def jackknife_cka(before: np.ndarray, after: np.ndarray, blocks: np.ndarray) -> JackknifeEstimate:
    """Return the debiased `cka`; 0 where either side does not vary beyond noise."""
    x, y = (side.astype(np.float64) - side.mean(0, dtype=np.float64) for side in (before, after))
    cross, first, second = (_jackknife_hsic(a, b, blocks) for a, b in ((x, y), (x, x), (y, y)))
    own = np.maximum(first, 0.0) * np.maximum(second, 0.0)
    cka = np.divide(cross, np.sqrt(own), out=np.zeros_like(cross), where=own > 0)
    return JackknifeEstimate(float(cka[0]), cka[1:])


def _jackknife_hsic(x: np.ndarray, y: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Unbiased HSIC of all rows, then without each block, (1 + blocks,), up to n - 3 and n.

    Song et al. 2012 (JMLR 13:1393-1434), equation 5, with linear kernels.
    """
    count, rows = int(blocks.max()) + 1, len(blocks)
    member = np.eye(count)[blocks]
    parts = {name: np.zeros((rows, count)) for name in ("x", "y", "both")}
    for start in range(0, rows, CHUNK_ROWS):
        place = slice(start, min(rows, start + CHUNK_ROWS))
        kernels = [side[place] @ side.T for side in (x, y)]
        for kernel in kernels:
            kernel[np.arange(len(kernel)), np.arange(start, place.stop)] = 0.0
        for name, kernel in zip(parts, (*kernels, kernels[0] * kernels[1]), strict=True):
            parts[name][place] = kernel @ member
    sums = {name: part.sum(1) for name, part in parts.items()}
    inside = 1 - member
    n = rows - np.r_[0, np.bincount(blocks)]

    def total(name: str) -> np.ndarray:
        of_block = member.T @ parts[name]
        gone = 2 * (member.T @ sums[name]) - np.diag(of_block)
        return np.r_[sums[name].sum(), sums[name].sum() - gone]

    row = [sums[name][:, None] - parts[name] for name in ("x", "y")]
    mixed = np.r_[sums["x"] @ sums["y"], (row[0] * row[1] * inside).sum(0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = (
            total("both") + total("x") * total("y") / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)
        ) / (n * (n - 3))
    return np.where(n > 3, estimate, 0.0)


@dataclass(frozen=True)
class JackknifeProbes:
    """Linear probes of one set of features, of all rows and without each block.

    Folds are those of all rows throughout: other folds would be other noise.
    """

    folds: np.ndarray
    blocks: np.ndarray
    fitted: list[list[Probe]]

    @classmethod
    def fit(
        cls, features: np.ndarray, labels: np.ndarray, units: np.ndarray, penalty: float,
        blocks: np.ndarray,
    ) -> "JackknifeProbes":  # fmt: skip
        """Fit a probe for each fold on the other folds' rows, of all rows and without each block.

        Args:
            features: (rows, width).
            labels: (rows,) int64 class ids.
            units: (rows,) int64; rows of one unit share a fold.
            penalty: C of the logistic regression.
            blocks: see the module.
        """
        folds = np.zeros(len(labels), dtype=np.int64)
        splitter = GroupKFold(min(FOLDS, len(np.unique(units))))
        for number, (_, test) in enumerate(splitter.split(features, labels, units)):
            folds[test] = number
        outputs, grid = int(labels.max()) + 1, np.array([penalty])
        fitted = [
            [
                fit_probe(features[train], labels[train], outputs, None, grid)
                for fold in range(int(folds.max()) + 1)
                for train in [np.flatnonzero((folds != fold) & (blocks != block))]
            ]
            for block in range(-1, int(blocks.max()) + 1 if blocks.any() else 0)
        ]
        return cls(folds, blocks, fitted)

    def score(self, features: np.ndarray, labels: np.ndarray) -> JackknifeEstimate:
        """Return the share of rows told right, each by the probe that did not see its fold."""
        hits = []
        for probes in self.fitted:
            right = np.zeros(len(labels))
            for fold, probe in enumerate(probes):
                rows = np.flatnonzero(self.folds == fold)
                right[rows] = probe.logits(features[rows]).argmax(1) == labels[rows]
            hits.append(right)
        count = len(hits) - 1
        without = [hits[j + 1][self.blocks != j].mean() for j in range(count)]
        effects = np.zeros((count, count))
        for j in range(count):
            left = self.blocks != j
            change = (hits[j + 1] - hits[0])[left]
            effects[j] = np.bincount(self.blocks[left], change, minlength=count) / len(labels)
        return JackknifeEstimate(float(hits[0].mean()), np.array(without), effects)
