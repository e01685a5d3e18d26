"""Start the runs that a campaign disturbs, and compare what they leave.

Runs are forks of this process, which has imported everything once; those of several processes are
started by torchrun, which starts this file.
"""
# ruff: noqa: E402

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import yaml
from conftest import pictures, sentences, write_csv
from support.fresh_process import child
from support.tiny import save_tiny

from hftl import cli
from hftl.adapt import adaptation
from hftl.measure.record import Record
from hftl.pipeline import pipeline
from hftl.publish import reload_process
from hftl.train import step_checkpoint

assert pipeline.run, "forks must not import what runs need"
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    str(Path(__file__)),
]  # fmt: skip
FINAL_FILES = ("weights.safetensors", "predictions.parquet", "head.safetensors")


def write_recipes(folder: Path) -> dict[str, Path]:
    """Write recipes that use everything that trains, on text and on pictures."""
    train = write_csv(folder / "train.csv", ["text", "label"], sentences(56))
    general = write_csv(folder / "general.csv", ["text", "label"], sentences(30, 7))
    photos = pictures(folder / "photos", 15)
    training = {"num_train_epochs": 2, "learning_rate": 1e-3, "bf16": False,
                "per_device_train_batch_size": 8}  # fmt: skip
    scratch = {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1}
    adapt = {"guard": "neighbours", "tolerance": 1, "held_out": 0.2, "training": training}
    trees = {
        "text": {
            "source": {"model": str(save_tiny("bert", folder / "bert", True))},
            "data": {"train": {"path": str(train)}, "max_length": 16,
                     "general": {"path": str(general), "label": "label"}},
            "adapt": {"objective": "mlm", "method": "lora", "pack": False, **adapt},
            "finetune": {"strategy": "lora", "pooling": "mean", "training": training},
            "retain": {"kl": {"weight": 0.3, "inputs": "both"}, "replay": {"ratio": 0.5}},
            "measure": {"seeds": [0], "scratch": scratch, "parallel": "data",
                        "arms": ["scratch", "head",
                                 {"gradual": {"retain": None}}, {"partial": {"retain": None}}]},
        },
        "image": {
            "source": {"model": str(save_tiny("vit", folder / "vit"))},
            "data": {"train": {"path": str(photos)}, "image_size": 24, "augment": "light"},
            "adapt": {"objective": "mae", "method": "full", **adapt, "guard": "off"},
            "finetune": {"strategy": "full", "training": training},
            "measure": {"seeds": [0, 1], "scratch": scratch, "parallel": "data",
                        "arms": ["scratch"]},
        },
    }  # fmt: skip
    paths = {}
    for name, tree in trees.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(tree), encoding="utf-8")
    return paths


def reload_in_fork(command: list[str], **_: Any) -> Any:
    """Stand in for the fresh process of the reload check."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        pid = os.fork()
        if pid == 0:
            for descriptor, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            for name in [name for name in sys.modules if name.split(".")[0] == "hftl"]:
                del sys.modules[name]
            os._exit(child(os.getcwd(), None, command[2:]))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return SimpleNamespace(returncode=code, stdout=out.read_text(), stderr=err.read_text())


def run_command(recipe: Path, folder: Path, prepare: Callable[[], None]) -> None:
    """Run the command line, and end this process as it ends."""
    reload_process.subprocess = SimpleNamespace(run=reload_in_fork)  # pyright: ignore
    reload_process.WaitingReload = lambda: None  # pyright: ignore
    step_checkpoint.MIN_SECONDS, step_checkpoint.COST_SHARE = 0.0, 0.5
    adaptation.HEAD_MAX_STEPS, adaptation.HEAD_EVAL_STEPS = 24, 8
    prepare()
    sys.argv = ["hftl", "run", str(recipe), "--output", str(folder)]
    cli.main()


def start(
    recipe: Path, folder: Path, prepare: Callable[[], None] = lambda: None,
    imported: Path | None = None,
) -> int:  # fmt: skip
    """Start a run in a fork; return its process id.

    Args:
        recipe: of the run.
        folder: of the run.
        prepare: is called in the fork.
        imported: gets the names of the modules that the run has imported.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(folder.with_suffix(".txt"), "ab") as screen:
            os.dup2(screen.fileno(), 1)
            os.dup2(screen.fileno(), 2)
        run_command(recipe, folder, prepare)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        if imported is not None:
            imported.write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(code)


def import_modules(names: list[str]) -> None:
    """Import what a run has imported, so that the forks that follow need not."""
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError):  # such as __main__ of another, or an optional package
                importlib.import_module(name)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """Return the exit code of a process, or None where it has not ended in time."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def hash_results(folder: Path) -> dict[str, str]:
    """Return the hashes of all that a finished run leaves."""
    files = [
        path for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.name in FINAL_FILES or "encoder" in path.parts)
    ]  # fmt: skip
    files += sorted((folder / "publish").rglob("*.safetensors"))
    hashes = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return hashes | {"record.json": Record.read(folder).hash}


def compare(folder: Path, expected: dict[str, str]) -> str:
    """Return what differs from a run without a stop, or that something was left behind."""
    results = hash_results(folder)
    names = sorted(results.keys() | expected.keys())
    differing = [name for name in names if results.get(name) != expected.get(name)]
    left = [path.name for path in folder.rglob(".tmp-*")]
    left += [path.name for path in folder.glob("checkpoints/*")]
    return "" if not differing and not left else f"differs {differing[:3]}, left {left[:3]}"


def end_with(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended, and wait for it."""
    try:
        os.kill(pid, number)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def launch(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start two ranks by torchrun."""
    with open(folder.with_suffix(".txt"), "ab") as screen:
        return subprocess.Popen([*TORCHRUN, str(recipe), str(folder)], stdout=screen, stderr=screen)


if __name__ == "__main__":
    run_command(Path(sys.argv[1]), Path(sys.argv[2]), lambda: None)
