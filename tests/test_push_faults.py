"""A push while the hub fails: the old state stands or the new one, and one line says what."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from localhub import ROOT, LocalHub
from published import Pusher
from pushed import ME, hub, local, made, push, run, says

from hftl.measure.record import Record
from hftl.runtime import run_folder
from hftl.runtime.run_folder import to_json

__all__ = ["hub", "made", "push", "run"]

FAULTS: dict[str, dict[str, Any]] = {
    "401": {"kind": "401", "times": 1},
    "403": {"kind": "403", "times": 1},
    "404": {"kind": "404", "times": 1},
    "409": {"kind": "409", "times": 1},
    "412": {"kind": "412", "times": 1},
    "429 with Retry-After": {"kind": "429", "times": 1},
    "500 once": {"kind": "500", "times": 1},
    "500 always": {"kind": "500"},
    "500 after it was done": {"kind": "500-after", "times": 1},
    "dropped": {"kind": "drop", "times": 1},
    "slow": {"kind": "slow", "times": 1, "seconds": 1.4},
    "truncated": {"kind": "truncated", "times": 1},
}
"""The slow one is slower than the pushes of tests wait."""
PASSING = (
    "429 with Retry-After", "500 once", "500 after it was done", "dropped", "slow", "truncated",
)  # fmt: skip
"""Those that a push gets over, whichever request they meet."""


def requests_of(hub: LocalHub, push: Pusher, run: Path, *more: str) -> list[str]:
    """What a push without faults asks."""
    assert push("publish", run, "--repo-id", ME, *more)[0] == 0
    return [f"{asked['method']} {asked['path']}" for asked in hub.log]


def whole(hub: LocalHub, before: dict[str, str] | None, after: dict[str, str]) -> bool:
    """Whether the new state stands; each commit is the first, the old or the new state whole."""
    state = hub.state
    assert state["broken"] == []
    if ME not in state["repos"]:
        assert before is None
        return False
    commits = [commit["files"] for commit in state["repos"][ME]["commits"].values()]
    first = commits[0]
    known = [first, first | after] + ([before] if before else [])
    assert all(files in known for files in commits)
    # The new state is committed once at most.
    assert commits.count(first | after) <= 1
    return hub.head(ME) == first | after


def meets(
    hub: LocalHub, push: Pusher, run: Path, fault: str, at: int, before: dict[str, str] | None
) -> None:
    """A push whose request number `at` meets the fault, and the one after it, which meets none."""
    hub.control(faults=[{"at": at, **FAULTS[fault]}])
    found = push("publish", run, "--repo-id", ME)
    new = whole(hub, before, local(run / "publish"))
    if fault in PASSING:
        assert found[0] == 0, found
    if found[0] == 0:
        assert new and found[2] == ""
    else:
        says(found, 5, "To repeat only the push: hftl publish")
    hub.control(faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert whole(hub, before, local(run / "publish"))


SAMPLE = [
    ("401", "GET /api/whoami"), ("403", "POST /api/models/me/model/commit/"),
    ("404", "GET /api/models/me/model"), ("409", "POST /api/repos/create"),
    ("412", "POST /api/models/me/model/commit/"), ("429 with Retry-After", "POST /me/model.git"),
    ("500 once", "PUT /lfs/"), ("500 always", "POST /api/models/me/model/commit/"),
    ("500 after it was done", "POST /api/models/me/model/commit/"),
    ("dropped", "POST /api/models/me/model/commit/"), ("slow", "POST /api/models/me/model/commit/"),
    ("truncated", "POST /api/models/me/model/commit/"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "request_"), SAMPLE)
def test_a_first_push_that_meets_a_fault(
    fault: str, request_: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    asked = requests_of(hub, push, run)
    at = next(number for number, line in enumerate(asked) if line.startswith(request_))
    hub.control(restore=True)
    meets(hub, push, run, fault, at, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_a_first_push_meets_the_fault(
    fault: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    asked = requests_of(hub, push, run)
    for at in range(len(asked)):
        hub.control(restore=True)
        meets(hub, push, run, fault, at, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_a_second_push_meets_the_fault(
    fault: str, hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    later = changed(hub, push, run, tmp_path)
    before = hub.head(ME)
    hub.control(faults=[])
    asked = requests_of(hub, push, later)
    for at in range(len(asked)):
        again(hub, push, run)
        meets(hub, push, later, fault, at, before)


def changed(hub: LocalHub, push: Pusher, run: Path, tmp_path: Path) -> Path:
    """Pushes a run; a copy of it with other figures."""
    assert push("publish", run, "--repo-id", ME)[0] == 0
    later = tmp_path / "later"
    shutil.copytree(run, later)
    record = Record.read(later).to_dict()
    record["ladder"][0]["test"] = 0.123
    run_folder.rewrite_finished_files(later, {"record.json": to_json(record)})
    return later


def again(hub: LocalHub, push: Pusher, run: Path) -> None:
    """The hub with the first run alone on it."""
    hub.control(restore=True, faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0


def test_a_fault_of_the_hub_that_lasts_leaves_what_stood(
    hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    later = changed(hub, push, run, tmp_path)
    before = hub.state["repos"][ME]
    hub.control(faults=[{"kind": "500", "path": "/api/models/me/model"}])
    began = time.monotonic()
    says(push("publish", later, "--repo-id", ME), 5, "500", "for too long")
    assert time.monotonic() - began < 20
    assert hub.state["repos"][ME] == before


def test_somebody_else_who_commits_meanwhile_is_not_overwritten(
    hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    later = changed(hub, push, run, tmp_path)
    hub.control(faults=[{"kind": "slow", "seconds": 0.5, "times": 1, "path": "/commit/"}])
    with sneaking(hub) as theirs:
        says(push("publish", later, "--repo-id", ME), 5, "somebody else has committed")
    head = hub.head(ME) or {}
    assert head["README.md"] == theirs and hub.log


class sneaking:  # noqa: N801 (reads as a function)
    """Commits to the repository while the hub holds a commit back."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub

    def __enter__(self) -> str:
        import hashlib
        import threading

        def sneak() -> None:
            while not any("/commit/" in asked["path"] for asked in self.hub.log):
                time.sleep(0.01)
            self.hub.put(ME, {"README.md": b"theirs"})

        self.thread = threading.Thread(target=sneak)
        self.thread.start()
        return hashlib.sha256(b"theirs").hexdigest()

    def __exit__(self, *error: Any) -> None:
        self.thread.join()


def killed(hub: LocalHub, run: Path, home: Path, after: float) -> float:
    """A push in a process of its own, killed `after` seconds from its first request on.

    Gives the seconds that it lasted from there.
    """
    hub.control(faults=[])
    process = subprocess.Popen(
        [sys.executable, "-m", "hftl", "publish", str(run), "--repo-id", ME],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=hub.environment(home),
    )  # fmt: skip
    while process.poll() is None and not hub.log:
        time.sleep(0.005)
    began = time.monotonic()
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - began


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_push_that_is_killed_leaves_the_old_state_or_the_new(
    count: int, hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    landed = 0
    pushed = changed(hub, push, run, tmp_path)
    before = hub.head(ME)
    shutil.copytree(pushed, tmp_path / "timed")
    lasts = killed(hub, tmp_path / "timed", tmp_path / "home", 60)
    draw = random.Random(0)
    for number in range(count):
        after = draw.uniform(0, 1.1 * lasts)
        again(hub, push, run)
        later = tmp_path / f"later-{number}"
        shutil.copytree(pushed, later)
        killed(hub, later, tmp_path / "home", after)
        now = hub.head(ME)
        state = hub.state
        assert state["broken"] == [] and now is not None
        landed += now != before
        # The same again brings the new state, whenever it was stopped.
        assert push("publish", later, "--repo-id", ME)[0] == 0
        after_all = local(later / "publish")
        assert now in (before, hub.head(ME)) and whole(hub, before, after_all)
        shutil.rmtree(later)
    if count > 10:
        assert 0 < landed < count
