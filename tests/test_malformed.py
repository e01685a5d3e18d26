"""Give commands inputs that are not what they should be: each ends in one line and the right code.

A case is a name, what the line must contain, and how to make the input. Commands run in this
process, and nothing trains, so that all of them end in seconds.
"""

import bz2
import copy
import errno
import io
import json
import os
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import pictures, sentences
from PIL import Image
from safetensors.torch import load_file, save_file
from support.command import Hftl, Outcome
from support.planted_defects import reconfigure, rewrite
from support.records import add_forgetting, make_record

from hftl.data.tables import READERS
from hftl.errors import DataError, DataWarning
from hftl.runtime.run_folder import to_json

MAX_LINE = 500
"""Characters of a line, at most; the longest lists the architectures that hftl knows."""
ROWS = sentences(12)
FAILURE_FILES = {".lock", "error.json", "log.txt", "recipe.yaml", "phases"}
"""What a run leaves that fails before it trains, at most."""


def assert_refused(outcome: Outcome, code: int, words: str, output: Path | None = None) -> None:
    """Check the code, the one line with the words and a fix, and that nothing is half written."""
    *warned, line = outcome.err.splitlines()
    assert outcome.code == code, outcome.err
    assert all(line.startswith("  warning: ") for line in warned), outcome.err
    assert line.startswith("hftl: error: ") and "Traceback" not in outcome.out
    assert re.search(r"[.?] [A-Z`]", line), f"no fix: {line}"
    shown = re.sub(r"/\S+/", "", line)
    assert len(shown) <= MAX_LINE, line
    for word in words.split("|"):
        assert word in line, line
    if output is not None and output.exists():
        assert {path.name for path in output.iterdir()} <= FAILURE_FILES
        assert all((path / "MANIFEST.json").exists() for path in output.glob("phases/*"))


# Recipes, as YAML text.

HEAD = "source: {model: x}\ndata: {train: a.csv}\n"
RECIPES: dict[str, tuple[str, str]] = {
    "empty": ("", "r.yaml"),
    "a comment alone": ("# nothing\n", "r.yaml"),
    "null": ("null\n", "r.yaml"),
    "a list": ("- source\n", "r.yaml"),
    "a word": ("source\n", "r.yaml"),
    "a number": ("3\n", "r.yaml"),
    "open bracket": ("source: {model: x\n", "r.yaml line"),
    "open quote": ('source: {model: "x}\n', "r.yaml line"),
    "a tab": ("source:\n\tmodel: x\n", "r.yaml line"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml"),
    "python object": ("source: !!python/object/apply:os.system ['true']\n", "r.yaml line"),
    "python name": ("source: !!python/name:os.system\n", "r.yaml line"),
    "unknown tag": ("source: !model x\n", "r.yaml line"),
    "unknown alias": ("source: *model\n", "r.yaml line"),
    "key twice": ("source: {model: x}\nsource: {model: y}\ndata: {train: a}\n", "r.yaml|source"),
    "key twice inside": ("source: {model: x, model: y}\ndata: {train: a}\n", "r.yaml|model"),
    "list as key": ("? [a, b]\n: c\n", "r.yaml"),
    "number as key": (HEAD + "3: x\n", "unknown key '3'"),
    "null as key": (HEAD + "null: x\n", "r.yaml"),
    "a NUL": ("source: {model: 'a\0b'}\n", "r.yaml"),
    "control character": ("source: {model: '\x07'}\n", "r.yaml"),
    "no source": ("data: {train: a.csv}\n", "source"),
    "no data": ("source: {model: x}\n", "data"),
    "no train": ("source: {model: x}\ndata: {}\n", "data.train"),
    "no path": ("source: {model: x}\ndata: {train: {text: t}}\n", "data.train.path"),
    "source is a list": ("source: [x]\ndata: {train: a.csv}\n", "source"),
    "model is a number": ("source: {model: 3}\ndata: {train: a.csv}\n", "source.model"),
    "model is null": ("source: {model: null}\ndata: {train: a.csv}\n", "source.model"),
    "train is a list": ("source: {model: x}\ndata: {train: [a.csv, b.csv]}\n", "data.train"),
    "train is a number": ("source: {model: x}\ndata: {train: 3}\n", "data.train"),
    "path is a mapping": ("source: {model: x}\ndata: {train: {path: {a: b}}}\n", "data.train.path"),
    "section is a word": (HEAD + "finetune: full\n", "finetune"),
    "section is a list": (HEAD + "measure: [1]\n", "measure"),
    "unknown section": (HEAD + "optimizer: {lr: 1}\n", "'optimizer'"),
    "deep nonsense": (HEAD + "finetune: {training: {learning_rate: {a: {b: 1}}}}\n",
                      "finetune.training.learning_rate"),
    "shots as text": (HEAD.replace("a.csv", "a.csv, shots: many"), "data.shots"),
    "shots as fraction": (HEAD.replace("a.csv", "a.csv, shots: 2.5"), "data.shots"),
    "shots as bool": (HEAD.replace("a.csv", "a.csv, shots: true"), "data.shots"),
    "huge seed": (HEAD.replace("a.csv", f"a.csv, seed: {10**30}"), "data.seed"),
    "seeds as text": (HEAD + "measure: {seeds: '0'}\n", "measure.seeds"),
    "seeds of texts": (HEAD + "measure: {seeds: [zero]}\n", "measure.seeds.0"),
    "seeds of fractions": (HEAD + "measure: {seeds: [0.5]}\n", "measure.seeds.0"),
    "epochs as date": (HEAD + "finetune: {training: {num_train_epochs: 2026-01-01}}\n",
                       "finetune.training.num_train_epochs"),
    "rate as bool": (HEAD + "finetune: {training: {learning_rate: yes}}\n",
                     "finetune.training.learning_rate"),
    "rate as list": (HEAD + "finetune: {training: {learning_rate: [1e-4]}}\n",
                     "finetune.training.learning_rate"),
    "batch of zero": (HEAD + "finetune: {training: {per_device_train_batch_size: 0}}\n",
                      "per_device_train_batch_size"),
    "negative batch": (HEAD + "finetune: {training: {per_device_train_batch_size: -8}}\n",
                       "per_device_train_batch_size"),
    "metric is a list": (HEAD + "measure: {metric: [accuracy, f1]}\n", "measure.metric"),
    "arms as text": (HEAD + "measure: {arms: head}\n", "measure.arms"),
    "arm of nothing": (HEAD + "measure: {arms: [null]}\n", "measure.arms"),
    "arm of a list": (HEAD + "measure: {arms: [[head]]}\n", "measure.arms"),
    "unknown analysis": (HEAD + "measure: {analyses: [tsne]}\n", "measure.analyses"),
    "target modules as number": (HEAD + "finetune: {lora: {target_modules: 3}}\n",
                                 "finetune.lora.target_modules"),
    "negative rank": (HEAD + "finetune: {lora: {r: -1}}\n", "finetune.lora.r"),
    "dropout of two": (HEAD + "finetune: {lora: {lora_dropout: 2}}\n", "lora_dropout"),
    "unknown objective": (HEAD + "adapt: {objective: gan}\n", "adapt.objective"),
    "objective twice": (HEAD + "adapt: {objective: [mlm, mae]}\n", "adapt.objective"),
    "tolerance as text": (HEAD + "adapt: {objective: mlm, tolerance: small}\n", "adapt"),
    "kl as number": (HEAD + "retain: {kl: 3}\n", "retain.kl"),
    "unknown term": (HEAD + "retain: {kll: {}}\n", "retain.kll"),
    "repo id as path": (HEAD + "publish: {repo_id: ../x/y}\n", "publish.repo_id"),
    "repo id with spaces": (HEAD + "publish: {repo_id: 'my name/model'}\n", "publish.repo_id"),
    "private as text": (HEAD + "publish: {private: maybe}\n", "publish.private"),
    "group as list": (HEAD.replace("a.csv", "a.csv, group: [a]"), "data.group"),
    "label of numbers": ("source: {model: x}\ndata: {train: {path: a, label: 3}}\n",
                         "data.train.label"),
    "negative pixels": (HEAD.replace("a.csv", "a.csv, max_pixels: -1"), "data.max_pixels"),
    "huge image": (HEAD.replace("a.csv", "a.csv, image_size: 100000"), "data.image_size"),
    "two places of a prompt": (HEAD.replace("a.csv", "a.csv, prompt: '{} {}'"), "prompt"),
    "token as value": (HEAD + f"publish: {{repo_id: hf_{'abcdefghij' * 3}}}\n", "secret"),
    "no name of a table": ("source: {model: x}\ndata: {train: ''}\n", "data.train.path"),
    "no name of a model": ("source: {model: ''}\ndata: {train: a.csv}\n", "source.model"),
    "published as a path": (HEAD.replace("x}", "x, published_as: ../x}"), "source.published_as"),
    "published as words": (HEAD.replace("x}", "x, published_as: my model}"), "no hub id"),
    "a revision that climbs": (HEAD.replace("x}", "x, revision: ../main}"), "source.revision"),
    "steps below 0": (HEAD + "finetune: {training: {eval_steps: -2}}\n", "eval_steps"),
    "a compiler of no name": (HEAD + "finetune: {training: {torch_compile_mode: fast}}\n",
                              "torch_compile_mode must be null or default"),
    "a length of no model": (HEAD.replace("a.csv", "a.csv, max_length: 1e9"), "data.max_length"),
    "400 digits": (HEAD + f"finetune: {{training: {{num_train_epochs: {10**400}}}}}\n",
                   "num_train_epochs must be|got 1000"),
    "password in a URL": (HEAD.replace("a.csv", "'https://me:word@host/a.csv'"), "secret"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(case: str, hftl: Hftl, tmp_path: Path) -> None:
    text, words = RECIPES[case]
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert_refused(hftl("run", tmp_path / "r.yaml"), 2, words)
    assert not list(Path().iterdir())


RECIPE_BYTES: dict[str, tuple[bytes, str]] = {
    "latin-1": ("source: {model: café}\n".encode("latin-1"), "r.yaml|utf-8"),
    "UTF-16": (HEAD.encode("utf-16"), "r.yaml"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "r.yaml"),
    "anchors bomb": (
        ("a0: &a0 [x, x]\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
        )).encode(), "r.yaml"),
    "an alias of itself": (b"source: &a {model: *a}\ndata: {train: a.csv}\n", "r.yaml|aliases"),
    "nested too deep": (b"source: " + b"[" * 5000, "r.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPE_BYTES)
def test_recipe_of_other_bytes(case: str, hftl: Hftl, tmp_path: Path) -> None:
    content, words = RECIPE_BYTES[case]
    (tmp_path / "r.yaml").write_bytes(content)
    assert_refused(hftl("run", tmp_path / "r.yaml"), 2, words)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("assignment", [
    "=", "=x", "data", "data.=1", ".seed=1", "data..seed=1", "data.seed", "data.seed=[", "a b",
    "data.seed={", "data.train.path=[1, 2", "data=", "source=", "measure.seeds=0..3",
    "data.train.path.name=x", "finetune.training.learning_rate.x=1", "adapt.5.objective=mlm",
    "measure.arms.0.x=1", "data.seed=!!python/name:os.system", "data.seed=*a",
])  # fmt: skip
def test_override(assignment: str, hftl: Hftl, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEAD, encoding="utf-8")
    assert_refused(hftl("run", tmp_path / "r.yaml", assignment), 2, "")
    assert not list(Path().iterdir())


# Tables of texts.


def as_csv(*rows: str, header: str = "text,label") -> bytes:
    return "\n".join([header, *(f"{text},{label}" for text, label in ROWS), *rows, ""]).encode()


def as_jsonl(*lines: str) -> bytes:
    own = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    return "\n".join([*own, *lines, ""]).encode()


def as_parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def as_archive(name: str) -> bytes:
    """Return a zip of many files, the last of this name."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for other in (*(f"docProps/{n}.xml" for n in range(20)), name):
            archive.writestr(other, "<a/>")
    return sink.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TEXTS = [text for text, _ in ROWS]
LABELS = [label for _, label in ROWS]
TABLES: dict[str, tuple[str, bytes, str, dict[str, Any]]] = {
    "blank": ("a.csv", b"\n\n\n", "a.csv", {}),
    "spaces": ("a.csv", b"   \n", "a.csv", {}),
    "a mark of order alone": ("a.csv", b"\xef\xbb\xbf", "a.csv", {}),
    "a header alone": ("a.csv", b"text,label\n", "a.csv has no", {}),
    "a header without its end": ("a.csv", b"text,label", "a.csv has no", {}),
    "NUL bytes": ("a.csv", as_csv("a\0b,positive"), "a.csv line 14", {}),
    "a header alone, of words": ("a.csv", b"some words", "no rows below its header: some words",
                                 {}),
    "all NUL": ("a.csv", bytes(200), "a.csv holds binary data", {}),
    "a line of noise": ("a.csv", bytes(range(1, 10)) * 90, "a.csv holds binary data", {}),
    "a picture": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a.csv is a PNG", {}),
    "an archive": ("a.csv", b"PK\x03\x04" + bytes(range(256)), "packed by zip. Unpack it", {}),
    "a sheet as csv": ("a.csv", as_archive("xl/workbook.xml"), "a spreadsheet|save the sheet", {}),
    "a document": ("a.txt", as_archive("word/document.xml"), "of a word processor|plain text", {}),
    "an old sheet": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office|save it as CSV", {}),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08" + bytes(range(256)), "packed by gzip. Unpack it", {}),
    "Parquet as a csv": ("a.csv", as_parquet(text=TEXTS, label=LABELS), "Name it a.parquet", {}),
    "JSON as a csv": ("a.csv", as_jsonl(), "a.csv holds JSON|Name it a.jsonl", {}),
    "spaced JSON": ("a.csv", b'{ "text": "a", "label": "b" }\n', "a.csv holds JSON", {}),
    "indented JSON": ("a.csv", b'[\n  {\n    "text": "a"\n  }\n]\n', "a.csv holds JSON", {}),
    "a web page": ("a.csv", b"<!DOCTYPE html>\n<html></html>\n", "a.csv is a web page", {}),
    "a pointer as csv": ("a.csv", POINTER, "a.csv is a pointer of Git LFS|git lfs pull", {}),
    "a pointer as Parquet": ("a.parquet", POINTER, "a.parquet is a pointer|git lfs pull", {}),
    "half of UTF-16": ("a.csv", as_csv().decode().encode("utf-16")[:-1], "a.csv is UTF-16", {}),
    "UTF-16 without a mark": ("a.csv", as_csv().decode().encode("utf-16-le"),
                              "a.csv is UTF-16LE without|iconv -f UTF-16LE", {}),
    "UTF-16 the other way": ("a.tsv", as_csv().decode().encode("utf-16-be"), "is UTF-16BE", {}),
    "UTF-32": ("a.csv", as_csv().decode().encode("utf-32"), "a.csv", {}),
    "latin-1": ("a.csv", as_csv("café,positive").decode().encode("latin-1"),
                "a.csv line 14|UTF-8", {}),
    "an empty text": ("a.csv", as_csv(",positive"), "a.csv line 14|text is empty", {}),
    "a blank text": ("a.csv", as_csv("\u3000\u00a0 ,positive"), "a.csv line 14|empty", {}),
    "an empty label": ("a.csv", as_csv("some words,"), "a.csv line 14|label is empty", {}),
    "a cell too many": ("a.csv", as_csv("a,b,c"), "a.csv line 14|3 fields", {}),
    "a cell too few": ("a.csv", as_csv("a"), "a.csv line 14|1 fields", {}),
    "an open quote": ("a.csv", as_csv('"open,positive'), "a.csv line", {}),
    "one class": ("a.csv", b"text,label\n" + b"".join(b"a%d,x\n" % n for n in range(20)),
                  "one class", {}),
    "fewer rows than shots": ("a.csv", as_csv(), "shots=50", {"shots": 50}),
    "too few rows": ("a.csv", b"text,label\na,x\nb,y\n", "left with no rows", {}),
    "every text has two labels": (
        "a.csv", b"text,label\n" + b"".join(b"a,%d\n" % n for n in range(9)), "different labels",
        {}),
    "no such group": ("a.csv", as_csv(), "no column 'who'", {"group": "who"}),
    "no such text": ("a.csv", as_csv(header="body,label"), "no column 'text'|body", {}),
    "a header twice": ("a.csv", as_csv(header="text,text"), "two columns are named 'text'", {}),
    "a header of nothing": ("a.csv", as_csv(header=","), "a.csv", {}),
    "semicolons in the header": ("a.csv", as_csv(header="text;label"), "a.csv line 2|';'", {}),
    "tabs in a csv": ("a.csv", as_csv().replace(b",", b"\t"), "a.csv", {}),
    "a truncated line": ("a.jsonl", as_jsonl('{"text": "a", "lab'), "a.jsonl line 13", {}),
    "a list of objects": ("a.jsonl", b'[{"text": "a", "label": "x"}]', "a.jsonl line 1|jq -c", {}),
    "a number a line": ("a.jsonl", b"1\n2\n", "a.jsonl line 1", {}),
    "NaN as text": ("a.jsonl", as_jsonl('{"text": NaN, "label": "x"}'), "a.jsonl line 13", {}),
    "a list as text": ("a.jsonl", as_jsonl('{"text": ["a"], "label": "x"}'), "line 13|list", {}),
    "an object as text": ("a.jsonl", as_jsonl('{"text": {"a": 1}, "label": "x"}'), "line 13", {}),
    "a bool as text": ("a.jsonl", as_jsonl('{"text": true, "label": "x"}'), "line 13|bool", {}),
    "null as label": ("a.jsonl", as_jsonl('{"text": "a", "label": null}'), "line 13|label", {}),
    "an object as label": ("a.jsonl", as_jsonl('{"text": "a", "label": {}}'), "line 13|dict", {}),
    "another label type": ("a.jsonl", as_jsonl('{"text": "a", "label": 3}'), "mixed types", {}),
    "an infinite label": ("a.jsonl", as_jsonl('{"text": "a", "label": Infinity}'),
                          "a.jsonl line 13", {}),
    "half a character": ("a.jsonl", as_jsonl('{"text": "\\ud800", "label": "x"}'),
                         "line 13|UTF-8", {}),
    "half a character as key": ("a.jsonl", as_jsonl('{"\\ud800": 1}'), "line 13|UTF-8", {}),
    "deep": ("a.jsonl", as_jsonl('{"text": ' + "[" * 3000), "line 13|nested", {}),
    "huge number": ("a.jsonl", as_jsonl('{"text": "a", "label": 1' + "0" * 5000 + "}"),
                    "a.jsonl line 13", {}),
    "a truncated parquet": ("a.parquet", as_parquet(text=TEXTS, label=LABELS)[:-40],
                            "a.parquet: not valid Parquet", {}),
    "a parquet whose column has a name that is no UTF-8": (
        "a.parquet", as_parquet(text=TEXTS, label=LABELS).replace(b"text", b"\xf4ext"),
        "a.parquet: not valid Parquet", {}),
    "half a parquet": ("a.parquet", as_parquet(text=TEXTS, label=LABELS)[:100], "a.parquet", {}),
    "a parquet whose text is no UTF-8": (
        "a.parquet", (lambda b: b.replace(TEXTS[0].encode()[:3], b"\xee\xff\xfe", 1))(
            as_parquet(text=[f"{n}{t}" for n, t in enumerate(TEXTS)], label=LABELS)), "a.parquet",
        {}),
    "a parquet of one letter": ("a.parquet", b"P", "a.parquet", {}),
    "a damaged parquet page": (
        "a.parquet", (lambda b: b[:8] + bytes(60) + b[68:])(as_parquet(text=TEXTS, label=LABELS)),
        "a.parquet", {}),
    "a parquet of no rows": ("a.parquet", as_parquet(text=pa.array([], pa.string()),
                                                     label=pa.array([], pa.string())), "no", {}),
    "a parquet of bytes": ("a.parquet", as_parquet(text=[t.encode() for t in TEXTS], label=LABELS),
                           "a.parquet row 1|bytes", {}),
    "a parquet of dates": (
        "a.parquet", as_parquet(text=pa.array([0] * 12, pa.date32()), label=LABELS),
        "a.parquet row 1|date", {}),
    "a parquet of nulls": ("a.parquet", as_parquet(text=pa.nulls(12), label=LABELS), "row 1", {}),
    "labels of a txt": ("a.txt", b"a\nb\n", "a.txt: no column 'label'", {}),
    "a spreadsheet": ("a.xlsx", b"PK", "'.xlsx' is of a spreadsheet", {}),
    "a pickle": ("a.pkl", b"\x80\x04.", "'.pkl' says no format", {}),
    "an array": ("a.npy", b"\x93NUMPY", "'.npy' says no format", {}),
    "no suffix": ("table", b"text,label\n", "says no format", {}),
    "one picture": ("a.png", b"x", "is one picture", {}),
    "a text target": ("a.csv", as_csv(), "line 2|not a number", {"task": "regression"}),
    "an infinite target": ("a.csv", b"text,label\na,1\nb,inf\nc,2\n", "line 3|inf",
                           {"task": "regression"}),
    "a target of hex": ("a.csv", b"text,label\na,1\nb,0x1F\nc,2\n", "line 3|not a number",
                        {"task": "regression"}),
    "a text for a list of labels": ("a.csv", as_csv(), "line 2|not a list",
                                    {"task": "multi-label"}),
    "a list with an empty name": ("a.jsonl", b'{"text": "a", "label": ["x", ""]}\n',
                                  "line 1|label", {"task": "multi-label"}),
    "a text for words": ("a.csv", as_csv(), "line 2|list of words",
                         {"task": "token-classification"}),
    "fewer tags than words": ("a.jsonl", b'{"text": ["a", "b"], "label": ["O"]}\n',
                              "line 1|1 labels for 2 words", {"task": "token-classification"}),
    "no words": ("a.jsonl", b'{"text": [], "label": []}\n', "line 1|empty list",
                 {"task": "token-classification"}),
    "an empty word": ("a.jsonl", b'{"text": [" "], "label": ["O"]}\n', "line 1|no word",
                      {"task": "token-classification"}),
    "a column of 2": ("a.csv", b"text,p,q\na,0,1\nb,2,0\n", "line 3|not 0 or 1",
                      {"task": "multi-label", "train": {"label": ["p", "q"]}}),
    "many columns": ("a.csv", (",".join(f"c{n}" for n in range(9000)) + "\n").encode() * 2,
                     "no column 'text'; it has c0, c1|and 8988 more", {}),
    "fractions as classes": ("a.csv", b"text,label\n" + b"".join(
        b"a%d,%f\n" % (n, n + 0.5) for n in range(9)), "fractions for classes", {}),
    "no second text": ("a.csv", as_csv(), "no column 'other'", {"train": {"text": ["text",
                                                                                  "other"]}}),
}  # fmt: skip


@pytest.fixture
def run(hftl: Hftl, tmp_path: Path) -> Callable[..., None]:
    """`run(code, words, model, path, task, **data)` checks that a run of these is refused."""

    def check(
        code: int, words: str, model: Path, path: Path, task: str | None = "classification",
        **data: Any,
    ) -> None:  # fmt: skip
        train = {"path": str(path)} | data.pop("train", {})
        tree = {
            "source": {"model": str(model)}, "data": {"task": task, "train": train, **data},
            "adapt": {"objective": "mlm"} if task is None else None,
        }  # fmt: skip
        recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
        recipe.write_text(json.dumps(tree), encoding="utf-8")
        outcome = hftl("run", recipe, "--output", output)
        assert_refused(outcome, code, words, output)
        error = json.loads((output / "error.json").read_text("utf-8"))
        assert error["exit_code"] == code and error["message"] in outcome.err

    return check


@pytest.mark.parametrize("case", TABLES)
def test_table(case: str, bert: Path, run: Callable[..., None], tmp_path: Path) -> None:
    name, content, words, more = TABLES[case]
    (tmp_path / name).write_bytes(content)
    run(3, words, bert, tmp_path / name, **more)


def test_a_text_may_begin_with_the_letters_of_a_format(tmp_path: Path) -> None:
    starts = (
        "PAR1,PAR2,label", "PK,text", "%PDF-1.7 is a format", "BZh91AY&SY begins bzip2",
        "version https://git-lfs.github.com/spec/v1 is a line", "SQLite format 3", "ARROW1", "7z",
        "GIF89a", "BM", "II*",
    )  # fmt: skip
    for start in starts:
        (tmp_path / "a.txt").write_text(f"{start}\n", encoding="utf-8")
        assert [row.values["text"] for row in READERS["txt"](tmp_path / "a.txt")] == [start]
    for header in ("[id],text", "{name},text", "[],text", "{,text", "[[id]],text"):
        (tmp_path / "a.csv").write_text(f"{header}\n1,a\n", encoding="utf-8")
        assert [",".join(row.values) for row in READERS["csv"](tmp_path / "a.csv")] == [header]
    for content in (b"%PDF-1.4\n%\xe2\xe3\n", bz2.compress(b"a text"), as_parquet(text=[])):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match="a PDF|packed by bzip2|a Parquet file"):
            [*READERS["txt"](tmp_path / "a.txt")]


def test_names_that_are_too_long(bert: Path, run: Callable[..., None], hftl: Hftl) -> None:
    run(2, "File name too long: aaaa", bert, Path("a" * 5000 + ".csv"))
    run(2, "File name too long: /aaaa", Path("/" + "a" * 5000), Path("a.csv"))
    (Path("r.yaml")).write_text(HEAD, encoding="utf-8")
    assert_refused(hftl("run", "r.yaml", "--output", "n" * 300), 2, "File name too long")


def test_a_pipe_or_device_is_no_table(bert: Path, run: Callable[..., None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    (tmp_path / "b.csv").symlink_to("/dev/zero")
    for name in ("a.csv", "b.csv"):
        run(3, f"{name} is neither a file nor a folder", bert, tmp_path / name)


@pytest.mark.parametrize("columns", [{"text": ["text", "label"]}, {"label": "text"}])
def test_label_that_is_an_input(
    columns: dict[str, Any], bert: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv())
    train = {"path": str(tmp_path / "a.csv"), **columns}
    run(3, "data.train: the column|is both input and label", bert, tmp_path / "a.csv", train=train)


def test_table_whose_classes_of_test_are_unseen(
    bert: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv())
    (tmp_path / "b.csv").write_bytes(b"text,label\nnew words,neutral\nmore words,positive\n")
    run(3, "neutral", bert, tmp_path / "a.csv", test={"path": str(tmp_path / "b.csv")})


CORPORA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "a.txt has no documents"),
    "blank lines": ("a.txt", b"\n \n\n", "a.txt"),
    "binary": ("a.txt", b"some\0words\n", "a.txt line 1|binary"),
    "control characters": ("a.txt", b"\x01\x02\x03\x04ab\n", "a.txt line 1|binary"),
    "latin-1": ("a.txt", "café\n".encode("latin-1"), "a.txt line 1|UTF-8"),
    "half of UTF-16": ("a.txt", "some words\n".encode("utf-16")[:-1], "a.txt is UTF-16"),
    "numbers": ("a.jsonl", b'{"text": 3}\n', "a.jsonl line 1|int"),
    "no text": ("a.jsonl", b'{"body": "x"}\n', "no column 'text'"),
    "a list of numbers": ("a.jsonl", b'{"text": [1, 2]}\n', "a.jsonl line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPORA)
def test_corpus(
    case: str, tiny_model: Callable[..., Path], run: Callable[..., None], tmp_path: Path
) -> None:
    name, content, words = CORPORA[case]
    (tmp_path / name).write_bytes(content)
    run(3, words, tiny_model("bert", True), tmp_path / name, None)


# Pictures.


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind)
    return sink.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Return a small file whose header promises a picture of this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "a web page": (b"<!doctype html><html></html>", "not an image"),
    "JSON": (b'{"error": "not found"}', "not an image"),
    "a pointer": (POINTER, "not an image but a pointer of Git LFS"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "PDF": (b"%PDF-1.7\n", "not an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    "Photoshop": (b"8BPS\0\1" + bytes(30), "not an image"),
    "FITS": (b"SIMPLE  =                    T" + bytes(60), "not an image"),
    "an icon": (b"\0\0\1\0" + bytes(40), "not an image"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "not an image"),
    "an archive": (b"PK\x03\x04" + bytes(40), "not an image"),
    "a program": (b"\x7fELF" + bytes(40), "not an image"),
    "a pickle": (b"\x80\x04cos\nsystem\n.", "not an image"),
    "half a PNG": (encode(NOISE)[:400], "truncated"),
    "the head of a PNG": (encode(NOISE)[:16], "header"),
    "a PNG with a flipped bit": ((lambda b: b[:300] + bytes([b[300] ^ 255]) + b[301:])(
        encode(NOISE)), "damaged"),
    "half a JPEG": (encode(NOISE, "JPEG")[:-200], "truncated"),
    "the head of a JPEG": (encode(NOISE, "JPEG")[:20], "damaged"),
    "half a WebP": (encode(NOISE, "WEBP")[:60], "damaged"),
    "half a GIF": (encode(NOISE, "GIF")[:200], "truncated"),
    "half a BMP": (encode(NOISE, "BMP")[:200], "truncated"),
    "half a TIFF": (encode(NOISE, "TIFF")[:200], "damaged"),
    "100 megapixels": (png_of_size(10_000, 10_000), "100,000,000 pixels"),
    "900 megapixels": (png_of_size(30_000, 30_000), "pixels"),
    "a line of pixels": (png_of_size(2**31 - 1, 1), "pixels"),
    "no pixels": (png_of_size(0, 0), "damaged|header"),
    "within a patch": (encode(NOISE.crop((0, 0, 3, 3))), "within one patch"),
    "other floats": (encode(Image.new("F", (9, 9), 7.5), "TIFF"), "floats"),
    "deep integers": (encode(Image.new("I", (9, 9), 7), "TIFF"), "mode I"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", IMAGES)
def test_picture(
    case: str, tiny_model: Callable[..., Path], run: Callable[..., None], tmp_path: Path
) -> None:
    content, words = IMAGES[case]
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            NOISE.rotate(number * 90).save(tmp_path / "photos" / label / f"{label}{number}.png")
    (tmp_path / "photos" / "light" / "bad.png").write_bytes(content)
    run(3, f"light/bad.png|{words}", tiny_model("vit"), tmp_path / "photos")


# Models.


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def header(text: bytes) -> Callable[[Path], None]:
    return write("model.safetensors", struct.pack("<Q", len(text)) + text + bytes(16))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "is no model"),
    "config is empty": (write("config.json", b""), "is no model"),
    "config is a list": (write("config.json", b"[]"), "is no model"),
    "config is a number": (write("config.json", b"3"), "is no model"),
    "config is no UTF-8": (write("config.json", b'{"model_type": "\xff"}'), "is no model"),
    "config is cut": (write("config.json", b'{"model_type": "bert"'), "is no model"),
    "config is deep": (write("config.json", b'{"a":' * 9000), "is no model"),
    "no model type": (write("config.json", b"{}"), "is no model"),
    "unknown model type": (edit_config(model_type="bertt"), "bertt"),
    "model type is a number": (edit_config(model_type=5), "is no model"),
    "model type is a list": (edit_config(model_type=["bert"]), "is no model"),
    "unsupported model type": (edit_config(model_type="whisper"), "whisper"),
    "a million layers": (edit_config(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "sizes that do not divide": (edit_config(num_attention_heads=7), "hidden size"),
    "layers as text": (edit_config(num_hidden_layers="three"), "num_hidden_layers"),
    "hidden size as list": (edit_config(hidden_size=[16]), "hidden_size"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "empty weights": (write("model.safetensors", b""), "does not open"),
    "weights of noise": (write("model.safetensors", bytes(range(256))), "does not open"),
    "a header of 100 GB": (write("model.safetensors", struct.pack("<Q", 10**11)), "does not open"),
    "a header of no JSON": (header(b"{nonsense"), "does not open"),
    "a header of a list": (header(b"[]"), "does not open"),
    "a tensor beyond the end": (header(
        b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}'), "does not open"),
    "a tensor before the start": (header(
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}'), "does not open"),
    "tensors that overlap": (header(
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'), "does not open"),
    "tensors with a hole": (header(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}'), "does not open"),
    "a shape that is no number": (header(
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 16]}}'), "does not open"),
    "an unknown dtype": (header(
        b'{"a": {"dtype": "F7", "shape": [4], "data_offsets": [0, 16]}}'), "does not open"),
    "no tokenizer": (remove("tokenizer.json"), "has no usable tokenizer"),
    "tokenizer is empty": (write("tokenizer.json", b""), "has no usable tokenizer"),
    "tokenizer is a list": (write("tokenizer.json", b"[]"), "has no usable tokenizer"),
    "tokenizer is a pickle": (write("tokenizer.json", b"\x80\x04cos\nsystem\n."), "tokenizer"),
    "tokenizer settings of noise": (write("tokenizer_config.json", b"\xff"), "tokenizer"),
    "tokenizer of another class": (
        write("tokenizer_config.json", b'{"tokenizer_class": "NoSuchTokenizer"}'), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_model(case: str, bert: Path, run: Callable[..., None], tmp_path: Path) -> None:
    damage, words = MODELS[case]
    folder = Path(shutil.copytree(bert, tmp_path / "model"))
    for file in ("vocab.txt", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    damage(folder)
    (tmp_path / "a.csv").write_bytes(as_csv())
    run(2, f"source.model|{words}", folder, tmp_path / "a.csv")


PROCESSORS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no usable image processor"), "empty": (b"", "no usable image processor"),
    "a list": (b"[]", "no usable image processor"), "noise": (b"\xff\xfe", "image processor"),
    "unknown class": (b'{"image_processor_type": "NoSuch"}', "image processor"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_image_processor(
    case: str, tiny_model: Callable[..., Path], run: Callable[..., None], tmp_path: Path
) -> None:
    content, words = PROCESSORS[case]
    folder = Path(shutil.copytree(tiny_model("vit"), tmp_path / "model"))
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_bytes(content)
    run(2, words, folder, pictures(tmp_path / "photos", 5))


# Adapters.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove(CONFIG), ""),
    "config is empty": (write(CONFIG, b""), "adapter_config.json"),
    "config is a list": (write(CONFIG, b"[]"), "adapter_config.json"),
    "config is no UTF-8": (write(CONFIG, b'{"peft_type": "\xff"}'), "adapter_config.json"),
    "config is deep": (write(CONFIG, b'{"a":' * 9000), "adapter_config.json"),
    "no kind": (lambda f: reconfigure(f, peft_type=None), ""),
    "unknown kind": (lambda f: reconfigure(f, peft_type="MAGIC"), ""),
    "kind is a number": (lambda f: reconfigure(f, peft_type=3), ""),
    "rank is text": (lambda f: reconfigure(f, r="four"), ""),
    "rank is zero": (lambda f: reconfigure(f, r=0), ""),
    "rank is negative": (lambda f: reconfigure(f, r=-4), ""),
    "rank of a million": (lambda f: reconfigure(f, r=10**6), ""),
    "no modules": (lambda f: reconfigure(f, target_modules=None), ""),
    "modules are a number": (lambda f: reconfigure(f, target_modules=5), ""),
    "modules are a bad pattern": (lambda f: reconfigure(f, target_modules="(["), ""),
    "no base": (lambda f: reconfigure(f, base_model_name_or_path=None), ""),
    "base is a number": (lambda f: reconfigure(f, base_model_name_or_path=7), ""),
    "base is missing": (lambda f: reconfigure(f, base_model_name_or_path="/no/where"), ""),
    "base leaves the folder": (
        lambda f: reconfigure(f, base_model_name_or_path="../../../etc/passwd"), ""),
    "no weights": (remove(WEIGHTS), ""),
    "empty weights": (write(WEIGHTS, b""), ""),
    "weights of noise": (write(WEIGHTS, bytes(range(256))), ""),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]) and None,
                    ""),
    "a header of 100 GB": (write(WEIGHTS, struct.pack("<Q", 10**11)), ""),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), ""),
    "tensors of another adapter": (lambda f: save_file({"x": torch.ones(2)}, f / WEIGHTS), ""),
    "tensors of NaN": (lambda f: save_file(
        {k: torch.full_like(t, torch.nan) for k, t in load_file(f / WEIGHTS).items()}, f / WEIGHTS,
    ), "finite"),
    "a folder as weights": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()) and None, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter(case: str, local_adapter: Path, hftl: Hftl, tmp_path: Path) -> None:
    damage, words = ADAPTERS[case]
    folder = Path(shutil.copytree(local_adapter, tmp_path / "adapter"))
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = hftl("predict", folder, "some words")
    assert outcome.code in (2, 4, 5, 6) and not outcome.out
    assert_refused(outcome, outcome.code, words)
    assert sorted(tmp_path.rglob("*")) == before


PLACES = {
    "r.yaml": "r.yaml is no folder", "nowhere": "there is no folder nowhere",
    "hf://org/x": "is an address|Give the hub id alone: org/x",
    "https://huggingface.co/org/x/tree/main": "is an address|Give the hub id alone: org/x",
    "https://host/x.zip": "is an address|Download it", "package:": "names no package",
    "package:json/x": "'json' has no 'x'",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_holds_no_model(place: str, hftl: Hftl) -> None:
    Path("r.yaml").write_text(HEAD)
    assert_refused(hftl("predict", place, "some words"), 2, PLACES[place])
    assert_refused(hftl("doctor", place), 2, PLACES[place])


def test_folder_that_holds_a_picture_among_texts(local_adapter: Path, hftl: Hftl) -> None:
    Path("texts", "new").mkdir(parents=True)
    Path("texts", "new", "a.txt").write_text("some words")
    Path("texts", "new", "b.md").write_bytes(encode(NOISE))
    outcome = hftl("predict", local_adapter, "texts")
    assert_refused(outcome, 3, "b.md: not valid UTF-8|replace b.md, which is a PNG picture")


def test_folder_of_texts_without_folders_is_predicted(local_adapter: Path, hftl: Hftl) -> None:
    Path("texts").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("texts", name).write_text("some words")
    outcome = hftl("predict", local_adapter, "texts")
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 3


@pytest.mark.parametrize("suffix", [".png", ".txt"])
def test_files_beside_the_folders_of_classes_are_named(suffix: str, tmp_path: Path) -> None:
    for label in ("dark", "light"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / f"a{suffix}").write_bytes(b"")
    read = READERS["imagefolder" if suffix == ".png" else "textfolder"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "data" / "README.md").write_bytes(b"")
        assert len(list(read(tmp_path / "data"))) == 2
    for name in ("stray", "other"):
        (tmp_path / "data" / f"{name}{suffix}").write_bytes(b"")
    with pytest.warns(DataWarning, match=rf"beside the folders .* other{suffix} and 1 more"):
        assert len(list(read(tmp_path / "data"))) == 2


@pytest.mark.parametrize("kind", ["imagefolder", "textfolder"])
def test_a_folder_that_may_not_be_read_is_no_empty_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in ("dark", "light"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "a.txt").write_bytes(b"")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("light"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="light"):
        list(READERS[kind](tmp_path / "data"))


@pytest.mark.parametrize(
    ("path", "words"),
    [(".", "Is a directory. Check"), ("/dev/zero", "more than 10,000,000 bytes")],
)
def test_what_is_no_file_of_a_recipe(path: str, words: str, hftl: Hftl) -> None:
    assert_refused(hftl("run", path), 2, words)


# Records.

TREE = add_forgetting(make_record())


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(tree: dict[str, Any]) -> None:
        *path, last = key.split(".")
        here: Any = tree
        for part in path:
            here = here[int(part) if isinstance(here, list) else part]
        here[int(last) if isinstance(here, list) else last] = value

    return change


RECORDS: dict[str, tuple[Any, str]] = {
    "missing": (None, "is no finished run"), "empty": (b"", "does not read"),
    "cut": (to_json(TREE).encode()[:500], "does not read"),
    "a list": (b"[]", "record.json"), "a number": (b"3", "record.json"), "null": (b"null", ""),
    "no UTF-8": (b'{"a": "\xff"}', "does not read"), "deep": (b"[" * 9000, "does not read"),
    "NaN": (b"NaN", "record.json"), "two objects": (b"{}{}", "does not read"),
    "another version": (put("schema_version", 99), "schema_version is 99"),
    "version as text": (put("schema_version", "2"), "schema_version"),
    "arms are a mapping": (put("arms", {}), "arms"),
    "an arm is a word": (put("arms.0", "lora"), "arms.0"),
    "seed is text": (put("arms.0.seed", "zero"), "arms.0.seed"),
    "score is text": (put("arms.0.metrics.test.accuracy", "good"), "arms.0.metrics.test"),
    "gain is a list": (put("transfer_gain", []), "transfer_gain"),
    "no such verdict": (put("verdict.decision", "maybe"), "verdict.decision"),
    "recipe is a word": (put("recipe", "lora"), "recipe"),
    "labels are a number": (put("data.labels", 3), "data.labels"),
    "unknown key": (put("extra", 1), "unknown key extra"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_record(case: str, hftl: Hftl, tmp_path: Path) -> None:
    content, words = RECORDS[case]
    if callable(content):
        tree = copy.deepcopy(TREE)
        content(tree)
        content = to_json(tree).encode()
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "record.json").write_bytes(content)
    assert_refused(hftl("verdict", tmp_path / "run"), 4, f"record.json|{words}")


def test_cases_are_many() -> None:
    tables = (RECIPES, RECIPE_BYTES, TABLES, CORPORA, IMAGES, MODELS, PROCESSORS, ADAPTERS, RECORDS)
    assert sum(map(len, tables)) >= 200
