"""Find pairs of rows that are nearly the same, within a split and across splits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from hftl.data.duplicates import SPLIT_PRIORITY, PictureHashes, build_shingles
from hftl.data.rows import Row
from hftl.plurals import count_noun

MIN_SIMILARITY = 0.6
"""Jaccard similarity of three-word shingles from which on two texts are near copies. One word of 20
that is replaced in the middle leaves .71, one of 12 leaves .54."""
MIN_WORDS = 6
"""Texts of fewer words are alike by chance: `a very good film` and `a very good film indeed`."""
MAX_SHARING = 100
"""Texts above which a shingle is a phrase of the domain and proposes no pairs."""
MAX_ROWS = 20_000
"""Rows that are compared, at most: those that measure first."""
CHUNK_ROWS = 1000


class NearPair(NamedTuple):
    """Hold two rows that are nearly the same, with their splits; the first one measures, if any."""

    split: str
    row: Row
    other_split: str
    other: Row


def find_near_copies(rows: Mapping[str, list[Row]]) -> list[NearPair]:
    """Return the pairs of near copies among the rows of all splits, of images by their hashes.

    Args:
        rows: by split; of more than `MAX_ROWS` the last ones of train are left out.
    """
    placed = [(split, row) for split in SPLIT_PRIORITY for row in rows[split]][:MAX_ROWS]
    if not placed:
        return []
    if any(row.perceptual_hash is not None for _, row in placed):
        # A picture with other words is another row: several questions of one picture, say.
        pairs = [
            (i, j) for i, j in _pair_pictures([row for _, row in placed])
            if placed[i][1].content[1:] == placed[j][1].content[1:]
        ]  # fmt: skip
    elif placed[0][1].size is not None:
        return []  # Images of a folder that an older version prepared, or all of them flat.
    else:
        pairs = pair_texts([" ".join(row.content) for _, row in placed])
    return [NearPair(*placed[i], *placed[j]) for i, j in pairs]


def describe_near_copies(count: int, noun: str) -> str:
    """Return how many texts or pictures that measure are near copies, as a sentence."""
    copies = "is a near copy" if count == 1 else "are near copies"
    return f"{count_noun(count, noun)} of validation and test {copies} of one in another split"


def pair_texts(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of texts whose shingles have a Jaccard similarity of `MIN_SIMILARITY`.

    The similarities are exact: shared shingles are counted by a product of sparse matrices.
    """
    shingles = [
        build_shingles(text) if text.count(" ") >= MIN_WORDS - 1 else set() for text in texts
    ]
    columns: dict[tuple[str, ...], int] = {}
    numbers = [[columns.setdefault(s, len(columns)) for s in own] for own in shingles]
    sizes = np.array([len(own) for own in numbers])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.array([n for own in numbers for n in own], dtype=np.int64)
    matrix = sparse.csr_matrix(
        (np.ones(len(flat), np.int32), flat, ends), shape=(len(texts), max(1, len(columns)))
    )
    counts = np.bincount(flat, minlength=max(1, len(columns)))
    proposing = matrix[:, (counts > 1) & (counts <= MAX_SHARING)]
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(texts), CHUNK_ROWS):
        shared = (proposing[start : start + CHUNK_ROWS] @ proposing.T).tocoo()
        left, right = shared.row + start, shared.col
        # Common phrases are not counted here, so that half of what is asked for proposes a pair.
        union = sizes[left] + sizes[right] - shared.data
        near = (left < right) & (shared.data >= MIN_SIMILARITY / 2 * union)
        pairs += [
            (i, j)
            for i, j in zip(left[near].tolist(), right[near].tolist(), strict=True)
            if len(shingles[i] & shingles[j]) >= MIN_SIMILARITY * len(shingles[i] | shingles[j])
        ]
    return pairs


def _pair_pictures(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the pairs of near copies among pictures; a flat one has no hash."""
    known = [i for i, row in enumerate(rows) if row.perceptual_hash is not None]
    hashes = PictureHashes.collect([rows[i] for i in known])
    return [
        (known[i], known[j])
        for left, right in hashes.find_near(hashes)
        for i, j in zip(left.tolist(), right.tolist(), strict=True)
        if i < j
    ]
