"""Start a run over: its old results go only when nothing of the new run can be refused any more."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hftl.runtime.run_folder import RESULTS

REPLACED = ".replaced"
"""Where the results are that a restart is about to replace."""


@contextmanager
def set_results_aside(run: Path) -> Iterator[None]:
    """Move a run's results aside, and remove them at the end; put them back where the body fails.

    The recipe stays, since it marks the folder as a run's. After a kill the next run restores the
    results.
    """
    aside = run / REPLACED
    aside.mkdir()
    for name in RESULTS:
        if (run / name).exists():
            (run / name).rename(aside / name)
    with ExitStack() as stack:
        stack.callback(restore_results, run)
        yield
        stack.pop_all()
    # A kill in the middle of the removal must not bring back what is left.
    unneeded = aside.rename(run / f".tmp-{REPLACED}")
    shutil.rmtree(unneeded)
    (run / "log.txt").unlink(missing_ok=True)


def restore_results(run: Path) -> None:
    """Put back the results that a restart has moved aside, instead of those made since."""
    aside = run / REPLACED
    if not aside.exists():
        return
    for path in sorted(aside.iterdir()):
        made_since = run / path.name
        if made_since.is_dir():
            shutil.rmtree(made_since)
        path.rename(made_since)
    aside.rmdir()
