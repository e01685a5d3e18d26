"""Exact duplicates: the same text twice is one item, with two labels it is none."""

from collections import defaultdict

from hftl.data.load import Row

PRIORITY = ("test", "validation", "train")
"""Where copies stand in several tables, the one that measures is kept."""


def drop_duplicates(parts: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """One row for each text, none where the labels differ.

    Args:
        parts: rows by train, validation and test; only train is required.

    Returns:
        The rows kept, and counts: `duplicates` (copies dropped), `conflicting` (rows dropped for
        differing labels), `leaked` (those of the copies that stood in another table too).
    """
    copies: dict[tuple[str, ...], list[tuple[str, Row]]] = defaultdict(list)
    for part in PRIORITY:
        for row in parts.get(part, []):
            copies[row.content].append((part, row))
    kept: dict[str, list[Row]] = {part: [] for part in parts}
    counts = {"duplicates": 0, "conflicting": 0, "leaked": 0}
    for found in copies.values():
        if len({row.label for _, row in found}) > 1:
            counts["conflicting"] += len(found)
            continue
        counts["duplicates"] += len(found) - 1
        first = found[0][0]
        counts["leaked"] += sum(part != first for part, _ in found)
        same_part = [row for part, row in found if part == first]
        kept[first].append(min(same_part, key=lambda row: (row.group or "", row.index)))
    return kept, counts
