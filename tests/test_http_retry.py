"""Push while the hub fails: the old state stays or the new one stands, and one line says why."""

import hashlib
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.local_hub import LocalHub
from support.publishing import ME, Pusher, assert_fails, copy_run, hash_files

from hftl.measure.record import Record
from hftl.runtime import finished_files, run_folder

pytestmark = pytest.mark.usefixtures("fast_reload")

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
    # Slower than the pushes of tests wait.
    "slow": {"kind": "slow", "times": 1, "seconds": 1.3},
    "truncated": {"kind": "truncated", "times": 1},
}
PASSING = (
    "429 with Retry-After", "500 once", "500 after it was done", "dropped", "slow", "truncated",
)  # fmt: skip
"""Those that a push recovers from, whichever request they hit."""
COMMIT = "POST /api/models/me/model/commit/"


def list_requests(hub: LocalHub, push: Pusher, run: Path) -> list[str]:
    """Return the requests of a push without faults."""
    assert push("publish", run, "--repo-id", ME)[0] == 0
    return [f"{request['method']} {request['path']}" for request in hub.log]


@pytest.fixture(scope="module")
def pushed(
    finished: Path, hub: LocalHub, push: Pusher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Return a run that was pushed once, and the requests; keep the hub's state as "first"."""
    run = copy_run(finished, hub, tmp_path_factory.mktemp("first"))
    lines = list_requests(hub, push, run)
    hub.control(keep="first")
    return run, lines


@pytest.fixture
def later(pushed: tuple[Path, list[str]], hub: LocalHub, tmp_path: Path) -> Path:
    """Return the pushed run with other figures, and the hub with the first push on it."""
    hub.control(restore="first", faults=[])
    shutil.copytree(pushed[0], tmp_path / "later")
    record = Record.read(tmp_path / "later").to_dict()
    record["ladder"][0]["test"] = 0.123
    text = run_folder.to_json(record)
    finished_files.rewrite_finished_files(tmp_path / "later", {"record.json": text})
    return tmp_path / "later"


def is_new(hub: LocalHub, before: dict[str, str] | None, after: dict[str, str]) -> bool:
    """Return whether the new state stands; check that no commit is a part of a state."""
    state = hub.state
    assert state["broken"] == []
    if ME not in state["repos"]:
        assert before is None
        return False
    commits = [commit["files"] for commit in state["repos"][ME]["commits"].values()]
    new = commits[0] | after
    assert all(files in [commits[0], new, before] for files in commits)
    assert commits.count(new) <= 1
    return hub.head(ME) == new


def push_with_fault(
    hub: LocalHub, push: Pusher, run: Path, fault: str, at: int, before: dict[str, str] | None
) -> None:
    """Push with a fault at request number `at`, and once more without one."""
    hub.control(faults=[{"at": at, **FAULTS[fault]}])
    result = push("publish", run, "--repo-id", ME)
    new = is_new(hub, before, hash_files(run / "publish"))
    if fault in PASSING:
        assert result[0] == 0, result
    if result[0] == 0:
        assert new and result[2] == ""
    else:
        assert_fails(result, 5, "To repeat only the push: hftl publish")
    hub.control(faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert is_new(hub, before, hash_files(run / "publish"))


@pytest.mark.parametrize(
    ("fault", "request_"),
    [
        ("403", COMMIT), ("409", "POST /api/repos/create"), ("412", COMMIT),
        ("429 with Retry-After", "POST /me/model.git"), ("500 always", COMMIT),
        ("500 after it was done", COMMIT), ("dropped", COMMIT), ("slow", COMMIT),
    ],
)  # fmt: skip
def test_first_push_with_a_fault(
    fault: str, request_: str, pushed: tuple[Path, list[str]], hub: LocalHub, push: Pusher,
    run: Path,
) -> None:  # fmt: skip
    at = next(number for number, line in enumerate(pushed[1]) if line.startswith(request_))
    push_with_fault(hub, push, run, fault, at, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_at_every_request_of_a_first_push(
    fault: str, pushed: tuple[Path, list[str]], hub: LocalHub, push: Pusher, run: Path
) -> None:
    for at in range(len(pushed[1])):
        hub.control(restore="base")
        push_with_fault(hub, push, run, fault, at, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_at_every_request_of_a_second_push(
    fault: str, hub: LocalHub, push: Pusher, later: Path
) -> None:
    before = hub.head(ME)
    for at in range(len(list_requests(hub, push, later))):
        hub.control(restore="first")
        push_with_fault(hub, push, later, fault, at, before)


def test_lasting_fault_leaves_the_old_state(hub: LocalHub, push: Pusher, later: Path) -> None:
    before = hub.state["repos"][ME]
    hub.control(faults=[{"kind": "500", "path": "/api/models/me/model"}])
    began = time.monotonic()
    assert_fails(push("publish", later, "--repo-id", ME), 5, "500", "for too long")
    assert time.monotonic() - began < 20
    assert hub.state["repos"][ME] == before


def test_commit_of_somebody_else_is_not_overwritten(
    hub: LocalHub, push: Pusher, later: Path
) -> None:
    def commit_meanwhile() -> None:
        while not any("/commit/" in request["path"] for request in hub.log):
            time.sleep(0.01)
        hub.put(ME, {"README.md": b"theirs"})

    # The hub holds our commit back while theirs comes.
    hub.control(faults=[{"kind": "slow", "seconds": 0.5, "times": 1, "path": "/commit/"}])
    thread = threading.Thread(target=commit_meanwhile)
    thread.start()
    assert_fails(push("publish", later, "--repo-id", ME), 5, "somebody else has committed")
    thread.join()
    assert (hub.head(ME) or {})["README.md"] == hashlib.sha256(b"theirs").hexdigest()


def push_and_kill(hub: LocalHub, push: Pusher, run: Path, after: float | None) -> float:
    """Push in another process, and kill it `after` seconds from its first request on.

    Returns:
        The seconds that it lasted from there.
    """
    hub.control(faults=[])
    process = push.start("publish", run, "--repo-id", ME)
    while not hub.log:
        time.sleep(0.005)
    began = time.monotonic()
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    push.wait(process)
    return time.monotonic() - began


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_push_leaves_the_old_state_or_the_new(
    count: int, hub: LocalHub, push: Pusher, later: Path, tmp_path: Path
) -> None:
    landed = 0
    before = hub.head(ME)
    seconds = push_and_kill(hub, push, Path(shutil.copytree(later, tmp_path / "timed")), None)
    draw = random.Random(0)
    for number in range(count):
        hub.control(restore="first")
        run = Path(shutil.copytree(later, tmp_path / f"later-{number}"))
        push_and_kill(hub, push, run, draw.uniform(0, 1.1 * seconds))
        now, state = hub.head(ME), hub.state
        assert state["broken"] == [] and now is not None
        landed += now != before
        # The same command again brings the new state, whenever the first was killed.
        assert push("publish", run, "--repo-id", ME)[0] == 0
        assert now in (before, hub.head(ME)) and is_new(hub, before, hash_files(run / "publish"))
        shutil.rmtree(run)
    if count > 10:
        assert 0 < landed < count


# --- Xet, which uploads large files in another way than HTTP requests of ours ---------------------


def test_large_files_are_pushed_by_xet_in_the_same_commit(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    pytest.importorskip("hf_xet")
    assert push("publish", run, "--repo-id", ME, xet=True)[0] == 0
    lines = [f"{request['method']} {request['path']}" for request in hub.log]
    assert any("/xet-write-token/" in line for line in lines)
    assert not any(line.startswith("PUT /lfs/") for line in lines)
    assert sum("/commit/" in line for line in lines) == 1
    assert (hub.head(ME) or {}).items() >= hash_files(run / "publish").items()
    again = push("publish", run, "--repo-id", ME, xet=True)
    assert again[1].startswith("me/model holds the same already")


@pytest.mark.parametrize(
    "fault",
    [
        "501",
        "403",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("401", "500", "drop")),
    ],
)
def test_failed_xet_ends_the_push_in_one_line_that_says_how_to_do_without(
    fault: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    pytest.importorskip("hf_xet")
    hub.control(faults=[{"kind": fault, "path": "xet-write-token"}])
    words = ("me/model was made and is private", "HF_HUB_DISABLE_XET=1")
    assert_fails(push("publish", run, "--repo-id", ME, xet=True), 5, *words)
    assert len(hub.state["repos"][ME]["commits"]) == 1
    # Where another request fails, Xet is not blamed.
    hub.control(restore="base", faults=[{"kind": "501", "path": "repos/create"}])
    assert "XET" not in push("publish", run, "--repo-id", ME, xet=True)[2]
    hub.control(restore="base", faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0, "the advice is true"
