"""Check bad input at the command line: one line on stderr, the exit code, nothing half written."""

import gc
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentences
from support.command import Hftl, Outcome
from test_predict_table import Fake

from hftl import __version__
from hftl.errors import HftlError
from hftl.inference import predict_table
from hftl.runtime import run_folder

pytestmark = pytest.mark.usefixtures("fast_reload")

HEADER = ["text", "label"]
TOKEN = "hf_" + "abcdefghij" * 3
ROWS = sentences(60)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def assert_nothing_half_written(output: Path) -> None:
    assert not [name for name in ("arms", "publish", "phases", "record.json")
                if (output / name).exists()]  # fmt: skip
    assert not list(output.rglob(".tmp-*"))


def lines(rows: list[tuple[Any, Any]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def as_csv(rows: list[tuple[Any, ...]], header: list[str] = HEADER) -> str:
    return "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n"


BAD_DATA: dict[str, tuple[str, str | bytes | None, list[str], list[str]]] = {
    "missing file": ("a.csv", None, [], ["data.train.path", "a.csv", "does not exist"]),
    "missing column": ("a.csv", as_csv(ROWS, ["text", "lable"]), [], ["a.csv", "'label'", "lable"]),
    "empty file": ("a.csv", "", [], ["a.csv", "empty"]),
    "empty text": ("a.csv", as_csv([*ROWS, (" ", "positive")]), [], ["a.csv line 62", "empty"]),
    "mixed labels, skip": (
        "a.jsonl", lines([*ROWS, ("x", 1)]), ["data.bad_rows=skip"], ["mixed types"],
    ),
    "nan target": (
        "a.csv", as_csv([*((t, 0.5) for t, _ in ROWS), ("x", "nan")]), ["data.task=regression"],
        ["a.csv line 62", "nan"],
    ),
    "invalid utf-8": (
        "a.csv", as_csv(ROWS).encode() + b"caf\xe9,positive\n", [], ["a.csv line 62", "UTF-8"],
    ),
    "bad csv": ("a.csv", as_csv(ROWS) + '"open,positive\n', [], ["a.csv line", "not valid CSV"]),
    "bad json": ("a.jsonl", lines(ROWS) + "{\n", [], ["a.jsonl line 61", "JSON"]),
    "deep json": (
        "a.jsonl", lines(ROWS) + "[" * 100_000, [], ["a.jsonl line 61", "nested too deep"],
    ),
    "huge target": (
        "a.jsonl", lines([*((t, 0.5) for t, _ in ROWS), ("x", 10**400)]),
        ["data.task=regression"], ["a.jsonl line 61", "too large"],
    ),
    "unknown suffix": ("a.xlsx", "x", [], ["a.xlsx", "'.xlsx'"]),
    "split empty": ("a.csv", as_csv(ROWS[:2]), [], ["test is left with no rows"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("command", ["run", pytest.param("check", marks=pytest.mark.slow)])
def test_bad_data(
    hftl: Hftl, recipe_file: Path, output: Path, tmp_path: Path, case: str, command: str
) -> None:
    name, content, overrides, words = BAD_DATA[case]
    path = tmp_path / "here" / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    place = ["--output", output] if command == "run" else []
    outcome = hftl(command, recipe_file, f"data.train.path={name}", *overrides, *place)
    outcome.assert_error(3, *words)
    assert_nothing_half_written(output)
    if command == "run":
        error = json.loads((output / "error.json").read_text(encoding="utf-8"))
        assert error["exit_code"] == 3
        assert f"hftl: error: {error['message']}\n" == outcome.err
        assert "Traceback" in (output / "log.txt").read_text(encoding="utf-8")


def test_bad_rows_are_skipped_where_the_recipe_says_so(
    hftl: Hftl, recipe_file: Path, tmp_path: Path
) -> None:
    bad = as_csv([*ROWS, (" ", "positive")]).encode() + b"caf\xe9,positive\n"
    (tmp_path / "here" / "a.csv").write_bytes(bad)
    outcome = hftl("check", recipe_file, "data.train.path=a.csv", "data.bad_rows=skip")
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 bad" in outcome.out and "warning: 2 bad rows were skipped" in outcome.out
    assert "    a.csv line 62: text is empty\n    a.csv line 63: not valid UTF-8" in outcome.out


BAD_RECIPE = {
    "a section": ("sorce.model=x", ["'sorce'", "'source'"]),
    "a key": ("data.shot=3", ["'data.shot'", "'data.shots'"]),
    "lora": ("finetune.lora.lora_alfa=3", ["'finetune.lora.lora_alpha'"]),
    "a shorter name": ("finetune.training.lr=1", ["'finetune.training.learning_rate'"]),
    "an arm": (
        "measure.arms=[{full: {finetune.training.lerning_rate: 1e-4}}]",
        ["measure.arms.full", "'finetune.training.learning_rate'"],
    ),
    "a rate as word": ("finetune.training.learning_rate=high", ["learning_rate", "'high'"]),
    "a repository's id": ("publish.repo_id=a/b/c", ["publish.repo_id", "owner/name"]),
    "a token": (f"data.train.path=/tmp/{TOKEN}/a.csv", ["data.train.path", "holds a secret"]),
    "a head that is not there": ("retain={kl: {on: mlm}}", ["on=mlm", "no trained"]),
    "no value": ("data.shots", ["not key=value"]),
    "metric": ("measure.metric=acuracy", ["acuracy"]),
    "blocks": ("finetune.strategy=partial finetune.blocks=4", ["blocks", "4", "3"]),
    "model folder": ("source.model=./none", ["source.model", "./none", "does not exist"]),
    "package": ("source.model=package:no_such/model", ["'no_such' is not installed"]),
    "data's package": ("data.train.path=package:no_such/a.csv", ["'no_such' is not installed"]),
    "a hub's model": ("source.model=no-such-org/no-such", ["source", "no-such-org/no-such"]),
    "a hub's table": ("data.train.path=no-such-org/no-such", ["data", "no-such-org/no-such"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECIPE)
@pytest.mark.parametrize("command", ["run", pytest.param("check", marks=pytest.mark.slow)])
def test_bad_recipe(hftl: Hftl, recipe_file: Path, output: Path, case: str, command: str) -> None:
    assignment, words = BAD_RECIPE[case]
    overrides = assignment.split() if case == "blocks" else [assignment]
    place = ["--output", output] if command == "run" else []
    code = 5 if case.startswith("a hub's") else 2  # there is no network
    hftl(command, recipe_file, *overrides, *place).assert_error(code, *words)
    assert_nothing_half_written(output)


def test_a_recipe_that_is_missing_or_no_yaml(hftl: Hftl, tmp_path: Path) -> None:
    hftl("run", "none.yaml").assert_error(2, "none.yaml does not exist")
    (tmp_path / "here" / "bad.yaml").write_text("a: [1\n", encoding="utf-8")
    hftl("run", "bad.yaml").assert_error(2, "bad.yaml line", "not valid YAML")
    assert not (tmp_path / "here" / "runs").exists()


def test_folders_that_hold_no_model_we_can_use(
    hftl: Hftl, recipe_file: Path, output: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config

    (tmp_path / "empty").mkdir()
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "gpt2")
    unsupported = hftl("run", recipe_file, f"source.model={tmp_path}/gpt2", "--output", output)
    unsupported.assert_error(2, "'gpt2' is not supported", "bert")
    empty = hftl("run", recipe_file, f"source.model={tmp_path}/empty", "--output", output)
    empty.assert_error(2, "source.model", "is no model")
    assert_nothing_half_written(output)


def test_an_output_that_cannot_be_used(
    hftl: Hftl, recipe_file: Path, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in ("file", "file/run"):
        outcome = hftl("run", recipe_file, "--output", tmp_path / place)
        outcome.assert_error(2, "cannot be written", "--output")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    for command in ("card", "publish"):
        hftl(command, output).assert_error(2, "there is no run folder", "hftl run")
        assert_nothing_half_written(output)
    for words in (("predict", "gone", "a.csv"), ("doctor", "gone")):
        (tmp_path / "here" / "a.csv").write_text(as_csv(ROWS), encoding="utf-8")
        hftl(*words).assert_error(2, "there is no folder gone", "hub id owner/name")
    run_folder.create_run_folder(output)
    with run_folder.lock_run(output):
        hftl("run", recipe_file, "--output", output).assert_error(4, "in use by process")
    (output / "thesis.tex").write_text("mine", encoding="utf-8")
    hftl("run", recipe_file, "--output", output).assert_error(2, "no run folder", "thesis.tex")
    hftl("run", recipe_file, "--output", output, "--restart").assert_error(2, "thesis.tex")
    assert (output / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("runn a.yaml", "Did you mean 'run'? See hftl --help"),
        ("run a.yaml --outptu x", "--outptu"), ("--no-such", "--no-such"),
        ("run", "RECIPE"), ("compare", ". See hftl compare --help"),
        ("init a.csv", "(hftl sources lists some)"),
        ("publish . --repo-id ../name --dry-run", "--repo-id: '../name' is no repository"),
        ("publish . --license MIT --dry-run", "--license: the hub knows no license 'MIT'"),
        ("publish . --force= --dry-run", "--force is empty"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_and_end_with_one_stop(
    hftl: Hftl, words: str, named: str
) -> None:
    outcome = hftl(*words.split())
    outcome.assert_error(2, named)
    assert ".. See" not in outcome.err


def test_a_text_that_begins_like_an_option_is_told_where_it_stands(hftl: Hftl) -> None:
    hftl("predict", ".", "-5 degrees").assert_error(2, "hftl predict RUN -- '-5 degrees'. See")


@pytest.mark.parametrize(
    ("what", "fix", "said"),
    [
        ("a is empty.", "Give b.", "a is empty. Give b"), ("a, b, ...", "Use b", "a, b, ... Use b"),
        ("a", "b=1, c=...", "a. b=1, c=..."), ("a?", "", "a?"),
    ],
)  # fmt: skip
def test_a_sentence_keeps_its_ellipsis(what: str, fix: str, said: str) -> None:
    assert str(HftlError(what, fix)) == said


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ('"x": {"k": "\\ud800"}', 3, ["in.jsonl line 2", "not valid UTF-8"]),
        (f'"x": {"[" * 100_000}', 3, ["in.jsonl line 2", "nested too deep"]),
        ('"x": "2"', 0, ["warning: column 'x'", "text is written"]),
        ('"x": 100000000000000000000000', 0, ["warning: column 'x'", "text is written"]),
    ],
    ids=["surrogate", "deep", "mixed", "large"],
)
def test_predict_refuses_a_row_or_writes_every_column(
    hftl: Hftl, more: str, code: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_table, "load", lambda model, base: Fake("text"))
    Path("in.jsonl").write_text(f'{{"text": "a", "x": 1}}\n{{"text": "b", {more}}}\n', "utf-8")
    outcome = hftl("predict", "run", "in.jsonl", "--output", "out.parquet")
    if code:
        outcome.assert_error(code, *words)
    assert outcome.code == code and len(outcome.err.splitlines()) == 1
    assert all(word in outcome.err for word in words)
    assert Path("out.parquet").exists() == (code == 0) and not list(Path().glob(".tmp-*"))


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("predict run č.csv", "a good film č,x,good".encode()),
        ("init č.csv --source org/name", rb"wrote \u010d.yaml"),
    ],
    ids=["table", "message"],
)
def test_letters_that_a_terminal_lacks_are_no_error(
    hftl: Hftl, words: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_table, "load", lambda model, base: Fake("text"))
    Path("č.csv").write_text("text,label\na good film č,x\na bad film,y\n", "utf-8")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", screen)
    outcome = hftl(*words.split())
    screen.flush()
    assert outcome.code == 0 and outcome.err == ""
    assert printed in screen.buffer.getvalue()  # pyright: ignore


def test_a_screen_that_is_closed_is_no_error(hftl: Hftl, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)
            assert hftl("schema").code == 0
            patch.setattr(sys, stream, None)
            assert hftl("run", "nothing.yaml").code == 2
    monkeypatch.setattr(sys, "stdout", None)
    hftl("predict", "run", "a good film").assert_error(2, "the screen is closed", "--output")


def test_letters_that_a_locale_lacks_are_read(hftl: Hftl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_table, "load", lambda model, base: Fake("text"))
    outcome = hftl("predict", "run", "a good č film".encode().decode("ascii", "surrogateescape"))
    assert outcome.code == 0 and "a good č film" in outcome.out


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"RANK": "two"}, "RANK=two is no number of a process"),
        ({"RANK": "1"}, "RANK=1 is not below the number of processes, WORLD_SIZE=1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is no number of a process"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number of processes"),
    ],
)
def test_a_variable_that_no_launcher_sets(
    variables: dict[str, str], why: str, hftl: Hftl, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hftl("check", "r.yaml").assert_error(2, why, "Unset both RANK and WORLD_SIZE")


def test_help_schema_version_and_traceback(hftl: Hftl, recipe_file: Path) -> None:
    outcome = hftl()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: ") and "  publish  " in outcome.out
    assert len(outcome.out.splitlines()) > 25 and "..." not in outcome.out.partition("\n")[2]
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "{RECIPE} [key=value]...\n" in hftl("run", "--help").out
    assert json.loads(hftl("schema").out)["required"] == ["source", "data"]
    assert hftl("--version").out == f"{__version__}\n"
    assert gc.isenabled() and gc.get_freeze_count() > 0
    outcome = hftl("check", recipe_file, "data.shots=none", "--debug")
    assert outcome.code == 2 and outcome.err.startswith("hftl: error: ")
    assert "Traceback" in outcome.err


def shell(*words: str) -> tuple[Outcome, float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr), time.perf_counter() - start


@pytest.mark.parametrize("misspelt", [False, True])
def test_help_and_a_misspelt_key_answer_at_once_in_a_shell(tmp_path: Path, misspelt: bool) -> None:
    path = tmp_path / "a.yaml"
    tree = {"source": {"model": "x"}, "data": {"train": {"path": "a.csv"}},
            "finetune": {"training": {"lerning_rate": 1e-4}}}  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = ["run", str(path)] if misspelt else ["--help"]
    outcome, seconds = min((shell("-m", "hftl", *words) for _ in range(2)), key=lambda run: run[1])
    if misspelt:
        outcome.assert_error(2, "did you mean 'finetune.training.learning_rate'")
    else:
        assert (outcome.code, outcome.err) == (0, "")
    assert seconds < 2


@pytest.mark.parametrize("words", [
    ("init", ""), ("check", ""), ("run", "r.yaml", "--output", ""), ("predict", "", "a"),
])  # fmt: skip
def test_empty_argument_is_no_current_folder(words: tuple[str, ...], hftl: Hftl) -> None:
    before = words[words.index("") - 1]
    hftl(*words).assert_error(2, f"the argument after {before} is empty", "variable of the shell")


def test_the_command_line_imports_no_heavy_library() -> None:
    code = (
        "import sys; import hftl.cli; from hftl.config.recipe import Recipe; "
        "Recipe.parse({'source': {'model': 'x'}, 'data': {'train': {'path': 'a'}}, "
        "'finetune': {'training': {'bf16': True}, 'lora': {'r': 4}}}); "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'sklearn', 'numpy') "
        "if m in sys.modules])"
    )
    outcome, _ = shell("-c", code)
    assert (outcome.out, outcome.err) == ("[]\n", "")


@pytest.mark.slow
def test_in_a_shell_stderr_is_one_line_after_the_heavy_imports_too(
    recipe_file: Path, output: Path
) -> None:
    outcome, _ = shell("-m", "hftl", "run", str(recipe_file), "finetune.strategy=partial",
                       "finetune.blocks=9", "--output", str(output))  # fmt: skip
    outcome.assert_error(2, "blocks")
    assert outcome.out == ""
    assert_nothing_half_written(output)
