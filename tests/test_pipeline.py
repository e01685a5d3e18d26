"""A whole run on tiny models: what it writes, what it skips, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import sentences, write_csv
from safetensors import safe_open

import hftl
from hftl.config.recipe import Recipe
from hftl.data import prepare
from hftl.errors import RunFolderError
from hftl.measure.error_analysis import analyze_errors
from hftl.measure.metrics import METRICS
from hftl.measure.record import Record
from hftl.pipeline.finalize_record import write_publish_folder


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> tuple[Path, dict[str, Any]]:
    """One finished run of every strategy; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished")
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(160))
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model())},
        "data": {"train": {"path": str(table)}, "max_length": 16, "shots": 20},
        "finetune": {"training": {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}},
        "measure": {
            "seeds": [0, 1],
            "arms": ["scratch", "head", "majority", "partial",
                     {"full_low": {"finetune.strategy": "full",
                                   "finetune.training.learning_rate": 1e-3}}],
            "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
        },
    }  # fmt: skip
    hftl.run(Recipe.parse(json.loads(json.dumps(tree))), folder / "run")
    return folder / "run", tree


@pytest.fixture
def again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the finished run, in another place."""
    run, tree = finished
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", json.loads(json.dumps(tree))


def state(run: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "log.txt")]
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_every_number_of_the_record_follows_from_the_predictions(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    run, _ = finished
    record = Record.read(run)
    by_arm: dict[str, list[float]] = {}
    for entry in record["arms"]:
        folder = run / "arms" / f"{entry['arm']}-seed{entry['seed']}"
        table = pq.read_table(folder / "predictions.parquet").to_pylist()
        for split in ("validation", "test"):
            rows = [row for row in table if row["split"] == split]
            labels = np.array([row["label"] == "positive" for row in rows], dtype=int)
            told = np.array([row["prediction"] == "positive" for row in rows], dtype=int)
            for name, metric in METRICS["classification"].items():
                assert entry["metrics"][split][name] == metric.score(labels, told)
            assert all(
                row["prediction"] == record["data"]["labels"][int(np.argmax(row["scores"]))]
                for row in rows
            )
        by_arm.setdefault(entry["arm"], []).append(entry["metrics"]["test"]["accuracy"])
    gain = record.transfer_gain
    assert gain["value"] == pytest.approx(
        np.mean(by_arm["lora"]) - np.mean(by_arm[gain["baseline"]]), abs=1e-12
    )
    for row in record["ladder"]:
        assert row["test"] == pytest.approx(np.mean(by_arm[row["arm"]]), abs=1e-12)
        assert row["sd"] == pytest.approx(np.std(by_arm[row["arm"]], ddof=1), abs=1e-12)


def test_run_folder_holds_what_the_contract_says(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    arms = {"lora", "scratch", "classical", "head", "majority", "partial", "full_low"}
    assert {p.name for p in (run / "arms").iterdir()} == {
        f"{arm}-seed{seed}" for arm in arms for seed in (0, 1)
    }
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "record.json", "report.html"}
    published = {p.relative_to(run / "publish").as_posix()
                 for p in (run / "publish").rglob("*") if p.is_file()}  # fmt: skip
    assert published == {
        "README.md", "hftl.json", "config.json", "adapter_config.json",
        "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "assets/ladder.png",
    }  # fmt: skip
    record = Record.read(run)
    assert set(record.to_dict()) >= {"schema_version", "recipe", "source", "data", "check", "adapt",
        "arms", "transfer_gain", "forgetting", "verdict", "environment", "timings"}  # fmt: skip
    gain = record.to_dict()["transfer_gain"]
    assert set(gain) == {"metric", "value", "ci95", "baseline", "baselines",
        "seeds", "p_value", "relative_error_reduction", "outcome"}  # fmt: skip
    assert record["reload_difference"] <= 1e-5
    config = json.loads((run / "publish" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_examples_stay_on_the_machine_unless_the_recipe_lets_them_out(
    again: tuple[Path, dict[str, Any]],
) -> None:
    run, _ = again
    record = Record.read(run).to_dict()
    arm = run / "arms" / f"lora-seed{record['published_seed']}"
    mistakes = analyze_errors(prepare.read_prepared_data(run / "phases" / "data"), arm).mistakes
    assert mistakes, "the test needs a model that is wrong somewhere"

    def told() -> str:
        files = [p for p in (run / "publish").rglob("*") if p.suffix in (".md", ".json")]
        return "".join(p.read_text("utf-8") for p in files)

    texts = [mistake.content[0] for mistake in mistakes]
    assert not [text for text in texts if text in told()]
    assert all(text in (run / "report.html").read_text("utf-8") for text in texts)
    record["recipe"]["publish"]["examples"] = True
    write_publish_folder(run, Record.parse(record))
    assert all(text in told() for text in texts)


def test_all_arms_predict_the_same_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    rows = {
        folder.name: pq.read_table(
            folder / "predictions.parquet", columns=["split", "row", "label"]
        )
        for folder in (run / "arms").iterdir()
    }
    first = next(iter(rows.values()))
    assert all(table.equals(first) for table in rows.values())


def test_the_same_command_again_changes_nothing(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    before = state(run)
    hftl.run(Recipe.parse(tree), run)
    assert state(run) == before


def test_two_identical_runs_have_one_hash(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, tree = finished
    other = hftl.run(Recipe.parse(json.loads(json.dumps(tree))), tmp_path / "other")
    assert other is not None and other.hash == Record.read(run).hash


def test_another_seed_runs_alone(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    before = state(run)
    tree["measure"]["seeds"] = [0, 1, 2]
    record = hftl.run(Recipe.parse(tree), run)
    after = state(run)
    assert record is not None and record.transfer_gain["seeds"] == 3
    kept = [name for name in before if name.startswith(("arms/", "phases/data", "phases/search"))]
    assert all(after[name] == before[name] for name in kept)
    assert {f"arms/{arm}-seed2/metrics.json" for arm in ("lora", "head", "scratch")} <= set(after)


def test_rows_in_another_order_are_the_same_data(
    again: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, tree = again
    before = state(run)
    rows = sentences(160)[::-1]
    tree["data"]["train"]["path"] = str(write_csv(tmp_path / "r.csv", ["text", "label"], rows))
    tree["measure"]["seeds"] = [0]
    hftl.run(Recipe.parse(tree), run)
    after = state(run)
    assert all(after[name] == before[name] for name in before if name.startswith("arms/"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("finetune.lora.r=16", "finetune.lora.r: 8 -> 16"),
        ("finetune.training.learning_rate=0.1", "finetune.training.learning_rate: 0.005 -> 0.1"),
        ("data.seed=1", "data.seed: 0 -> 1"),
        ("data.max_length=12", "data.max_length: 16 -> 12"),
        ("finetune.pooling=mean", "finetune.pooling: native -> mean"),
    ],
)
def test_a_changed_key_that_was_read_is_refused(
    again: tuple[Path, dict[str, Any]], change: str, message: str
) -> None:
    from hftl.config.overrides import apply_overrides

    run, tree = again
    before = state(run)
    with pytest.raises(RunFolderError, match=message):
        hftl.run(Recipe.parse(apply_overrides(tree, [change])), run)
    assert state(run) == before


def test_other_data_are_refused(again: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, tree = again
    rows = [*sentences(160)[:-1], ("a sentence that was not there", "positive")]
    tree["data"]["train"]["path"] = str(write_csv(tmp_path / "r.csv", ["text", "label"], rows))
    with pytest.raises(RunFolderError, match="made with other data"):
        hftl.run(Recipe.parse(tree), run)


def test_another_source_model_is_refused(
    again: tuple[Path, dict[str, Any]], tiny_model: Callable[..., Path]
) -> None:
    run, tree = again
    tree["source"]["model"] = str(tiny_model("distilbert"))
    with pytest.raises(RunFolderError, match="another source model"):
        hftl.run(Recipe.parse(tree), run)


def test_measure_may_change(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    before = state(run)
    tree["measure"]["metric"] = "f1"
    record = hftl.run(Recipe.parse(tree), run)
    assert record is not None and record.transfer_gain["metric"] == "f1"
    after = state(run)
    assert all(after[name] == before[name] for name in before if name.startswith("arms/"))


def test_an_arm_that_measure_defines_anew_runs_again(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    before = state(run)
    tree["measure"]["arms"][-1]["full_low"]["finetune.training.learning_rate"] = 2e-3
    hftl.run(Recipe.parse(tree), run)
    after = state(run)
    changed = {name.split("/")[1] for name in before
               if name.startswith("arms/") and after[name] != before[name]}  # fmt: skip
    assert changed == {"full_low-seed0", "full_low-seed1"}


def test_a_damaged_arm_is_named(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    path = run / "arms" / "lora-seed0" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="lora-seed0/weights.safetensors is not what was"):
        hftl.run(Recipe.parse(tree), run)


def test_a_lost_publish_folder_is_built_again(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    before = state(run / "publish")
    shutil.rmtree(run / "publish")
    hftl.run(Recipe.parse(tree), run)
    after = state(run / "publish")
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}


def test_restart_starts_over(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    tree["finetune"] = {"strategy": "head"}
    tree["measure"] = {"seeds": [0], "arms": ["head", "majority"]}
    record = hftl.run(Recipe.parse(tree), run, restart=True)
    assert record is not None and record.transfer_gain is None
    assert record.verdict["decision"] == "hold"
    assert {p.name for p in (run / "arms").iterdir()} == {"head-seed0", "majority-seed0"}


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_other_things_is_not_touched(
    restart: bool, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / "publish").mkdir(parents=True)
    (mine / "publish" / "book.md").write_text("mine too")
    (mine / "thesis.txt").write_text("years of work")
    before = state(tmp_path / "mine")
    with pytest.raises(hftl.HftlError, match=r"no run folder: it holds 'thesis\.txt'"):
        hftl.run(Recipe.parse(recipe_tree), mine, restart=restart)
    assert state(mine) == before and not (mine / ".lock").exists()


def test_restart_leaves_what_is_not_the_runs_own(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    (run / "predicted.csv").write_text("kept")
    tree["data"]["train"]["path"] += ".gone"
    with pytest.raises(hftl.HftlError, match="does not exist"):
        hftl.run(Recipe.parse(tree), run, restart=True)
    assert (run / "predicted.csv").exists() and not (run / "arms").exists()
    tree["data"]["train"]["path"] = tree["data"]["train"]["path"].removesuffix(".gone")
    assert hftl.run(Recipe.parse(tree), run) is not None


def test_arms_of_other_splits_are_refused_where_the_data_phase_was_lost(
    again: tuple[Path, dict[str, Any]],
) -> None:
    run, tree = again
    shutil.rmtree(run / "phases" / "data")
    tree["data"]["seed"] = 1
    with pytest.raises(RunFolderError, match="made with other data"):
        hftl.run(Recipe.parse(tree), run)


def test_a_key_changed_by_a_detour_is_still_refused(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    tree["finetune"] |= {"strategy": "head", "lora": {"r": 4}}
    tree["measure"]["arms"] = ["classical"]
    hftl.run(Recipe.parse(tree), run)
    tree["finetune"]["strategy"] = "lora"
    with pytest.raises(RunFolderError, match="finetune.lora.r: 8 -> 4"):
        hftl.run(Recipe.parse(tree), run)


def test_publish_does_not_fall_behind_the_record(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    tree["measure"]["metric"] = "f1"
    hftl.run(Recipe.parse(tree), run, until="measure")
    told = json.loads((run / "publish" / "hftl.json").read_text(encoding="utf-8"))
    assert told["metric"] == Record.read(run)["metric"] == "f1"


def test_an_edited_publish_folder_is_built_again(again: tuple[Path, dict[str, Any]]) -> None:
    run, tree = again
    config = run / "publish" / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    hftl.run(Recipe.parse(tree), run)
    assert config.read_bytes() == before


def test_an_unknown_phase_is_refused(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(hftl.HftlError, match="unknown phase 'data'"):
        hftl.run(Recipe.parse(recipe_tree), tmp_path / "run", until="data")


def test_output_is_named_after_the_recipe_file(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    assert recipe.default_output() == Path("runs") / f"{recipe_file.parent.name}-tiny"
    with pytest.raises(hftl.HftlError, match="has no file name"):
        Recipe.parse(recipe.to_dict()).default_output()


def test_finetune_and_measure_stop_where_they_say(
    recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe_tree["measure"] = {"seeds": [0], "arms": ["classical"]}
    recipe_tree["finetune"] = {"strategy": "head", "pooling": "mean"}
    run = tmp_path / "run"
    assert hftl.run(Recipe.parse(recipe_tree), run, until="finetune") is None
    assert not (run / "record.json").exists()
    assert hftl.run(Recipe.parse(recipe_tree), run, until="measure") is not None
    assert (run / "record.json").exists() and not (run / "publish").exists()
    hftl.run(Recipe.parse(recipe_tree), run)
    assert (run / "publish" / "model.safetensors").exists()
    with safe_open(run / "publish" / "head.safetensors", "pt") as head:
        assert head.metadata() == {"pooling": "mean"}


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_regression_runs_to_the_end(
    strategy: str, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = [(text, 1.5 if label == "positive" else -0.5) for text, label in sentences(120)]
    table = write_csv(tmp_path / "v.csv", ["text", "label"], rows)
    recipe_tree["data"] |= {"task": "regression", "train": {"path": str(table)}, "shots": 40}
    recipe_tree["finetune"]["strategy"] = strategy
    record = hftl.run(Recipe.parse(recipe_tree), tmp_path / "run")
    assert record is not None and record.transfer_gain["metric"] == "pearson"
    found = hftl.load(tmp_path / "run").predict(["a good great film"])
    assert set(found[0]) == {"label"} and isinstance(found[0]["label"], float)


def test_sentence_pairs_run_to_the_end(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    first, second = sentences(80, 1), sentences(80, 2)
    rows = [
        (a, b, "same" if x == y else "other")
        for (a, x), (b, y) in zip(first, second[1:] + second[:1], strict=True)
    ]
    rows += [(a, b, "same") for (a, _), (b, _) in zip(first[:40], second[:40], strict=True)]
    table = write_csv(tmp_path / "p.csv", ["premise", "hypothesis", "label"], rows)
    recipe_tree["data"]["train"] = {"path": str(table), "text": ["premise", "hypothesis"]}
    recipe_tree["measure"]["seeds"] = [0]
    hftl.run(Recipe.parse(recipe_tree), tmp_path / "run")
    found = hftl.load(tmp_path / "run").predict([("a good film", "a bad film")])
    assert found[0]["label"] in ("same", "other")


def test_load_predicts_what_the_run_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    run, tree = finished
    record = Record.read(run)
    folder = run / "arms" / f"lora-seed{record['published_seed']}"
    told = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist()
            if row["split"] == "test"]  # fmt: skip
    texts = [sentences(160)[row["row"]][0] for row in told]
    found = hftl.load(run).predict(texts)
    assert [row["label"] for row in found] == [row["prediction"] for row in told]
    for row, stored in zip(found, told, strict=True):
        np.testing.assert_allclose(list(row["scores"].values()), stored["scores"], atol=1e-5)
    elsewhere = hftl.load(run / "publish", base=tree["source"]["model"]).predict(texts[:3])
    assert [row["label"] for row in elsewhere] == [row["label"] for row in found[:3]]
    assert elsewhere[0]["scores"] == pytest.approx(found[0]["scores"], abs=1e-6)


def test_another_base_is_refused_on_loading(
    finished: tuple[Path, dict[str, Any]], tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(finished[0] / "publish", base=tiny_model("bert", True))


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_killed_run_loses_at_most_the_arm_in_work(
    number: int, code: int, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe_tree["measure"]["arms"] = ["classical", "head", "majority"]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    command = [sys.executable, "-m", "hftl", "run", str(path), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    arms = tmp_path / "run" / "arms"
    deadline = time.monotonic() + 90
    while not (arms / "classical-seed0" / "MANIFEST.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(60) == code
    done = {p.name: p.stat().st_mtime_ns for p in arms.iterdir() if not p.name.startswith(".")}
    record = hftl.run(Recipe.load(path), tmp_path / "run")
    assert record is not None
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    for name, when in done.items():
        assert (arms / name).stat().st_mtime_ns == when, f"{name} was run again"
    other = hftl.run(Recipe.load(path), tmp_path / "straight")
    assert other is not None and other.hash == record.hash


def test_changed_weights_are_neither_used_nor_listed(again: tuple[Path, dict[str, Any]]) -> None:
    from hftl.pipeline.push import PushOptions, validate_push

    run, _ = again
    path = run / "publish" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for use in (hftl.load, lambda run: validate_push(run, PushOptions())):
        with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors is not what was"):
            use(run)


def test_an_encoder_without_a_head_does_not_predict(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(hftl.HftlError, match="has no trained head to predict with"):
        hftl.load(tiny_model())
