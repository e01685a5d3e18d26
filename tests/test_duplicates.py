"""Exact duplicates: one copy stays, with two labels none, and the measuring table wins."""

import itertools

import pytest

from hftl.data.duplicates import count_near_images, drop_duplicates
from hftl.data.facts import CopyCounts
from hftl.data.rows import Row


def row(text: str, label: str | float = "a", index: int = 0, group: str | None = None) -> Row:
    return Row((text,), label, group, index, f"t line {index}")


def totals(counts: CopyCounts) -> tuple[int, int, int]:
    return counts.duplicates, counts.conflicting, counts.leaked


def test_one_of_several_copies_stays() -> None:
    remaining, counts = drop_duplicates({"train": [row("x"), row("y"), row("x", index=2)]})
    assert remaining == {"train": [row("x"), row("y")]}
    assert totals(counts) == (1, 0, 0)


def test_copies_with_differing_labels_all_go() -> None:
    rows = [row("x"), row("y"), row("x", "b", 2), row("x", "a", 3)]
    remaining, counts = drop_duplicates({"train": rows})
    assert remaining == {"train": [row("y")]}
    assert totals(counts) == (0, 3, 0)


def test_the_same_words_in_another_place_are_no_copy() -> None:
    rows = [
        Row(("a", "b"), "x", None, 0, ""), Row(("b", "a"), "x", None, 1, ""),
        Row(("a b",), "x", None, 2, ""), Row(("a c",), "x", None, 3, ""),
    ]  # fmt: skip
    remaining, counts = drop_duplicates({"train": rows})
    assert remaining["train"] == rows
    assert counts.duplicates == 0


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
    remaining, counts = drop_duplicates(parts)
    assert [part for part, rows in remaining.items() if row("x") in rows] == [stays]
    assert totals(counts) == (len(tables) - 1, 0, len(tables) - 1)


def test_conflicts_reach_across_tables() -> None:
    remaining, counts = drop_duplicates({"train": [row("x"), row("y")], "test": [row("x", "b")]})
    assert remaining == {"train": [row("y")], "test": []}
    assert totals(counts) == (0, 2, 0)


def test_targets_conflict_too() -> None:
    remaining, counts = drop_duplicates({"train": [row("x", 1.0), row("x", 1.5), row("y", 2.0)]})
    assert remaining["train"] == [row("y", 2.0)]
    assert counts.conflicting == 2


def test_which_copy_stays_does_not_depend_on_the_order() -> None:
    for groups in itertools.permutations(["g1", "g2", "g3"]):
        rows = [row("x", index=i, group=group) for i, group in enumerate(groups)]
        assert drop_duplicates({"train": rows})[0]["train"][0].group == "g1"


@pytest.mark.parametrize(
    "copy",
    ["a caf\u00e9 noir ", "a  caf\u00e9\tnoir", "A Caf\u00c9 Noir", "a cafe\u0301 noir",
     "a caf\u00e9\u200b noir", "a caf\u00e9\u00a0noir", "\ufeffa caf\u00e9 noir"],
    ids=["trailing space", "tab", "case", "NFD", "zero width", "hard space", "byte order mark"],
)  # fmt: skip
def test_texts_that_differ_only_in_spelling_are_copies(copy: str) -> None:
    plain = row("a caf\u00e9 noir")
    remaining, counts = drop_duplicates({"train": [plain, row(copy, index=1)], "test": [row(copy)]})
    assert (len(remaining["train"]), len(remaining["test"])) == (0, 1)
    assert totals(counts) == (2, 0, 2)
    assert drop_duplicates({"train": [plain, row(copy, "b", 1)]})[1].contradictory_inputs == 1


def test_pairs_and_words_are_compared_part_by_part() -> None:
    pair = [Row(("A b", "c"), "x", None, 0, ""), Row(("a b ", "C"), "x", None, 1, "")]
    assert drop_duplicates({"train": pair})[1].duplicates == 1
    words = [Row(("A", "b"), ("O", "O"), None, 0, ""), Row(("a", "b"), ("O", "B-X"), None, 1, "")]
    assert drop_duplicates({"train": words})[1].contradictory_inputs == 1


def test_contradictory_inputs_are_counted_apart_from_copies() -> None:
    rows = [row(f"t{i}", label, 2 * i) for i in range(70) for label in "ab"]
    rows += [row(f"u{i}", "a") for i in range(50)] + [row("u0", "a", 1)]
    counts = drop_duplicates({"train": rows})[1]
    assert counts == CopyCounts(
        duplicates=1, conflicting=140, contradictory_inputs=70, distinct_inputs=120, leaked=0
    )


def test_near_pictures_are_counted_where_they_measure() -> None:
    def picture(code: int | None, name: str) -> Row:
        return Row((name,), "x", None, 0, "", perceptual_hash=code)

    train = [picture(0b1111, "a"), picture(1 << 63, "b"), picture(None, "flat")]
    five = (1 << 63) | 0b111110000
    test = [picture(0, "four bits off"), picture(five, "five"), picture(None, "c")]
    rows = {"train": train, "validation": [picture(0b1111, "d")], "test": test}
    assert count_near_images(rows) == 2
    assert count_near_images(rows | {"train": [picture(None, "flat")]}) == 1
    assert count_near_images(rows | {"train": [], "validation": []}) == 0
