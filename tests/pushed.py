"""Fixtures of the push: a hub, finished runs that were made once, and a command line."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from localhub import LocalHub, running
from published import Pusher, finished_run, pusher, put_base

from hftl.runtime.run_folder import hash_file

ME = "me/model"
MADE: list[Path] = []
"""The run, once it is made: pytest takes a fixture that several files import for several."""


@pytest.fixture(scope="module")
def hub(tiny_model: Callable[..., Path]) -> Iterator[LocalHub]:
    """A hub that holds the base of the runs."""
    with running() as found:
        put_base(found, tiny_model())
        found.control(keep=True)
        yield found


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A finished run of a LoRA adapter with a native head."""
    if not MADE:
        with pytest.MonkeyPatch.context() as patch:
            MADE.append(finished_run(tmp_path_factory.mktemp("made"), tiny_model(), patch, {}))
    return MADE[0]


@pytest.fixture(scope="module")
def push(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    with pusher(hub.environment(tmp_path_factory.mktemp("home"))) as found:
        yield found


@pytest.fixture
def run(made: Path, hub: LocalHub, tmp_path: Path) -> Path:
    """A copy of the run to push, and a hub that holds the base alone."""
    return fresh(made, hub, tmp_path)


def fresh(made: Path, hub: LocalHub, folder: Path) -> Path:
    """A copy of a run under `folder`, and the hub as it was."""
    hub.control(restore=True, faults=[])
    shutil.copytree(made, folder / "run")
    return folder / "run"


def local(folder: Path) -> dict[str, str]:
    """The files of a folder by their sha256."""
    return {
        p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()
    }


def says(found: tuple[int, str, str], code: int, *words: str) -> None:
    """A failure of that code, in one line with these words."""
    assert found[0] == code, found
    assert re.fullmatch(r"hftl: error: [^\n]+\n", found[2]), found[2]
    for word in words:
        assert word in found[2], found[2]
