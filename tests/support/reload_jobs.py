"""Reload many published folders in one fresh process, which saves imports."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from support.fresh_process import FreshProcess

from hftl.publish import checks

ONE_AFTER_ANOTHER = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
for job in json.loads(Path(sys.argv[2]).read_text()):
    reload.main(*map(Path, job), "cpu")
"""


@dataclass(frozen=True)
class ReloadJob:
    """Name a published folder, the folder of its base, and the sample of inputs and logits."""

    folder: Path
    base: Path
    sample: Path


@dataclass(frozen=True)
class Reload:
    """Hold the largest difference of a logit, and the largest logit."""

    difference: float
    largest: float
    hftl_imported: bool


def reload_folders(jobs: list[ReloadJob], folder: Path, server: FreshProcess) -> list[Reload]:
    """Return what a fresh process with plain transformers, peft and timm finds of each folder.

    Args:
        jobs: the folders.
        folder: for two files of this function.
        server: starts the process.
    """
    paths = [[str(job.folder), str(job.base), str(job.sample)] for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(paths), encoding="utf-8")
    (folder / "reload.py").write_text(ONE_AFTER_ANOTHER, encoding="utf-8")
    check = Path(checks.__file__).with_name("reload_check.py")
    words = [str(folder / "reload.py"), str(check), str(folder / "jobs.json")]
    done = server.run([sys.executable, "-P", *words])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(jobs), (jobs[len(lines)].folder, done.stderr[-2000:])
    return [Reload(**json.loads(line)) for line in lines]
