"""Exact duplicates: one copy stays, with two labels none, and the measuring table wins."""

import itertools

import pytest

from hftl.data.duplicates import drop_duplicates
from hftl.data.load import Row


def row(text: str, label: str | float = "a", index: int = 0, group: str | None = None) -> Row:
    return Row((text,), label, group, index, f"t line {index}")


def test_one_of_several_copies_stays() -> None:
    kept, counts = drop_duplicates({"train": [row("x"), row("y"), row("x", index=2)]})
    assert kept == {"train": [row("x"), row("y")]}
    assert counts == {"duplicates": 1, "conflicting": 0, "leaked": 0}


def test_copies_with_differing_labels_all_go() -> None:
    rows = [row("x"), row("y"), row("x", "b", 2), row("x", "a", 3)]
    kept, counts = drop_duplicates({"train": rows})
    assert kept == {"train": [row("y")]}
    assert counts == {"duplicates": 0, "conflicting": 3, "leaked": 0}


def test_the_same_words_in_another_place_are_no_copy() -> None:
    rows = [
        Row(("a", "b"), "x", None, 0, ""), Row(("b", "a"), "x", None, 1, ""),
        Row(("a b",), "x", None, 2, ""), Row(("A b",), "x", None, 3, ""),
    ]  # fmt: skip
    kept, counts = drop_duplicates({"train": rows})
    assert kept["train"] == rows
    assert counts["duplicates"] == 0


@pytest.mark.parametrize(
    ("tables", "stays"),
    [
        (("train", "test"), "test"),
        (("train", "validation"), "validation"),
        (("validation", "test"), "test"),
        (("train", "validation", "test"), "test"),
    ],
)
def test_a_copy_in_several_tables_stays_where_it_measures(
    tables: tuple[str, ...], stays: str
) -> None:
    parts = {"train": [row("own")]} | {t: [row("own " + t), row("x")] for t in tables}
    kept, counts = drop_duplicates(parts)
    assert [part for part, rows in kept.items() if row("x") in rows] == [stays]
    assert counts == {"duplicates": len(tables) - 1, "conflicting": 0, "leaked": len(tables) - 1}


def test_conflicts_reach_across_tables() -> None:
    kept, counts = drop_duplicates({"train": [row("x"), row("y")], "test": [row("x", "b")]})
    assert kept == {"train": [row("y")], "test": []}
    assert counts == {"duplicates": 0, "conflicting": 2, "leaked": 0}


def test_targets_conflict_too() -> None:
    kept, counts = drop_duplicates({"train": [row("x", 1.0), row("x", 1.5), row("y", 2.0)]})
    assert kept["train"] == [row("y", 2.0)]
    assert counts["conflicting"] == 2


def test_which_copy_stays_does_not_depend_on_the_order() -> None:
    for groups in itertools.permutations(["g1", "g2", "g3"]):
        rows = [row("x", index=i, group=group) for i, group in enumerate(groups)]
        assert drop_duplicates({"train": rows})[0]["train"][0].group == "g1"
