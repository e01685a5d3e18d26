"""Speak HTTP for the small hub: requests, faults that a test sets, and what it may look at.

Paths that begin with /_ are the tests': /_control sets faults, makes repositories and keeps or
brings back a state; /_state tells all commits; /_log tells all requests without Authorization.
"""

import base64
import copy
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.hub_store import Repo, Store


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "", sha: str = "") -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Repo-Commit": sha} if sha else {}


Answer = tuple[int, dict[str, str], bytes]


def as_json(tree: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(tree).encode()


class Door:
    """The tests' own door to the hub: its store, the faults to come, and the log."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.store = Store()
        self.kept_states: dict[str, Store] = {}
        self.log: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.shows = False
        """Return whether a repository is public, whatever the request says."""

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Answer:
        """Answer a request as the hub does."""
        raise NotImplementedError

    def control(self, request: dict[str, Any]) -> Answer:
        answer: dict[str, Any] = {}
        if request.get("restore"):
            self.store = copy.deepcopy(self.kept_states[request["restore"]])
        if "put" in request:
            put = request["put"]
            files = {k: base64.b64decode(v) for k, v in put["files"].items()}
            answer["sha"] = self.store.put(put["repo_id"], files, put.get("private", False))
        if "gated" in request:
            self.store.repos[request["gated"]].gated = True
        if "shows" in request:
            self.shows = request["shows"]
        if "hide" in request:
            self.store.repos[request["hide"]].private = True
        if "drop" in request:
            del self.store.repos[request["drop"]]
        if request.get("keep"):
            self.kept_states[request["keep"]] = copy.deepcopy(self.store)
        if "faults" in request:
            self.log, self.broken, self.faults = [], [], request["faults"]
        return as_json(answer)

    def state(self) -> Answer:
        def describe(repo: Repo) -> dict[str, Any]:
            commits = {
                sha: {"parent": c.parent, "title": c.title,
                      "files": {path: blob.sha256 for path, blob in c.files.items()}}
                for sha, c in repo.commits.items()
            }  # fmt: skip
            return {"private": repo.private, "refs": repo.refs, "commits": commits}

        repos = {repo_id: describe(repo) for repo_id, repo in self.store.repos.items()}
        return as_json({"repos": repos, "broken": self.broken})

    def fault(self, number: int, method: str, path: str) -> dict[str, Any] | None:
        """The fault that this request meets; one without `times` meets the same request always."""
        for fault in self.faults:
            if fault.get("same") == [method, path] or (
                "same" not in fault
                and fault.get("at", number) == number
                and re.search(fault.get("path", ""), f"{method} {path}")
            ):
                if "times" not in fault:
                    fault["same"] = [method, path]
                elif fault["times"] == 0:
                    continue
                else:
                    fault["times"] -= 1
                return fault
        return None

    def check(self) -> None:
        """After every request: each reference leads to a whole commit, back to the first one."""
        for repo_id, repo in self.store.repos.items():
            for ref, sha in repo.refs.items():
                if sha not in repo.commits:
                    self.broken.append(f"{repo_id} {ref} leads nowhere")
                for path, blob in repo.commits[sha].files.items():
                    by_xet = repo_id in self.store.by_xet
                    if blob.lfs and blob.sha256 not in self.store.objects and not by_xet:
                        self.broken.append(f"{repo_id} {ref} {path} has no content")


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, meets them with faults, and writes answers."""

    protocol_version = "HTTP/1.1"
    hub: Door

    def do_GET(self) -> None:
        body = self._body()
        if self.path.startswith("/_"):
            self._write(self._own(body))
            return
        with self.hub.lock:
            number = len(self.hub.log)
            fault = self.hub.fault(number, self.command, self.path)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "authorization"}
            self.hub.log.append({"method": self.command, "path": self.path, "headers": headers,
                                 "body": base64.b64encode(body).decode()})  # fmt: skip
        self._meet(fault, body)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _meet(self, fault: dict[str, Any] | None, body: bytes) -> None:
        kind = fault["kind"] if fault else ""
        if kind == "slow":
            time.sleep((fault or {}).get("seconds", 3))
        elif kind == "drop":
            self.close_connection = True
            return
        elif kind == "unseen":
            self._write(as_json({"error": "none"}, 404, **{"X-Error-Code": "RepoNotFound"}))
            return
        elif kind.isdigit():
            headers = {"Retry-After": "0"} if kind == "429" else {}
            self._write(as_json({"error": f"fault {kind}"}, int(kind), **headers))
            return
        answer = self._answer(body)
        if kind == "500-after":
            answer = as_json({"error": "fault after it was done"}, 500)
        if kind == "drop-after":
            self.close_connection = True
            return
        self._write(answer, cut=kind == "truncated")

    def _answer(self, body: bytes) -> Answer:
        with self.hub.lock:
            try:
                return self.hub.answer(self.command, self.path, self.headers, body)
            except Refused as refused:
                return as_json({"error": refused.message}, refused.status, **refused.headers)
            finally:
                self.hub.check()

    def _own(self, body: bytes) -> Answer:
        with self.hub.lock:
            if self.path == "/_control":
                return self.hub.control(json.loads(body))
            return self.hub.state() if self.path == "/_state" else as_json(self.hub.log)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _write(self, answer: Answer, cut: bool = False) -> None:
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        if cut:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Nothing; /_log tells."""

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""
