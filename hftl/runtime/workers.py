"""Start processes of this program that work alone, each on its device, and end with their parent.

A worker has none of a launcher's variables in its environment, so that all in it is as in a run of
one process. Its standard input is a pipe that nobody writes to: at its end the parent is gone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hftl.runtime.interruption import exit_on_notices

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PMI_", "OMPI_COMM_WORLD_", "MV2_")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE_SECONDS = 25.0
"""Seconds in which a process that was asked to end can do so, after a checkpoint if it trains."""


def build_environment(
    environment: Mapping[str, str], device: int | None, threads: int | None
) -> dict[str, str]:
    """Return the environment of a worker.

    Args:
        environment: of this process.
        device: the number of its accelerator among those visible here; None leaves it all.
        threads: of its computations on a CPU; None leaves what is set.
    """
    own = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    if device is not None:
        visible = [name for name in own.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        own["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
    if threads is not None:
        own |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    return own


@contextmanager
def start_workers(
    module: str, arguments: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]],
    outputs: Sequence[Path],
) -> Iterator[list[subprocess.Popen[bytes]]]:  # fmt: skip
    """Run a module in processes of their own, and end those that still run after the block.

    Args:
        module: whose `main` is called.
        arguments: of each process, its `sys.argv[1:]`.
        environments: of each process.
        outputs: the file that each process prints to.
    """
    # The same modules are found as here, however this process found them.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from hftl.runtime.imports import pause_collections; pause_collections(); "
        f"from {module} import main; main()"
    )
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for words, environment, output in zip(arguments, environments, outputs, strict=True):
            with open(output, "ab") as screen:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *words],
                        env=dict(environment),
                        stdin=subprocess.PIPE,
                        stdout=screen,
                        stderr=screen,
                    )  # fmt: skip
                )
        yield workers
    finally:
        _end_workers(workers)


def _end_workers(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the workers to end, and kill those that do not in time."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()


def follow_parent() -> None:
    """End this worker when its parent does, however that ended; call it first in a worker."""
    # A terminal sends Ctrl-C to all of its processes, and the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_on_notices()
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # Not sys.stdin: its lock, held here, would be missed at the interpreter's end.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)
