"""Start fresh processes that have the plain libraries imported already, and never hftl.

As a program, `fresh_process.py ADDRESS` listens at a socket until its stdin is closed. It reads a
line of JSON, `[folder, environment, script, arguments...]`, forks, runs the script in that folder
in the child and answers `[exit code, stdout, stderr]`. The gate's proof of a reload runs a script
so; importing peft and transformers anew for each of many runs would take much of the time of the
tests. One server is enough for all workers of pytest-xdist.
"""

import gc
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TIMEOUT_SECONDS = 300


@contextmanager
def start_server() -> Iterator[str]:
    """Yield the address of a server, which ends with the block or with this process."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder, "socket"))
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", __file__, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as server:
            yield address
            server.communicate()


class FreshProcess:
    """Stand in for `subprocess.run([python, "-P", script, ...], ...)`.

    Args:
        address: of a server.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def run(
        self, command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None,
        **_: Any,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Return what the script's process gave, as `subprocess.run` does."""
        assert command[:2] == [sys.executable, "-P"], command
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
            connection.settimeout(TIMEOUT_SECONDS)
            self._connect(connection)
            stream.write(json.dumps([str(cwd or Path.cwd()), env, *command[2:]]) + "\n")
            stream.flush()
            code, out, err = json.loads(stream.readline())
        return subprocess.CompletedProcess(command, code, out, err)

    def _connect(self, connection: socket.socket) -> None:
        """Connect to the server, which may only just have been started, or not have started."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                return connection.connect(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the check of publishing reload folders by `run`, in no process that waits for it."""
        from hftl.publish import reload_process

        before = reload_process.subprocess, reload_process.WaitingReload
        reload_process.subprocess = SimpleNamespace(  # pyright: ignore
            run=self.run, Popen=subprocess.Popen, PIPE=subprocess.PIPE
        )
        reload_process.WaitingReload = _NoneWaits  # pyright: ignore
        try:
            yield
        finally:
            reload_process.subprocess, reload_process.WaitingReload = before  # pyright: ignore


class _NoneWaits:
    """Stand in for the class of a waiting process: there is none. Types are made of the name."""

    def __new__(cls) -> None:  # pyright: ignore
        return None


def child(folder: str, environment: dict[str, str] | None, words: list[str]) -> int:
    """Run a script as `python -P` would."""
    os.chdir(folder)
    sys.argv = words
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
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


def answer(connection: socket.socket) -> None:
    """Run the script that a client asks for in a process of its own, and send what it gave."""
    with connection, connection.makefile("rw") as stream, tempfile.TemporaryDirectory() as folder:
        place, environment, *words = json.loads(stream.readline())
        files = [Path(folder, name) for name in ("out", "err")]
        pid = os.fork()
        if pid == 0:
            for descriptor, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            os._exit(child(place, environment, words))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outputs = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        stream.write(json.dumps([code, *outputs]) + "\n")


def serve(address: str) -> None:
    """Answer each client in a process of its own until stdin is closed."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        gc.disable()
        import peft
        import transformers

        assert peft.PeftModel and transformers.AutoModelForSequenceClassification
        assert transformers.AutoImageProcessor and "hftl" not in sys.modules
        # A collection in a child would walk through all of it, and copy the pages that it shares.
        gc.freeze()
        gc.enable()
        running: list[int] = []
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            pid = os.fork()
            if pid == 0:
                answer(connection)
                os._exit(0)
            connection.close()
            running.append(pid)
            running = [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0]


if __name__ == "__main__":
    serve(sys.argv[1])
