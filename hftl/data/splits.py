"""Splits and draws by content: they do not depend on the order of rows on the disk."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

from hftl.data.labels import get_label_names
from hftl.data.load import Row
from hftl.errors import DataError

TASKS_WITHOUT_CLASS_SHOTS = ("regression", "token-classification")
"""The tasks whose shots are rows in all, not rows a class."""
TARGET_BINS = 10
"""Strata of a regression target: its deciles."""


def hash_row(row: Row, seed: int = 0, purpose: str = "order") -> bytes:
    """Return a hash of what the row says, different for each seed and purpose.

    A target is left out: another unit of the targets must draw the same rows.
    """
    label = [] if isinstance(row.label, float) else [str(row.label)]
    return hash_text("\x1f".join([str(seed), purpose, *row.content, *label]))


def hash_text(told: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def take_stratified(
    rows: list[Row], count: int, task: str, seed: int, purpose: str, leave: int = 0
) -> tuple[list[Row], list[Row]]:
    """`count` rows, stratified, groups whole, and the rows left.

    Groups are visited in the order of their hash; one is taken when that brings the strata's
    counts nearer to their quota. Where every row is its own group the quota is met exactly. Where
    groups are too large for that, a second visit brings the total alone as near as whole groups
    can.

    Args:
        rows: what to take from.
        count: how many rows to take; with groups, about as many.
        task: classification (strata are the classes) or regression (the deciles).
        seed: decides the draw, with `purpose`.
        purpose: keeps draws of one seed apart.
        leave: how many rows of every class must stay, so that train knows it.
    """
    leave = 0 if task == "regression" else leave
    strata = _assign_strata(rows, task)
    need = _compute_quota(strata, count, leave)
    room = {s: n - leave for s, n in Counter(strata).items()}
    taken: set[int] = set()

    def visit(nearer: Callable[[Counter[Hashable]], bool]) -> None:
        for numbers in groups:
            holds = Counter(strata[i] for i in numbers)
            fits = all(n <= room[s] for s, n in holds.items())
            if taken.isdisjoint(numbers) and fits and nearer(holds):
                taken.update(numbers)
                for stratum, n in holds.items():
                    need[stratum] -= n
                    room[stratum] -= n

    groups = _group_rows(rows, seed, purpose)
    visit(lambda holds: sum(n * n - 2 * n * need[s] for s, n in holds.items()) < 0)
    visit(lambda holds: abs(count - len(taken) - holds.total()) < abs(count - len(taken)))
    return [rows[i] for i in sorted(taken)], [r for i, r in enumerate(rows) if i not in taken]


def _group_rows(rows: list[Row], seed: int, purpose: str) -> list[list[int]]:
    """The rows' numbers by group, in the order of the groups' hash."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row.group if row.group is not None else (number,)].append(number)
    return sorted(groups.values(), key=lambda g: min(hash_row(rows[i], seed, purpose) for i in g))


def draw_shots(rows: list[Row], shots: int | None, task: str, seed: int) -> list[Row]:
    """`shots` rows of each class; a larger draw holds every smaller one.

    For regression and tokens so many in all; for multi-label so many that hold each class, one
    row counting for all its classes.

    Raises:
        DataError: if a class has fewer rows.
    """
    if shots is None:
        return rows
    ordered = sorted(rows, key=lambda row: hash_row(row, seed, "shots"))
    by_class: dict[str, list[Row]] = defaultdict(list)
    for row in ordered:
        for name in (
            ("",) if task in TASKS_WITHOUT_CLASS_SHOTS else get_label_names(row.label, task)
        ):
            by_class[name].append(row)
    for name, found in sorted(by_class.items()):
        if len(found) < shots:
            what = f"the class {name!r}" if name else "train"
            raise DataError(
                f"{what} has {len(found)} rows left for training, fewer than shots={shots}",
                "Lower data.shots or the fractions",
            )
    drawn = {id(row): row for found in by_class.values() for row in found[:shots]}
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
    """For each row the rarest of the names that its label speaks of, None where it has none.

    It stands for the row where strata are wanted and labels are many: rare names then spread over
    the splits as their share demands.
    """
    held = [set(get_label_names(row.label, task)) for row in rows]
    counts = Counter(name for names in held for name in names)
    return [min(names, key=lambda n: (counts[n], n), default=None) for names in held]


def _compute_quota(strata: list[Hashable], count: int, leave: int) -> dict[Hashable, int]:
    """Whole numbers that add up to `count`, in the strata's proportion (largest remainders)."""
    sizes = Counter(strata)
    exact = {s: n * count / len(strata) for s, n in sizes.items()}
    room = {s: max(0, n - leave) for s, n in sizes.items()}
    quota = {s: min(int(share), room[s]) for s, share in exact.items()}
    for _ in range(min(count, sum(room.values())) - sum(quota.values())):
        open_ = [s for s in quota if quota[s] < room[s]]
        quota[min(open_, key=lambda s: (quota[s] - exact[s], str(s)))] += 1
    return quota
