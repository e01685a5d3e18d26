"""Prepare data: what is dropped, what is refused, and that data count by content."""

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


def prepare(folder: Path, rows: list[Any], header: list[str] = HEADER, **more: Any) -> PreparedData:
    return prepare_data(data(write_csv(folder / "a.csv", header, rows), **more))


def list_texts(prepared: PreparedData, split: str) -> list[str]:
    return [row.content[0] for row in prepared.rows[split]]


def test_fractions_are_exact_and_the_facts_count_them(table: Path) -> None:
    prepared = prepare_data(data(table))
    assert prepared.facts.splits == {"train": 96, "validation": 32, "test": 32}
    assert prepared.names == ["negative", "positive"]
    assert prepared.facts.label_counts["test"] == {"negative": 16, "positive": 16}
    texts = [text for split in prepared.rows for text in list_texts(prepared, split)]
    assert len(set(texts)) == len(texts) == prepared.facts.rows_read == 160


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_prepared_data_are_read_back_as_written(tmp_path: Path, task: str) -> None:
    rows = [(f"text {i}", f"second {i}", i % 2 if task == "classification" else i % 8 / 4, i // 4)
            for i in range(80)]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", ["q", "p", "y", "who"], rows)
    train = {"path": str(path), "text": ["q", "p"], "label": "y"}
    prepared = prepare_data(Data.model_validate({"train": train, "task": task, "group": "who"}))
    stage.write_prepared_data(prepared, tmp_path, "digest")
    again = stage.read_prepared_data(tmp_path)
    assert again == prepared
    assert stage.read_stored_digest(tmp_path) == "digest"
    np.testing.assert_array_equal(
        again.encode_targets(again.rows["train"]), prepared.encode_targets(prepared.rows["train"])
    )


def test_the_fingerprint_and_the_rows_know_content_and_not_order_or_path(
    table: Path, tmp_path: Path
) -> None:
    rows, first = sentences(160), prepare_data(data(table))
    mixed = prepare(tmp_path, rows[::-1])
    assert mixed.facts.fingerprint == first.facts.fingerprint
    assert list_texts(mixed, "test") == list_texts(first, "test")
    for seed in (0, 1):
        drawn = [[row.content for row in p.draw_train_rows(5, seed)] for p in (first, mixed)]
        assert drawn[0] == drawn[1]
    flipped = [(rows[0][0], "positive"), *rows[1:]]
    longer = [*rows, ("one more text", "positive")]
    for other in (prepare(tmp_path, flipped), prepare(tmp_path, longer),
                  prepare_data(data(table, seed=1))):  # fmt: skip
        assert other.facts.fingerprint != first.facts.fingerprint


def test_class_ids_follow_numbers_as_numbers(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, [(f"text {i}", (10, 9, -1)[i % 3]) for i in range(60)])
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
    prepared = prepare(tmp_path, [(f"text {i}", names[i % len(names)]) for i in range(60)])
    assert prepared.names == sorted(names)


def test_targets_are_floats_and_have_no_classes(tmp_path: Path) -> None:
    rows = [(f"text {i}", i / 10) for i in range(50)]
    prepared = prepare(tmp_path, rows, task="regression", shots=7)
    assert prepared.names == []
    assert prepared.facts.label_counts is None
    assert prepared.encode_targets(prepared.rows["test"]).dtype == np.float64
    assert (len(prepared.draw_train_rows(7, 0)), len(prepared.rows["validation"])) == (7, 7)


def test_bad_rows_and_duplicates_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [*sentences(60), (" ", "positive"), sentences(1)[0], ("both", "negative"),
            ("both", "positive")]  # fmt: skip
    facts = prepare(tmp_path, rows, bad_rows="skip").facts
    assert (facts.rows_read, facts.bad_rows) == (64, 1)
    assert (facts.duplicates, facts.conflicting) == (1, 2)
    assert facts.bad_rows_listed == [BadRow(where="a.csv line 62", why="text is empty")]
    assert sum(facts.splits.values()) == 60


def test_fractions_are_taken_after_duplicates_are_dropped(table: Path, tmp_path: Path) -> None:
    facts = prepare(tmp_path, sentences(160) * 3).facts
    assert facts.fingerprint == prepare_data(data(table)).facts.fingerprint
    assert facts.duplicates == 320


def test_groups_never_straddle(tmp_path: Path) -> None:
    rows = [(*row, i // 4) for i, row in enumerate(sentences(160))]
    prepared = prepare(tmp_path, rows, [*HEADER, "who"], group="who")
    groups = [{row.group for row in rows} for rows in prepared.rows.values()]
    assert set(Counter(group for part in groups for group in part).values()) == {1}
    assert prepared.facts.splits == {"train": 96, "validation": 32, "test": 32}


def prepare_with_test(
    folder: Path, test: list[tuple[Any, ...]], header: list[str] = HEADER, **more: Any
) -> PreparedData:
    """Prepare train and test from two files."""
    rows = [(*row, f"g{i}")[: len(header)] for i, row in enumerate(sentences(40))]
    other = write_csv(folder / "test.csv", header, test)
    return prepare(folder, rows, header, test={"path": str(other)}, **more)


def test_rows_of_a_test_table_are_taken_out_of_train(tmp_path: Path) -> None:
    leaked, *_ = sentences(1)
    test = [*sentences(52)[40:], leaked]
    prepared = prepare_with_test(tmp_path, test)
    assert set(list_texts(prepared, "test")) == {text for text, _ in test}
    assert prepared.facts.leaked == 1 and leaked[0] not in list_texts(prepared, "train")


def test_a_test_label_that_train_never_has_is_refused(tmp_path: Path) -> None:
    message = r"test\.csv line 3: test has the label 'neutral', which train never has"
    with pytest.raises(DataError, match=message):
        prepare_with_test(tmp_path, [("well", "positive"), ("so so", "neutral")])


def test_one_group_of_all_rows_is_named_as_the_cause(tmp_path: Path) -> None:
    rows = [(*row, "one") for row in sentences(40)]
    message = "test is left with no rows; .* 1 group by data.group .who.*leave data.group out"
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, rows, [*HEADER, "who"], group="who")


def test_train_that_test_holds_whole_is_named_as_the_cause(table: Path) -> None:
    with pytest.raises(DataError, match="every row of data.train stands in data.test, too"):
        prepare_data(data(table, test={"path": str(table)}))


def test_a_group_that_straddles_two_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the group 'g3' stands in train and in another table"):
        rows = [("well", "positive", "g3")]
        prepare_with_test(tmp_path, rows, [*HEADER, "who"], group="who")


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([(f"text {i}", "only") for i in range(20)], {}, "train has one class only: 'only'"),
        (sentences(2), {}, "test is left with no rows; train has 2 "),
        (sentences(4), {"test": {"fraction": 0.5}, "validation": {"fraction": 0.1}},
         "validation is left with no rows; train has 4 "),
        (sentences(160), {"shots": 49}, "has 48 rows left for training, fewer than shots=49"),
    ],
    ids=["one class", "empty test", "empty validation", "shots"],
)  # fmt: skip
def test_data_that_cannot_be_split_are_refused(
    rows: list[Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, rows, **more)


@pytest.mark.parametrize("rare", [1, 2])
def test_train_knows_every_class(tmp_path: Path, rare: int) -> None:
    rows = [*sentences(40), *((f"rare {i}", "rare") for i in range(rare))]
    share = {"fraction": 0.45}
    prepared = prepare(tmp_path, rows, test=share, validation=share)
    assert {row.label for row in prepared.rows["train"]} == {"negative", "positive", "rare"}
    assert prepared.facts.label_counts["test"].get("rare", 0) == rare - 1


def test_the_digest_knows_bytes_and_not_where_they_lie(table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    shutil.copy(table, copy)
    first = hash_data_files(data(table))
    assert hash_data_files(data(copy)) == first
    assert hash_data_files(data(copy, test={"path": str(table)})) != first
    for key, value in (("format", "txt"), ("text", "label"), ("image", "label"), ("label", "text")):
        assert hash_data_files(data(copy, train={"path": str(copy), key: value})) != first
    copy.write_bytes(copy.read_bytes().replace(b"good", b"goof", 1))
    assert hash_data_files(data(copy)) != first


def test_the_digest_of_a_folder_and_of_a_hub_id(tmp_path: Path) -> None:
    folder = tmp_path / "texts" / "a"
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text("x", encoding="utf-8")
    first = hash_data_files(data(tmp_path / "texts"))
    (folder / "1.txt").rename(folder / "2.txt")
    assert hash_data_files(data(tmp_path / "texts")) != first
    one, other = ({"path": "org/name"}, {"path": "org/name", "revision": "abc"})
    digests = {hash_data_files(Data.model_validate({"train": train})) for train in (one, other)}
    assert len(digests) == 2


def test_labels_that_no_two_rows_share_are_named_as_the_cause(tmp_path: Path) -> None:
    rows = [(text, f"c{i}") for i, (text, _) in enumerate(sentences(40))]
    message = "test is left with no rows; train has 40 .* no two of them have one label, as 'c0'"
    with pytest.raises(DataError, match=f"{message}.*data.train.label: it reads like an ident"):
        prepare(tmp_path, rows)
