"""A push to a repository that somebody has filled or shown already."""

from pathlib import Path

import pytest
from localhub import LocalHub
from published import Pusher
from pushed import ME, hub, local, made, push, run, says

__all__ = ["hub", "made", "push", "run"]
THEIRS = {"README.md": b"mine", "model.safetensors": b"mine", "notes.md": b"mine"}


def test_a_model_that_hftl_did_not_publish_is_left_alone(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, THEIRS, private=True)
    before = hub.state
    words = ("hftl did not publish: model.safetensors. Nothing", "another --repo-id", "remove it")
    found = push("publish", run, "--repo-id", ME)
    says(found, 5, *words)
    assert "To repeat" not in found[2]
    assert hub.state == before


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json",
                                  "adapter_model.safetensors"])  # fmt: skip
def test_whatever_a_push_would_replace_or_delete_counts(
    name: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, {name: b"mine"})
    says(push("publish", run, "--repo-id", ME), 5, f"hftl did not publish: {name}")


def test_the_page_that_the_hub_makes_is_no_model(hub: LocalHub, push: Pusher, run: Path) -> None:
    hub.put(ME, {"README.md": b"---\nlicense: mit\n---\n"}, private=True)
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert (hub.head(ME) or {}).items() >= local(run / "publish").items()


def test_a_pull_request_says_what_it_would_replace(hub: LocalHub, push: Pusher, run: Path) -> None:
    hub.put(ME, THEIRS, private=True)
    before = hub.head(ME)
    code, out, _ = push("publish", run, "--repo-id", ME, "--pr")
    assert code == 0 and "/discussions/1" in out and hub.head(ME) == before
    assert "merged, it replaces a model that hftl did not publish: model.safetensors" in out


@pytest.mark.parametrize("more", [(), ("--pr",)])
def test_what_shall_be_private_is_not_shown_by_a_public_repository(
    more: tuple[str, ...], hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, {"README.md": b"mine"})
    before = hub.state
    says(push("publish", run, "--repo-id", ME, *more), 5, "is public already", "--public")
    assert hub.state == before
    assert push("publish", run, "--repo-id", ME, "--public", *more)[1].endswith("(public)\n")


def test_what_hftl_made_public_takes_the_next_push_as_it_is(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME, "--public")[0] == 0
    hub.put(ME, {"README.md": b"edited by hand"})
    found = push("publish", run, "--repo-id", ME)
    assert found[0] == 0 and found[1].startswith("pushed   ") and found[1].endswith("(public)\n")
