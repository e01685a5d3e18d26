"""Pushes with Xet, which uploads large files by another way than HTTP requests of ours."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from localhub import LocalHub
from published import Pusher, pusher
from pushed import ME, hub, local, made, run, says

__all__ = ["hub", "made", "run"]


@pytest.fixture(scope="module")
def push(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    """The command line with Xet enabled."""
    pytest.importorskip("hf_xet")
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    del environment["HF_HUB_DISABLE_XET"]
    with pusher(environment) as found:
        yield found


def test_large_files_go_through_xet_in_the_same_single_commit(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME)[0] == 0
    asked = [f"{request['method']} {request['path']}" for request in hub.log]
    assert any("/xet-write-token/" in line for line in asked)
    assert not any(line.startswith("PUT /lfs/") for line in asked)
    assert sum("/commit/" in line for line in asked) == 1
    assert (hub.head(ME) or {}).items() >= local(run / "publish").items()
    assert push("publish", run, "--repo-id", ME)[1].startswith("me/model holds the same already")


@pytest.mark.parametrize(
    "fault",
    ["401", "403", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("500", "drop"))],
)
def test_a_hub_that_gives_no_token_for_xet_ends_the_push_in_one_line(
    fault: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.control(faults=[{"kind": fault, "path": "xet-write-token"}])
    began = time.monotonic()
    says(push("publish", run, "--repo-id", ME), 5, "me/model was made and is private")
    assert time.monotonic() - began < 60
    assert len(hub.state["repos"][ME]["commits"]) == 1
