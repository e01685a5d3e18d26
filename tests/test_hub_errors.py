"""What is said of a hub that fails or refuses, by unit and by commands against a hub of our own."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import sentences, write_csv
from localhub import LocalHub
from published import Pusher, pusher
from pushed import ME, hub, made, push, run, says

from hftl.errors import format_error_line
from hftl.publish.http_retry import wrap_hub_errors
from hftl.runtime.paths import TRANSIENT_STATUSES, advise_on_status, translate_hub_errors

__all__ = ["hub", "made", "push", "run"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo", "one"),
        ("Error(s) in loading state_dict for X:\n\tsize mismatch for a\nand so on",
         "Error(s) in loading state_dict for X: size mismatch for a"),
        ("\n\nBad request for commit endpoint:\n\n  \"base_model\" is not valid",
         'Bad request for commit endpoint: "base_model" is not valid'),
        ("a:\nb:\nc\nd", "a: b: c"),
        ("nothing follows:", "nothing follows"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_a_reason_is_not_cut_off_at_its_colon(text: str, line: str) -> None:
    assert format_error_line(ValueError(text)) == line


def test_only_what_passes_by_itself_is_to_be_tried_again() -> None:
    again = {status for status in range(400, 512) if advise_on_status(status) == "Try again later"}
    assert again >= set(TRANSIENT_STATUSES) - {501}
    assert not again & {400, 401, 402, 403, 404, 405, 409, 410, 413, 422, 501, 507}
    assert "HF_ENDPOINT" in advise_on_status(501)


def test_a_full_disk_is_no_failure_of_the_hub() -> None:
    for translate in (translate_hub_errors("a/b", "model"), wrap_hub_errors("reading a/b")):
        with pytest.raises(OSError, match="No space"), translate:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["/commit/", "repos/create", "GET /api/models/me/model$"])
@pytest.mark.parametrize("kind", ["501", "400"])
def test_what_a_hub_does_not_offer_is_not_to_be_tried_again(
    kind: str, step: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.control(faults=[{"kind": kind, "path": step}])
    found = push("publish", run, "--repo-id", ME)
    says(found, 5, f"the hub answered {kind}: fault {kind}", "HF_ENDPOINT" if kind == "501" else "")
    assert "again later" not in found[2]


@pytest.mark.parametrize(
    ("kind", "words", "never"),
    [
        ("501", "HTTP 501: fault 501). This hub does not offer it", "again later"),
        ("503", "HTTP 503: fault 503). Try again later", "auth login"),
        ("429", "HTTP 429: fault 429). Try again later", "auth login"),
        ("400", "that id: HTTP 400: fault 400. Check", "request:."),
        ("403", "that id: HTTP 403: fault 403. Check", "None"),
        ("unseen", "that id: HTTP 404: none. Check", "Client Error"),
        ("drop", "the hub cannot be reached: Server disconnected", "a bug in hftl"),
    ],
)
def test_why_a_hub_gives_no_model(
    kind: str, words: str, never: str, hub: LocalHub, push: Pusher, tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "new.csv", ["text", "label"], sentences(8))
    commands = [("doctor",), ("compare", "--data", table), ("predict", table)]
    # The client itself repeats what may pass, which takes its time.
    for command, *more in commands if kind in ("501", "400", "403") else commands[:1]:
        hub.control(restore=True, faults=[{"kind": kind, "path": "me/none"}])
        found = push(command, "me/none", *more)
        says(found, 5, words)
        assert never not in found[2]


def test_a_repository_that_a_hub_makes_public_is_told_once(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    """It was `public already`, and `was made and is private`, in one sentence."""
    hub.control(shows=True)
    try:
        found = push("publish", run, "--repo-id", ME)
    finally:
        hub.control(shows=False)
    says(found, 5, "asked for a private me/model and made it public. Nothing was pushed")
    assert "is private" not in found[2] and "already" not in found[2]
    assert len(hub.state["repos"][ME]["commits"]) == 1


def test_a_public_repository_that_was_not_seen_at_first_is_not_called_private(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, {"README.md": b"mine"})
    before = hub.state
    hub.control(faults=[{"kind": "unseen", "path": "GET /api/models/me/model$", "times": 1}])
    found = push("publish", run, "--repo-id", ME)
    says(found, 5, "me/model is public already", "--public")
    assert "is private" not in found[2] and hub.state == before


@pytest.fixture
def with_xet(hub: LocalHub, tmp_path: Path) -> Iterator[Pusher]:
    pytest.importorskip("hf_xet")
    environment = hub.environment(tmp_path / "home")
    del environment["HF_HUB_DISABLE_XET"]
    with pusher(environment) as found:
        yield found


@pytest.mark.parametrize("kind", ["501", "403"])
def test_a_push_that_fails_by_xet_says_how_to_do_without(
    kind: str, hub: LocalHub, with_xet: Pusher, push: Pusher, run: Path
) -> None:
    hub.control(faults=[{"kind": kind, "path": "xet-write-token"}])
    says(with_xet("publish", run, "--repo-id", ME), 5, "HF_HUB_DISABLE_XET=1")
    # Where something else fails, it is no matter of Xet.
    hub.control(restore=True, faults=[{"kind": "501", "path": "repos/create"}])
    assert "XET" not in with_xet("publish", run, "--repo-id", ME)[2]
    hub.control(restore=True, faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0, "the advice is true"


def test_a_download_that_fails_by_xet_says_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client's own function raises, as where the storage of a hub is out of reach."""
    from huggingface_hub import constants, file_download

    from hftl.runtime.paths import make_hub_load_error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def failure() -> Exception:
        try:
            file_download.xet_get(incomplete_path=None, xet_file_data=None, headers={})  # pyright: ignore
        except (AttributeError, TypeError) as error:
            return error
        raise AssertionError("it cannot succeed")

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1" in make_hub_load_error(failure(), "a/b", "model").fix
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert "XET" not in str(make_hub_load_error(failure(), "a/b", "model"))


@pytest.mark.slow
@pytest.mark.parametrize("away", ["drop", "501"])
def test_the_doctor_examines_a_copy_in_the_cache_where_the_hub_is_away(
    away: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert push("doctor", ME)[0] == 0
    faults = [{"kind": "501", "path": "me/model/revision"}, {"kind": away, "path": "me/model/tree"}]
    hub.control(faults=faults)
    code, out, err = push("doctor", ME)
    assert (code, err) == (0, "")
    assert "not examined: files that are not in the cache" in out
    assert "sound in what was examined" in out


def test_a_run_and_its_copy_at_the_hub_are_compared_on_the_runs_test(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    """The command asked for a table, though the run has the test items of both."""
    assert push("publish", run, "--repo-id", ME)[0] == 0
    for models in ((run, ME), (ME, run)):
        code, out, err = push("compare", *models)
        assert (code, err) == (0, "") and "20 items" in out and "warning" not in out
    says(push("compare", ME, ME), 2, "me/model", "none is a run on this machine", "--data TABLE")


def test_a_model_without_a_record_is_compared_with_a_warning(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    files = {p.name: p.read_bytes() for p in (run / "publish").iterdir() if p.is_file()}
    record = files.pop("hftl.json")
    hub.put("me/plain", files, private=True)
    code, out, _ = push("compare", run, "me/plain")
    assert code == 0 and "warning: what me/plain was trained on is not recorded" in out
    other = json.loads(record)
    other["data"]["fingerprint"] = "0" * 64
    hub.put("me/other", files | {"hftl.json": json.dumps(other).encode()}, private=True)
    says(push("compare", run, "me/other"), 2, "me/other has other data or splits")
