"""Measure how far the words of two samples of texts lie from each other, with intervals."""

from collections import Counter

import numpy as np
from scipy.special import rel_entr

from hftl.analysis.distance import Distance, assign_units, jackknife_distance
from hftl.measure.statistics import estimate_item_error

MAX_WORDS = 10_000
"""The most frequent words whose overlap counts (Gururangan et al. 2020, arXiv:2004.10964)."""


def compute_word_overlap(
    first: list[list[str]], second: list[list[str]], groups: np.ndarray | None = None
) -> Distance:
    """Return the share of the frequent words of one sample that are frequent in the other.

    The interval is wider than need be: a block of the jackknife takes the words with it that occur
    there alone, so that its variance is too large on average where these are many (Efron & Stein
    1981, Annals of Statistics 9:586-596).

    Args:
        first: the words of each text.
        second: the same.
        groups: see `distance.classify_domains`.
    """

    def estimate(left: np.ndarray, right: np.ndarray) -> float:
        pairs = zip((first, second), (left, right), strict=True)
        sides = [_find_frequent_words([side[i] for i in rows]) for side, rows in pairs]
        return len(sides[0] & sides[1]) / max(1, min(map(len, sides)))

    units = assign_units(len(first), len(second), groups)
    return _clip(jackknife_distance(estimate, units, len(first)))


def compute_word_divergence(
    first: list[list[str]], second: list[list[str]], groups: np.ndarray | None = None
) -> Distance:
    """Return the Jensen-Shannon divergence of the words, in bits: 0 for equal, 1 for disjoint.

    Of so many texts: it is above 0 for equal domains, by as much as words are rare. The interval is
    by the delta method, of the divergence that as many other texts have on average.

    Args:
        first: the words of each text.
        second: the same.
        groups: see `distance.classify_domains`.
    """
    vocabulary = {w: i for i, w in enumerate(sorted({w for t in [*first, *second] for w in t}))}
    counts = [_count_words(side, vocabulary) for side in (first, second)]
    shares = [side.sum(0, dtype=np.float64) / max(float(side.sum()), 1.0) for side in counts]
    middle = (shares[0] + shares[1]) / 2
    value = sum(float(rel_entr(share, middle).sum()) for share in shares) / (2 * np.log(2))
    influence = [
        _measure_influence(side, share, middle)
        for side, share in zip(counts, shares, strict=True)
    ]  # fmt: skip
    units = assign_units(len(first), len(second), groups)
    by_unit = np.bincount(units, np.concatenate(influence))
    error = estimate_item_error(by_unit * len(by_unit), np.bincount(units))
    assert error is not None
    return _clip(Distance(value, *error.interval(value)))


def _measure_influence(counts: np.ndarray, share: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Return how far each text moves the divergence, to first order, (texts,).

    It changes by log2(p / m) / 2 for a change of a word's share p, m that of both samples.
    """
    ratios = np.divide(share, middle, out=np.ones_like(share), where=share > 0)
    slopes = np.log2(ratios) / 2
    # Of the counts' type: their copy in 64 bits would be the largest array of all.
    moves = (slopes - share @ slopes).astype(counts.dtype)
    return counts @ moves / max(float(counts.sum()), 1.0)


def _find_frequent_words(texts: list[list[str]]) -> set[str]:
    return {w for w, _ in Counter(w for text in texts for w in text).most_common(MAX_WORDS)}


def _count_words(texts: list[list[str]], vocabulary: dict[str, int]) -> np.ndarray:
    counts = np.zeros((len(texts), len(vocabulary)), dtype=np.float32)
    for row, text in enumerate(texts):
        np.add.at(counts[row], [vocabulary[word] for word in text], 1)
    return counts


def _clip(distance: Distance) -> Distance:
    return Distance(distance.value, max(0.0, distance.low), min(1.0, distance.high))
