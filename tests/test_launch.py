"""Run recipes on two processes: the same as on one, written once, and loud when one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import pictures, sentences, write_csv
from safetensors.numpy import load_file
from support.tiny import save_tiny

import hftl

pytestmark = pytest.mark.usefixtures("fast_reload")

LAUNCH = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    "-m", "hftl",
]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def deterministic_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`deterministic_model(architecture)`: a tiny checkpoint without dropout."""

    def make(name: str) -> Path:
        folder = save_tiny(name, tmp_path_factory.mktemp(name))
        config = json.loads((folder / "config.json").read_text())
        off = {key: 0.0 for key in config if "dropout" in key and config[key] is not None}
        (folder / "config.json").write_text(json.dumps(config | off))
        return folder

    return make


def write_recipe(path: Path, model: Path, data: dict[str, Any], batch: int, **more: Any) -> Path:
    training = {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": False,
                "per_device_train_batch_size": batch}  # fmt: skip
    tree = {
        "source": {"model": str(model)},
        "data": data,
        "finetune": {"strategy": "lora", "head_init": "random", "training": training},
        "measure": {"seeds": [0], "arms": ["scratch", "head", "full"],
                    "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
                    "parallel": "data"},
        **more,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def launch(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def load_pair(folder: Path, arm: str, file: str) -> list[dict[str, np.ndarray]]:
    return [load_file(folder / run / "arms" / arm / file) for run in ("one", "two")]


@pytest.mark.slow  # Of each step test_processes.py holds it, of dealt arms test_parallel.py.
@pytest.mark.parametrize("kind", ["text", "image"])
def test_two_processes_give_what_one_gives(
    kind: str, deterministic_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data: dict[str, Any]
    if kind == "text":
        train = write_csv(tmp_path / "train.csv", ["text", "label"], sentences(90))
        general = write_csv(tmp_path / "general.csv", ["text", "label"], sentences(80, 7))
        data, model = {"max_length": 16}, deterministic_model("bert")
    else:
        train, general = pictures(tmp_path / "train", 25), pictures(tmp_path / "general", 45)
        data, model = {"augment": "light", "image_size": 24}, deterministic_model("vit")
    data |= {"train": {"path": str(train)}, "general": {"path": str(general), "label": "label"}}
    hftl.run(write_recipe(tmp_path / "one.yaml", model, data, 16), tmp_path / "one")
    two = write_recipe(tmp_path / "two.yaml", model, data, 8)
    ended = launch(["run", str(two), "--output", "two"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 processes" in ended.stdout and ended.stdout.count("lora seed 0") == 1
    one_arms, arms = (
        sorted(path.name for path in (tmp_path / run / "arms").iterdir()) for run in ("one", "two")
    )
    assert one_arms == arms and len(arms) == 5
    for arm in arms:
        one, other = load_pair(tmp_path, arm, "logits.safetensors")
        for split in ("validation", "test"):
            np.testing.assert_allclose(other[split], one[split], atol=1e-4, err_msg=arm)
    for arm in ("lora-seed0", "full-seed0"):
        one, other = load_pair(tmp_path, arm, "embeddings.safetensors")
        for part in ("general", "new"):
            np.testing.assert_allclose(other[part], one[part], atol=1e-4, err_msg=arm)
    assert not (tmp_path / "two" / "error.json").exists()
    records = [json.loads((tmp_path / r / "record.json").read_text()) for r in ("one", "two")]
    assert records[0]["data"]["fingerprint"] == records[1]["data"]["fingerprint"]
    forgotten = [r["forgetting"]["arms"][0]["forgotten"]["value"] for r in records]
    assert forgotten[0] == pytest.approx(forgotten[1], abs=0.05)


@pytest.mark.slow  # tests/test_processes.py adapts on two processes without the command line
def test_adaptation_on_two_processes_is_that_on_one(
    table: Path, deterministic_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "general": {"path": str(table)}, "max_length": 12}
    facts = []
    for name, batch in (("one", 16), ("two", 8)):
        training = {"num_train_epochs": 2, "bf16": False, "per_device_train_batch_size": batch}
        adapt = {"objective": "mlm", "guard": "neighbours", "tolerance": 1, "pack": False,
                 "held_out": 0.2, "training": training}  # fmt: skip
        model = deterministic_model("bert")
        path = write_recipe(tmp_path / f"{name}.yaml", model, data, batch, adapt=adapt)
        if name == "one":
            hftl.run(path, tmp_path / name, until="adapt")
        else:
            ended = launch(["adapt", str(path), "--output", name], tmp_path)
            assert ended.returncode == 0, ended.stderr
            assert ended.stdout.count("adapt mlm full, ") == 1
        phase = tmp_path / name / "phases" / "adapt-1"
        facts.append(json.loads((phase / "told.json").read_text()))
        assert (phase / "head.safetensors").exists()
        assert not (tmp_path / name / "checkpoints" / "adapt-1").exists()
    one, two = facts
    assert one["steps"] == two["steps"] > 0 and one["kept"] == two["kept"]
    for evaluation, other in zip(one["history"], two["history"], strict=True):
        assert evaluation == pytest.approx(other, abs=1e-3)


@pytest.mark.slow  # tests/test_processes.py: rank 0 alone reports; test_cli_errors.py: how
def test_error_is_printed_once_and_stored(
    table: Path, deterministic_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "shots": 1000}
    path = write_recipe(tmp_path / "r.yaml", deterministic_model("bert"), data, 8)
    ended = launch(["run", str(path), "--output", "run"], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("hftl: error:") == 1 and "shots=1000" in ended.stderr
    error = json.loads((tmp_path / "run" / "error.json").read_text())
    assert error["exit_code"] == 3 and error["process"] == 0


@pytest.mark.slow  # A process that hangs is named in test_watchdog.py.
def test_lost_process_is_reported(
    table: Path, deterministic_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "max_length": 16}
    path = write_recipe(tmp_path / "r.yaml", deterministic_model("bert"), data, 2)
    words = ["run", str(path), "finetune.training.num_train_epochs=500", "--output", "run"]
    process = subprocess.Popen(
        [*LAUNCH, *words], cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "arms").glob("head-seed0")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # into the training of the next arm
    main = int((tmp_path / "run" / ".lock").read_text().split()[-1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = [int(pid) for pid in children if int(pid) != main]
    os.kill(other, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - killed < 15
    assert (tmp_path / "run" / "error.json").exists(), errors[-3000:]
    error = json.loads((tmp_path / "run" / "error.json").read_text())
    assert error["exit_code"] == 8 and "process 1" in error["message"], errors[-1500:]


HANG = """
import time
from hftl.train.trainer import TransferTrainer
compute_loss = TransferTrainer.compute_loss

def compute(self, *args, **kwargs):
    if self.args.process_index == 1 and self.state.global_step == 3:
        open("hung", "w").close()
        time.sleep(600)
    return compute_loss(self, *args, **kwargs)

TransferTrainer.compute_loss = compute
from hftl.cli import main
main()
"""


@pytest.mark.slow
def test_hung_process_is_named_within_twice_the_limit(
    table: Path, deterministic_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "max_length": 16}
    path = write_recipe(tmp_path / "r.yaml", deterministic_model("bert"), data, 8)
    (tmp_path / "hang.py").write_text(HANG, encoding="utf-8")
    command = [*LAUNCH[: LAUNCH.index("-m", 3)], str(tmp_path / "hang.py"), "run", str(path)]
    limit = 4.0
    ended = subprocess.run(
        [*command, "--output", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=150,
        env=ENVIRONMENT | {"HFTL_WATCHDOG_SECONDS": str(limit), "PYTHONPATH": os.pathsep.join(
            [str(Path(hftl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    file = tmp_path / "run" / "error.json"
    error = json.loads(file.read_text())
    assert error["exit_code"] == 8, ended.stderr[-3000:]
    assert file.stat().st_mtime - (tmp_path / "hung").stat().st_mtime < 2 * limit
    assert error["message"].startswith("process 1 of the run did nothing for 4 s")
    assert ended.stderr.count("hftl: error:") == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "process 0 waits, or does nothing" in log and "hang.py" in log
