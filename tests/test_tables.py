"""`hftl predict` on tables, with a predictor that needs no model."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from hftl.data.rows import Row
from hftl.errors import DataError, RecipeError
from hftl.inference import predict, predict_table
from hftl.inference.predict import Predictor


class Fake:
    """Says `good` of texts that hold the word."""

    modality = "text"
    task = "classification"

    def __init__(self, *columns: str, names: tuple[str, ...] = ("bad", "good")) -> None:
        self.columns = list(columns)
        self.names = names

    def encode(self, inputs: Iterable[Any], places: list[str], folder: Path) -> list[str]:
        return [row if isinstance(row, str) else " ".join(row) for row in inputs]

    def predict_encoded(self, encoded: list[str]) -> list[dict[str, Any]]:
        return [self._predict(text) for text in encoded]

    def _predict(self, text: str) -> dict[str, Any]:
        if not self.names:
            return {"label": float(len(text))}
        chances = [0.25, 0.75] if "good" in text else [0.75, 0.25]
        scores = dict(zip(self.names, chances, strict=True))
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fake("text"))


def use(monkeypatch: pytest.MonkeyPatch, predictor: Fake) -> None:
    monkeypatch.setattr(predict_table, "load", lambda model, base: predictor)


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def told(data: Path, output: Path | None = None) -> list[dict[str, Any]]:
    """The predicted rows, read back from CSV."""
    text = predict_table.predict_table("run", data, output)
    if output is not None:
        assert text is None
        text = output.read_text("utf-8")
    return list(csv.DictReader(io.StringIO(text)))


ROWS = 'id,text\n7,a good film\n8,"dull, long"\n'


def test_rows_come_back_with_label_score_and_a_column_a_class(tmp_path: Path) -> None:
    assert told(put(tmp_path / "in.csv", ROWS)) == [
        {"id": "7", "text": "a good film", "label": "good", "score": "0.75", "bad": "0.25",
         "good": "0.75"},
        {"id": "8", "text": "dull, long", "label": "bad", "score": "0.75", "bad": "0.75",
         "good": "0.25"},
    ]  # fmt: skip


def test_a_target_has_a_label_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fake("text", names=()))
    found = told(put(tmp_path / "in.csv", ROWS))
    assert found[0] == {"id": "7", "text": "a good film", "label": "11.0"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_output_holds_the_same_rows(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    data = put(tmp_path / "in.csv", ROWS)
    assert predict_table.predict_table("run", data, output) is None
    if suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(output.read_text("utf-8"))))
    elif suffix == ".jsonl":
        found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    else:
        found = pq.read_table(output).to_pylist()
    plain = [{key: str(value) for key, value in row.items()} for row in found]
    assert plain == told(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.csv", output.name])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_every_input_is_read(suffix: str, tmp_path: Path) -> None:
    data = tmp_path / f"in{suffix}"
    texts = ["a good film", "dull"]
    match suffix:
        case ".csv" | ".tsv":
            put(data, "text\n" + "\n".join(texts) + "\n")
        case ".jsonl":
            put(data, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".parquet":
            pq.write_table(pa.table({"text": texts}), data)
        case ".txt":
            put(data, "\n".join(texts) + "\n")
    assert [(row["text"], row["label"]) for row in told(data)] == [
        ("a good film", "good"), ("dull", "bad")
    ]  # fmt: skip


def test_lines_of_a_text_file_are_the_text_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Fake("sentence"))
    rows = told(put(tmp_path / "in.txt", "a good film\ndull\n"))
    assert [(row["sentence"], row["label"]) for row in rows] == [
        ("a good film", "good"), ("dull", "bad")
    ]  # fmt: skip


def test_a_pair_is_read_from_two_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fake("a", "b"))
    data = put(tmp_path / "in.csv", "b,a\ngood,x\nx,x\n")
    assert [row["label"] for row in told(data)] == ["good", "bad"]


def test_columns_of_ours_are_kept_under_another_name(tmp_path: Path) -> None:
    data = put(tmp_path / "in.csv", "text,label,good,score\na good film,mine,yes,9\n")
    assert told(data) == [
        {"text": "a good film", "input.label": "mine", "input.good": "yes", "input.score": "9",
         "label": "good", "score": "0.75", "bad": "0.25", "good": "0.75"}
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_keys_that_only_later_rows_have_are_kept(suffix: str, tmp_path: Path) -> None:
    data = put(tmp_path / "in.jsonl", '{"text": "good"}\n{"text": "dull", "note": "late"}\n')
    output = tmp_path / f"out{suffix}"
    predict_table.predict_table("run", data, output)
    if suffix == ".parquet":
        notes = pq.read_table(output)["note"].to_pylist()
    elif suffix == ".jsonl":
        notes = [json.loads(line)["note"] for line in output.read_text("utf-8").splitlines()]
    else:
        notes = [row["note"] or None for row in told(data)]
    assert notes == [None, "late"]


def test_missing_column_names_the_closest(tmp_path: Path) -> None:
    data = put(tmp_path / "in.csv", "id,texts\n1,x\n")
    with pytest.raises(DataError, match=r"in.csv: no column 'text'; did you mean 'texts'; it has"):
        told(data)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("in.csv", "text,id\nfine,1\n ,2\n", "in.csv line 3: text is empty"),
        ("in.csv", "text,id\nfine,1\nx\n", "in.csv line 3: 1 fields where the header has 2"),
        ("in.csv", 'id,text\n1,good\n2,"bad\n3,fine\n4,12"\n', "in.csv line 3: .* at line 4"),
        ("in.csv", b"text,id\nfine,1\nJos\xe9,2\n", "in.csv line 3: not valid UTF-8"),
        ("in.csv", b"text,id\nfine,1\nfine,\xe9\n", "in.csv line 3: not valid UTF-8"),
        ("in.jsonl", '{"text": "a"}\n{"text": null}\n', "in.jsonl line 2: text is empty, not text"),
        ("in.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "in.jsonl line 3: text is int, not text"),
        ("in.txt", "one\n\nthree\n", "in.txt line 2: text is empty"),
        ("in.csv", "text,id\n", "in.csv has no rows"),
        ("in.xlsx", "x", "in.xlsx: the suffix '.xlsx' says no format"),
    ],
)
def test_bad_row_is_named(name: str, content: str | bytes, why: str, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with pytest.raises(DataError, match=why):
        told(put(tmp_path / name, content), output)
    assert not output.exists()


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.csv does not exist"):
        told(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.txt"])
def test_unknown_output_suffix_is_refused_before_anything_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_table, "load", lambda *given: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match=r"unknown suffix .*Use \.csv, \.jsonl, \.parquet"):
        told(put(tmp_path / "in.csv", ROWS), tmp_path / name)


def test_output_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder .*none"):
        told(put(tmp_path / "in.csv", ROWS), tmp_path / "none" / "out.csv")


def predictor(monkeypatch: pytest.MonkeyPatch, names: list[str], texts: list[str]) -> Predictor:
    """A predictor whose logits are the lengths of the texts, then ones."""

    def outputs(model: Any, encoded: list[Row], inputs: Any, device: str) -> np.ndarray:
        return np.array([[len(row.content[0])] + [1.0] * (len(names) - 1) for row in encoded])

    monkeypatch.setattr(predict, "predict_logits", outputs)
    task = "classification" if names else "regression"
    inputs: Any = SimpleNamespace(encode=lambda rows: rows)
    return Predictor(nn.Identity(), inputs, task, names, texts, "cpu")


def test_predict_tells_label_score_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = predictor(monkeypatch, ["long", "short"], ["text"]).predict(["four", ("x",)])
    first, even = found
    assert first["label"] == "long" and first["score"] == first["scores"]["long"]
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-3))) and list(first["scores"]) == [
        "long", "short"
    ]  # fmt: skip
    assert even["scores"] == pytest.approx({"long": 0.5, "short": 0.5})


def test_predict_tells_a_target_as_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    assert predictor(monkeypatch, [], ["text"]).predict(["four"]) == [{"label": 4.0}]
    assert predictor(monkeypatch, [], ["text"]).predict([]) == []


@pytest.mark.parametrize(
    ("texts", "inputs"),
    [(["text"], ["fine", " "]), (["text"], ["fine", ("a", "b")]), (["a", "b"], [("a", "b"), "a"]),
     (["text"], ["fine", 3]), (["a", "b"], [("a", "b"), ("a", "")])],
    ids=["blank", "two for one", "one for two", "number", "half a pair"],
)  # fmt: skip
def test_predict_names_the_input_it_cannot_take(
    texts: list[str], inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=rf"input 2 is .*expected {len(texts)} text"):
        predictor(monkeypatch, ["x", "y"], texts).predict(inputs)


def test_a_class_called_label_keeps_its_own_column() -> None:
    told = {"label": "label", "score": 0.9, "scores": {"label": 0.9, "other": 0.1}}
    assert predict_table._flatten_prediction(told) == {
        "label": "label", "score": 0.9, "class.label": 0.9, "other": 0.1,
    }  # fmt: skip


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    data.write_text("text\nx\n")
    with pytest.raises(RecipeError, match="is the input itself"):
        predict_table.predict_table("model", data, data)
