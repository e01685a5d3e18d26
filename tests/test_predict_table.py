"""Predict tables with a predictor that needs no model."""

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

from hftl.data.encodings import BAD_BYTE
from hftl.data.rows import Row
from hftl.data.tables import READERS, guess_format
from hftl.errors import DataError, RecipeError
from hftl.inference import predict, predict_table
from hftl.inference.arguments import is_literal_text
from hftl.inference.predict import Predictor

pytestmark = pytest.mark.usefixtures("fast_reload")


class Fake:
    """Say `good` of texts that hold the word, or the length as a target without class names."""

    modality = "text"
    task = "classification"
    bad_rows = "refuse"

    def __init__(self, *columns: str, names: tuple[str, ...] = ("bad", "good")) -> None:
        self.columns = list(columns)
        self.names = names
        self.texts: list[str] = []

    def encode(
        self, inputs: Iterable[Any], places: list[str], folder: Path, reject: Any
    ) -> list[str]:
        self.texts = [row if isinstance(row, str) else " ".join(row) for row in inputs]
        return self.texts

    def predict_encoded(
        self, encoded: list[str], coverage: float | None = None
    ) -> list[dict[str, Any]]:
        return [self._predict(text) for text in encoded]

    def _predict(self, text: str) -> dict[str, Any]:
        if not self.names:
            return {"label": float(len(text))}
        chances = [0.25, 0.75] if "good" in text else [0.75, 0.25]
        scores = dict(zip(self.names, chances, strict=True))
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return use(monkeypatch, Fake("text"))


def use(monkeypatch: pytest.MonkeyPatch, predictor: Fake) -> Fake:
    monkeypatch.setattr(predict_table, "load", lambda model, base: predictor)
    return predictor


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_back(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    match path.suffix:
        case ".csv":
            return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
        case ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        case _:
            return pq.read_table(path).to_pylist()


def predict_rows(data: Path, output: Path | None = None) -> list[dict[str, Any]]:
    """Return the predicted rows, from the printed CSV or the output."""
    text = predict_table.predict_table("run", data, output)
    assert (text is None) == (output is not None)
    return read_back(output) if output else list(csv.DictReader(io.StringIO(text)))


ROWS = 'id,text\n7,a good film\n8,"dull, long"\n'
PREDICTED = [("a good film", "good"), ("dull", "bad")]


def test_rows_come_back_with_label_score_and_a_column_a_class(tmp_path: Path) -> None:
    assert predict_rows(put(tmp_path / "in.csv", ROWS)) == [
        {"id": "7", "text": "a good film", "label": "good", "score": "0.75", "bad": "0.25",
         "good": "0.75"},
        {"id": "8", "text": "dull, long", "label": "bad", "score": "0.75", "bad": "0.75",
         "good": "0.25"},
    ]  # fmt: skip


def test_a_target_has_a_label_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fake("text", names=()))
    row, _ = predict_rows(put(tmp_path / "in.csv", ROWS))
    assert row == {"id": "7", "text": "a good film", "label": "11.0"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_output_holds_the_same_rows(suffix: str, tmp_path: Path) -> None:
    data, output = put(tmp_path / "in.csv", ROWS), tmp_path / f"out{suffix}"
    rows = predict_rows(data, output)
    plain = [{key: str(value) for key, value in row.items()} for row in rows]
    assert plain == predict_rows(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.csv", output.name])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_every_input_is_read(suffix: str, tmp_path: Path) -> None:
    data, texts = tmp_path / f"in{suffix}", [text for text, _ in PREDICTED]
    match suffix:
        case ".jsonl":
            put(data, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".parquet":
            pq.write_table(pa.table({"text": texts}), data)
        case _:
            put(data, "\n".join([*(["text"] if suffix != ".txt" else []), *texts, ""]))
    assert [(row["text"], row["label"]) for row in predict_rows(data)] == PREDICTED


def test_lines_of_a_text_file_are_the_text_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Fake("sentence"))
    rows = predict_rows(put(tmp_path / "in.txt", "a good film\ndull\n"))
    assert [(row["sentence"], row["label"]) for row in rows] == PREDICTED


def test_junk_beside_texts_is_no_class(tmp_path: Path) -> None:
    for folder in (".cache", "__MACOSX"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        put(tmp_path / "in" / folder / "x.txt", "no text")
    put(tmp_path / "in" / "a.txt", "a good film")
    put(tmp_path / "in" / "b.txt", "dull")
    assert [(row["text"], row["label"]) for row in predict_rows(tmp_path / "in")] == PREDICTED


def test_a_pair_is_read_from_two_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fake("a", "b"))
    data = put(tmp_path / "in.csv", "b,a\ngood,x\nx,x\n")
    assert [row["label"] for row in predict_rows(data)] == ["good", "bad"]


def test_input_columns_named_as_ours_come_back_under_another_name(tmp_path: Path) -> None:
    data = put(tmp_path / "in.csv", "text,label,good,score\na good film,mine,yes,9\n")
    assert predict_rows(data) == [
        {"text": "a good film", "input.label": "mine", "input.good": "yes", "input.score": "9",
         "label": "good", "score": "0.75", "bad": "0.25", "good": "0.75"}
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_keys_that_only_later_rows_have_come_back(suffix: str, tmp_path: Path) -> None:
    data = put(tmp_path / "in.jsonl", '{"text": "good"}\n{"text": "dull", "note": "late"}\n')
    rows = predict_rows(data, tmp_path / f"out{suffix}")
    assert [row["note"] or None for row in rows] == [None, "late"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("in.csv", "id,texts\n1,x\n", "in.csv: no column 'text'; did you mean 'texts'; it has"),
        ("in.csv", "text,id\nfine,1\n ,2\n", "in.csv line 3: text is empty"),
        ("in.csv", "text,id\nfine,1\nx\n", "in.csv line 3: 1 fields where the header has 2"),
        ("in.csv", 'id,text\n1,good\n2,"bad\n3,fine\n4,12"\n', "in.csv line 3: .* at line 4"),
        ("in.csv", b"text,id\nfine,1\nJos\xe9,2\n", "in.csv line 3: not valid UTF-8"),
        ("in.csv", b"text,id\nfine,1\nfine,\xe9\n", "in.csv line 3: not valid UTF-8"),
        ("in.jsonl", '{"text": "a"}\n{"text": null}\n', "in.jsonl line 2: text is empty, not text"),
        ("in.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "in.jsonl line 3: text is int, not text"),
        ("in.txt", "one\n\nthree\n", "in.txt line 2: text is empty"),
        ("in.csv", "text,id\n", "in.csv has no rows"),
        ("in.xlsx", "x", "in.xlsx: the suffix '.xlsx' is of a spreadsheet"),
        ("none.csv", None, r"none.csv does not exist\. Check the path; a text itself is more than"),
    ],
)
def test_a_bad_table_or_row_is_named(
    name: str, content: str | bytes | None, why: str, tmp_path: Path
) -> None:
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(DataError, match=why):
        predict_rows(tmp_path / name, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_text_itself_is_a_table_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Fake("sentence"))
    text = predict_table.predict_table("run", "A good, clever film.", None)
    assert text is not None
    assert text.splitlines()[1:] == ['"A good, clever film.",good,0.75,0.25,0.75']
    said: list[str] = []
    for text in ("dull, dull", "dull as data.csv"):
        predict_table.predict_table("run", text, tmp_path / "out.jsonl", say=said.append)
        assert [row["label"] for row in read_back(tmp_path / "out.jsonl")] == ["bad"]
    assert said == [f"text: {text!r} is no file that is there, and is read as a text itself"]


@pytest.mark.parametrize("data", ["", " \n"])
def test_an_empty_text_is_not_the_current_folder(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.txt", "A warm film")
    with pytest.raises(DataError, match="the text is empty"):
        predict_table.predict_table("run", data, None)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("A warm film", True), ("A warm film.", True), ("one/two three", True), ("word", False),
        ("new.csv", False), ("my new.csv", False), ("my new.xlsx", False), ("my data/new", False),
        ("my data/old reviews", False), ("my photo.JPG", False), ("I like amazon.com", True),
        ("Nice phone.Works", True), ("/ is good", True),
        ("", False), ("x " * 5000, True), ("I opened data.csv", True),
        ("our old review.csv", False),
    ],
)  # fmt: skip
def test_only_what_can_be_no_file_is_a_text(
    data: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data" / "new").mkdir(parents=True)
    (tmp_path / "our old reviews.csv").touch()
    assert is_literal_text(data) == expected


@pytest.mark.parametrize(
    ("task", "modality", "columns", "reads"),
    [
        ("classification", "text", ["a", "b"], "a and b"),
        ("classification", "image", ["image"], "pictures"),
    ],
)
def test_a_text_for_a_model_that_reads_something_else_is_refused(
    task: str, modality: str, columns: list[str], reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = use(monkeypatch, Fake(*columns))
    other.task, other.modality = task, modality
    with pytest.raises(DataError, match=f"no file or folder 'a film', .* {reads}. Give a table"):
        predict_table.predict_table("run", "a film", None)


def test_a_text_that_is_tagged_comes_back_a_word_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tagger = use(monkeypatch, Fake("tokens"))
    tagger.task = "token-classification"
    tags = {"label": ["B-PER", "O", "B-LOC"], "score": [0.987654321, None, 0.5]}
    monkeypatch.setattr(tagger, "predict_encoded", lambda *_: [tags])
    text = predict_table.predict_table("run", "Anna in\tBerlin", None)
    assert tagger.texts == ["Anna in Berlin"] and text is not None
    assert text.splitlines() == ["word,label,score", "Anna,B-PER,0.987654", "in,O,",
                                 "Berlin,B-LOC,0.5"]  # fmt: skip


MIXED = b"text,id\na good film,1\n ,2\nx\nJos\xe9,4\ndull,5\n"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_bad_rows_stay_without_a_label_where_they_are_skipped(
    suffix: str, fake: Fake, tmp_path: Path
) -> None:
    data, output, said = put(tmp_path / "in.csv", MIXED), tmp_path / f"out{suffix}", []
    for given, trained in (("skip", "refuse"), (None, "skip")):
        fake.bad_rows = trained
        predict_table.predict_table("run", data, output, say=said.append, bad_rows=given)
        rows = read_back(output)
        assert [row["label"] or None for row in rows] == ["good", None, None, None, "bad"]
        assert [row["good"] in (None, "") for row in rows] == [False, True, True, True, False]
        assert [row["text"] for row in rows][3:] == ["Jos\N{REPLACEMENT CHARACTER}", "dull"]
        faults = [row["fault"] or "" for row in rows]
        assert faults[:3] == [
            "", "in.csv line 3: text is empty", "in.csv line 4: 1 fields where the header has 2"
        ]  # fmt: skip
        assert faults[3].startswith("in.csv line 5: ") and BAD_BYTE in faults[3] and not faults[4]
    assert said[0].startswith("bad rows: 3 of 5 without a label, see the column fault; the first")
    fake.bad_rows = "skip"
    with pytest.raises(DataError, match=r"line 3: text is empty\. .* --bad-rows skip"):
        predict_table.predict_table("run", data, output, bad_rows="refuse")
    with pytest.raises(DataError, match="no row can be read; of the first: in.csv line 2: text"):
        predict_table.predict_table("run", put(tmp_path / "in.csv", "text,id\n ,1\n"), None)


def test_csv_has_the_digits_that_a_score_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "in.csv", "text,id\ngood,0.12345678901\n")
    third = {"label": "a", "score": 1 / 3, "set": ["a"], "scores": {"a": 1 / 3, "b": 2 / 3}}
    fake = use(monkeypatch, Fake("text"))
    monkeypatch.setattr(fake, "predict_encoded", lambda *_: [third])
    (row,) = predict_rows(data)
    assert (row["id"], row["score"], row["b"]) == ("0.12345678901", "0.333333", "0.666667")
    (row,) = predict_rows(data, tmp_path / "out.jsonl")
    assert row["score"] == 1 / 3, "a file of numbers holds them as they are"
    fake.task = "regression"
    monkeypatch.setattr(fake, "predict_encoded", lambda *_: [{"label": 1234567.25}])
    assert predict_rows(data)[0]["label"] == "1234567.0"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("out.xlsx", r"unknown suffix .*Use \.csv, \.jsonl, \.parquet"),
        ("out", "unknown suffix"), ("out.txt", "unknown suffix"),
        ("none/out.csv", "there is no folder .*none"), ("in.csv", "is the input itself"),
    ],
)  # fmt: skip
def test_an_output_is_refused_before_anything_loads(
    output: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_table, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match=why):
        predict_rows(put(tmp_path / "in.csv", ROWS), tmp_path / output)
    assert (tmp_path / "in.csv").read_text() == ROWS


def build_predictor(
    monkeypatch: pytest.MonkeyPatch, names: list[str], texts: list[str]
) -> Predictor:
    """Return a predictor whose logits are the lengths of the texts, then ones."""

    def predict_lengths(model: Any, encoded: list[Row], inputs: Any, device: str) -> np.ndarray:
        return np.array([[len(row.content[0])] + [1.0] * (len(names) - 1) for row in encoded])

    monkeypatch.setattr(predict, "predict_logits", predict_lengths)
    task = "classification" if names else "regression"
    inputs: Any = SimpleNamespace(encode=lambda rows: rows)
    return Predictor(nn.Identity(), inputs, task, names, texts, "cpu")


def test_predict_returns_label_score_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = build_predictor(monkeypatch, ["long", "short"], ["text"])
    first, even = predictor.predict(["four", ("x",)])
    assert first["label"] == "long" and first["score"] == first["scores"]["long"]
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert list(first["scores"]) == ["long", "short"]
    assert even["scores"] == pytest.approx({"long": 0.5, "short": 0.5})


def test_predict_returns_a_target_as_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_predictor(monkeypatch, [], ["text"]).predict(["four"]) == [{"label": 4.0}]
    assert build_predictor(monkeypatch, [], ["text"]).predict([]) == []


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
        build_predictor(monkeypatch, ["x", "y"], texts).predict(inputs)


@pytest.mark.parametrize("value", ["a\ud800", ("a", "\ud800")])
def test_predict_refuses_half_a_character(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="input 1 is not valid UTF-8: .*ud800"):
        build_predictor(monkeypatch, ["x", "y"], ["a"]).predict([value])


def test_a_class_called_label_has_a_column_with_a_prefix() -> None:
    scores = {"label": 0.9, "other": 0.1}
    prediction = {"label": "label", "score": 0.9, "scores": scores}
    assert predict_table._flatten_prediction(prediction) == {
        "label": "label", "score": 0.9, "class.label": 0.9, "other": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_a_predicted_table_reads_back_with_line_feeds(
    suffix: str, end: str, fake: Fake, tmp_path: Path
) -> None:
    texts = ["one line", "two\nlines, quoted", "a\n\nparagraph", "ends in a break\n", "\nbegins so",
             'says "no"\n', "a,b\nc", "u\u2028v\x85w", '"']  # fmt: skip
    ended = [text.replace("\n", end) for text in texts]
    pq.write_table(pa.table({"text": ended, "note": ended}), tmp_path / "in.parquet")
    output = tmp_path / f"out{suffix}"
    predict_table.predict_table("run", tmp_path / "in.parquet", output)
    assert fake.texts == texts
    back = list(READERS[guess_format(output)](output))
    for column in ("text", "note"):
        assert [raw.values[column] for raw in back] == texts
    assert not any(raw.fault for raw in back)
    if suffix == ".jsonl":
        assert len(output.read_text("utf-8").splitlines()) == len(texts)


def test_csv_on_the_screen_holds_no_carriage_return(tmp_path: Path) -> None:
    pq.write_table(pa.table({"te\rxt": ["a"], "text": ["b\r"]}), tmp_path / "in.parquet")
    text = predict_table.predict_table("run", tmp_path / "in.parquet", None)
    assert text is not None and "\r" not in text
    assert len(list(csv.reader(io.StringIO(text)))) == 2


def test_python_callers_get_the_same_answer_for_each_ending() -> None:
    pair: Any = SimpleNamespace(task="classification", columns=("a", "b"))
    first, second = (
        predict.Predictor._build_row(pair, "input 1", texts)
        for texts in (["a\r\nb", "c\rd"], ["a\nb", "c\nd"])
    )
    assert first == second
