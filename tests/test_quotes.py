"""A quote that is never closed joins rows of a table: it is refused. True line breaks are read."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hftl.config.data import Data
from hftl.data.load import load_rows, read_documents
from hftl.data.rows import BadRows, InputSpec
from hftl.data.tables import READERS
from hftl.errors import DataError, DataWarning
from hftl.init import guess_columns, write_recipe

WORDS = "the film was slow but its end is fine and nobody left before that".split()


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


def table(path: Path, layout: str, opens: int | None, closes: int, rows: int = 120) -> Path:
    """Write a table whose text of row `opens` begins with a quote, and of `closes` ends so."""
    header, line = LAYOUTS[layout]
    texts = [sentence(n) for n in range(rows)]
    if opens is not None:
        texts[opens] = '"' + texts[opens]
        texts[closes] = texts[closes] + ' 6"'
    lines = [header, *(line(n, text) for n, text in enumerate(texts)), ""]
    path.write_text("\n".join(lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [raw.values for raw in READERS["csv"](path) if raw.fault is None]


@pytest.mark.parametrize("closes", [11, 12, 25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unclosed_quote_is_refused_with_both_lines(
    layout: str, closes: int, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", layout, 10, closes)
    with pytest.raises(DataError) as error:
        read(path)
    assert "a.csv line 12: a quote opens" in error.value.what
    assert "another row at line 13" in error.value.what


def test_a_text_with_commas_after_the_open_quote_does_not_hide_it(tmp_path: Path) -> None:
    rows = [f"{sentence(n)},{label(n)}" for n in range(20)]
    rows[3] = '"slow, long, dull,pos'
    rows[4] = 'at 6",neg'
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    with pytest.raises(DataError, match="line 5: .* at line 6"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_of_four_rows_is_enough(end: str, tmp_path: Path) -> None:
    rows = ["text,label", "good,pos", '"bad film,neg', "fine,pos", '12",neg', ""]
    (tmp_path / "a.csv").write_bytes(end.join(rows).encode())
    with pytest.raises(DataError, match="line 3: .* at line 4"):
        read(tmp_path / "a.csv")


def test_a_quote_that_ends_the_file_names_where_it_opens(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "text, label", None, 0)
    path.write_text(path.read_text() + '"oops,pos\nlast,neg\n')
    with pytest.raises(DataError, match="line 123: not valid CSV.*begins at line 122"):
        read(path)


def test_rows_joined_into_a_row_of_too_many_cells_are_not_skipped_as_one(tmp_path: Path) -> None:
    rows = [f"{sentence(n)},{label(n)}" for n in range(20)]
    rows[3], rows[9] = '"' + rows[3], 'a 6",neg,more'
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    data = Data.model_validate(
        {"task": "classification", "train": {"path": str(tmp_path / "a.csv")}, "bad_rows": "skip"}
    )
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
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows([text if c == "T" else c for c in line(n, "T").split(",")]
                         for n, text in enumerate(texts))  # fmt: skip
    got = [row["text"] for row in read(path)]
    assert got == [text.replace("\r\n", "\n") for text in texts]


def test_one_column_of_documents_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one, two\nthree"\nfour\n"five\n\nsix, seven"\n')
    assert [r["text"] for r in read(tmp_path / "a.csv")] == [
        "one, two\nthree", "four", "five\n\nsix, seven"
    ]  # fmt: skip


def test_in_a_tsv_a_quote_is_text(tmp_path: Path) -> None:
    texts = [
        "plain",
        '"never closed',
        '12" and 6"',
        '"closed"',
        '""',
        '""two""',
        '"a" and "b"',
        'a "b" c',
        "fine",
    ]
    lines = ["text\tlabel", *(f"{text}\t{label(n)}" for n, text in enumerate(texts))]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert [row["text"] for row in read(tmp_path / "a.tsv")] == texts


def test_a_tsv_with_a_quoted_line_break_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one\ntwo"\tpos\n')
    faults = [raw.fault for raw in READERS["csv"](tmp_path / "a.tsv")]
    assert faults[0] and "in a .tsv a quote is text" in faults[0]


@pytest.mark.parametrize("text", ['''"She said ""no"" twice"''', '''"""no"" she said"'''])
def test_a_tsv_quoted_by_a_writer_of_csv_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\tpos\n")
    faults = [raw.fault for raw in READERS["csv"](tmp_path / "a.tsv")]
    assert faults[0] and "quoted as in a .csv; in a .tsv a quote is text" in faults[0]


def test_every_table_of_a_recipe_is_read_so(tmp_path: Path) -> None:
    good = str(table(tmp_path / "good.csv", "text, label", None, 0))
    bad = str(table(tmp_path / "bad.csv", "text, label", 10, 25))
    for part in ("train", "test", "validation"):
        tables = {part: {"path": bad}} if part == "train" else {
            "train": {"path": good}, part: {"path": bad}}  # fmt: skip
        data = Data.model_validate({"task": "classification", **tables})
        with pytest.raises(DataError, match="bad.csv line 12"):
            load_rows(data, part, BadRows(), InputSpec())
    for part in ("unlabeled", "general"):
        data = Data.model_validate(
            {"task": "classification", "train": {"path": good}, part: {"path": bad}}
        )
        with pytest.raises(DataError, match="bad.csv line 12"):
            list(read_documents(data, part, BadRows()))


def test_a_recipe_is_not_guessed_from_joined_rows(tmp_path: Path) -> None:
    bad = table(tmp_path / "bad.csv", "text, label", 10, 25)
    with pytest.raises(DataError, match="bad.csv line 12"):
        write_recipe(bad, "org/name", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()
    rows = [raw.values for raw in READERS["csv"](table(tmp_path / "a.csv", "text, label", None, 0))]
    assert guess_columns("a.csv", rows).label == "label"


def test_two_columns_of_free_text_in_several_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = [(f"{sentence(n)}, then\n{sentence(n + 500)}, so", f"{sentence(n + 900)}, and\nmore")
            for n in range(60)]  # fmt: skip
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([("first", "second"), *rows])
    with pytest.warns(DataWarning, match="line 2: one row holds 3 lines") as issued:
        faults = [raw.fault for raw in READERS["csv"](path)]
    assert faults == [None] * 60 and len(issued) == 1


def test_a_quote_open_in_a_single_column_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"bad film\nfine\n12"\n')
    with pytest.warns(DataWarning, match="a.csv line 3: one row holds 3 lines"):
        assert len(list(READERS["csv"](path))) == 2
