"""Write whatever columns a user has beside the predictions, in every format, or refuse in time."""

import datetime
import decimal
import errno
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_predict_table import Fake, predict_rows, put, use

from hftl.data.tables import MAX_DEPTH
from hftl.errors import DataError, DataWarning
from hftl.inference import predict_table
from hftl.runtime import run_folder

pytestmark = pytest.mark.usefixtures("fast_reload")

SUFFIXES = [".csv", ".jsonl", ".parquet"]
DAY, MINUTE = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return use(monkeypatch, Fake("text"))


def put_lines(path: Path, cells: Iterable[str]) -> Path:
    """Write a text and a column `x`, whose cells are given as JSON, as JSON lines."""
    return put(path, "".join(f'{{"text": "good", "x": {cell}}}\n' for cell in cells))


def put_arrow(path: Path, **columns: Any) -> Path:
    """Write one row with a text and further columns as Parquet."""
    pq.write_table(pa.table({"text": ["good"], **columns}), path)
    return path


def parse_strictly(line: str) -> dict[str, Any]:
    """Parse a line as JSON has it, which knows no NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


NO_PARQUET_TYPE = {
    "number and text": (["1", '"x2"', "null"], ["1", "x2", None]),
    "more than 64 bits": (["100000000000000000000000", "2"], ["1" + 23 * "0", "2"]),
    "empty object": (["{}"], ["{}"]),
    "empty object in a list": (["[{}]", "[]", "null"], ["[{}]", "[]", None]),
    "object and list": (['{"a": "\u00e9"}', "[1]"], ['{"a": "\u00e9"}', "[1]"]),
}


@pytest.mark.parametrize("case", NO_PARQUET_TYPE)
def test_cells_of_no_parquet_type_are_text_and_that_is_said(case: str, tmp_path: Path) -> None:
    cells, texts = NO_PARQUET_TYPE[case]
    data = put_lines(tmp_path / "in.jsonl", cells)
    with pytest.warns(DataWarning, match="column 'x': no Parquet type holds .* text is written"):
        rows = predict_rows(data, tmp_path / "out.parquet")
    assert [row["x"] for row in rows] == texts
    assert [row["label"] for row in rows] == ["good"] * len(texts)


def test_parquet_keeps_the_types_of_its_columns(tmp_path: Path) -> None:
    columns = {
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "byte": pa.array([7], pa.int8()),
        "money": pa.array([decimal.Decimal("1.50")], pa.decimal128(9, 2)),
        "nanosecond": pa.array([1], pa.timestamp("ns", "UTC")),
        "days": pa.array([[DAY]], pa.list_(pa.date32())),
        "kind": pa.array(["a"]).dictionary_encode(),
        "none": pa.array([None], pa.float32()),
    }
    data = put_arrow(tmp_path / "in.parquet", **columns)
    predict_rows(data, tmp_path / "out.parquet")
    before, after = pq.read_table(data), pq.read_table(tmp_path / "out.parquet")
    assert after.select(before.column_names).equals(before)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (".jsonl", {"day": "2020-01-02", "minute": "2020-01-02T03:04:00", "money": "1.5",
                    "days": ["2020-01-02"], "map": [["a", 1]], "bytes": [None]}),
        (".csv", {"day": "2020-01-02", "minute": "2020-01-02 03:04:00", "money": "1.5",
                  "days": '["2020-01-02"]', "map": '[["a", 1]]', "bytes": "[null]"}),
    ],
)  # fmt: skip
def test_values_that_are_no_json_are_written_as_text(
    suffix: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    data = put_arrow(
        tmp_path / "in.parquet", day=[DAY], minute=[MINUTE], money=[decimal.Decimal("1.5")],
        days=[[DAY]], map=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        bytes=[[b"\xff"]],
    )  # fmt: skip
    (row,) = predict_rows(data, tmp_path / f"out{suffix}")
    assert {name: row[name] for name in expected} == expected


def test_images_lose_their_bytes_and_other_objects_nothing(tmp_path: Path) -> None:
    image = {"bytes": b"\x89PNG", "path": "a.png"}
    data = put_arrow(tmp_path / "in.parquet", image=[image], images=[[image]], size=[{"bytes": 5}])
    for suffix in (".jsonl", ".parquet"):
        (row,) = predict_rows(data, tmp_path / f"out{suffix}")
        assert row["image"] == "a.png" and row["images"] == ["a.png"]
        assert row["size"] == {"bytes": 5}


@pytest.mark.parametrize("cell", ["NaN", "1e999", '{"a": [-Infinity]}'])
def test_numbers_that_json_lacks_are_null_and_that_is_said(cell: str, tmp_path: Path) -> None:
    data = put_lines(tmp_path / "in.jsonl", [cell])
    with pytest.warns(DataWarning, match="column 'x': JSON has no NaN.* null is written"):
        predict_rows(data, tmp_path / "out.jsonl")
    row = parse_strictly((tmp_path / "out.jsonl").read_text())
    assert row["x"] in (None, {"a": [None]})
    if cell.startswith("{"):
        with pytest.warns(DataWarning, match="column 'x': JSON has no NaN"):
            (row,) = predict_rows(data, tmp_path / "out.csv")
        assert parse_strictly(row["x"]) == {"a": [None]}
    else:
        (row,) = predict_rows(data, tmp_path / "out.csv")
        assert row["x"] in ("nan", "inf")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cell", ['{"k": "\\ud800"}', '{"\\ud800": 1}', '[1, ["\\udfff"]]'])
def test_half_a_character_inside_a_cell_is_a_bad_row(
    cell: str, suffix: str, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "predict_encoded", lambda *_: pytest.fail("predicted"))
    data = put_lines(tmp_path / "in.jsonl", ["1", cell])
    with pytest.raises(DataError, match="in.jsonl line 2: not valid UTF-8"):
        predict_rows(data, tmp_path / f"out{suffix}")
    assert list(tmp_path.iterdir()) == [data]


def test_half_a_character_in_a_column_name_is_refused(tmp_path: Path) -> None:
    data = put(tmp_path / "in.jsonl", '{"text": "good", "a\\ud800": 1}\n')
    with pytest.raises(DataError, match="in.jsonl line 1: a key that is not valid UTF-8"):
        predict_rows(data, tmp_path / "out.jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_nested_too_deep_is_a_bad_row_and_less_is_written(suffix: str, tmp_path: Path) -> None:
    output, deep = tmp_path / f"out{suffix}", "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    for depth in (MAX_DEPTH, 900, 100_000):
        data = put_lines(tmp_path / "in.jsonl", ["1", "[" * depth + "]" * depth])
        with pytest.raises(DataError, match="in.jsonl line 2: its JSON is nested too deep"):
            predict_rows(data, output)
    with nullcontext() if suffix != ".parquet" else pytest.warns(DataWarning, match="column 'x'"):
        (row,) = predict_rows(put_lines(tmp_path / "in.jsonl", [deep]), output)
    assert (json.dumps(row["x"]) if suffix == ".jsonl" else row["x"]) == deep


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_column_is_lost_when_a_predicted_table_is_predicted_again(
    suffix: str, tmp_path: Path
) -> None:
    data, rows = put(tmp_path / "in.csv", "label,text,score\nmine,a good film,9\n"), []
    for number in range(3):
        output = tmp_path / f"{number}{suffix}"
        rows, data = predict_rows(data, output), output
    names = ["text", *(f"{'input.' * n}{name}" for n in range(4) for name in ("label", "score")),
             *(f"{'input.' * n}{name}" for n in range(3) for name in ("bad", "good"))]  # fmt: skip
    assert len(names) == 15 and sorted(rows[0]) == sorted(names)
    labels = {name: str(rows[0][name]) for name in names if name.endswith(("label", "score"))}
    assert labels == {
        "label": "good", "score": "0.75", "input.label": "mine", "input.score": "9",
        "input.input.label": "good", "input.input.score": "0.75",
        "input.input.input.label": "good", "input.input.input.score": "0.75",
    }  # fmt: skip


def test_classes_and_columns_with_the_names_of_others_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Fake("text", names=("label", "class.label")))
    data = put(tmp_path / "in.csv", "text,class.label,input.class.label\na good film,1,2\n")
    assert predict_rows(data) == [
        {"text": "a good film", "input.input.class.label": "1", "input.class.label": "2",
         "label": "class.label", "score": "0.75", "class.class.label": "0.25",
         "class.label": "0.75"}
    ]  # fmt: skip


def test_names_that_differ_in_their_line_ends_stay_apart(tmp_path: Path) -> None:
    data = put_arrow(tmp_path / "in.parquet", **{"a\rb": [1], "a\nb": [2], "a\r\nb": [3]})
    (row,) = predict_rows(data, tmp_path / "out.csv")
    assert list(row)[1:4] == ["a\nb", "input.a\nb", "input.input.a\nb"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_that_fails_leaves_the_old_file_alone(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    data, output = put(tmp_path / "in.csv", "text\ngood\n"), put(tmp_path / f"out{suffix}", "old")
    with pytest.raises(OSError, match="no space left"):
        predict_table.predict_table("run", data, output)
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([data, output])
