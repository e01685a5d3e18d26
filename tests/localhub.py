"""The small hub in a process of its own, and what a test asks it."""

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class LocalHub:
    """A running hub at `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def _ask(self, path: str, asked: Any = None) -> Any:
        body = None if asked is None else json.dumps(asked).encode()
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + path, body)) as answer:
            return json.loads(answer.read())

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commits files; returns the commit."""
        told = {name: base64.b64encode(content).decode() for name, content in files.items()}
        asked = {"repo_id": repo_id, "files": told, "private": private}
        return self._ask("/_control", {"put": asked})["sha"]

    def control(self, **asked: Any) -> None:
        """`keep`, `restore`, `gated`, `shows` or `faults`; the last begins a new log."""
        self._ask("/_control", asked)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every request since faults were set: method, path, headers, body (base64)."""
        return self._ask("/_log")

    @property
    def state(self) -> dict[str, Any]:
        """Every commit of every repository, and what the hub found broken."""
        return self._ask("/_state")

    def head(self, repo_id: str) -> dict[str, str] | None:
        """The files of main, by their sha256; None where there is no such repository."""
        repo = self.state["repos"].get(repo_id)
        return None if repo is None else repo["commits"][repo["refs"]["main"]]["files"]

    def environment(self, home: Path, token: str | None = "hf_me_write") -> dict[str, str]:
        """The environment of a command that uses this hub, with Xet disabled."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        told = {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        return kept | told | ({} if token is None else {"HF_TOKEN": token})


@contextmanager
def running() -> Iterator[LocalHub]:
    """The hub, for as long as the block lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hubserver"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield LocalHub(process.stdout.readline().strip())
    finally:
        # Not terminate: what a process ignores, those that it starts ignore too.
        process.kill()
        process.wait()
