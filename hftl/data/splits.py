"""Split and draw rows by content: the order of rows on the disk does not matter.

scikit-learn's splitters are not used: they depend on the order of the rows, do not nest smaller
draws in larger ones, and stratify groups only roughly.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

from hftl.data.labels import get_label_names
from hftl.data.rows import Row
from hftl.errors import DataError
from hftl.plurals import count_noun

MEASURED_SPLITS = ("validation", "test")
"""The splits that arms are measured on."""
TASKS_WITHOUT_CLASS_SHOTS = ("regression", "token-classification")
"""The tasks whose shots count all rows, not the rows of a class."""
TARGET_BINS = 10
"""Strata of a regression target: its deciles."""


def hash_row(row: Row, seed: int = 0, purpose: str = "order") -> bytes:
    """Return 16 bytes that depend on the content and label of a row, the seed and the purpose.

    A regression target is left out: targets in another unit must draw the same rows.
    """
    label = [] if isinstance(row.label, float) else [str(row.label)]
    return hash_text("\x1f".join([str(seed), purpose, *row.content, *label]))


def hash_text(text: str) -> bytes:
    """Return the hash of a text, 16 bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def take_stratified(
    rows: list[Row], count: int, task: str, seed: int, purpose: str, leave: int = 0
) -> tuple[list[Row], list[Row]]:
    """Draw `count` rows, stratified and with groups whole; return them and the rows left.

    Groups are visited in the order of their hash; one is taken when that brings the counts of the
    strata nearer to their quota. Where every row is its own group the quota is met exactly. Where
    groups are too large for that, a second visit brings the total alone as near as whole groups
    can.

    Args:
        rows: what to draw from.
        count: how many rows to draw; with groups, about as many.
        task: classification (strata are the classes), regression (the deciles), or one with several
            names a row (the rarest of them).
        seed: decides the draw, with `purpose`.
        purpose: makes draws of one seed independent.
        leave: how many rows of every class must stay, so that train knows it.
    """
    leave = 0 if task == "regression" else leave
    strata = _assign_strata(rows, task)
    need = _compute_quota(strata, count, leave)
    room = {stratum: n - leave for stratum, n in Counter(strata).items()}
    groups = _group_rows(rows, seed, purpose)
    taken: set[int] = set()

    def visit(is_nearer: Callable[[Counter[Hashable]], bool]) -> None:
        for numbers in groups:
            sizes = Counter(strata[i] for i in numbers)
            fits = all(n <= room[stratum] for stratum, n in sizes.items())
            if taken.isdisjoint(numbers) and fits and is_nearer(sizes):
                taken.update(numbers)
                for stratum, n in sizes.items():
                    need[stratum] -= n
                    room[stratum] -= n

    # The change of the squared distance to the quota: (need - n)^2 - need^2, summed over strata.
    visit(lambda sizes: sum(n * n - 2 * n * need[stratum] for stratum, n in sizes.items()) < 0)
    visit(lambda sizes: abs(count - len(taken) - sizes.total()) < abs(count - len(taken)))
    return [rows[i] for i in sorted(taken)], [r for i, r in enumerate(rows) if i not in taken]


def _group_rows(rows: list[Row], seed: int, purpose: str) -> list[list[int]]:
    """Return the indices of the rows by group, in the order of the groups' hash."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row.group if row.group is not None else (number,)].append(number)
    return sorted(
        groups.values(), key=lambda group: min(hash_row(rows[i], seed, purpose) for i in group)
    )


def limit_rows(rows: list[Row], most: int, task: str, seed: int, purpose: str) -> list[Row]:
    """Return the rows, or about `most` of them, drawn as by `take_stratified`.

    All of them where every group alone is further from that than none.
    """
    if len(rows) <= most:
        return rows
    return take_stratified(rows, most, task, seed, purpose)[0] or rows


def draw_shots(rows: list[Row], shots: int | None, task: str, seed: int) -> list[Row]:
    """Draw `shots` rows of each class; a larger draw contains every smaller one.

    For regression and tokens that many rows in all; for multi-label that many with each class, one
    row counting for all its classes.

    Raises:
        DataError: if a class has fewer rows.
    """
    if shots is None:
        return rows
    ordered = sorted(rows, key=lambda row: hash_row(row, seed, "shots"))
    by_class: dict[str, list[Row]] = defaultdict(list)
    for row in ordered:
        names = ("",) if task in TASKS_WITHOUT_CLASS_SHOTS else get_label_names(row.label, task)
        for name in names:
            by_class[name].append(row)
    for name, members in sorted(by_class.items()):
        if len(members) < shots:
            subject = f"the class {name!r}" if name else "train"
            raise DataError(
                f"{subject} has {count_noun(len(members), 'row')} left for training, fewer than "
                f"shots={shots}",
                "Lower data.shots or the fractions",
            )
    drawn = {id(row): row for members in by_class.values() for row in members[:shots]}
    return list(drawn.values())


def _assign_strata(rows: list[Row], task: str) -> list[Hashable]:
    if task == "classification":
        return [row.label for row in rows]
    if task != "regression":
        return find_rarest_names(rows, task)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].label, hash_row(rows[i])))
    strata: list[Hashable] = [0] * len(rows)
    for rank, number in enumerate(order):
        strata[number] = rank * TARGET_BINS // len(rows)
    return strata


def find_rarest_names(rows: list[Row], task: str) -> list[Hashable]:
    """Return the rarest of the class names of each row's label, None where it has none.

    It is the row's stratum where rows have several names: rare names then spread over the splits
    in proportion.
    """
    names_by_row = [set(get_label_names(row.label, task)) for row in rows]
    counts = Counter(name for names in names_by_row for name in names)
    return [min(names, key=lambda n: (counts[n], n), default=None) for names in names_by_row]


def _compute_quota(strata: list[Hashable], count: int, leave: int) -> dict[Hashable, int]:
    """Return integers that add up to `count`, in the strata's proportion (largest remainders)."""
    sizes = Counter(strata)
    exact = {stratum: n * count / len(strata) for stratum, n in sizes.items()}
    room = {stratum: max(0, n - leave) for stratum, n in sizes.items()}
    quota = {stratum: min(int(share), room[stratum]) for stratum, share in exact.items()}
    for _ in range(min(count, sum(room.values())) - sum(quota.values())):
        open_strata = [stratum for stratum in quota if quota[stratum] < room[stratum]]
        quota[min(open_strata, key=lambda s: (quota[s] - exact[s], str(s)))] += 1
    return quota
