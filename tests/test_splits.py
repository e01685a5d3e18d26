"""Check splits as properties: by content alone, disjoint, exact, stratified, groups whole."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hftl.config.data import Data
from hftl.data.prepare import prepare_data
from hftl.data.rows import Row
from hftl.data.splits import draw_shots, hash_row, limit_rows, take_stratified
from hftl.errors import DataError

SIZES = {"a": 61, "b": 30, "c": 9}


def made(sizes: dict[str, int] = SIZES, groups: int | None = None) -> list[Row]:
    labels = [label for label, n in sizes.items() for _ in range(n)]
    draw = random.Random(0)
    return [
        Row((f"text {i}",), label, str(draw.randrange(groups)) if groups else None, i, f"line {i}")
        for i, label in enumerate(labels)
    ]


def targets(count: int) -> list[Row]:
    draw = random.Random(1)
    return [Row((f"text {i}",), draw.gauss(0, 1), None, i, "") for i in range(count)]


def shuffled(rows: list[Row], seed: int = 7) -> list[Row]:
    """Return the same rows in another order on the disk."""
    mixed = random.Random(seed).sample(rows, len(rows))
    return [Row(r.content, r.label, r.group, i, f"line {i}") for i, r in enumerate(mixed)]


def identify(rows: list[Row]) -> set[Any]:
    return {(row.content, row.label) for row in rows}


@pytest.mark.parametrize(
    ("rows", "task"),
    [(made(), "classification"), (made(groups=12), "classification"), (targets(83), "regression")],
    ids=["classes", "groups", "targets"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_on_the_disk_does_not_matter(rows: list[Row], task: str, seed: int) -> None:
    first = take_stratified(rows, 20, task, seed, "test")
    for order in range(3):
        again = take_stratified(shuffled(rows, order), 20, task, seed, "test")
        assert [identify(part) for part in again] == [identify(part) for part in first]


@pytest.mark.parametrize("count", [0, 1, 7, 20, 50, 99, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_totals_are_exact_and_nothing_is_lost_or_doubled(count: int, seed: int) -> None:
    rows = made()
    taken, left = take_stratified(rows, count, "classification", seed, "test")
    assert len(taken) == count
    assert not identify(taken) & identify(left)
    assert identify(taken) | identify(left) == identify(rows)
    assert len(taken) + len(left) == len(rows)


@pytest.mark.parametrize("count", [1, 7, 20, 33, 50, 80])
def test_every_class_is_within_one_row_of_its_share(count: int) -> None:
    taken, _ = take_stratified(made(), count, "classification", 0, "test")
    counts = Counter(row.label for row in taken)
    for label, size in SIZES.items():
        assert abs(counts[label] - size * count / 100) < 1


@pytest.mark.parametrize("count", [10, 20, 37, 50])
def test_every_decile_of_a_target_is_within_one_row_of_its_share(count: int) -> None:
    rows = targets(100)
    taken, _ = take_stratified(rows, count, "regression", 0, "test")
    rank = {row: i for i, row in enumerate(sorted(rows, key=lambda row: row.label))}
    deciles = Counter(rank[row] // 10 for row in taken)
    assert len(taken) == count
    assert {abs(deciles[d] - count / 10) < 1 for d in range(10)} == {True}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [5, 20, 60])
def test_groups_stay_whole_and_the_share_is_about_right(seed: int, groups: int) -> None:
    rows = made(groups=groups)
    taken, left = take_stratified(rows, 20, "classification", seed, "test")
    assert not {row.group for row in taken} & {row.group for row in left}
    largest = max(Counter(row.group for row in rows).values())
    assert abs(len(taken) - 20) <= largest


@pytest.mark.parametrize("count", [50, 90, 95, 100])
def test_every_class_stays_in_train(count: int) -> None:
    rows = made({"a": 94, "b": 5, "c": 1})
    taken, left = take_stratified(rows, count, "classification", 0, "test", leave=1)
    assert {row.label for row in left} == {"a", "b", "c"}
    assert len(taken) == min(count, 97)


def test_seeds_and_purposes_draw_apart() -> None:
    draws = {
        frozenset(identify(take_stratified(made(), 20, "classification", seed, purpose)[0]))
        for seed in (0, 1, 2)
        for purpose in ("test", "validation")
    }
    assert len(draws) == 6


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_larger_draw_of_shots_holds_every_smaller_one(task: str, seed: int) -> None:
    rows = made() if task == "classification" else targets(40)
    draws = [identify(draw_shots(rows, shots, task, seed)) for shots in range(1, 10)]
    for smaller, larger in zip(draws, draws[1:], strict=False):
        assert smaller < larger


def test_the_seed_draws_the_shots_of_each_class_or_of_a_target_in_all() -> None:
    drawn = [draw_shots(made(), 5, "classification", seed) for seed in range(4)]
    assert Counter(row.label for row in drawn[0]) == {"a": 5, "b": 5, "c": 5}
    assert len({frozenset(identify(rows)) for rows in drawn}) == 4
    again = draw_shots(shuffled(made()), 5, "classification", 3)
    assert identify(again) == identify(drawn[3]), "the order on the disk does not matter"
    assert len(draw_shots(targets(40), 5, "regression", 0)) == 5
    assert draw_shots(made(), None, "classification", 0) == made()


def test_fewer_rows_than_shots() -> None:
    with pytest.raises(DataError, match="the class 'c' has 9 rows .* fewer than shots=10"):
        draw_shots(made(), 10, "classification", 0)
    with pytest.raises(DataError, match="train has 40 rows .* fewer than shots=41"):
        draw_shots(targets(40), 41, "regression", 0)


def test_a_key_knows_text_label_seed_and_purpose() -> None:
    row = Row(("a", "b"), "x", None, 0, "")
    others = [Row(("a", "c"), "x", None, 0, ""), Row(("a", "b"), "y", None, 0, ""),
              Row(("ab",), "x", None, 0, "")]  # fmt: skip
    keys = [*map(hash_row, [row, *others]), hash_row(row, 1), hash_row(row, 0, "p")]
    assert len(set(keys)) == 6
    assert hash_row(row) == hash_row(Row(("a", "b"), "x", "g", 9, "elsewhere"))


@pytest.mark.parametrize(("shots", "validation"), [(3, 6), (10, 20), (16, 32), (40, 32)])
def test_validation_is_cut_to_the_size_of_train(table: Path, shots: int, validation: int) -> None:
    data = Data.model_validate({"train": {"path": str(table)}, "shots": shots})
    prepared = prepare_data(data)
    assert len(prepared.rows["validation"]) == validation
    assert len(prepared.draw_train_rows(shots, 0)) == 2 * shots
    assert len(prepared.rows["test"]) == 32
    counts = Counter(row.label for row in prepared.rows["validation"])
    assert max(counts.values()) - min(counts.values()) <= 1


def test_test_items_are_the_same_with_and_without_shots(table: Path) -> None:
    def rows(**more: Any) -> Callable[[str], set[Any]]:
        prepared = prepare_data(Data.model_validate({"train": {"path": str(table)}, **more}))
        return lambda split: identify(prepared.rows[split])

    whole, few = rows(), rows(shots=4)
    assert whole("test") == few("test")
    assert few("validation") < whole("validation")
    assert rows(seed=1)("test") != whole("test")


@pytest.mark.parametrize(("groups", "size"), [(20, 2), (20, 50)])
def test_groups_that_lie_in_one_stratum_are_still_split(groups: int, size: int) -> None:
    """One target decile a group: no group brings the strata nearer, the total still counts."""
    rows = [Row((f"{g} {i}",), float(g), str(g), i, "") for g in range(groups) for i in range(size)]
    taken, left = take_stratified(rows, groups * size // 5, "regression", 0, "test")
    assert abs(len(taken) - groups * size // 5) <= size
    assert not {row.group for row in taken} & {row.group for row in left}


def test_a_group_that_holds_a_whole_class_stays() -> None:
    rows = [Row((f"{i}",), "common", str(i), i, "") for i in range(30)]
    rows += [Row((f"rare {i}",), "rare", "one author", i, "") for i in range(6)]
    for seed in range(20):
        taken, left = take_stratified(rows, 12, "classification", seed, "test", leave=1)
        assert "rare" in {row.label for row in left} and len(taken) == 12


def test_a_group_that_alone_is_more_than_rows_are_asked_for_is_taken_whole() -> None:
    rows = made(groups=1)
    assert limit_rows(rows, 20, "classification", 0, "test") == rows
    assert limit_rows(rows, 200, "classification", 0, "test") == rows
    few = limit_rows(made(), 20, "classification", 0, "test")
    assert few == take_stratified(made(), 20, "classification", 0, "test")[0] and len(few) == 20
