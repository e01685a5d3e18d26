"""The data stage: what it keeps, what it refuses, and that data count by content."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences, write_csv

from hftl.config.data import Data
from hftl.data import prepare as stage
from hftl.data.facts import BadRow
from hftl.data.prepare import PreparedData, hash_data_files, prepare_data
from hftl.errors import DataError

HEADER = ["text", "label"]


def data(path: Path, **more: Any) -> Data:
    return Data.model_validate({"train": {"path": str(path)}, **more})


def test_fractions_are_exact_and_the_facts_tell_them(table: Path) -> None:
    prepared = prepare_data(data(table))
    assert prepared.facts.splits == {"train": 96, "validation": 32, "test": 32}
    assert prepared.names == ["negative", "positive"]
    assert prepared.facts.label_counts["test"] == {"negative": 16, "positive": 16}
    texts = [row.content for rows in prepared.rows.values() for row in rows]
    assert len(set(texts)) == len(texts) == prepared.facts.rows_read == 160


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_what_is_written_is_read_back(tmp_path: Path, task: str) -> None:
    rows = [(f"text {i}", f"second {i}", i % 2 if task == "classification" else i % 8 / 4, i // 4)
            for i in range(80)]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", ["q", "p", "y", "who"], rows)
    train = {"path": str(path), "text": ["q", "p"], "label": "y"}
    prepared = prepare_data(Data.model_validate({"train": train, "task": task, "group": "who"}))
    stage.write_prepared_data(prepared, tmp_path, "digest")
    again = stage.read_prepared_data(tmp_path)
    assert again == prepared
    assert stage.read_stored_digest(tmp_path) == "digest"
    assert np.array_equal(
        again.encode_targets(again.rows["train"]), prepared.encode_targets(prepared.rows["train"])
    )


def test_the_fingerprint_knows_content_and_not_order_or_path(table: Path, tmp_path: Path) -> None:
    rows = sentences(160)
    (tmp_path / "else").mkdir()
    mixed = write_csv(tmp_path / "else" / "other.csv", HEADER, rows[::-1])
    flipped = write_csv(tmp_path / "flip.csv", HEADER, [(rows[0][0], "positive"), *rows[1:]])
    longer = write_csv(tmp_path / "long.csv", HEADER, [*rows, ("one more text", "positive")])
    first = prepare_data(data(table))
    assert prepare_data(data(mixed)).facts.fingerprint == first.facts.fingerprint
    for other in (data(flipped), data(longer), data(table, seed=1)):
        assert prepare_data(other).facts.fingerprint != first.facts.fingerprint


def test_an_arms_rows_and_their_order_do_not_depend_on_the_disk(table: Path) -> None:
    rows = sentences(160)
    first = prepare_data(data(table))
    write_csv(table, HEADER, rows[::-1])
    again = prepare_data(data(table))
    for seed in (0, 1):
        drawn = [[row.content for row in p.draw_train_rows(5, seed)] for p in (first, again)]
        assert drawn[0] == drawn[1]
    assert [row.content for row in first.rows["test"]] == [
        row.content for row in again.rows["test"]
    ]


def test_class_ids_follow_numbers_as_numbers(tmp_path: Path) -> None:
    rows = [(f"text {i}", (10, 9, -1)[i % 3]) for i in range(60)]
    prepared = prepare_data(data(write_csv(tmp_path / "a.csv", HEADER, rows)))
    assert prepared.names == ["-1", "9", "10"]
    ids = prepared.encode_targets(prepared.rows["test"])
    assert ids.dtype == np.int64
    assert [prepared.names[i] for i in ids] == [row.label for row in prepared.rows["test"]]


@pytest.mark.parametrize(
    "names",
    [("1", "\u2460"), ("1", "2", "\u00b2"), ("-1", "--1"), ("-", "1"), ("1", "9" * 5000)],
    ids=["circled", "superscript", "two minus signs", "minus alone", "too long"],
)
def test_a_name_that_only_resembles_a_number_is_a_name(tmp_path: Path, names: Any) -> None:
    rows = [(f"text {i}", names[i % len(names)]) for i in range(60)]
    path = write_csv(tmp_path / "a.csv", HEADER, rows)
    assert prepare_data(data(path)).names == sorted(names)


def test_targets_are_floats_and_have_no_classes(tmp_path: Path) -> None:
    rows = [(f"text {i}", i / 10) for i in range(50)]
    path = write_csv(tmp_path / "a.csv", HEADER, rows)
    prepared = prepare_data(data(path, task="regression", shots=7))
    assert prepared.names == []
    assert prepared.facts.label_counts is None
    assert prepared.encode_targets(prepared.rows["test"]).dtype == np.float64
    assert (len(prepared.draw_train_rows(7, 0)), len(prepared.rows["validation"])) == (7, 7)


def test_bad_rows_and_duplicates_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [*sentences(60), (" ", "positive"), sentences(1)[0], ("both", "negative"),
            ("both", "positive")]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", HEADER, rows)
    facts = prepare_data(data(path, bad_rows="skip")).facts
    assert (facts.rows_read, facts.bad_rows) == (64, 1)
    assert (facts.duplicates, facts.conflicting) == (1, 2)
    assert facts.bad_rows_listed == [BadRow(where="a.csv line 62", why="text is empty")]
    assert sum(facts.splits.values()) == 60


def test_fractions_are_taken_after_duplicates_are_dropped(table: Path) -> None:
    first = prepare_data(data(table))
    write_csv(table, HEADER, sentences(160) * 3)
    again = prepare_data(data(table))
    assert again.facts.fingerprint == first.facts.fingerprint
    assert again.facts.duplicates == 320


def test_groups_never_straddle(tmp_path: Path) -> None:
    rows = [(text, label, i // 4) for i, (text, label) in enumerate(sentences(160))]
    path = write_csv(tmp_path / "a.csv", [*HEADER, "who"], rows)
    prepared = prepare_data(data(path, group="who"))
    seen = Counter(
        group for rows in prepared.rows.values() for group in {row.group for row in rows}
    )
    assert set(seen.values()) == {1}
    assert prepared.facts.splits == {"train": 96, "validation": 32, "test": 32}


def tables(
    folder: Path, test: list[tuple[Any, ...]], header: list[str] = HEADER, **more: Any
) -> PreparedData:
    """Train and test in two files."""
    rows = [(*row, f"g{i}")[: len(header)] for i, row in enumerate(sentences(40))]
    train = write_csv(folder / "train.csv", header, rows)
    other = write_csv(folder / "test.csv", header, test)
    return prepare_data(data(train, test={"path": str(other)}, **more))


def test_a_test_table_of_its_own(tmp_path: Path) -> None:
    leaked, *_ = sentences(1)
    test = [*sentences(52)[40:], leaked]
    prepared = tables(tmp_path, test)
    assert {row.content[0] for row in prepared.rows["test"]} == {text for text, _ in test}
    assert prepared.facts.leaked == 1
    assert leaked[0] not in {row.content[0] for row in prepared.rows["train"]}


def test_a_test_label_that_train_never_has(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"test\.csv line 3: test has the label 'neutral', which train never has"
    ):
        tables(tmp_path, [("well", "positive"), ("so so", "neutral")])


def test_a_group_that_straddles_two_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the group 'g3' stands in train and in another table"):
        tables(tmp_path, [("well", "positive", "g3")], [*HEADER, "who"], group="who")


def test_one_class(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", HEADER, [(f"text {i}", "only") for i in range(20)])
    with pytest.raises(DataError, match="train has one class only: 'only'"):
        prepare_data(data(path))


@pytest.mark.parametrize(
    ("rows", "more", "split"),
    [
        (2, {}, "test"),
        (4, {"test": {"fraction": 0.5}, "validation": {"fraction": 0.1}}, "validation"),
    ],
)
def test_a_split_left_empty(tmp_path: Path, rows: int, more: dict[str, Any], split: str) -> None:
    path = write_csv(tmp_path / "a.csv", HEADER, sentences(rows))
    with pytest.raises(DataError, match=f"{split} is left with no rows; train has {rows} "):
        prepare_data(data(path, **more))


def test_fewer_rows_than_shots(table: Path) -> None:
    with pytest.raises(DataError, match="has 48 rows left for training, fewer than shots=49"):
        prepare_data(data(table, shots=49))


@pytest.mark.parametrize("rare", [1, 2])
def test_train_knows_every_class(tmp_path: Path, rare: int) -> None:
    rows = [*sentences(40), *((f"rare {i}", "rare") for i in range(rare))]
    path = write_csv(tmp_path / "a.csv", HEADER, rows)
    prepared = prepare_data(data(path, test={"fraction": 0.45}, validation={"fraction": 0.45}))
    assert {row.label for row in prepared.rows["train"]} == {"negative", "positive", "rare"}
    assert prepared.facts.label_counts["test"].get("rare", 0) == rare - 1


def test_the_digest_knows_bytes_and_not_where_they_lie(table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    shutil.copy(table, copy)
    first = hash_data_files(data(table))
    assert hash_data_files(data(copy)) == first
    assert hash_data_files(data(copy, test={"path": str(table)})) != first
    copy.write_bytes(copy.read_bytes().replace(b"good", b"goof", 1))
    assert hash_data_files(data(copy)) != first


def test_the_digest_of_a_folder_and_of_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("x", encoding="utf-8")
    first = hash_data_files(data(tmp_path / "texts"))
    (tmp_path / "texts" / "a" / "1.txt").rename(tmp_path / "texts" / "a" / "2.txt")
    assert hash_data_files(data(tmp_path / "texts")) != first
    one = Data.model_validate({"train": {"path": "org/name"}})
    other = Data.model_validate({"train": {"path": "org/name", "revision": "abc"}})
    assert hash_data_files(one) != hash_data_files(other)
