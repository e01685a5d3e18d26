"""The push, through the real client, against a hub of our own in another process."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from localhub import LocalHub
from published import BASE, Pusher, pusher
from pushed import ME, hub, local, made, push, run, says

__all__ = ["hub", "made", "push", "run"]


def commits(hub: LocalHub, repo_id: str = ME) -> list[dict[str, Any]]:
    return list(hub.state["repos"][repo_id]["commits"].values())


def told(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def test_a_push_is_one_commit_of_exactly_the_publish_folder(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    code, out, err = push("publish", run, "--repo-id", ME)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"pushed   http://127\S+/me/model/commit/\w{40} \(private\)\n", out)
    first, ours = commits(hub)
    assert ours["files"] == local(run / "publish") | first["files"]
    assert hub.state["repos"][ME]["private"] and hub.state["broken"] == []
    asked = [f"{request['method']} {request['path']}" for request in hub.log]
    assert sum("/commit/" in line for line in asked) == 1
    # Nothing is made before the card was accepted and the base was seen.
    assert asked.index("POST /api/repos/create") > asked.index("POST /api/validate-yaml")
    assert asked.index("POST /api/repos/create") > asked.index(
        next(line for line in asked if f"/{BASE}" in line)
    )


def test_what_is_only_known_at_the_push_is_told(hub: LocalHub, push: Pusher, run: Path) -> None:
    head = hub.state["repos"][BASE]["refs"]["main"]
    assert push("publish", run, "--repo-id", "model")[0] == 0
    adapter = told(run, "publish/adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE, head)
    for name in ("record.json", "publish/hftl.json"):
        assert told(run, name)["published"] == {"repo_id": ME}
        assert told(run, name)["source"]["revision"] == head
    assert ME in (run / "publish" / "README.md").read_text()
    assert "forced" not in told(run, "record.json")


def test_the_same_again_makes_no_commit_and_a_change_makes_one(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME)[0] == 0
    before = hub.state["repos"]
    hub.control(faults=[])
    code, out, _ = push("publish", run, "--repo-id", ME)
    assert (code, out) == (0, "me/model holds the same already (private)\n")
    assert hub.state["repos"] == before
    assert {request["method"] for request in hub.log if "validate" not in request["path"]} == {
        "GET"
    }
    change(run)
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert len(commits(hub)) == 3
    assert hub.head(ME) == local(run / "publish") | commits(hub)[0]["files"]


def change(run: Path) -> None:
    """Other figures in the record, as a run with other settings would have, and no second plot."""
    from hftl.runtime import run_folder
    from hftl.runtime.run_folder import to_json

    record = told(run, "record.json")
    record["ladder"][0]["test"] = 0.123
    run_folder.rewrite_finished_files(run, {"record.json": to_json(record)})


def test_files_of_an_older_push_go_and_those_of_others_stay(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    old = {"hftl.json": b"{}", "model.safetensors": b"old", "assets/frontier.png": b"old"}
    hub.put(ME, old | {"LICENSE": b"mine"})
    assert push("publish", run, "--repo-id", ME)[0] == 0
    files = hub.head(ME) or {}
    assert "LICENSE" in files and "model.safetensors" not in files
    assert {k: v for k, v in files.items() if k not in ("LICENSE", ".gitattributes")} == local(
        run / "publish"
    )


def test_public_only_when_asked_and_only_after_the_commit(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    assert push("publish", run, "--repo-id", ME, "--public")[1].endswith("(public)\n")
    assert not hub.state["repos"][ME]["private"]
    asked = [f"{request['method']} {request['path']}" for request in hub.log]
    assert asked[-1] == f"PUT /api/models/{ME}/settings"


def test_a_push_of_the_same_can_make_it_public_later(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    push("publish", run, "--repo-id", ME)
    assert push("publish", run, "--repo-id", ME, "--public")[0] == 0
    assert not hub.state["repos"][ME]["private"] and len(commits(hub)) == 2


def test_a_pull_request_leaves_main_alone_and_is_opened_once(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    says(push("publish", run, "--repo-id", ME, "--pr"), 5, "there is no me/model", "without --pr")
    assert ME not in hub.state["repos"]
    hub.put(ME, {"README.md": b"theirs"}, private=True)
    before = hub.head(ME)
    code, out, _ = push("publish", run, "--repo-id", ME, "--pr")
    assert code == 0 and out.startswith("pushed   ") and "/discussions/1" in out
    assert push("publish", run, "--repo-id", ME, "--pr")[0] == 0
    repo = hub.state["repos"][ME]
    assert sorted(repo["refs"]) == ["main", "refs/pr/1"] and hub.head(ME) == before
    proposed = repo["commits"][repo["refs"]["refs/pr/1"]]["files"]
    assert proposed.items() >= local(run / "publish").items()


def test_a_dry_run_asks_what_a_push_asks_and_writes_nothing(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    before, state = local(run), hub.state
    code, out, _ = push("publish", run, "--repo-id", ME, "--dry-run")
    assert code == 0 and "adapter_model.safetensors" in out and "verdict: publish" in out
    assert "me/model would be made, private" in out and f"base     {BASE} at " in out
    assert hub.state == state and local(run) == before
    asked = {f"{request['method']} {request['path']}" for request in hub.log}
    assert {line for line in asked if not line.startswith("GET ")} == {"POST /api/validate-yaml"}
    assert push("publish", run, "--repo-id", ME)[0] == 0
    head, before = hub.state["repos"][ME]["refs"]["main"], local(run)
    code, out, _ = push("publish", run, "--repo-id", ME, "--dry-run", "--public")
    assert code == 0 and f"me/model (private) would get one commit on {head[:8]}" in out
    assert "made public" in out and hub.state["repos"][ME]["private"] and local(run) == before


def test_a_dry_run_is_refused_as_the_push_would_be(hub: LocalHub, push: Pusher, run: Path) -> None:
    """It asked no hub, listed the files and exited 0."""
    words = ("publish", run, "--dry-run", "--repo-id")
    says(push(*words, "other/model"), 5, "me is not other")
    says(push(*words, ME, "--pr"), 5, "there is no me/model to open a pull request on")
    hub.put(ME, {"model.safetensors": b"mine"})
    says(push(*words, ME), 5, "hftl did not publish: model.safetensors")
    hub.control(restore=True, drop=BASE)
    says(push(*words, ME), 5, BASE, "is not public")
    hub.control(restore=True, faults=[{"kind": "501", "path": "validate-yaml"}])
    says(push(*words, ME), 5, "HF_ENDPOINT")
    assert ME not in hub.state["repos"]


def test_a_dry_run_says_what_it_could_not_ask(
    hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    found = push("publish", run, "--dry-run")
    assert found[0] == 0 and "not asked of the hub, as no repository is named" in found[1]
    nobody = hub.environment(tmp_path / "nobody", token=None)
    offline = hub.environment(tmp_path / "offline") | {"HF_HUB_OFFLINE": "1"}
    for environment, why in ((nobody, "there is no token"), (offline, "HF_HUB_OFFLINE=1")):
        with pusher(environment) as call:
            code, out, _ = call("publish", run, "--dry-run", "--repo-id", ME)
        assert code == 0 and f"not asked of the hub, as {why}" in out
    assert hub.log == []


def test_nobody_has_said_where(push: Pusher, run: Path) -> None:
    says(push("publish", run), 2, "--repo-id", "publish.repo_id")


BASES: dict[str, tuple[Callable[[LocalHub, Path], Any], str]] = {
    "other weights": (
        lambda hub, model: hub.put(
            BASE, {"model.safetensors": scaled(model / "model.safetensors", 2)}
        ),
        "other weights",
    ),
    "private": (lambda hub, model: hub.control(hide=BASE), "is not public"),
    "not there": (lambda hub, model: hub.control(drop=BASE), "is not public"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_others_cannot_have_is_refused(
    case: str, hub: LocalHub, push: Pusher, run: Path, tiny_model: Callable[..., Path]
) -> None:
    spoil, words = BASES[case]
    spoil(hub, tiny_model())
    says(push("publish", run, "--repo-id", ME), 5, BASE, words)
    assert ME not in hub.state["repos"]


def scaled(weights: Path, by: float) -> bytes:
    """The same tensors times `by`, as another file."""
    from safetensors.torch import load_file, save

    return save({name: tensor * by for name, tensor in load_file(weights).items()})


def test_a_base_of_the_same_tensors_in_another_file_is_taken(
    hub: LocalHub, push: Pusher, run: Path, tiny_model: Callable[..., Path]
) -> None:
    again = scaled(tiny_model() / "model.safetensors", 1)
    assert again != (tiny_model() / "model.safetensors").read_bytes()
    head = hub.put(BASE, {"model.safetensors": again})
    code, _, err = push("publish", run, "--repo-id", ME)
    assert (code, err) == (0, "")
    assert told(run, "publish/adapter_config.json")["revision"] == head


@pytest.mark.parametrize("name", ["publish/README.md", "publish/hftl.json", "record.json"])
def test_a_file_that_was_changed_by_hand_is_not_pushed(
    name: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    (run / name).write_text((run / name).read_text().replace("0", "1"))
    says(push("publish", run, "--repo-id", ME), 4, name, "not what was written")
    assert hub.log == []


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors"])
def test_a_file_that_the_run_did_not_write_is_not_pushed(
    name: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    stray = run / "publish" / name
    stray.write_bytes((run / "publish" / "adapter_model.safetensors").read_bytes())
    says(push("publish", run, "--repo-id", ME), 4, name, "was not written by the run")
    assert hub.log == []


def test_a_link_is_not_followed_to_what_it_leads_to(
    hub: LocalHub, push: Pusher, run: Path, tmp_path: Path
) -> None:
    """Not even where it leads to the very file that the run wrote."""
    card = run / "publish" / "README.md"
    card.rename(tmp_path / "elsewhere.md")
    card.symlink_to(tmp_path / "elsewhere.md")
    says(push("publish", run, "--repo-id", ME), 4, "README.md is a link")
    assert hub.log == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
@pytest.mark.parametrize("command", ["card", "publish"])
def test_a_damaged_record_is_told_of(command: str, text: str, push: Pusher, run: Path) -> None:
    (run / "record.json").write_text(text, encoding="latin-1")
    says(push(command, run), 4, "record.json", "hftl run")


def test_a_card_does_not_vouch_for_a_record_that_was_changed(push: Pusher, run: Path) -> None:
    record = run / "record.json"
    record.write_text(record.read_text().replace('"seeds": 1', '"seeds": 9'))
    says(push("card", run), 4, "record.json", "not what was written")
    assert "9 seeds" not in (run / "publish" / "README.md").read_text()


LOST = ["phases/report", "phases/report/files.json", "phases/data", "phases/package/model", "arms"]


@pytest.mark.parametrize("part", [*LOST, ".lock"])
def test_a_card_of_a_run_that_lost_a_part_is_refused(part: str, push: Pusher, run: Path) -> None:
    (run / part).rename(run.parent / "lost")
    says(push("card", run), 4, str(run))


def test_a_run_that_lost_what_it_noted_is_not_pushed(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    (run / "phases" / "report").rename(run.parent / "lost")
    says(push("publish", run, "--repo-id", ME), 4, "is not finished")
    assert hub.log == []


def test_weights_whose_reload_was_not_proved_are_not_pushed(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    from hftl.runtime import run_folder

    weights = run / "publish" / "adapter_model.safetensors"
    weights.write_bytes(scaled(weights, 1.5))
    run_folder.write_finished_files(run)
    says(push("publish", run, "--repo-id", ME), 4, "adapter_model.safetensors", "proved")
    assert hub.log == []


def test_a_run_that_was_killed_while_it_wrote_can_be_pushed(
    hub: LocalHub, push: Pusher, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hftl.runtime import run_folder

    class Killed(BaseException):
        pass

    really = run_folder.write_text

    def write(path: Path, text: str) -> None:
        if path.name == "hftl.json":
            raise Killed
        really(path, text)

    changed = {f"publish/{name}": (run / "publish" / name).read_text() + " "
               for name in ("README.md", "hftl.json")}  # fmt: skip
    monkeypatch.setattr(run_folder, "write_text", write)
    with pytest.raises(Killed):
        run_folder.rewrite_finished_files(run, changed)
    monkeypatch.undo()
    assert (run / "publish" / "README.md").read_text() == changed["publish/README.md"]
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert hub.head(ME) == local(run / "publish") | commits(hub)[0]["files"]


def test_a_license_is_asked_for_and_wins_over_the_recipe(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    def stated() -> Any:
        return yaml.safe_load((run / "publish" / "README.md").read_text().split("---")[1])

    from hftl.runtime import run_folder
    from hftl.runtime.run_folder import to_json

    record = told(run, "record.json")
    record["recipe"]["publish"]["license"] = None
    run_folder.rewrite_finished_files(run, {"record.json": to_json(record)})
    warning = "warning: no license is stated"
    for more in (("--dry-run",), ()):
        assert warning in push("publish", run, "--repo-id", ME, *more)[1]
    assert "license" not in stated()
    words = ("publish", run, "--repo-id", ME, "--license")
    for more in (("--dry-run",), ()):
        code, out, _ = push(*words, "bsd", *more)
        assert code == 0 and warning not in out
    assert stated()["license"] == "bsd" and "license: bsd" in card_at(hub)
    code, out, _ = push("publish", run, "--repo-id", ME)
    assert code == 0 and warning not in out and "holds the same already" in out
    says(push(*words, "mitt"), 2, "--license", "did you mean 'mit'?")
    says(push(*words, "other"), 2, "--license other", "publish.license_name")


def card_at(hub: LocalHub) -> str:
    body = base64.b64decode(next(r for r in hub.log[::-1] if "/commit/" in r["path"])["body"])
    changes = [json.loads(line)["value"] for line in body.splitlines()]
    card = next(c for c in changes if c.get("path") == "README.md")
    return base64.b64decode(card["content"]).decode()


def test_results_for_leaderboards_go_along_and_stay_the_same(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    from hftl.runtime import run_folder
    from hftl.runtime.run_folder import to_json

    record = told(run, "record.json")
    benchmark = {"dataset": "org/reviews", "task_id": "default"}
    record["recipe"]["publish"] |= {"benchmark": benchmark, "examples": True}
    # A benchmark is a dataset of the hub, and the test set of the run.
    record["data"]["hub_revisions"]["test"] = "0" * 40
    record["recipe"]["data"]["test"] = record["recipe"]["data"]["train"] | {
        "path": "org/reviews", "format": "hub",
    }  # fmt: skip
    run_folder.rewrite_finished_files(run, {"record.json": to_json(record)})
    code, _, problem = push("card", run)
    assert code == 0, problem
    names = [".eval_results/hftl-org-reviews.yaml", "every_eval_ever.json"]
    code, out, _ = push("publish", run, "--repo-id", ME, "--dry-run")
    assert code == 0 and all(name in out for name in names)
    hub.put(ME, {".eval_results/org-reviews.yaml": b"theirs"}, private=True)
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert (hub.head(ME) or {}).keys() >= {*names, ".eval_results/org-reviews.yaml"}
    assert told(run, "publish/every_eval_ever.json")["model_info"]["id"] == ME
    assert push("publish", run, "--repo-id", ME)[1].startswith("me/model holds the same already")
    front = yaml.safe_load((run / "publish" / "README.md").read_text().split("---")[1])
    assert {shown["example_title"] for shown in front["widget"]} == {
        "true label: negative", "true label: positive"
    }  # fmt: skip
    for shown in front["widget"]:
        assert sum(one["score"] for one in shown["output"]) == pytest.approx(1, abs=1e-3)
    assert push("doctor", run)[0] == 0
