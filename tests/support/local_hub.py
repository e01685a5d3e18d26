"""Run the small hub in another process, and control it from tests."""

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

ROOT = Path(__file__).parents[2]


class LocalHub:
    """A running hub at `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def _request(self, path: str, request: Any = None) -> Any:
        body = None if request is None else json.dumps(request).encode()
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + path, body)) as answer:
            return json.loads(answer.read())

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files, and return the commit."""
        encoded = {name: base64.b64encode(content).decode() for name, content in files.items()}
        request = {"repo_id": repo_id, "files": encoded, "private": private}
        return self._request("/_control", {"put": request})["sha"]

    def control(self, **request: Any) -> None:
        """Send `keep`, `restore`, `gated`, `shows` or `faults`; the last begins a new log.

        `keep` names the present state, and `restore` brings back the state of a name.
        """
        self._request("/_control", request)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Return every request since faults were set: method, path, headers, body (base64)."""
        return self._request("/_log")

    @property
    def state(self) -> dict[str, Any]:
        """Return every commit of every repository, and what the hub saw broken."""
        return self._request("/_state")

    def head(self, repo_id: str) -> dict[str, str] | None:
        """Return the sha256 of main's files; None where there is no such repository."""
        repo = self.state["repos"].get(repo_id)
        return None if repo is None else repo["commits"][repo["refs"]["main"]]["files"]

    def environment(self, home: Path, token: str | None = "hf_me_write") -> dict[str, str]:
        """Return the environment of a command that uses this hub, with Xet disabled."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        return plain | settings | ({} if token is None else {"HF_TOKEN": token})


@contextmanager
def start_hub() -> Iterator[LocalHub]:
    """Run the hub for as long as the block lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.hub_server"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield LocalHub(process.stdout.readline().strip())
    finally:
        # Not terminate: what a process ignores, those that it starts ignore too.
        process.kill()
        process.wait()
