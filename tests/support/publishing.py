"""Fixtures of publishing: a local hub, one finished run, and a command line that pushes it fast."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.fresh_process import FreshProcess
from support.local_hub import ROOT, LocalHub, start_hub

from hftl.runtime.run_folder import hash_file

ME = "me/model"
BASE = "org/tiny"
"""The tiny model's name at the hub."""
SHORT_WAITS = {
    "RETRY_SECONDS": 2.5, "TIMEOUT_SECONDS": 1.0, "FIRST_WAIT": 0.01, "MAX_WAIT": 0.05
}  # fmt: skip
"""The limits of `http_retry` in tests, in seconds."""


def build_small_recipe(folder: Path, model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that runs in seconds; write its table to `folder`."""
    from conftest import sentences, write_csv

    from hftl.config import overrides

    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(100))
    tree: dict[str, Any] = {
        "source": {"model": str(model), "published_as": BASE},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "finetune": {"training": {"num_train_epochs": 1, "bf16": False}},
        "measure": {"seeds": [0], "arms": ["scratch"],
                    "scratch": {"learning_rates": [1e-3], "epochs_factor": 1}},
        "publish": {"license": "mit"},
    }  # fmt: skip
    for key, value in changes.items():
        overrides.set_key(tree, key, value)
    return tree


def finish_run(
    folder: Path, model: Path, changes: dict[str, Any] | None = None, decision: str = "publish"
) -> Path:
    """Run a small recipe of the tiny model under `folder`, with a verdict of the test's choice."""
    import hftl
    from hftl.measure.record import Verdict
    from hftl.pipeline import evaluate

    verdict = Verdict.model_validate({"decision": decision, "reasons": ["the test says so"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "judge_record", lambda record: verdict)
        tree = build_small_recipe(folder, model, changes or {})
        hftl.run(hftl.Recipe.parse(tree), folder / "run")
    return folder / "run"


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def copy_run(finished: Path, hub: LocalHub, folder: Path) -> Path:
    """Return a copy of a run under `folder`, and restore the hub."""
    hub.control(restore="base", faults=[])
    return Path(shutil.copytree(finished, folder / "run"))


def assert_fails(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Check a failure's exit code, and that one line on stderr holds the words."""
    assert result[0] == code, result
    assert re.fullmatch(r"hftl: error: [^\n]+\n", result[2]), result[2]
    for word in words:
        assert word in result[2], result[2]


SERVE = f"""
import contextlib, io, json, os, sys
from huggingface_hub import constants
from hftl import cli, cli_errors
from hftl.publish import http_retry
for name, seconds in {SHORT_WAITS!r}.items():
    assert hasattr(http_retry, name), name
    setattr(http_retry, name, seconds)

def call(words):
    sys.argv = ["hftl", *words]
    cli_errors.CURRENT_COMMAND = cli_errors.CurrentCommand()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return [code, out.getvalue(), err.getvalue()]

for line in sys.stdin:
    job = json.loads(line)
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = job["offline"], not job["xet"]
    before = dict(os.environ)
    os.environ.update(job["environment"])
    os.environ.pop("HF_TOKEN", None)
    if job["token"]:
        os.environ["HF_TOKEN"] = job["token"]
    if job["action"] == "call":
        answer = call(job["words"])
    elif job["action"] == "start":
        answer = os.fork()
        if answer == 0:
            call(job["words"])
            os._exit(0)
    else:
        answer = os.waitpid(job["words"][0], 0)[1]
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps(answer), file=sys.__stdout__, flush=True)
"""


class Pusher:
    """A command line in one long-lived process: `push("publish", run, ...)`.

    A call returns the exit code, stdout and stderr.

    Args:
        process: that serves.
        environment: what its commands see besides its own.
    """

    def __init__(
        self, process: subprocess.Popen[str], environment: dict[str, str] | None = None
    ) -> None:
        self._process = process
        self._environment = environment or {}

    def within(self, environment: dict[str, str]) -> "Pusher":
        """Return the same command line in another environment."""
        return Pusher(self._process, environment)

    def __call__(
        self, *words: Any, token: str | None = "hf_me_write", offline: bool = False,
        xet: bool = False,
    ) -> tuple[int, str, str]:  # fmt: skip
        job = {"words": list(map(str, words)), "token": token, "offline": offline, "xet": xet}
        code, out, err = self._send("call", job)
        return code, out, err

    def start(self, *words: Any) -> int:
        """Start a command in a forked process, and return its id."""
        job = {"words": list(map(str, words)), "token": "hf_me_write"}
        return self._send("start", job)

    def wait(self, process: int) -> None:
        """Wait for a command that `start` has started."""
        self._send("wait", {"words": [process], "token": None})

    def _send(self, action: str, job: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        usual = {"offline": False, "xet": False, "environment": self._environment}
        line = json.dumps({"action": action, **usual, **job})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def open_pusher(environment: dict[str, str]) -> Iterator[Pusher]:
    """Start the process of a `Pusher`, of short waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        yield Pusher(process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def hub(tiny_model: Callable[..., Path]) -> Iterator[LocalHub]:
    """Start a hub that holds the base of the runs; `control(restore="base")` empties it again."""
    with start_hub() as hub:
        hub.put(BASE, read_files(tiny_model()))
        hub.control(keep="base")
        yield hub


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path],
    reload_server: FreshProcess,
) -> Path:  # fmt: skip
    """Return a finished run of a LoRA adapter with a native head, which tests only read."""
    with reload_server.in_use():
        return finish_run(tmp_path_factory.mktemp("finished"), tiny_model())


@pytest.fixture(scope="session")
def push(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    """Start a command line that uses the hub."""
    with open_pusher(hub.environment(tmp_path_factory.mktemp("home"))) as push:
        yield push


@pytest.fixture
def run(finished: Path, hub: LocalHub, tmp_path: Path) -> Path:
    """Return a copy of the finished run, and restore the hub to the base alone."""
    return copy_run(finished, hub, tmp_path)
