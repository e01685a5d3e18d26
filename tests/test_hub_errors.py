"""Check the messages about a hub that fails or refuses."""

import errno
import json
from pathlib import Path

import pytest
from conftest import sentences, write_csv
from support.local_hub import LocalHub
from support.publishing import ME, Pusher, assert_fails

from hftl.errors import format_error_line
from hftl.publish.http_retry import wrap_hub_errors
from hftl.runtime.paths import TRANSIENT_STATUSES, advise_on_status, translate_hub_errors

pytestmark = pytest.mark.usefixtures("fast_reload")


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
def test_error_line_is_not_cut_at_a_colon(text: str, line: str) -> None:
    assert format_error_line(ValueError(text)) == line


def test_only_transient_statuses_advise_to_try_again() -> None:
    again = {status for status in range(400, 512) if advise_on_status(status) == "Try again later"}
    assert again >= set(TRANSIENT_STATUSES) - {501}
    assert not again & {400, 401, 402, 403, 404, 405, 409, 410, 413, 422, 501, 507}
    assert "HF_ENDPOINT" in advise_on_status(501)


def test_a_full_disk_is_no_failure_of_the_hub() -> None:
    for translate in (translate_hub_errors("a/b", "model"), wrap_hub_errors("reading a/b")):
        with pytest.raises(OSError, match="No space"), translate:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("kind", "step"),
    [("501", "/commit/"), ("400", "repos/create"), ("501", "GET /api/models/me/model$")],
)
def test_refused_request_of_a_push_does_not_advise_to_try_again(
    kind: str, step: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.control(faults=[{"kind": kind, "path": step}])
    result = push("publish", run, "--repo-id", ME)
    assert_fails(
        result, 5, f"the hub answered {kind}: fault {kind}", "HF_ENDPOINT" if kind == "501" else ""
    )
    assert "again later" not in result[2]


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
def test_reason_why_a_hub_gives_no_model(
    kind: str, words: str, never: str, hub: LocalHub, push: Pusher, tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "new.csv", ["text", "label"], sentences(8))
    commands = [("doctor",), ("compare", "--data", table), ("predict", table)]
    # The client itself repeats what may pass, which takes its time.
    for command, *more in commands if kind in ("501", "400", "403") else commands[:1]:
        hub.control(restore="base", faults=[{"kind": kind, "path": "me/none"}])
        result = push(command, "me/none", *more)
        assert_fails(result, 5, words)
        assert never not in result[2]


def test_repository_that_the_hub_makes_public_is_an_error(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.control(shows=True)
    try:
        result = push("publish", run, "--repo-id", ME)
    finally:
        hub.control(shows=False)
    assert_fails(result, 5, "asked for a private me/model and made it public. Nothing was pushed")
    assert "is private" not in result[2] and "already" not in result[2]
    assert len(hub.state["repos"][ME]["commits"]) == 1


def test_public_repository_that_was_not_seen_at_first_is_not_called_private(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, {"README.md": b"mine"})
    before = hub.state
    hub.control(faults=[{"kind": "unseen", "path": "GET /api/models/me/model$", "times": 1}])
    result = push("publish", run, "--repo-id", ME)
    assert_fails(result, 5, "me/model is public already", "--public")
    assert "is private" not in result[2] and hub.state == before


def test_failed_download_by_xet_says_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
def test_doctor_examines_a_cached_copy_where_the_hub_is_away(
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


def test_run_and_its_copy_at_the_hub_are_compared_on_the_runs_test_items(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME)[0] == 0
    for models in ((run, ME), (ME, run)):
        code, out, err = push("compare", *models)
        assert (code, err) == (0, "") and "20 items" in out and "warning" not in out
    assert_fails(
        push("compare", ME, ME), 2, "me/model", "none is a run on this machine", "--data TABLE"
    )


def test_model_without_a_record_is_compared_with_a_warning(
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
    assert_fails(push("compare", run, "me/other"), 2, "me/other has other data or splits")
