"""Run the whole pipeline on tiny models: what it writes, what it skips, what it refuses."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import pictures, sentences, write_csv
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hftl
from hftl import cli
from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Recipe
from hftl.data import prepare
from hftl.doctor.adapter_folder import open_adapter_folder
from hftl.doctor.checks import check_published_weights
from hftl.doctor.examination import Examination
from hftl.errors import RunFolderError
from hftl.measure.error_analysis import analyze_errors
from hftl.measure.metrics import METRICS
from hftl.measure.record import Record
from hftl.pipeline.publish_folder import write_publish_folder
from hftl.pipeline.push import PushOptions, validate_push
from hftl.runtime import run_folder
from hftl.runtime.restart import set_results_aside

pytestmark = pytest.mark.usefixtures("fast_reload")

Run = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Run:
    """Finish one run of every strategy; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished")
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(160))
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model())},
        "data": {"train": {"path": str(table)}, "max_length": 16, "shots": 16},
        "finetune": {"training": {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}},
        "measure": {
            "seeds": [0, 1],
            "arms": ["scratch", "head", "majority", "partial",
                     {"full_low": {"finetune.strategy": "full",
                                   "finetune.training.learning_rate": 1e-3}}],
            "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
        },
    }  # fmt: skip
    hftl.run(Recipe.parse(copy.deepcopy(tree)), folder / "run")
    return folder / "run", tree


@pytest.fixture
def again(finished: Run, tmp_path: Path) -> Run:
    """Copy the finished run to another place."""
    run, tree = finished
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", copy.deepcopy(tree)


def state(run: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "log.txt")]
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def changed_parts(before: dict[str, Any], run: Path) -> set[str]:
    """Return the arms and phases one of whose files was written again."""
    after = state(run)
    return {"/".join(name.split("/")[:2]) for name in before
            if name[:4] in ("arms", "phas") and after.get(name) != before[name]}  # fmt: skip


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_every_number_of_the_record_follows_from_the_predictions(finished: Run) -> None:
    run, _ = finished
    record = Record.read(run)
    by_arm: dict[str, list[float]] = {}
    items: set[tuple[Any, ...]] = set()
    for entry in record["arms"]:
        folder = run / "arms" / f"{entry['arm']}-seed{entry['seed']}"
        table = pq.read_table(folder / "predictions.parquet").to_pylist()
        items.add(tuple((row["split"], row["row"], row["label"]) for row in table))
        for split in ("validation", "test"):
            rows = [row for row in table if row["split"] == split]
            labels, predictions = (
                np.array([row[column] == "positive" for row in rows], dtype=int)
                for column in ("label", "prediction")
            )
            for name, metric in METRICS["classification"].items():
                assert entry["metrics"][split][name] == metric.score(labels, predictions)
            for row in rows:
                assert row["prediction"] == record["data"]["labels"][int(np.argmax(row["scores"]))]
        by_arm.setdefault(entry["arm"], []).append(entry["metrics"]["test"]["accuracy"])
    assert len(items) == 1, "all arms predict the same rows"
    gain = record.transfer_gain
    assert gain["value"] == pytest.approx(
        np.mean(by_arm["lora"]) - np.mean(by_arm[gain["baseline"]]), abs=1e-12
    )
    for row in record["ladder"]:
        assert row["test"] == pytest.approx(np.mean(by_arm[row["arm"]]), abs=1e-12)
        assert row["sd"] == pytest.approx(np.std(by_arm[row["arm"]], ddof=1), abs=1e-12)


def test_the_run_folder_holds_what_the_contract_says(finished: Run) -> None:
    run, _ = finished
    arms = ("lora", "scratch", "classical", "head", "majority", "partial", "full_low")
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
    assert set(record.to_dict()["transfer_gain"]) == {"metric", "value", "ci95", "baseline",
        "baselines", "seeds", "p_value", "relative_error_reduction", "outcome"}  # fmt: skip
    assert record["reload_difference"] <= 1e-5
    config = json.loads((run / "publish" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_examples_stay_on_the_machine_unless_the_recipe_publishes_them(again: Run) -> None:
    run, _ = again
    record = Record.read(run).to_dict()
    arm = run / "arms" / f"lora-seed{record['published_seed']}"
    mistakes = analyze_errors(prepare.read_prepared_data(run / "phases" / "data"), arm).mistakes
    assert mistakes, "the test needs a model that is wrong somewhere"
    texts = [mistake.content[0] for mistake in mistakes]

    def read_published() -> str:
        files = [p for p in (run / "publish").rglob("*") if p.suffix in (".md", ".json")]
        return "".join(p.read_text("utf-8") for p in files)

    assert not [text for text in texts if text in read_published()]
    assert all(text in (run / "report.html").read_text("utf-8") for text in texts)
    record["recipe"]["publish"]["examples"] = True
    write_publish_folder(run, Record.parse(record))
    assert all(text in read_published() for text in texts)


def test_the_same_command_again_changes_nothing(again: Run) -> None:
    run, tree = again
    before = state(run)
    hftl.run(Recipe.parse(tree), run)
    assert state(run) == before


def test_another_seed_runs_alone(again: Run) -> None:
    run, tree = again
    before = state(run)
    tree["measure"] |= {"seeds": [0, 1, 2], "arms": ["classical", "head"]}
    record = hftl.run(Recipe.parse(tree), run, until="measure")
    assert record is not None and record.transfer_gain["seeds"] == 3
    assert not [part for part in changed_parts(before, run) if not part.startswith("phases/report")]
    assert {p.name for p in (run / "arms").glob("*-seed2")} == {
        "lora-seed2", "classical-seed2", "head-seed2",
    }  # fmt: skip


def test_rows_in_another_order_are_the_same_data(again: Run, tmp_path: Path) -> None:
    run, tree = again
    before = state(run)
    rows = sentences(160)[::-1]
    tree["data"]["train"]["path"] = str(write_csv(tmp_path / "r.csv", ["text", "label"], rows))
    hftl.run(Recipe.parse(tree), run, until="finetune")
    assert not [part for part in changed_parts(before, run) if part.startswith("arms/")]


def test_a_changed_key_that_was_read_is_refused(finished: Run) -> None:
    run, tree = finished
    before = state(run)
    changes = ["finetune.lora.r=16", "data.seed=1", "data.max_length=12"]
    with pytest.raises(RunFolderError) as refusal:
        hftl.run(Recipe.parse(apply_overrides(copy.deepcopy(tree), changes)), run)
    for line in ("finetune.lora.r: 8 -> 16", "data.seed: 0 -> 1", "data.max_length: 16 -> 12"):
        assert line in str(refusal.value)
    assert state(run) == before


def test_other_data_and_another_source_model_are_refused(
    again: Run, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    run, tree = again
    rows = [*sentences(160)[:-1], ("a sentence that was not there", "positive")]
    table = write_csv(tmp_path / "r.csv", ["text", "label"], rows)
    changes = {
        f"data.train.path={table}": "made with other data",
        f"source.model={tiny_model('distilbert')}": "another source model",
        "data.seed=1": "made with other data",
    }
    for change, message in changes.items():
        if change == "data.seed=1":  # Without the data phase the arms still know their rows.
            shutil.rmtree(run / "phases" / "data")
        with pytest.raises(RunFolderError, match=message):
            hftl.run(Recipe.parse(apply_overrides(copy.deepcopy(tree), [change])), run)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("config.json", "hidden_act", "relu", "made with another config.json"),
        ("tokenizer.json", "normalizer", None, "made with another tokenizer or image processor"),
    ],
)
def test_an_edited_file_of_the_source_is_refused(
    again: Run, name: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """Weights say nothing of the activation between them, or of which tokens they read."""
    run, tree = again
    model = Path(shutil.copytree(tree["source"]["model"], tmp_path / "model"))
    tree["source"]["model"] = str(model)
    hftl.run(Recipe.parse(copy.deepcopy(tree)), run, until="finetune")
    content = json.loads((model / name).read_text("utf-8"))
    (model / name).write_text(json.dumps(content | {key: value}), "utf-8")
    with pytest.raises(RunFolderError, match=message):
        hftl.run(Recipe.parse(copy.deepcopy(tree)), run)


def test_an_edited_image_processor_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model("vit"), tmp_path / "vit"))
    made = Recipe.parse({
        "source": {"model": str(model)},
        "data": {"train": {"path": str(pictures(tmp_path / "pics", 10))}},
        "finetune": {"strategy": "head"}, "measure": {"seeds": [0], "arms": []},
    })  # fmt: skip
    hftl.run(made, tmp_path / "run", until="finetune")
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"image_mean": [0, 0, 0]}))
    with pytest.raises(RunFolderError, match="another tokenizer or image processor"):
        hftl.run(made, tmp_path / "run", until="finetune")


def test_measure_may_change_and_the_published_card_follows(again: Run) -> None:
    run, tree = again
    before = state(run)
    tree["measure"]["metric"] = "f1"
    record = hftl.run(Recipe.parse(tree), run, until="measure")
    assert record is not None and record.transfer_gain["metric"] == "f1"
    assert not [part for part in changed_parts(before, run) if part.startswith("arms/")]
    published = json.loads((run / "publish" / "hftl.json").read_text(encoding="utf-8"))
    assert published["metric"] == Record.read(run)["metric"] == "f1"


def test_an_arm_that_measure_defines_anew_runs_again(again: Run) -> None:
    run, tree = again
    before = state(run)
    change = {"finetune.strategy": "full", "finetune.training.learning_rate": 2e-3}
    tree["measure"] |= {"seeds": [0], "arms": ["head", {"full_low": change}]}
    hftl.run(Recipe.parse(tree), run, until="finetune")
    changed = {part for part in changed_parts(before, run) if part.startswith("arms/")}
    assert changed == {"arms/full_low-seed0"}


def test_a_lost_or_edited_publish_folder_is_built_again(again: Run) -> None:
    run, tree = again
    before = {name: content for name, (_, content) in state(run / "publish").items()}
    config = run / "publish" / "config.json"
    for lose in (lambda: shutil.rmtree(run / "publish"), lambda: config.write_bytes(b"{}\n")):
        lose()
        hftl.run(Recipe.parse(tree), run)
        assert {k: content for k, (_, content) in state(run / "publish").items()} == before


def test_restart_starts_over_and_leaves_files_of_others(again: Run) -> None:
    run, tree = again
    (run / "predicted.csv").write_text("a user's")
    tree["finetune"] = {"strategy": "head"}
    tree["measure"] = {"seeds": [0], "arms": ["head", "majority"]}
    record = hftl.run(Recipe.parse(tree), run, restart=True)
    assert record is not None and record.transfer_gain is None
    assert record.verdict["decision"] == "hold"
    assert {p.name for p in (run / "arms").iterdir()} == {"head-seed0", "majority-seed0"}
    assert (run / "predicted.csv").read_text() == "a user's"


@pytest.mark.parametrize(
    "change",
    ["data.train.path=absent.csv", "source.model=absent", "measure.metric=unknown",
     "measure.metric=evaluate:absent/absent", "data.shots=1000", "data.general=absent.csv",
     "finetune.lora.target_modules=[absent]"],
)  # fmt: skip
def test_a_restart_that_is_refused_leaves_the_finished_run(again: Run, change: str) -> None:
    run, tree = again
    before = state(run)
    with pytest.raises(hftl.HftlError):
        hftl.run(Recipe.parse(apply_overrides(tree, [change])), run, restart=True)
    assert state(run) == before


def test_a_restart_that_is_killed_before_training_loses_nothing(again: Run) -> None:
    run, tree = again
    before = state(run)
    # Nothing is closed after a kill.
    stopped = set_results_aside(run)
    stopped.__enter__()
    (run / "phases" / "data").mkdir(parents=True)
    assert not (run / "record.json").exists()
    hftl.run(Recipe.parse(tree), run)
    assert state(run) == before


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_other_things_is_not_touched(
    restart: bool, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / "publish").mkdir(parents=True)
    (folder / "publish" / "book.md").write_text("mine too")
    (folder / "thesis.txt").write_text("years of work")
    before = state(folder)
    with pytest.raises(hftl.HftlError, match=r"no run folder: it holds 'thesis\.txt'"):
        hftl.run(Recipe.parse(recipe_tree), folder, restart=restart)
    assert state(folder) == before and not (folder / ".lock").exists()


def test_a_key_changed_by_a_detour_is_still_refused(again: Run) -> None:
    run, tree = again
    tree["finetune"] |= {"strategy": "head", "lora": {"r": 4}}
    tree["measure"]["arms"] = ["classical"]
    hftl.run(Recipe.parse(tree), run, until="finetune")
    tree["finetune"]["strategy"] = "lora"
    with pytest.raises(RunFolderError, match="finetune.lora.r: 8 -> 4"):
        hftl.run(Recipe.parse(tree), run)


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


def run_to_the_end(tree: dict[str, Any], table: Path, output: Path) -> Record:
    tree["data"]["train"]["path"] = str(table)
    tree["finetune"]["training"]["num_train_epochs"] = 1
    tree["measure"] |= {"seeds": [0], "arms": ["classical"]}
    record = hftl.run(Recipe.parse(tree), output)
    assert record is not None
    return record


@pytest.mark.parametrize("strategy", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_regression_runs_to_the_end(
    strategy: str, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = [(text, 1.5 if label == "positive" else -0.5) for text, label in sentences(120)]
    recipe_tree["data"] |= {"task": "regression", "shots": 40}
    recipe_tree["finetune"]["strategy"] = strategy
    table = write_csv(tmp_path / "v.csv", ["text", "label"], rows)
    record = run_to_the_end(recipe_tree, table, tmp_path / "run")
    assert record.transfer_gain["metric"] == "pearson"
    (row,) = hftl.load(tmp_path / "run").predict(["a good great film"])
    assert set(row) == {"label"} and isinstance(row["label"], float)


def test_sentence_pairs_run_to_the_end(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    first, second = sentences(80, 1), sentences(80, 2)
    rows = [(a, b, "same" if x == y else "other")
            for (a, x), (b, y) in zip(first, second[1:] + second[:1], strict=True)]  # fmt: skip
    rows += [(a, b, "same") for (a, _), (b, _) in zip(first[:40], second[:40], strict=True)]
    table = write_csv(tmp_path / "p.csv", ["premise", "hypothesis", "label"], rows)
    recipe_tree["data"]["train"]["text"] = ["premise", "hypothesis"]
    run_to_the_end(recipe_tree, table, tmp_path / "run")
    (row,) = hftl.load(tmp_path / "run").predict([("a good film", "a bad film")])
    assert row["label"] in ("same", "other")


def test_load_predicts_what_the_run_measured(finished: Run) -> None:
    run, tree = finished
    folder = run / "arms" / f"lora-seed{Record.read(run)['published_seed']}"
    stored = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist()
              if row["split"] == "test"]  # fmt: skip
    texts = [sentences(160)[row["row"]][0] for row in stored]
    rows = hftl.load(run).predict(texts)
    assert [row["label"] for row in rows] == [row["prediction"] for row in stored]
    calibration = Record.read(run).calibration
    assert calibration is not None
    for row, expected in zip(rows, stored, strict=True):
        # Logits over a temperature are probabilities to its inverse power.
        powers = np.array(expected["scores"]) ** (1 / (calibration.temperature or 1.0))
        calibrated = powers / powers.sum()
        np.testing.assert_allclose(list(row["scores"].values()), calibrated, atol=1e-4)
    elsewhere = hftl.load(run / "publish", base=tree["source"]["model"]).predict(texts[:3])
    assert [row["label"] for row in elsewhere] == [row["label"] for row in rows[:3]]
    assert elsewhere[0]["scores"] == pytest.approx(rows[0]["scores"], abs=1e-6)


def test_another_base_is_refused_on_loading(finished: Run, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(RunFolderError, match="other weights than this adapter was trained on"):
        hftl.load(finished[0] / "publish", base=tiny_model("bert", True))


def assert_goes_on(run: Path, recipe: Path, straight: Path) -> None:
    """Check that only what is missing runs, and gives the hash of the run in one go."""
    done = {p: p.stat().st_mtime_ns for p in run.glob("arms/*") if not p.name.startswith(".")}
    assert 0 < len(done) < len(list(straight.glob("arms/*")))
    record = hftl.run(Recipe.load(recipe), run)
    assert not list(run.rglob(".tmp-*"))
    assert [p.name for p, when in done.items() if p.stat().st_mtime_ns != when] == []
    assert record is not None and record.hash == Record.read(straight).hash


def test_a_stopped_run_loses_at_most_the_arm_in_work_and_ends_with_the_same_hash(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two identical runs have one hash, even where one was interrupted."""
    straight, tree = finished
    path, run = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    commit_stage = run_folder.commit_stage

    @contextmanager
    def stop_in_an_arm(folder: Path, reads: dict[str, Any]) -> Iterator[Path]:
        with commit_stage(folder, reads) as aside:
            yield aside
            if folder.name == "head-seed1":
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["hftl", "run", str(path), "--output", str(run)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(run_folder, "commit_stage", stop_in_an_arm)
        cli.main()
    assert stop.value.code == 143
    assert_goes_on(run, path, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_process_loses_at_most_the_arm_in_work(
    number: int, code: int, finished: Run, tmp_path: Path
) -> None:
    straight, tree = finished
    path, run = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "hftl", "run", str(path), "--output", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (run / "arms" / "lora-seed0" / "MANIFEST.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(60) == code
    assert_goes_on(run, path, straight)


def test_damaged_weights_are_named_and_not_used(again: Run) -> None:
    run, tree = again
    damage(run / "publish" / "adapter_model.safetensors")
    for use in (hftl.load, lambda run: validate_push(run, PushOptions())):
        with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors is not what was"):
            use(run)
    damage(run / "arms" / "lora-seed0" / "weights.safetensors")
    with pytest.raises(RunFolderError, match="lora-seed0/weights.safetensors is not what was"):
        hftl.run(Recipe.parse(tree), run)


def test_tensors_changed_after_their_proof_are_noticed(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, tree = finished
    published = {path.name: run_folder.hash_file(path)
                 for path in (run / "publish").glob("*.safetensors")}  # fmt: skip
    assert Record.read(run).weight_files == published and published
    folder = Path(shutil.copytree(run / "publish", tmp_path / "copy"))
    assert not list(check_published_weights(Examination(open_adapter_folder(folder))))
    path, base = folder / "adapter_model.safetensors", tree["source"]["model"]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    words = f"{path.name} is not what was published: expected sha256 {published[path.name]}, got "
    words += run_folder.hash_file(path)
    with pytest.raises(RunFolderError, match=words):
        hftl.load(folder, base)
    monkeypatch.setattr(sys, "argv", ["hftl", "predict", str(folder), "a text", "--base", base])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 4 and words in capsys.readouterr().err
    (finding,) = check_published_weights(Examination(open_adapter_folder(folder)))
    assert f"{finding.where} {finding.what}" == words
    (folder / "head.safetensors").write_bytes(path.read_bytes())
    path.write_bytes((run / "publish" / path.name).read_bytes())
    with pytest.raises(RunFolderError, match="head.safetensors is not among the files"):
        hftl.load(folder, base)
    (folder / "head.safetensors").unlink()
    hftl.load(folder, base)


def test_a_wrong_phase_model_or_missing_file_name_is_refused(
    recipe_file: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    recipe = Recipe.load(recipe_file)
    assert recipe.default_output() == Path("runs") / f"{recipe_file.parent.name}-tiny"
    with pytest.raises(hftl.HftlError, match="has no file name"):
        Recipe.parse(recipe.to_dict()).default_output()
    with pytest.raises(hftl.HftlError, match="unknown phase 'data'"):
        hftl.run(recipe, tmp_path / "run", until="data")
    with pytest.raises(hftl.HftlError, match="has no trained head to predict with"):
        hftl.load(tiny_model())
