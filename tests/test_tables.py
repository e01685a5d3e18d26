"""Read tables: line endings do not reach the texts, and a quote left open is refused."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hftl.config.data import Data
from hftl.data.columns import guess_columns
from hftl.data.csv_reader import find_separator
from hftl.data.load import load_rows, read_documents
from hftl.data.rows import BadRows, InputSpec
from hftl.data.tables import READERS, read_table, read_text_files
from hftl.errors import DataError, DataWarning, RecipeError
from hftl.init import write_recipe

ENDINGS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
TEXTS = ["one line", "two\nlines, quoted", "ends with a break\n", "a\n\nparagraph"]
LABELS = ["pos", "neg", "pos", "neg"]
WORDS = "the film was slow but its end is fine and nobody left before that".split()


def parse_data(**parts: Any) -> Data:
    """Return the data section of a classification whose parts are paths or mappings."""
    tables = {k: {"path": str(v)} if isinstance(v, Path) else v for k, v in parts.items()}
    return Data.model_validate({"task": "classification", **tables})


def load_train(path: Path) -> list[Any]:
    return load_rows(parse_data(train=path), "train", BadRows(), InputSpec())


def read_csv(path: Path) -> list[dict[str, Any]]:
    return [raw.values for raw in READERS["csv"](path) if raw.fault is None]


def write_with_endings(folder: Path, kind: str, end: str) -> Path:
    """Write TEXTS and LABELS, every line break as `end`."""
    path = folder / f"data.{kind}"
    rows = list(zip([text.replace("\n", end) for text in TEXTS], LABELS, strict=True))
    match kind:
        case "csv":
            lines = ["text,label", *(f'"{text}",{label}' for text, label in rows), ""]
            path.write_bytes(end.join(lines).encode())
        case "jsonl":
            lines = [json.dumps({"text": text, "label": label}) + end for text, label in rows]
            path.write_bytes("".join(lines).encode())
        case "parquet":
            pq.write_table(pa.table({"text": [text for text, _ in rows], "label": LABELS}), path)
        case _:
            for number, (text, label) in enumerate(rows):
                (path / label).mkdir(parents=True, exist_ok=True)
                (path / label / f"{number}.txt").write_bytes(text.encode())
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
@pytest.mark.parametrize("end", ENDINGS)
def test_every_format_gives_texts_with_line_feeds(kind: str, end: str, tmp_path: Path) -> None:
    rows = load_train(write_with_endings(tmp_path, kind, ENDINGS[end]))
    assert sorted(row.content[0] for row in rows) == sorted(TEXTS)
    assert {row.label for row in rows} == {"pos", "neg"}


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("part", ["unlabeled", "general"])
def test_a_corpus_does_not_depend_on_line_endings(end: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("one\ntwo words\n\nthree".replace("\n", ENDINGS[end]).encode())
    data = parse_data(task=None, **{"train": path, part: path})
    assert list(read_documents(data, part, BadRows())) == ["one", "two words", "three"]


def test_mixed_endings_in_one_file_are_all_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\nthree\rfour\r\n")
    lines = [raw.values["text"] for raw in READERS["txt"](tmp_path / "a.txt")]
    assert lines == ["one", "two", "three", "four"]
    assert [raw.values["text"] for raw in read_text_files(tmp_path)] == ["one\ntwo\nthree\nfour\n"]


def test_words_of_a_list_and_other_separators(tmp_path: Path) -> None:
    words = ["one\r\n", "t\rwo", "next\x85line", "line\u2028break"]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"tokens": words, "text": words[3]}, ensure_ascii=False), "utf-8")
    (raw,) = READERS["jsonl"](path)
    # U+0085 and U+2028 end no line of a file: they are characters of the text.
    assert raw.values == {"tokens": ["one\n", "t\nwo", *words[2:]], "text": words[3]}


def test_a_lone_carriage_return_outside_quotes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nfine\rfilm,pos\ndull,neg\n")
    with pytest.raises(DataError, match="a.csv line 2: 1 fields where the header has 2"):
        load_train(path)


def sentence(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=7)) + f" {seed}"


def label(seed: int) -> str:
    return "pos" if seed % 2 else "neg"


LAYOUTS: dict[str, tuple[str, Callable[[int, str], str]]] = {
    "text, label": ("text,label", lambda n, text: f"{text},{label(n)}"),
    "label, text": ("label,text", lambda n, text: f"{label(n)},{text}"),
    "text, class id": ("text,label", lambda n, text: f"{text},{n % 3}"),
    "text, target": ("text,y", lambda n, text: f"{text},{n * 0.37:.2f}"),
    "number, text": ("id,text", lambda n, text: f"{n},{text}"),
    "key, text, label": ("id,text,label", lambda n, text: f"r-{n},{text},{label(n)}"),
}


def write_quoted(
    path: Path, layout: str = "text, label", opens: int | None = None, closes: int = 0
) -> Path:
    """Write a table whose text of row `opens` begins with a quote, and of `closes` ends so."""
    header, line = LAYOUTS[layout]
    texts = [sentence(n) for n in range(120)]
    if opens is not None:
        texts[opens] = '"' + texts[opens]
        texts[closes] = texts[closes] + ' 6"'
    path.write_text("\n".join([header, *(line(n, text) for n, text in enumerate(texts)), ""]))
    return path


@pytest.mark.parametrize("closes", [11, 12, 25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unclosed_quote_is_refused_with_both_lines(
    layout: str, closes: int, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="a.csv line 12: a quote opens.* another row at line 13"):
        read_csv(write_quoted(tmp_path / "a.csv", layout, 10, closes))


@pytest.mark.parametrize(
    ("end", "rows", "message"),
    [
        # Commas in the text after the quote do not hide it.
        ("\n", ["one,pos", "two,neg", "three,pos", '"slow, long, dull,pos', 'at 6",neg'],
         "line 5: .* at line 6"),
        *((end, ["good,pos", '"bad film,neg', "fine,pos", '12",neg', ""], "line 3: .* at line 4")
          for end in ENDINGS.values()),
        ("\n", ["good,pos", '"oops,pos', "last,neg", ""],
         "line 4: not valid CSV.*begins at line 3"),
    ],
)  # fmt: skip
def test_a_table_of_few_rows_is_enough(
    end: str, rows: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(end.join(["text,label", *rows]).encode())
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "a.csv")


def test_rows_joined_into_a_row_of_too_many_cells_are_not_skipped_as_one(tmp_path: Path) -> None:
    rows = [f"{sentence(n)},{label(n)}" for n in range(20)]
    rows[3], rows[9] = '"' + rows[3], 'a 6",neg,more'
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    data = parse_data(train=tmp_path / "a.csv", bad_rows="skip")
    with pytest.raises(DataError, match="line 5: .* at line 6"):
        load_rows(data, "train", BadRows(skip=True), InputSpec())


PROSE = [
    "Dear John,\nI am fine, thanks.\nBye",
    "Hello, world\nGreat stuff",
    "Roses are red,\nviolets are blue,\n\nthe end",
    "It costs 10,000\nand 4,5 stars,\nor 3,000 dollars",
    "one, two, three\nfour, five\nsix",
    'She said "no, neg"\nand left, pos or not',
    "- a list\n- of things, pos\n- and more",
    "ends with a break\n",
    "a\n\nparagraph, with a comma\r\nand a carriage return",
]


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_of_several_lines_are_read(layout: str, every: int, tmp_path: Path) -> None:
    header, line = LAYOUTS[layout]
    texts = [PROSE[n % len(PROSE)] if n % every == 0 else sentence(n) for n in range(90)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows([text if c == "T" else c for c in line(n, "T").split(",")]
                         for n, text in enumerate(texts))  # fmt: skip
    rows = read_csv(tmp_path / "a.csv")
    assert [row["text"] for row in rows] == [text.replace("\r\n", "\n") for text in texts]


def test_one_column_of_documents_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one, two\nthree"\nfour\n"five\n\nsix, seven"\n')
    texts = [row["text"] for row in read_csv(tmp_path / "a.csv")]
    assert texts == ["one, two\nthree", "four", "five\n\nsix, seven"]


def test_in_a_tsv_a_quote_is_text(tmp_path: Path) -> None:
    texts = ["plain", '"never closed', '12" and 6"', '"closed"', '""', '""two""', '"a" and "b"',
             'a "b" c', "fine"]  # fmt: skip
    lines = ["text\tlabel", *(f"{text}\t{label(n)}" for n, text in enumerate(texts))]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert [row["text"] for row in read_csv(tmp_path / "a.tsv")] == texts


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('"one\ntwo"', "in a .tsv a quote is text"),
        ('"She said ""no"" twice"', "quoted as in a .csv; in a .tsv a quote is text"),
        ('"""no"" she said"', "quoted as in a .csv; in a .tsv a quote is text"),
    ],
)
def test_a_tsv_quoted_as_a_csv_is_named(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\tpos\n")
    first = next(iter(READERS["csv"](tmp_path / "a.tsv")))
    assert first.fault is not None and fault in first.fault


def test_every_table_of_a_recipe_is_checked_for_open_quotes(tmp_path: Path) -> None:
    good = write_quoted(tmp_path / "good.csv")
    bad = write_quoted(tmp_path / "bad.csv", opens=10, closes=25)
    for part in ("train", "test", "validation", "unlabeled", "general"):
        data = parse_data(**({"train": good} | {part: bad}))
        with pytest.raises(DataError, match="bad.csv line 12"):
            if part in ("unlabeled", "general"):
                list(read_documents(data, part, BadRows()))
            else:
                load_rows(data, part, BadRows(), InputSpec())


def test_a_recipe_is_not_guessed_from_joined_rows(tmp_path: Path) -> None:
    bad = write_quoted(tmp_path / "bad.csv", opens=10, closes=25)
    with pytest.raises(DataError, match="bad.csv line 12"):
        write_recipe(bad, "org/name", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()
    assert guess_columns("a.csv", read_csv(write_quoted(tmp_path / "a.csv"))).label == "label"


def test_two_columns_of_free_text_in_several_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = [(f"{sentence(n)}, then\n{sentence(n + 500)}, so", f"{sentence(n + 900)}, and\nmore")
            for n in range(60)]  # fmt: skip
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([("first", "second"), *rows])
    with pytest.warns(DataWarning, match="line 2: one row holds 3 lines") as issued:
        faults = [raw.fault for raw in READERS["csv"](path)]
    assert faults == [None] * 60 and len(issued) == 1


def test_a_quote_open_in_a_single_column_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"bad film\nfine\n12"\n')
    with pytest.warns(DataWarning, match="a.csv line 3: one row holds 3 lines"):
        assert len(list(READERS["csv"](path))) == 2


@pytest.mark.parametrize("key", ["name", "split", "revision"])
@pytest.mark.parametrize("part", ["train", "test", "unlabeled", "general"])
def test_keys_of_hub_datasets_are_refused_beside_a_local_file(
    part: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na fine film,pos\n", "utf-8")
    data = parse_data(**({"train": path} | {part: {"path": str(path), key: "x"}}))
    with pytest.raises(RecipeError, match=rf"data\.{part}\.{key} is of datasets of the Hub"):
        read_table(getattr(data, part), part, "text")


def write_with_semicolons(path: Path, *rows: str) -> Path:
    lines = [f'{sentence(n)}, {n};{label(n)};"{n},5"' for n in range(20)]
    path.write_text("\n".join(["Text;Label;Score", *lines, *rows]))
    return path


def test_semicolons_are_read_as_commas_are(tmp_path: Path) -> None:
    path = write_with_semicolons(tmp_path / "a.csv", '"one; two\nthree, neg";pos;1', "short;pos")
    with pytest.warns(DataWarning, match="a.csv: its columns are separated by ';'"):
        raws = list(READERS["csv"](path))
    assert raws[20].values == {"Text": "one; two\nthree, neg", "Label": "pos", "Score": "1"}
    assert raws[0].values["Score"] == "0,5"
    assert raws[21].fault == "2 fields where the header has 3, cut at ';'"
    open_quote = write_with_semicolons(tmp_path / "b.csv", '"bad;neg;1', "good;pos;2", '12";pos;3')
    with pytest.warns(DataWarning), pytest.raises(DataError, match="line 22: a quote opens .* 23"):
        list(READERS["csv"](open_quote))


@pytest.mark.parametrize("header", ['"a;b",c', "a,b;c", "only", "a;", "x\ty;z"])
def test_a_header_that_commas_or_nothing_separate_stays_so(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n")
    assert find_separator(tmp_path / "a.csv") == ","
