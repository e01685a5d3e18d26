"""A whole run on two processes: the same as on one, written once, and loud when one is lost."""

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

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`still(architecture)`: a tiny checkpoint without dropout."""

    def make(name: str) -> Path:
        folder = save_tiny(name, tmp_path_factory.mktemp(name))
        config = json.loads((folder / "config.json").read_text())
        off = {key: 0.0 for key in config if "dropout" in key and config[key] is not None}
        (folder / "config.json").write_text(json.dumps(config | off))
        return folder

    return make


def recipe(path: Path, model: Path, data: dict[str, Any], batch: int, **more: Any) -> Path:
    training = {"num_train_epochs": 2, "learning_rate": 1e-3, "bf16": False,
                "per_device_train_batch_size": batch}  # fmt: skip
    tree = {
        "source": {"model": str(model)},
        "data": data,
        "finetune": {"strategy": "lora", "head_init": "random", "training": training} | more,
        "measure": {"seeds": [0], "arms": ["scratch", "head", "full", "partial"],
                    "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def launched(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, "-m", "hftl", *words], cwd=folder, env=ENVIRONMENT, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(
    kind: str, table: Path, still: Callable[[str], Path], tmp_path: Path
) -> None:
    model = still("bert" if kind == "text" else "vit")
    train = table if kind == "text" else pictures(tmp_path / "pictures", 25)
    data = {"train": {"path": str(train)}, "max_length": 16, "augment": "none"}
    if kind == "image":
        data |= {"augment": "light", "image_size": 24}
    general = (
        write_csv(tmp_path / "general.csv", ["text", "label"], sentences(90, 7))
        if kind == "text"
        else pictures(tmp_path / "general", 45)
    )
    data["general"] = {"path": str(general), "label": "label"}
    one = recipe(tmp_path / "one.yaml", model, data, 16)
    two = recipe(tmp_path / "two.yaml", model, data, 8)
    hftl.run(one, tmp_path / "one")
    both = launched(["run", str(two), "--output", "two"], tmp_path)
    assert both.returncode == 0, both.stderr
    assert "2 processes" in both.stdout and both.stdout.count("lora seed 0") == 1
    arms = sorted(path.name for path in (tmp_path / "one" / "arms").iterdir())
    assert arms == sorted(path.name for path in (tmp_path / "two" / "arms").iterdir())
    assert len(arms) == 6
    for arm in arms:
        mine, theirs = (
            load_file(tmp_path / run / "arms" / arm / "logits.safetensors")
            for run in ("one", "two")
        )
        for split in ("validation", "test"):
            np.testing.assert_allclose(theirs[split], mine[split], atol=1e-4, err_msg=arm)
        kept = [tmp_path / run / "arms" / arm / "embeddings.safetensors" for run in ("one", "two")]
        assert [path.exists() for path in kept] == [arm.startswith(("lora", "full", "part"))] * 2
        if kept[0].exists():
            mine, theirs = map(load_file, kept)
            for part in ("general", "new"):
                np.testing.assert_allclose(theirs[part], mine[part], atol=1e-4, err_msg=arm)
    assert not (tmp_path / "two" / "error.json").exists()
    records = [json.loads((tmp_path / r / "record.json").read_text()) for r in ("one", "two")]
    assert records[0]["data"]["fingerprint"] == records[1]["data"]["fingerprint"]
    told = [record["forgetting"]["arms"][0]["forgotten"]["value"] for record in records]
    assert told[0] == pytest.approx(told[1], abs=0.05)


@pytest.mark.slow  # tests/test_processes.py adapts on two processes without the command line
def test_adaptation_on_two_processes_is_that_on_one(
    table: Path, still: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "general": {"path": str(table)}, "max_length": 12}
    found = {}
    for name, batch in (("one", 16), ("two", 8)):
        path = recipe(tmp_path / f"{name}.yaml", still("bert"), data, batch)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        training = {"num_train_epochs": 2, "bf16": False, "per_device_train_batch_size": batch}
        tree["adapt"] = {"objective": "mlm", "guard": "neighbours", "tolerance": 1, "pack": False,
                         "held_out": 0.2, "training": training}  # fmt: skip
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        if name == "two":
            done = launched(["adapt", str(path), "--output", name], tmp_path)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("adapt mlm full, ") == 1
        else:
            hftl.run(path, tmp_path / name, until="adapt")
        phase = tmp_path / name / "phases" / "adapt-1"
        found[name] = json.loads((phase / "told.json").read_text())
        assert (phase / "head.safetensors").exists() and not (
            tmp_path / name / "checkpoints" / "adapt-1"
        ).exists()
    one, two = found.values()
    assert one["steps"] == two["steps"] > 0 and one["kept"] == two["kept"]
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_an_error_is_told_once_and_kept(
    table: Path, still: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(table)}, "shots": 1000}
    path = recipe(tmp_path / "r.yaml", still("bert"), data, 8)
    found = launched(["run", str(path), "--output", "run"], tmp_path)
    assert found.returncode != 0
    assert found.stderr.count("hftl: error:") == 1 and "shots=1000" in found.stderr
    told = json.loads((tmp_path / "run" / "error.json").read_text())
    assert told["exit_code"] == 3 and told["process"] == 0


def test_a_lost_process_is_told(table: Path, still: Callable[[str], Path], tmp_path: Path) -> None:
    data = {"train": {"path": str(table)}, "max_length": 16}
    path = recipe(tmp_path / "r.yaml", still("bert"), data, 2)
    words = ["run", str(path), "finetune.training.num_train_epochs=500", "--output", "run"]
    process = subprocess.Popen(
        [*LAUNCH, "-m", "hftl", *words], cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "arms").glob("head-seed0")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)
    main = int((tmp_path / "run" / ".lock").read_text().split()[-1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = [int(pid) for pid in children if int(pid) != main]
    os.kill(other, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (tmp_path / "run" / "error.json").exists(), errors[-3000:]
    told = json.loads((tmp_path / "run" / "error.json").read_text())
    assert told["exit_code"] == 8 and "process 1" in told["message"], errors[-1500:]
