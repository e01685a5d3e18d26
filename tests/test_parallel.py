"""Check arms that are dealt out to processes: the same as one after the other, to the bit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import bench_of

import hftl
from hftl.config.recipe import Recipe
from hftl.errors import (
    HftlError,
    HungProcessError,
    LostProcessError,
    NumericError,
    RecipeError,
    RunFolderError,
    is_disk_full,
    is_out_of_memory,
)
from hftl.pipeline import arm_worker, deal, deal_files, placement
from hftl.pipeline.deal_files import read_features, read_plan, write_plan
from hftl.pipeline.placement import choose_placement
from hftl.pipeline.schedule import ArmCost, Task, estimate_makespan, plan_tasks
from hftl.runtime.claims import ClaimState, create_claims, hold_claim, read_claim
from hftl.runtime.run_folder import DEAL_FOLDER, MANIFEST
from hftl.runtime.workers import build_environment, start_workers

pytestmark = pytest.mark.usefixtures("fast_reload")
TRAINED = ("weights.safetensors", "logits.safetensors", "predictions.parquet")


@pytest.fixture
def tree(recipe_tree: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose arms need a search of rates, the probe, and a choice of KL's weight."""
    recipe_tree["data"]["shots"] = 16
    recipe_tree["finetune"] |= {"strategy": "full", "head_init": "probe"}
    recipe_tree["finetune"]["training"]["num_train_epochs"] = 1
    recipe_tree["measure"] |= {"seeds": [0, 1], "arms": ["scratch", "head"]}
    return recipe_tree


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "count_cores", lambda **_: 2)


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let this process do the work of each worker in turn; return the numbers of those."""
    numbers: list[int] = []

    @contextmanager
    def start(
        module: str, arguments: Sequence[Sequence[str]], *_: Any
    ) -> Iterator[list[SimpleNamespace]]:
        assert module == arm_worker.__name__
        ended = []
        for run, number in arguments:
            numbers.append(int(number))
            monkeypatch.setattr(sys, "argv", ["worker", run, number])
            code = 0
            (Path(run) / DEAL_FOLDER / f"output-{number}.txt").touch()
            try:
                arm_worker.main()
            except HftlError as error:
                sys.excepthook(type(error), error, error.__traceback__)
                code = 1
            ended.append(SimpleNamespace(poll=lambda code=code: code, returncode=code))
        yield ended

    monkeypatch.setattr(deal, "start_workers", start)
    monkeypatch.setattr(arm_worker, "follow_parent", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return numbers


def read_arms(run: Path) -> dict[str, bytes]:
    """Return what arms have trained and predicted, by file."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted((run / "arms").rglob("*"))
        if path.name in TRAINED
    }


def run_dealt(tree: dict[str, Any], folder: Path, lines: list[str]) -> None:
    tree["measure"]["parallel"] = "arms"
    hftl.run(Recipe.parse(tree), folder, until="finetune", say=lines.append)


@pytest.mark.usefixtures("two_cores")
def test_dealt_arms_are_those_of_one_process_to_the_bit(
    tree: dict[str, Any], tmp_path: Path, workers_here: list[int]
) -> None:
    tree["measure"]["parallel"] = "data"
    hftl.run(Recipe.parse(tree), tmp_path / "one", until="finetune")
    assert workers_here == []
    lines: list[str] = []
    run_dealt(tree, tmp_path / "two", lines)
    assert workers_here == [0, 1]
    one, two = read_arms(tmp_path / "one"), read_arms(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 8 * len(TRAINED)
    assert one == two
    arms = [line for line in lines if line.startswith("  [")]
    assert [line.split("]")[0] for line in arms] == [f"  [{n}/8" for n in range(1, 9)]
    assert sum("scratch: rate" in line for line in lines) in (2, 3, 4)
    assert any("arms: 2 processes of 1 thread take an arm" in line for line in lines)
    assert not (tmp_path / "two" / DEAL_FOLDER).exists()
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.usefixtures("two_cores")
def test_error_of_a_worker_is_that_of_the_run(
    tree: dict[str, Any], tmp_path: Path, workers_here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["measure"] |= {"arms": [], "seeds": [0, 1]}

    def fail(*_: Any) -> None:
        raise RecipeError("the arm does not train", "Try another")

    monkeypatch.setattr(arm_worker, "run_job", fail)
    with pytest.raises(RecipeError, match="the arm does not train. Try another") as caught:
        run_dealt(tree, tmp_path / "run", [])
    assert "in process 0:\nTraceback" in caught.value.__notes__[0]
    assert not (tmp_path / "run" / "arms").exists(), "after an error no other task is begun"


def test_lost_task_is_not_repeated_and_what_waits_for_it_is_not_begun(tmp_path: Path) -> None:
    tasks = [
        Task("rate", "rate", "scratch", 0),
        Task("choice", "search", "scratch", 0, after=("rate",)),
        Task("full", "train", "full", 0),
    ]
    create_claims(tmp_path, [task.name for task in tasks])
    with hold_claim(tmp_path, "rate") as mine:
        assert mine and read_claim(tmp_path, "rate") is ClaimState.TAKEN
        with hold_claim(tmp_path, "rate") as again:
            assert not again
        assert arm_worker._wait_for_task(tmp_path, tasks) is tasks[2]
    assert arm_worker._wait_for_task(tmp_path, tasks) is tasks[1], "the rate is known"
    # A killed process leaves the word and no lock.
    (tmp_path / "rate.claim").write_text("taken", encoding="utf-8")
    assert read_claim(tmp_path, "rate") is ClaimState.LOST
    assert arm_worker._wait_for_task(tmp_path, tasks) is tasks[2]
    with hold_claim(tmp_path, "full"):
        pass
    assert arm_worker._wait_for_task(tmp_path, tasks) is None
    create_claims(tmp_path, ["other"])
    with pytest.raises(ValueError, match="broken"), hold_claim(tmp_path, "other"):
        raise ValueError("broken")
    assert read_claim(tmp_path, "other") is ClaimState.FAILED


def test_plan_is_read_as_it_was_written(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.parse(tree)
    tasks = [Task("full-rate0", "rate", "full", 3, 0.1 + 0.2, ("a",), 1 / 3)]
    words = {bytes([n] * 16): np.full((n, 4), n / 3, np.float32) for n in (1, 3, 2)}
    features = {"full": {("mean", None): words, ("cls", 2): {}}, "head": {("cls", 0): words}}
    write_plan(tmp_path, recipe, tasks, features, 2)
    plan = read_plan(tmp_path)
    assert plan.recipe.to_dict() == recipe.to_dict() and plan.recipe.arms == recipe.arms
    assert (list(plan.tasks), plan.sharers) == (tasks, 2)
    read = read_features(tmp_path, plan)
    assert {arm: list(held) for arm, held in read.items()} == {
        "full": [("mean", None)], "head": [("cls", 0)],
    }  # fmt: skip
    for held in (read["full"]["mean", None], read["head"]["cls", 0]):
        assert list(held) == list(words)
        assert all(np.array_equal(held[key], words[key]) for key in words)
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".safetensors"}


@pytest.mark.parametrize(
    "error",
    [
        RecipeError("'r' is 0", "Give more"), NumericError("the loss is NaN"),
        HungProcessError([1], 5), OSError(errno.ENOSPC, "No space left on device", "/x/a"),
        MemoryError("no room"), RuntimeError("MPS backend out of memory"), KeyError("name"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_error_is_raised_as_it_was_in_the_worker(error: Exception, tmp_path: Path) -> None:
    assert deal_files.read_error(tmp_path, 3) is None
    deal_files.write_error(tmp_path, 3, error)
    again = deal_files.read_error(tmp_path, 3)
    assert again is not None and type(error).__name__ in again.__notes__[0]
    if isinstance(error, HftlError):
        assert type(again) is type(error) and str(again) == str(error)
        assert isinstance(again, HftlError) and (again.what, again.fix) == (error.what, error.fix)
    assert str(error) in str(again)
    assert is_disk_full(again) == is_disk_full(error)
    assert is_out_of_memory(again) == is_out_of_memory(error)
    assert getattr(again, "filename", None) == getattr(error, "filename", None)


def test_error_that_names_a_file_in_other_bytes_is_left_and_read(tmp_path: Path) -> None:
    deal_files.write_error(tmp_path, 3, RecipeError("/x/\udcff.png is no picture", "Remove it"))
    again = deal_files.read_error(tmp_path, 3)
    assert isinstance(again, RecipeError) and again.what == r"/x/\udcff.png is no picture"
    deal_files.write_error(tmp_path, 3, OSError(errno.ENOENT, "No such file", "/x/\udcff.png"))
    again = deal_files.read_error(tmp_path, 3)
    assert isinstance(again, FileNotFoundError) and again.filename == r"/x/\udcff.png"


def test_lost_worker_is_named(tmp_path: Path) -> None:
    (tmp_path / "output-1.txt").write_text("Killed", encoding="utf-8")
    failures = deal._read_failure(tmp_path, 1, -9)
    assert deal._read_failure(tmp_path, 0, 0) == []
    with pytest.raises(LostProcessError, match="process 1 of the run ended") as caught:
        deal._finish(tmp_path, failures)
    assert "exit code -9\nKilled" in caught.value.__notes__[0]


def test_longest_first_and_choices_before_what_waits_for_them(tree: dict[str, Any]) -> None:
    tree["measure"]["scratch"]["learning_rates"] = [1e-3, 1e-3, 3e-3]
    recipe = Recipe.parse(tree)
    jobs = [(arm, seed) for arm in recipe.arms for seed in (0, 1) if not arm.spec.is_solved]
    costs = {"full": ArmCost(5.0), "scratch": ArmCost(15.0, rate=5.0)}
    tasks = plan_tasks(jobs, recipe, costs)
    names = [task.name for task in tasks]
    assert names[:3] == ["scratch-rate0", "scratch-rate1", "scratch-choice"]
    assert names[3:5] == ["scratch-seed0", "scratch-seed1"] and len(names) == 7
    assert estimate_makespan(tasks, 1) == 50.0
    assert estimate_makespan(tasks, 2) == 25.0
    assert estimate_makespan(tasks, 8) == 20.0
    chosen = plan_tasks(jobs, recipe, costs, chosen=["scratch"])
    assert [task.name for task in chosen] == [
        "scratch-seed0", "scratch-seed1", "full-seed0", "full-seed1",
    ]  # fmt: skip
    assert not any(task.after for task in chosen)


@pytest.mark.parametrize(
    ("parallel", "world", "quick", "expected"),
    [
        ("auto", 1, True, ("data", 1)),
        ("auto", 1, False, ("arms", 2)),
        ("arms", 1, True, ("arms", 2)),
        ("data", 1, False, ("data", 1)),
        ("auto", 2, True, ("data", 2)),
        ("auto", 2, False, ("arms", 2)),
        ("auto", 8, False, ("data", 8)),
        ("arms", 8, True, ("arms", 8)),
        ("data", 2, False, ("data", 2)),
    ],
)
@pytest.mark.usefixtures("two_cores")
def test_placement(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, parallel: str, world: int,
    quick: bool, expected: tuple[str, int],
) -> None:  # fmt: skip
    tree["measure"]["parallel"] = parallel
    # Enough of them that the search of scratch, one try after another, is not what all wait for.
    tree["measure"]["seeds"] = list(range(8))
    recipe = Recipe.parse(tree)
    monkeypatch.setattr("hftl.runtime.distributed.get_world_size", lambda: world)
    monkeypatch.setattr(placement, "NOMINAL_FLOPS", 1e12 if quick else 1.0)
    chosen = choose_placement(bench_of(recipe), recipe)
    assert (chosen.mode, chosen.processes) == expected, chosen
    assert chosen.local == (world == 1 and expected[0] == "arms")
    assert chosen.sharing == (1 if expected[0] == "arms" else world)
    assert (chosen.text == "") == (expected[1] == 1)


def test_arms_need_a_whole_model(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hftl.runtime.distributed.get_world_size", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = Recipe.parse(tree)
    assert choose_placement(bench_of(recipe), recipe).mode == "data"
    tree["measure"]["parallel"] = "arms"
    with pytest.raises(RecipeError, match="measure.parallel=arms puts a whole model"):
        choose_placement(bench_of(recipe), Recipe.parse(tree))


def test_workers_see_one_device_and_no_launcher() -> None:
    launched = {
        "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node", "TORCHELASTIC_RUN_ID": "1",
        "ACCELERATE_MIXED_PRECISION": "bf16", "HOME": "/home", "CUDA_VISIBLE_DEVICES": "4,MIG-a",
        "OMP_NUM_THREADS": "8",
    }  # fmt: skip
    own = build_environment(launched, 1, None)
    assert own == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "MIG-a", "OMP_NUM_THREADS": "8"}
    own = build_environment({}, 3, 2)
    assert own["CUDA_VISIBLE_DEVICES"] == "3"
    assert own["OMP_NUM_THREADS"] == own["MKL_NUM_THREADS"] == "2"


def test_no_worker_outlives_the_block_or_its_parent(tmp_path: Path) -> None:
    (tmp_path / "patient.py").write_text(
        "import sys, time\n"
        "from hftl.runtime.workers import follow_parent\n"
        "def main():\n    follow_parent()\n"
        # In one write: another worker's must not come between the number and the line's end.
        "    sys.stdout.write(sys.argv[1] + '\\n')\n    sys.stdout.flush()\n    time.sleep(60)\n"
    )
    output, environment = tmp_path / "out.txt", dict(os.environ)
    sys.path.append(str(tmp_path))
    try:
        with start_workers("patient", [["7"], ["8"]], [environment] * 2, [output] * 2) as pair:
            deadline = time.monotonic() + 30
            while len(output.read_text().split()) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert sorted(output.read_text().split()) == ["7", "8"]
            assert pair[0].stdin is not None
            pair[0].stdin.close()  # as the system does for a parent that was killed
            assert pair[0].wait(10) == 128 + signal.SIGTERM
        assert pair[1].returncode == 128 + signal.SIGTERM
    finally:
        sys.path.remove(str(tmp_path))


# Real processes.


def write_recipe(tree: dict[str, Any], folder: Path, **measure: Any) -> Path:
    tree["measure"] |= measure
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(words: list[str], folder: Path, launcher: tuple[str, ...] = ()) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "hftl", "run", *words], cwd=folder, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "launched"])
def test_processes_train_what_one_trains(
    tree: dict[str, Any], tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    hftl.run(write_recipe(tree, tmp_path, parallel="data"), tmp_path / "one")
    path = write_recipe(tree, tmp_path, parallel="arms")
    ended = start([str(path), "--output", "two"], tmp_path, launcher)
    out, errors = ended.communicate(timeout=300)
    assert ended.returncode == 0, errors
    assert "arms: 2 processes" in out and out.count("] full seed 0") == 1
    assert read_arms(tmp_path / "one") == read_arms(tmp_path / "two")
    records = [json.loads((tmp_path / r / "record.json").read_text()) for r in ("one", "two")]
    for record in records:
        for key in ("environment", "timings", "recipe"):
            record.pop(key)
    assert records[0] == records[1]


@pytest.mark.slow
def test_failing_arm_keeps_its_code_and_message(tree: dict[str, Any], tmp_path: Path) -> None:
    broken = {"broken": {"finetune.training.learning_rate": 1e38}}
    path = write_recipe(tree, tmp_path, parallel="arms", arms=[broken], seeds=[0])
    ended = start([str(path), "--output", "run"], tmp_path)
    _, errors = ended.communicate(timeout=300)
    assert ended.returncode == 6, errors
    assert errors.count("hftl: error:") == 1
    assert json.loads((tmp_path / "run" / "error.json").read_text())["exit_code"] == 6
    assert "in process" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "parent", "all"])
def test_killed_process_leaves_the_others_work_and_no_orphan(
    tree: dict[str, Any], tmp_path: Path, victim: str
) -> None:
    tree["finetune"]["training"]["num_train_epochs"] = 12
    write = {"arms": [{"lora": {}}], "seeds": [0]}
    hftl.run(write_recipe(tree, tmp_path, parallel="data", **write), tmp_path / "one")
    path = write_recipe(tree, tmp_path, parallel="arms", **write)
    words, run = [str(path), "--output", "run"], tmp_path / "run"
    process = start(words, tmp_path)
    deadline = time.monotonic() + 120
    events = [run / DEAL_FOLDER / f"events-{number}.jsonl" for number in range(2)]
    while not all(e.exists() and "begin" in e.read_text() for e in events):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # Another one waits for the reload check.
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    workers = [pid for pid, title in titles.items() if "arm_worker" in title]
    assert len(workers) == 2
    if victim == "worker":
        os.kill(int(workers[1]), signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if victim == "parent" else signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == {"worker": 8, "parent": -9, "all": 143}[victim], errors
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a worker has outlived its parent"
        time.sleep(0.1)
    if victim == "worker":
        assert len(list((run / "arms").iterdir())) == 1, "the other worker has finished its task"
        assert json.loads((run / "error.json").read_text())["exit_code"] == 8
    again = start(words, tmp_path)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert read_arms(run) == read_arms(tmp_path / "one")
    assert not (run / DEAL_FOLDER).exists()


def test_seeds_whose_steps_hold_other_rows_are_not_added(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["measure"] |= {"seeds": [0], "arms": ["head"], "parallel": "data"}
    hftl.run(Recipe.parse(tree), tmp_path / "run", until="finetune")
    path = tmp_path / "run" / "arms" / "full-seed0" / MANIFEST
    stored = json.loads(path.read_text("utf-8"))
    assert stored["reads"]["processes"] == 1
    stored.pop("own")
    stored["reads"]["processes"] = 4  # As `accelerate launch` on four devices leaves it.
    path.write_text(json.dumps(stored), "utf-8")
    tree["measure"]["seeds"] = [0, 1]
    with pytest.raises(RunFolderError, match="share each step: 4 -> 1, for full seed 0"):
        hftl.run(Recipe.parse(tree), tmp_path / "run", until="finetune")
