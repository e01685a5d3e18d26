"""Copies: the same content twice is one item, with two labels it is none.

Texts are the same when they differ only in white space, case or Unicode form; pictures when they
decode to the same pixels.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from hftl.data.load import Label, Row
from hftl.data.normalization import normalize_content

SPLIT_PRIORITY = ("test", "validation", "train")
"""Where copies stand in several tables, the one that measures is kept."""
MAX_HASH_DISTANCE = 4
"""Pictures whose perceptual hashes differ in at most so many of 64 bits are near copies."""
CHUNK_PAIRS = 1 << 22
"""Pairs of pictures that are compared at once."""


@dataclass(frozen=True)
class CopyCounts:
    """Count what was dropped.

    Attributes:
        duplicates: copies of a row that stays.
        conflicting: rows of inputs that have differing labels.
        contradictory_inputs: the inputs that these rows repeat, each counted once.
        distinct_inputs: all inputs, each counted once.
        leaked: copies that stood in another table than the row that stays.
    """

    duplicates: int
    conflicting: int
    contradictory_inputs: int
    distinct_inputs: int
    leaked: int


def drop_duplicates(parts: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], CopyCounts]:
    """Return one row for each input, none where the labels differ, and what was dropped.

    Args:
        parts: rows by train, validation and test; only train is required.
    """
    copies: dict[tuple[str, ...], list[tuple[str, Row]]] = defaultdict(list)
    for part in SPLIT_PRIORITY:
        for row in parts.get(part, []):
            copies[normalize_content(row.content)].append((part, row))
    remaining: dict[str, list[Row]] = {part: [] for part in parts}
    duplicates = conflicting = contradictory = leaked = 0
    for same in copies.values():
        if len({_round_target(row.label) for _, row in same}) > 1:
            conflicting += len(same)
            contradictory += 1
            continue
        duplicates += len(same) - 1
        first = same[0][0]
        leaked += sum(part != first for part, _ in same)
        candidates = [row for part, row in same if part == first]
        remaining[first].append(
            min(candidates, key=lambda row: (row.group or "", row.content, row.index))
        )
    return remaining, CopyCounts(duplicates, conflicting, contradictory, len(copies), leaked)


def _round_target(label: Label) -> Label:
    """Return a target as float32 holds it: parquet may have rounded what a csv has in full."""
    if not isinstance(label, float):
        return label
    with np.errstate(over="ignore"):
        return float(np.float32(label))


def count_near_images(rows: dict[str, list[Row]]) -> int:
    """Return how many pictures are near copies of one in a split that is seen before their own.

    Those are of validation near one of train, and of test near one of either. Near copies are
    re-encoded or resized: their perceptual hashes differ in a few bits.
    """
    train, validation, test = (
        np.array([r.perceptual_hash for r in rows[s] if r.perceptual_hash is not None], np.uint64)
        for s in ("train", "validation", "test")
    )
    return _count_near(validation, train) + _count_near(test, np.concatenate([train, validation]))


def _count_near(codes: np.ndarray, others: np.ndarray) -> int:
    """Count the hashes (n,) that are near one of the others (m,), all uint64."""
    near, step = 0, max(1, CHUNK_PAIRS // max(1, others.size))
    for start in range(0, codes.size if others.size else 0, step):
        differing = np.bitwise_count(codes[start : start + step, None] ^ others)
        near += int((differing <= MAX_HASH_DISTANCE).any(1).sum())
    return near
