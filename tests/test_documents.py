"""Read documents of every format, refuse bad ones, and cut very long ones into pieces."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hftl.config.data import Data, Table
from hftl.data import corpus as module
from hftl.data.corpus import batch_documents
from hftl.data.load import read_documents
from hftl.data.rows import BadRows
from hftl.errors import DataError

FILES = {
    "a.csv": 'text,label\na fine film,pos\n"two\nlines",neg\n',
    "a.jsonl": '{"text": "a fine film"}\n{"text": "two\\nlines"}\n',
}


def read(path: Path, part: str = "unlabeled", skip: bool = False, **table: Any) -> list[str]:
    return list(stream(path, part, BadRows(skip), **table))


def stream(path: Path, part: str, bad: BadRows, **table: Any) -> Iterator[str]:
    data = Data.model_construct(**{part: Table(path=str(path), **table)})  # pyright: ignore
    return read_documents(data, part, bad)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", ["unlabeled", "general", "train"])
def test_a_table_gives_its_texts_and_needs_no_label(tmp_path: Path, name: str, part: str) -> None:
    path = write(tmp_path, name, FILES[name])
    assert read(path, part) == ["a fine film", "two\nlines"]


def test_columns_are_documents_and_words_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "a,b\none,two\nthree,four\n")
    assert read(path, text=["a", "b"]) == ["one", "two", "three", "four"]
    path = write(tmp_path, "a.jsonl", '{"text": ["Paris", "is", "big"]}\n')
    assert read(path, "train") == ["Paris is big"]


def test_a_folder_is_read_flat(tmp_path: Path) -> None:
    for name, content in (("b/c/2.txt", "second"), ("b/1.md", "first"), ("3", "third")):
        write(tmp_path / "texts", name, content)
    write(tmp_path / "texts", ".hidden/4.txt", "hidden")
    write(tmp_path / "texts", "b/.5.txt", "hidden")
    assert sorted(read(tmp_path / "texts")) == ["first", "second", "third"]
    assert read(tmp_path / "texts", "general", format="textfolder") == read(tmp_path / "texts")
    write(tmp_path / "texts", "b/bad", b"\xff\xfa\x00")
    with pytest.raises(DataError, match="^b/bad: not valid UTF-8"):
        read(tmp_path / "texts")


def test_a_folder_of_pictures_is_no_corpus_of_texts(tmp_path: Path) -> None:
    write(tmp_path, "0.png", b"\x89PNG")
    with pytest.raises(DataError, match="data.unlabeled.path: .* is a folder of pictures"):
        read(tmp_path)


def test_train_as_a_folder_has_classes(tmp_path: Path) -> None:
    write(tmp_path / "texts", "pos/1.txt", "good")
    write(tmp_path / "texts", "neg/1.txt", "bad")
    write(tmp_path / "texts", "readme.txt", "of no class")
    assert sorted(read(tmp_path / "texts", "train")) == ["bad", "good"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "text is empty"),
        (" \n", "text is empty"),
        (7, "text is int, not text"),
        ([], "text is an empty list"),
        (["a", 3], "text holds 3, which is no word"),
        ("half \ud800", "not valid UTF-8"),
        ("nul \0 inside a text that is otherwise long and clean enough", "text is binary"),
        ("\x01\x02abc", "text is binary"),
        ("\ufffd\ufffdabc", "text is binary"),
        (["fine", "\x01\x02\x03"], "text is binary"),
    ],
)
def test_a_bad_cell_is_named_or_counted(tmp_path: Path, content: Any, why: str) -> None:
    rows = ["a fine film", content, "another one"]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in rows))
    with pytest.raises(DataError, match=f"^a.jsonl line 2: {why}.*bad_rows=skip"):
        read(path)
    bad = BadRows(skip=True)
    assert list(stream(path, "unlabeled", bad)) == ["a fine film", "another one"]
    assert len(bad.dropped) == 1 and bad.dropped[0].where == "a.jsonl line 2"


def test_ordinary_text_is_no_junk(tmp_path: Path) -> None:
    texts = ["tab\t,\tand\r\nlines\n\n\f", "Straße, 東京, 🙂 e\u0301", "a stray \ufffd in a text"]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert read(path) == [text.replace("\r\n", "\n") for text in texts]


def test_bytes_that_are_not_text_are_refused_by_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"fine\n\x80\x90 not utf-8\n")
    with pytest.raises(DataError, match="^a.txt line 2: not valid UTF-8"):
        read(path)
    assert read(path, skip=True) == ["fine"]


def test_a_missing_column_names_the_key_to_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "texts,label\na,b\n")
    with pytest.raises(DataError, match=r"a.csv: no column 'text'.*data.general: {text:") as caught:
        read(path, "general")
    assert "it has texts, label" in str(caught.value)


def test_no_documents_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "")
    with pytest.raises(DataError, match="^data.unlabeled: a.txt has no documents"):
        read(path)
    with pytest.raises(DataError, match="a.txt has no usable documents"):
        read(write(tmp_path, "a.txt", "\n \n"), skip=True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has no documents"):
        read(tmp_path / "nothing")
    with pytest.raises(DataError, match="data.unlabeled.path: .* does not exist"):
        read(tmp_path / "gone.txt")


def test_documents_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n\x00\n")
    texts = stream(path, "unlabeled", BadRows())
    assert [next(texts), next(texts)] == ["one", "two"]
    with pytest.raises(DataError, match="line 3"):
        next(texts)


def test_batchesare_bounded_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 3)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 20)
    texts = ["a", "", "word " * 30, "x" * 50, "b", "c", "d", "e", "word\n" * 7]
    batches = list(batch_documents(texts))
    assert all(1 <= len(batch) <= 3 for batch in batches)
    assert all(sum(len(piece) for _, piece in batch) <= 20 for batch in batches)
    joined: list[str] = []
    for content, piece in (item for batch in batches for item in batch):
        if content is None:
            assert piece[0] in " \nx"
            joined[-1] += piece
        else:
            joined.append(piece)
    assert joined == texts
    assert list(batch_documents([])) == []


def test_equal_documents_have_one_hash() -> None:
    (first,) = batch_documents(["one", "two", "one"])
    contents = [content for content, _ in first]
    assert contents[0] == contents[2] != contents[1]
    assert all(content is not None and 0 <= content < 2**64 for content in contents)
