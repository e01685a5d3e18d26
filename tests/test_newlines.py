"""A text is the same whoever saved it: line endings do not reach the tokenizer or split rows."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hftl.config.data import Data
from hftl.data.load import load_rows, read_documents
from hftl.data.rows import BadRows, InputSpec
from hftl.data.tables import READERS, guess_format, read_text_files
from hftl.errors import DataError
from hftl.inference import predict, predict_table

ENDINGS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
TEXTS = ["one line", "two\nlines, quoted", "ends with a break\n", "a\n\nparagraph"]
LABELS = ["pos", "neg", "pos", "neg"]


def write_csv(path: Path, end: str) -> Path:
    lines = [f'"{text}",{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    content = "\n".join(["text,label", *lines, ""])
    path.with_suffix(".csv").write_bytes(content.replace("\n", end).encode())
    return path.with_suffix(".csv")


def write_jsonl(path: Path, end: str) -> Path:
    rows = [
        json.dumps({"text": text.replace("\n", end), "label": label}) + end
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    path.with_suffix(".jsonl").write_bytes("".join(rows).encode())
    return path.with_suffix(".jsonl")


def write_parquet(path: Path, end: str) -> Path:
    texts = [text.replace("\n", end) for text in TEXTS]
    pq.write_table(pa.table({"text": texts, "label": LABELS}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_folder(path: Path, end: str) -> Path:
    for number, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / f"{number}.txt").write_bytes(text.replace("\n", end).encode())
    return path


WRITERS = [write_csv, write_jsonl, write_parquet, write_folder]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("end", ENDINGS)
def test_every_format_gives_texts_with_line_feeds(
    write: Callable[[Path, str], Path], end: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data", ENDINGS[end])
    data = Data.model_validate({"train": {"path": str(path)}, "task": "classification"})
    rows = load_rows(data, "train", BadRows(), InputSpec())
    assert sorted(row.content[0] for row in rows) == sorted(TEXTS)
    assert {row.label for row in rows} == {"pos", "neg"}


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("part", ["unlabeled", "general"])
def test_a_corpus_does_not_depend_on_line_endings(end: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("one\ntwo words\n\nthree".replace("\n", ENDINGS[end]).encode())
    table = {"path": str(path)}
    data = Data.model_validate({"train": table, part: table, "task": None})
    assert list(read_documents(data, part, BadRows())) == ["one", "two words", "three"]


def test_mixed_endings_in_one_file_are_all_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\nthree\rfour\r\n")
    assert [raw.values["text"] for raw in READERS["txt"](tmp_path / "a.txt")] == [
        "one", "two", "three", "four",
    ]  # fmt: skip
    assert [raw.values["text"] for raw in read_text_files(tmp_path)] == ["one\ntwo\nthree\nfour\n"]


def test_words_of_a_list_and_other_separators(tmp_path: Path) -> None:
    words = ["one\r\n", "t\rwo", "next\x85line", "line\u2028break"]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"tokens": words, "text": words[3]}, ensure_ascii=False), "utf-8")
    (raw,) = READERS["jsonl"](path)
    # U+0085 and U+2028 end no line of a file: they are characters of the text.
    assert raw.values == {"tokens": ["one\n", "t\nwo", *words[2:]], "text": words[3]}


class Reader:
    """Keep the texts that reach the model."""

    modality = "text"
    task = "classification"
    columns = ("text",)

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, inputs: Iterable[Any], places: list[str], folder: Path) -> list[str]:
        self.texts = list(inputs)
        return self.texts

    def predict_encoded(self, encoded: list[str]) -> list[dict[str, Any]]:
        return [{"label": "pos", "score": 1.0, "scores": {"pos": 1.0}} for _ in encoded]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    monkeypatch.setattr(predict_table, "load", lambda model, base: reader)
    return reader


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("end", ENDINGS)
def test_what_predict_writes_reads_back_with_the_same_rows(
    suffix: str, end: str, reader: Reader, tmp_path: Path
) -> None:
    odd = ["ends in a break\n", "\nbegins with one", 'says "no"\n', "a,b\nc", "u\u2028v\x85w", '"']
    texts = [text.replace("\n", ENDINGS[end]) for text in [*TEXTS, *odd]]
    pq.write_table(pa.table({"text": texts, "note": texts}), tmp_path / "in.parquet")
    output = tmp_path / f"out{suffix}"
    predict_table.predict_table("run", tmp_path / "in.parquet", output)
    assert reader.texts == [*TEXTS, *odd]
    back = list(READERS[guess_format(output)](output))
    assert [raw.values["text"] for raw in back] == [*TEXTS, *odd]
    assert [raw.values["note"] for raw in back] == [*TEXTS, *odd]
    assert not any(raw.fault for raw in back)


def test_a_line_of_json_is_one_line_for_every_reader(reader: Reader, tmp_path: Path) -> None:
    texts = ["a\x85b", "c\u2028d", "e\u2029f"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    predict_table.predict_table("run", tmp_path / "in.parquet", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts


def test_csv_on_the_screen_holds_no_carriage_return(reader: Reader, tmp_path: Path) -> None:
    pq.write_table(pa.table({"te\rxt": ["a"], "text": ["b\r"]}), tmp_path / "in.parquet")
    text = predict_table.predict_table("run", tmp_path / "in.parquet", None)
    assert text is not None and "\r" not in text
    assert len(list(csv.reader(io.StringIO(text)))) == 2


def test_python_callers_get_the_same_answer_for_each_ending() -> None:
    rows = [
        predict.Predictor._build_row(_pair(), "input 1", given)
        for given in (["a\r\nb", "c\rd"], ["a\nb", "c\nd"])
    ]
    assert rows[0] == rows[1]


def _pair() -> Any:
    class Pair:
        task = "classification"
        columns = ("a", "b")

    return Pair()


def test_a_lone_carriage_return_outside_quotes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nfine\rfilm,pos\ndull,neg\n")
    data = Data.model_validate({"train": {"path": str(path)}, "task": "classification"})
    with pytest.raises(DataError, match="a.csv line 2: 1 fields where the header has 2"):
        load_rows(data, "train", BadRows(), InputSpec())
