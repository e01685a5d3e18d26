"""Load folders in a fresh process that imports its libraries while this one imports the same."""

import json
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from subprocess import CompletedProcess

from hftl.publish.reload_process import WaitingReload, build_reload_environment, hold_process

COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("load_once.py"))]
LOAD_TIMEOUT_SECONDS = 600


class LoadProcess(WaitingReload):
    """Hold a process that answers a request after the other; it ends where one fails."""

    def __init__(self) -> None:
        super().__init__(COMMAND, build_load_environment())

    def run(self, arguments: Sequence[str]) -> CompletedProcess[str]:
        """Let it check the reload that the arguments name; return its outputs."""
        return self._ask({"sample": arguments})

    def load(self, arguments: Sequence[str]) -> CompletedProcess[str]:
        """Let it load what the arguments name, once a seed; return its outputs."""
        return self._ask({"loads": arguments})

    def _ask(self, request: dict[str, Sequence[str]]) -> CompletedProcess[str]:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(LOAD_TIMEOUT_SECONDS, end)
        timer.daemon = True  # The end of this process, such as by a signal, does not wait for it.
        timer.start()
        answer = ""
        try:
            with suppress(BrokenPipeError):  # It has ended: its code and its last words say why.
                requests.write(json.dumps(request) + "\n")
                requests.flush()
                answer = answers.readline()
        finally:
            timer.cancel()
        if answer:
            return CompletedProcess(COMMAND, 0, answer, "")
        code = self._process.wait()
        self._errors.seek(0)
        late = f"it took more than {LOAD_TIMEOUT_SECONDS} s"
        words = late if is_late.is_set() else self._errors.read()
        return CompletedProcess(COMMAND, code or 1, "", words)


def prepare_loads(is_needed: bool) -> AbstractContextManager[LoadProcess | None]:
    """Yield a process that waits for what is to be loaded; see `hold_process`."""
    return hold_process(LoadProcess, is_needed)


def build_load_environment() -> dict[str, str]:
    """Return the environment of a process that loads a stranger's folder, without the hub."""
    return build_reload_environment() | {"HF_HUB_OFFLINE": "1"}
