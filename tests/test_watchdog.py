"""Let one of two processes do nothing: both end within the limit, and the line names it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hftl.errors import RecipeError
from hftl.runtime import watchdog

ROOT = Path(__file__).parent.parent
PROCESS = """
import sys, time
from pathlib import Path
from hftl.runtime import watchdog
watchdog.REPORT_SECONDS = 0.3
folder, rank, hangs = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hangs"

def report(error):
    (folder / "error.json").write_text(str(error))

with watchdog.watch_processes(folder, report):
    time.sleep(0.7)  # Nothing is expected before the training.
    with watchdog.expect_beats():
        with watchdog.suspend_watch():
            time.sleep(0.7)  # The other computes alone.
        for step in range(9):
            if hangs and rank == 1 and step == 5:
                time.sleep(60)
            watchdog.beat()
            while hangs and step == 6:
                time.sleep(0.1)  # It waits for the other.
            time.sleep(0.05)
    time.sleep(0.7)  # Nor after it.
"""


@pytest.mark.parametrize("case", ["hangs", pytest.param("goes on", marks=pytest.mark.slow)])
def test_process_that_hangs_ends_all_and_is_named(case: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), watchdog.VARIABLE: "0.5",
    }  # fmt: skip
    started = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(rank), case],
                         env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    codes = [process.wait(timeout=30) for process in processes]
    if case == "goes on":
        assert codes == [0, 0] and not (tmp_path / "error.json").exists()
        return
    assert codes == [8, 8] and time.monotonic() - started < 15
    message = (tmp_path / "error.json").read_text()
    assert message.startswith("process 1 of the run did nothing for 0.5 s")
    log = (tmp_path / "log.txt").read_text()
    assert all(f"process {rank} waits, or does nothing" in log for rank in range(2))
    assert log.count("_watch") >= 2 and "<string>" in log


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_limit_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(watchdog.VARIABLE, text)
    with pytest.raises(RecipeError, match=f"HFTL_WATCHDOG_SECONDS={text}"):
        watchdog.read_limit()


def test_one_process_is_not_watched(tmp_path: Path) -> None:
    with watchdog.watch_processes(tmp_path, print), watchdog.expect_beats():
        watchdog.beat()
        assert not list(tmp_path.iterdir())
