"""Finished runs to push, made once a session, and a command line that pushes them fast."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences, write_csv
from localhub import ROOT, LocalHub

BASE = "org/tiny"
"""What the tiny model is called at the hub."""
SHORT_WAITS = {
    "RETRY_SECONDS": 3.0, "TIMEOUT_SECONDS": 1.0, "FIRST_WAIT": 0.01, "MAX_WAIT": 0.05
}  # fmt: skip
"""The limits of `http_retry` in tests, in seconds."""


def small_recipe(folder: Path, model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe that runs in seconds; its table is written to `folder`."""
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


def finished_run(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    decision: str = "publish",
) -> Path:  # fmt: skip
    """A finished run of the tiny model under `folder`, of a verdict that the test chooses."""
    import hftl
    from hftl.pipeline import evaluate

    tree = small_recipe(folder, model, changes)
    verdict = {"decision": decision, "reasons": ["the test says so"]}
    monkeypatch.setattr(evaluate, "decide_verdict", lambda *given: verdict)
    hftl.run(hftl.Recipe.parse(tree), folder / "run")
    return folder / "run"


def put_base(hub: LocalHub, model: Path) -> str:
    """Puts the tiny model on the hub; returns its commit."""
    return hub.put(BASE, {path.name: path.read_bytes() for path in model.iterdir()})


SERVE = f"""
import contextlib, io, json, sys
from hftl import cli, cli_errors
from hftl.publish import http_retry
for name, seconds in {SHORT_WAITS!r}.items():
    assert hasattr(http_retry, name), name
    setattr(http_retry, name, seconds)
real = sys.stdout
for line in sys.stdin:
    sys.argv = ["hftl", *json.loads(line)]
    cli_errors.CURRENT_COMMAND = cli_errors.CurrentCommand()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=real, flush=True)
"""
Pusher = Callable[..., tuple[int, str, str]]


@contextmanager
def pusher(environment: dict[str, str]) -> Iterator[Pusher]:
    """`push("publish", run, ...)`: commands in one long-lived process, of little http_retry.

    Gives the exit code, and what was said on stdout and stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    into, out = process.stdin, process.stdout

    def push(*words: Any) -> tuple[int, str, str]:
        into.write(json.dumps([str(word) for word in words]) + "\n")
        into.flush()
        code, said, error = json.loads(out.readline())
        return code, said, error

    try:
        yield push
    finally:
        process.kill()
        process.wait()
