"""Start fresh processes that have the plain libraries imported already, and never hftl.

As a program it reads a line of JSON, `[folder, script, arguments...]`, forks, runs the script in
that folder in the child and answers `[exit code, stdout, stderr]`. The gate's proof of a reload
runs a script so; importing peft and transformers anew for each of many runs would take much of the
time of the tests.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FreshProcess:
    """Stand in for `subprocess.run([python, "-P", script, ...], ...)`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """Return what the script's process gave, as `subprocess.run` does."""
        assert command[:2] == [sys.executable, "-P"], command
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps([os.getcwd(), *command[2:]]) + "\n")
        self._server.stdin.flush()
        code, out, err = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess(command, code, out, err)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the check of publishing reload folders by `run`."""
        from hftl.publish import checks

        before = checks.subprocess
        checks.subprocess = SimpleNamespace(run=self.run)  # pyright: ignore
        try:
            yield
        finally:
            checks.subprocess = before

    def close(self) -> None:
        """End the server, if one was needed."""
        if self._server is not None and self._server.stdin:
            self._server.stdin.close()
            self._server.wait()


def child(folder: str, words: list[str], out: Any, err: Any) -> int:
    """Run a script as `python -P` would; stdout and stderr go to the files."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(folder)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 (what python itself would print)
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer until stdin is closed."""
    import peft
    import transformers

    assert peft.PeftModel and transformers.AutoModelForSequenceClassification
    assert transformers.AutoImageProcessor and "hftl" not in sys.modules
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder, name) for name in ("out", "err")]
            with open(places[0], "w") as out, open(places[1], "w") as err:
                pid = os.fork()
                if pid == 0:
                    place, *words = json.loads(line)
                    os._exit(child(place, words, out, err))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            outputs = [path.read_text(encoding="utf-8", errors="replace") for path in places]
        answers.write(json.dumps([code, *outputs]) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
