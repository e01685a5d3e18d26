"""Read every format the same way, and name every bad row by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from hftl.config.data import Data
from hftl.data.encodings import HALF_CHARACTER
from hftl.data.facts import BadRow
from hftl.data.label_parsing import find_label_fault, parse_label
from hftl.data.load import find_text_fault, load_rows
from hftl.data.normalization import normalize_name
from hftl.data.rows import BadRows, InputSpec, Row
from hftl.data.tables import READERS
from hftl.errors import DataError, HftlError, HubError, RecipeError

GOOD = [("a fine film", "pos"), ('dull, "very" dull', "neg"), ("two\nlines", "pos")]


def rows_of(
    path: Path | str,
    task: str = "classification",
    group: str | None = None,
    bad: BadRows | None = None,
    **table: Any,
) -> list[Row]:
    section = {"train": {"path": str(path), **table}, "task": task, "group": group}
    return load_rows(Data.model_validate(section), "train", bad or BadRows(), InputSpec())


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(folder: Path) -> Path:
    lines = [f'"{text.replace(chr(34), chr(34) * 2)}",{label}' for text, label in GOOD]
    return written(folder, "a.csv", "\n".join(["text,label", *lines]) + "\n")


def as_jsonl(folder: Path) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in GOOD]
    return written(folder, "a.jsonl", "\n\n".join(lines))


def as_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, labels = zip(*GOOD, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), folder / "a.parquet")
    return folder / "a.parquet"


def as_textfolder(folder: Path) -> Path:
    for number, (text, label) in enumerate(GOOD):
        (folder / "texts" / label).mkdir(parents=True, exist_ok=True)
        (folder / "texts" / label / f"{number}.txt").write_bytes(text.encode())
    (folder / "texts" / "pos" / ".hidden").write_bytes(b"x")
    return folder / "texts"


@pytest.mark.parametrize("make", [as_csv, as_jsonl, as_parquet, as_textfolder])
def test_each_format_gives_the_same_rows(make: Any, tmp_path: Path) -> None:
    rows = rows_of(make(tmp_path))
    assert sorted((row.content[0], row.label) for row in rows) == sorted(GOOD)
    assert {row.group for row in rows} == {None}
    assert len({row.index for row in rows}) == 3
    assert len({row.where for row in rows}) == 3


def test_tabs_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = [f"{text}\t{label}" for text, label in GOOD if "\n" not in text]
    tabbed = written(tmp_path, "a.tsv", "\n".join(["text\tlabel", *lines]))
    marked = written(tmp_path, "b.csv", b"\xef\xbb\xbf" + as_csv(tmp_path).read_bytes())
    crlf = written(tmp_path, "c.csv", "text,label\r\nx,a\r\n\r\ny,b\r\n")
    assert [(r.content[0], r.label) for r in rows_of(tabbed)] == [
        pair for pair in GOOD if "\n" not in pair[0]
    ]
    assert [(r.content[0], r.label) for r in rows_of(marked)] == GOOD
    assert [(r.content[0], r.label, r.index, r.where) for r in rows_of(crlf)] == [
        ("x", "a", 0, "c.csv line 2"), ("y", "b", 1, "c.csv line 4"),
    ]  # fmt: skip


def test_format_of_the_recipe_wins_over_the_suffix(tmp_path: Path) -> None:
    path = written(tmp_path, "a.data", "text,label\nx,a\n")
    assert rows_of(path, format="csv")[0].content == ("x",)
    with pytest.raises(DataError, match=r"a\.data: the suffix '\.data' says no format"):
        rows_of(path)


def test_columns_pairs_groups_and_targets(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "q,p,score,who\nx,y,1.5,7\nz,w,-2,8\n")
    rows = rows_of(path, "regression", "who", text=["q", "p"], label="score")
    assert rows == [
        Row(("x", "y"), 1.5, "7", 0, "a.csv line 2"),
        Row(("z", "w"), -2.0, "8", 1, "a.csv line 3"),
    ]


@pytest.mark.parametrize(
    ("value", "name"), [(1, "1"), (1.0, "1"), ("1", "1"), (" a ", "a"), (True, "True"), (-2, "-2")]
)
def test_class_names(value: Any, name: str) -> None:
    assert normalize_name(value) == name


BAD = [
    ("fields", "a.csv", "text,label\nx,a\ny\nz,b\n", "a.csv line 3", "1 fields where the header"),
    ("more", "a.csv", "text,label\nx,a\ny,b,c\nz,b\n", "a.csv line 3", "3 fields where the header"),
    ("text", "a.csv", "text,label\nx,a\n  ,b\nz,b\n", "a.csv line 3", "text is empty"),
    ("label", "a.csv", "text,label\nx,a\ny, \nz,b\n", "a.csv line 3", "the label is empty"),
    ("utf8", "a.csv", b"text,label\nx,a\ncaf\xe9,b\nz,b\n", "a.csv line 3", "not valid UTF-8"),
    ("utf8 label", "a.csv", b"text,label\nx,a\ny,b\xff\nz,b\n", "a.csv line 3", "not valid UTF-8"),
    ("json", "a.jsonl", '{"text":"x","label":"a"}\n{"text":\n{"text":"z","label":"b"}\n',
     "a.jsonl line 2", "not a JSON object"),
    ("json first", "a.jsonl", '{"text":\n{"text":"x","label":"a"}\n{"text":"z","label":"b"}\n',
     "a.jsonl line 1", "not a JSON object"),
    ("list", "a.jsonl", '{"text":"x","label":"a"}\n[1]\n{"text":"z","label":"b"}\n',
     "a.jsonl line 2", "not a JSON object"),
    ("lacks", "a.jsonl", '{"text":"x","label":"a"}\n{"text":"y"}\n{"text":"z","label":"b"}\n',
     "a.jsonl line 2", "the label is empty"),
    ("number", "a.jsonl", '{"text":"x","label":"a"}\n{"text":3,"label":"b"}\n'
     '{"text":"z","label":"b"}\n', "a.jsonl line 2", "text is int, not text"),
    ("null", "a.jsonl", '{"text":"x","label":"a"}\n{"text":null,"label":"b"}\n'
     '{"text":"z","label":"b"}\n', "a.jsonl line 2", "text is empty, not text"),
    ("half", "a.jsonl", '{"text":"x","label":1}\n{"text":"y","label":1.5}\n'
     '{"text":"z","label":2}\n', "a.jsonl line 2", "the label 1.5 is no class"),
    ("many", "a.jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":["b"]}\n'
     '{"text":"z","label":"b"}\n', "a.jsonl line 2", "the label is a list"),
    ("surrogate", "a.jsonl", '{"text":"x","label":"a"}\n{"text":"\\ud83d","label":"b"}\n'
     '{"text":"z","label":"b"}\n', "a.jsonl line 2", "not valid UTF-8"),
    ("surrogate inside", "a.jsonl", '{"text":"x","label":"a"}\n'
     '{"text":"y","label":"b","more":{"k":["\\ud83d"]}}\n{"text":"z","label":"b"}\n',
     "a.jsonl line 2", "not valid UTF-8"),
    ("deep", "a.jsonl", f'{{"text":"x","label":"a"}}\n{"[" * 100_000}\n'
     '{"text":"z","label":"b"}\n', "a.jsonl line 2", "its JSON is nested too deep"),
    ("deep inside", "a.jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":"b","more":'
     f'{"[" * 900}{"]" * 900}}}\n{{"text":"z","label":"b"}}\n',
     "a.jsonl line 2", "its JSON is nested too deep"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "where", "why"), [b[1:] for b in BAD],
                         ids=[b[0] for b in BAD])  # fmt: skip
def test_bad_row_is_refused_or_dropped_and_listed(
    tmp_path: Path, name: str, content: str | bytes, where: str, why: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=f"^{where}: .*{why}.*(data.bad_rows=skip|iconv -f cp1252)"):
        rows_of(path)
    bad = BadRows(skip=True)
    assert [row.content for row in rows_of(path, bad=bad)] == [("x",), ("z",)]
    assert [row.where for row in bad.dropped] == [where]
    assert why in bad.dropped[0].why


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("nan", "the target is nan"),
        ("inf", "the target is inf"),
        ("", "the target is empty"),
        ("high", "the target 'high' is not a number"),
        ('"1,5"', "the target '1,5' is not a number; decimals follow a point, as in 1.5"),
    ],
)
def test_bad_target_is_refused_or_dropped_and_listed(tmp_path: Path, target: str, why: str) -> None:
    path = written(tmp_path, "a.csv", f"text,label\nx,1\ny,{target}\nz,2\n")
    with pytest.raises(DataError, match=f"^a.csv line 3: {why}"):
        rows_of(path, "regression")
    bad = BadRows(skip=True)
    assert [row.label for row in rows_of(path, "regression", bad=bad)] == [1.0, 2.0]
    assert bad.dropped == [BadRow(where="a.csv line 3", why=why)]


def test_target_too_large_for_a_float_is_a_bad_row(tmp_path: Path) -> None:
    lines = [f'{{"text": "t{n}", "label": {label}}}\n' for n, label in enumerate(["1", "9" * 401])]
    bad = BadRows(skip=True)
    rows = rows_of(written(tmp_path, "a.jsonl", "".join(lines)), "regression", bad=bad)
    assert [row.label for row in rows] == [1.0]
    assert bad.dropped == [BadRow(where="a.jsonl line 2", why="the target is too large")]


def test_half_a_character_in_a_list_of_words_or_names_is_a_bad_row(tmp_path: Path) -> None:
    cells = ['["a\\ud83d"], "label": ["O"]', '["a"], "label": ["O"]', '["a"], "label": ["\\ud83d"]']
    path = written(tmp_path, "a.jsonl", "".join(f'{{"text": {cell}}}\n' for cell in cells))
    bad = BadRows(skip=True)
    assert len(rows_of(path, "token-classification", bad=bad)) == 1
    assert {(row.where, row.why) for row in bad.dropped} == {
        ("a.jsonl line 1", HALF_CHARACTER), ("a.jsonl line 3", HALF_CHARACTER)
    }  # fmt: skip


def test_file_name_that_is_not_utf8_names_its_row_in_utf8(tmp_path: Path) -> None:
    folder = as_textfolder(tmp_path)
    written(folder / "neg", "caf\udce9.txt", b"sound")
    (row,) = [row for row in rows_of(folder) if row.content == ("sound",)]
    assert row.where == r"neg/caf\udce9.txt"


def test_row_without_its_group_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label,who\nx,a,1\ny,b,\n")
    with pytest.raises(DataError, match="a.csv line 3: who is empty"):
        rows_of(path, group="who")


def test_bytes_that_are_not_utf8_in_a_folder_of_texts(tmp_path: Path) -> None:
    folder = as_textfolder(tmp_path)
    written(folder / "neg", "9.txt", b"caf\xe9")
    with pytest.raises(DataError, match="neg/9.txt: not valid UTF-8"):
        rows_of(folder)


UNREADABLE = [
    ("absent.csv", None, "absent.csv does not exist"),
    ("a.csv", "", "a.csv is empty"),
    ("a.csv", "text,label\n", "a.csv has no rows"),
    ("a.csv", "text,label\n,\n", "a.csv line 2: text is empty"),
    ("a.jsonl", "", "a.jsonl has no rows"),
    ("a.csv", "text,lable\nx,a\n", "no column 'label'; did you mean 'lable'; it has text, lable"),
    ("a.csv", "text\tlabel\nx\ta\n", r"its columns are separated by tabs, not by commas"),
    ("a.csv", "text,text\nx,a\n", "two columns are named 'text'"),
    ("a.csv", 'text,label\nx,a\n"y,b\n', "a.csv line .*: not valid CSV"),
    ("a.csv", b"text,cat\xe9gorie\nx,a\n", "a.csv line 1: not valid UTF-8"),
    ("a.csv", "text,label\nx,a\n".encode("utf-16")[:-1], "a.csv is UTF-16 and ends within"),
    ("a.csv", "text,label\nx,a\n".encode("utf-32"), "a.csv is UTF-32.*iconv -f UTF-32"),
    ("a.json", '[{"text": "x", "label": "a"}]', "a.json line 1: not a JSON object"),
    ("a.json", '[\n{"text": "x", "label": "a"},\n]', "a.json line 1: not a JSON object"),
    ("a.jsonl", '"x"\n', "a.jsonl line 1: not a JSON object"),
    ("a.parquet", "text,label\nx,a\n", "a.parquet: not valid Parquet"),
    ("a.parquet", "", "a.parquet: not valid Parquet"),
    ("a.jsonl", "[" * 100_000, "a.jsonl line 1: its JSON is nested too deep"),
    ("a.txt", "x\n", "a.txt: no column 'label'; it has text"),
    ("a.xlsx", "x", "a.xlsx: the suffix '.xlsx' is of a spreadsheet"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        written(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([["x"], ["a"], ["b"]], names=["text", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: two columns are named 'label'"):
        rows_of(tmp_path / "a.parquet")


def test_skip_does_not_turn_an_unusable_file_into_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\n,a\n ,b\n")
    with pytest.raises(DataError, match="a.csv has no usable rows"):
        rows_of(path, bad=BadRows(skip=True))


def test_the_format_and_the_place_must_fit(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nx,a\n")
    with pytest.raises(DataError, match=r"a\.csv is a file.*textfolder"):
        rows_of(path, format="textfolder")
    with pytest.raises(DataError, match="is a folder.*csv"):
        rows_of(tmp_path, format="csv")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none is an empty folder"):
        rows_of(tmp_path / "none")
    written(tmp_path / "none", "a.txt", "loose")
    with pytest.raises(DataError, match="none has no folders, one a class"):
        rows_of(tmp_path / "none")


@pytest.mark.parametrize("labels", [('"a"', "1"), ("1", "true"), ('"1"', "1.0")])
@pytest.mark.parametrize("skip", [False, True])
def test_labels_of_mixed_types(tmp_path: Path, labels: tuple[str, str], skip: bool) -> None:
    lines = [f'{{"text": "t{i}", "label": {label}}}' for i, label in enumerate(labels)]
    path = written(tmp_path, "a.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match="a.jsonl: labels of mixed types: .*line 1.*line 2|line 2"):
        rows_of(path, bad=BadRows(skip=skip))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("no-such-org/no-such-dataset", HubError),
        ("missing.csv", DataError),
        ("data/missing.jsonl", DataError),
        ("package:no_such_package/a.csv", RecipeError),
    ],
)
def test_missing_data_are_named(
    path: str, error: type[HftlError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=path.split("/")[-1] if error is not RecipeError else "no_such"):
        rows_of(path)


def test_a_missing_folder_with_a_format_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/reviews does not exist"):
        rows_of("data/reviews", format="csv")


@pytest.mark.parametrize(
    ("value", "task", "why"),
    [
        ("a text", "classification", None),
        ("  ", "classification", "text is empty"),
        (None, "classification", "text is empty, not text"),
        (3, "classification", "text is int, not text"),
        (["a", "b"], "token-classification", None),
        ([], "token-classification", "text is an empty list"),
        ("a b", "token-classification", "text is a str, not a list of words"),
        (None, "token-classification", "text is empty, not a list of words"),
        (["a", " "], "token-classification", "text holds ' ', which is no word"),
        (["a", None], "token-classification", "text holds None, which is no word"),
    ],
)
def test_texts_and_words(value: Any, task: str, why: str | None) -> None:
    assert find_text_fault("text", value, task) == why


@pytest.mark.parametrize(
    ("value", "task", "why"),
    [
        (["a", "b"], "multi-label", None),
        ([], "multi-label", None),
        ([1, 2], "multi-label", None),
        ("a", "multi-label", "the label is a str, not a list"),
        (None, "multi-label", "the label is empty, not a list"),
        (["a", ""], "multi-label", "the label is empty"),
        (["a", 1.5], "multi-label", "the label 1.5 is no class"),
        (["O", "B-X"], "token-classification", None),
        (["O"], "token-classification", "1 labels for 2 words"),
        (["O", "O", "O"], "token-classification", "3 labels for 2 words"),
        (["O", None], "token-classification", "the label is empty"),
        ("O O", "token-classification", "the label is a str, not a list"),
    ],
)
def test_lists_of_labels(value: Any, task: str, why: str | None) -> None:
    words = ["two", "words"] if task == "token-classification" else None
    fault = find_label_fault({"y": value}, "y", task, words)
    assert fault == why or (why and fault and fault.startswith(why))


@pytest.mark.parametrize(("on", "off"), [(1, 0), (True, False), (1.0, 0.0), ("1", "0"), (" 1 ", 0)])
def test_columns_of_zero_and_one_are_labels(on: Any, off: Any) -> None:
    cells = {"b": on, "a": on, "c": off}
    assert find_label_fault(cells, ["b", "a", "c"], "multi-label") is None
    assert parse_label(cells, ["b", "a", "c"], "multi-label") == ("a", "b")
    for bad in (2, "yes", None, "", 0.5):
        why = find_label_fault({"a": on, "b": bad}, ["a", "b"], "multi-label")
        assert why is not None and why.startswith("b is ") and why.endswith("not 0 or 1")


@pytest.mark.parametrize(
    ("value", "task", "label"),
    [
        (["b", "a", "b"], "multi-label", ("a", "b")),
        ([2, 1.0], "multi-label", ("1", "2")),
        (["B-X", "O"], "token-classification", ("B-X", "O")),
        ([3, 0], "token-classification", ("3", "0")),
        ("2.5", "regression", 2.5),
        (" a ", "classification", "a"),
    ],
)
def test_labels_are_parsed_by_task(value: Any, task: str, label: Any) -> None:
    assert parse_label({"y": value}, "y", task) == label


def test_all_bad_rows_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nx,a\ny,\n,b\nz,b\n,\nv,\n")
    message = (
        r"a.csv line 3: the label is empty; and 3 more bad rows, such as a.csv line 4 \(text is "
        r"empty\), a.csv line 6 \(text is empty\)\. Correct them, or set data.bad_rows=skip"
    )
    with pytest.raises(DataError, match=message):
        rows_of(path)


UMLAUTS = "text,label\nschön größer,a\nübel,b\nfine,a\n"


def test_rows_in_another_encoding_are_never_to_be_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "my a.csv", UMLAUTS.encode("cp1252"))
    message = (
        r"my a.csv line 2: not valid UTF-8: byte 0xF6, in cp1252 'schön'; and 1 more bad row: .*"
        rf"cp1252: iconv -f cp1252 -t UTF-8 '{path}' > '{path.parent}/my a-utf8.csv'$"
    )
    with pytest.raises(DataError, match=message):
        rows_of(path)
    path.write_bytes(UMLAUTS.encode("cp850"))
    with pytest.raises(DataError, match="iconv -f cp850"):
        rows_of(path)
    # Where other lines are UTF-8, a conversion would damage them.
    path.write_bytes(UMLAUTS.encode() + "groß,b\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 5: .*in cp1252 'groß'\. Correct it$"):
        rows_of(path)
    path.write_bytes("text,label\nü,a\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"no usable rows; my a.csv line 2: .*iconv -f cp1252"):
        rows_of(path, bad=BadRows(skip=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_mark_of_byte_order_decides_the_encoding(
    name: str, encoding: str, tmp_path: Path
) -> None:
    lines = '{"text": "schön", "label": "a"}\n{"text": "😀", "label": "b"}\n'
    content = "text,label\nschön,a\n😀,b\n" if name == "a.csv" else lines
    path = written(tmp_path, name, content.encode(encoding))
    assert [row.content for row in rows_of(path)] == [("schön",), ("😀",)]


@pytest.mark.parametrize("kind", ["textfolder", "imagefolder"])
def test_what_systems_leave_in_folders_is_no_row(kind: str, tmp_path: Path) -> None:
    folder = as_textfolder(tmp_path)
    rows = len(list(READERS[kind](folder)))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        written(folder / "neg", name, b"\0")
    (folder / "__MACOSX").mkdir()
    written(folder / "__MACOSX", "a.txt", b"x")
    assert len(list(READERS[kind](folder))) == rows > 0
