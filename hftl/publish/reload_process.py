"""Run the reload check in a fresh process, which may import its libraries before it is needed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("reload_check.py"))]


class WaitingReload:
    """Hold a process that imports the libraries of the reload check while this one works.

    It is as fresh as one that is started when it is needed: nothing of this process reaches it but
    the arguments, and it checks one folder. It ends with this process, whose end of its standard
    input is then closed.
    """

    def __init__(
        self, command: Sequence[str] = COMMAND, environment: dict[str, str] | None = None
    ) -> None:
        # A file: a pipe that nobody reads would stop it once it is full.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment or build_reload_environment(),
        )  # fmt: skip

    @property
    def is_waiting(self) -> bool:
        """Return whether it still runs: the system may have ended it to free memory."""
        return self._process.poll() is None

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Let it check the folder that the arguments name; return its outputs."""
        output, _ = self._process.communicate(json.dumps(arguments) + "\n")
        self._errors.seek(0)
        code = self._process.returncode
        return subprocess.CompletedProcess(COMMAND, code, output, self._errors.read())

    def close(self) -> None:
        """End it, if it has checked nothing."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


Process = TypeVar("Process", bound=WaitingReload)


def prepare_reload(is_needed: bool) -> AbstractContextManager[WaitingReload | None]:
    """Yield a process that waits for the reload check; see `hold_process`."""
    return hold_process(WaitingReload, is_needed)


@contextmanager
def hold_process(start: Callable[[], Process], is_needed: bool) -> Iterator[Process | None]:
    """Yield a process that waits until it is asked, and end it; None where none is needed.

    Where the system starts none, the check tries again when it is needed, and reports that.
    """
    waiting = None
    with suppress(OSError):
        waiting = start() if is_needed else None
    try:
        yield waiting
    finally:
        if waiting is not None:
            waiting.close()


def run_reload_check(
    arguments: Sequence[str], waiting: WaitingReload | None = None
) -> subprocess.CompletedProcess[str]:
    """Return the outputs of the reload check in a fresh process.

    Args:
        arguments: folder, base, sample and device, see `reload_check`.
        waiting: the process, where one was prepared.
    """
    if waiting is not None and waiting.is_waiting:
        return waiting.run(arguments)
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=build_reload_environment(),
        check=False,
    )


def build_reload_environment() -> dict[str, str]:
    """Return the environment of a process that is no part of this one's launch, without hftl."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
        environment.pop(name, None)
    return environment
