"""Push through the real client to a hub in another process."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.local_hub import LocalHub
from support.publishing import BASE, ME, Pusher, assert_fails, copy_run, hash_files

from hftl.doctor.checks import examine_adapter
from hftl.runtime import finished_files, run_folder
from hftl.runtime.run_folder import to_json

pytestmark = pytest.mark.usefixtures("fast_reload")

THEIRS = {"README.md": b"mine", "model.safetensors": b"mine", "notes.md": b"mine"}


def commits(hub: LocalHub) -> list[dict[str, Any]]:
    return list(hub.state["repos"][ME]["commits"].values())


def requests(hub: LocalHub) -> list[str]:
    return [f"{request['method']} {request['path']}" for request in hub.log]


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def read_front(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "publish" / "README.md").read_text().split("---")[1])


def rewrite_record(run: Path, record: dict[str, Any]) -> None:
    finished_files.rewrite_finished_files(run, {"record.json": to_json(record)})


def scaled(weights: Path, by: float) -> bytes:
    """Return the same tensors times `by`, as another file."""
    from safetensors.torch import load_file, save

    return save({name: tensor * by for name, tensor in load_file(weights).items()})


@pytest.fixture(scope="module")
def pushed(
    finished: Path, hub: LocalHub, push: Pusher, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run that was pushed once, which leaves the hub's state "pushed"."""
    run = copy_run(finished, hub, tmp_path_factory.mktemp("pushed"))
    code, out, err = push("publish", run, "--repo-id", "model")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"pushed   http://127\S+/me/model/commit/\w{40} \(private\)\n", out)
    hub.control(keep="pushed")
    return run


@pytest.fixture
def pushed_run(pushed: Path, hub: LocalHub, tmp_path: Path) -> Path:
    """Return a copy of the pushed run, with the hub as the push left it."""
    run = copy_run(pushed, hub, tmp_path)
    hub.control(restore="pushed")
    return run


def test_push_is_one_commit_of_exactly_the_publish_folder(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    head = hub.state["repos"][BASE]["refs"]["main"]
    assert push("publish", run, "--repo-id", "model")[0] == 0
    first, ours = commits(hub)
    assert ours["files"] == hash_files(run / "publish") | first["files"]
    assert hub.state["repos"][ME]["private"] and hub.state["broken"] == []
    lines = requests(hub)
    assert sum("/commit/" in line for line in lines) == 1
    # Nothing is created before the card is accepted and the base is seen.
    created = lines.index("POST /api/repos/create")
    assert created > lines.index("POST /api/validate-yaml")
    assert created > lines.index(next(line for line in lines if f"/{BASE}" in line))
    # What is known only now is written: the repository and the base's commit.
    adapter = read(run, "publish/adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE, head)
    for name in ("record.json", "publish/hftl.json"):
        assert read(run, name)["published"] == {"repo_id": ME}
        assert read(run, name)["source"]["revision"] == head
    assert ME in (run / "publish" / "README.md").read_text()
    assert "forced" not in read(run, "record.json")


def test_second_push_makes_a_commit_only_after_a_change(
    hub: LocalHub, push: Pusher, pushed_run: Path
) -> None:
    before = hub.state["repos"]
    code, out, _ = push("publish", pushed_run, "--repo-id", ME)
    assert (code, out) == (0, "me/model holds the same already (private)\n")
    assert hub.state["repos"] == before
    assert {line.split()[0] for line in requests(hub) if "validate" not in line} == {"GET"}
    record = read(pushed_run, "record.json")
    record["ladder"][0]["test"] = 0.123
    rewrite_record(pushed_run, record)
    assert push("publish", pushed_run, "--repo-id", ME)[0] == 0
    assert len(commits(hub)) == 3
    assert hub.head(ME) == hash_files(pushed_run / "publish") | commits(hub)[0]["files"]


def test_rewritten_card_still_names_the_repository(
    hub: LocalHub, push: Pusher, pushed_run: Path
) -> None:
    before = hash_files(pushed_run / "publish")
    page = (pushed_run / "report.html").read_text()
    assert f"load(&quot;{ME}&quot;)" in page and "Where it is wrong" in page
    assert push("card", pushed_run)[0] == 0
    assert (pushed_run / "report.html").read_text() == page
    assert hash_files(pushed_run / "publish")["README.md"] == before["README.md"]
    assert push("publish", pushed_run, "--repo-id", ME)[1].startswith("me/model holds the same")


def test_files_of_an_older_push_are_deleted_and_those_of_others_stay(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    old = {"hftl.json": b"{}", "model.safetensors": b"old", "assets/frontier.png": b"old"}
    hub.put(ME, old | {"LICENSE": b"mine"})
    assert push("publish", run, "--repo-id", ME)[0] == 0
    files = hub.head(ME) or {}
    ours = {name: sha for name, sha in files.items() if name not in ("LICENSE", ".gitattributes")}
    assert "LICENSE" in files and ours == hash_files(run / "publish")


def test_public_is_set_only_on_request_and_after_the_commit(
    hub: LocalHub, push: Pusher, pushed_run: Path
) -> None:
    assert push("publish", pushed_run, "--repo-id", ME, "--public")[0] == 0
    assert not hub.state["repos"][ME]["private"] and len(commits(hub)) == 2
    hub.control(restore="base", faults=[])
    assert push("publish", pushed_run, "--repo-id", ME, "--public")[1].endswith("(public)\n")
    assert not hub.state["repos"][ME]["private"]
    assert requests(hub)[-1] == f"PUT /api/models/{ME}/settings"
    # Once hftl has made it public, the next push needs no flag.
    hub.put(ME, {"README.md": b"edited by hand"})
    code, out, _ = push("publish", pushed_run, "--repo-id", ME)
    assert code == 0 and out.startswith("pushed   ") and out.endswith("(public)\n")


def test_pull_request_leaves_main_alone_and_is_opened_once(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    words = ("publish", run, "--repo-id", ME, "--pr")
    assert_fails(push(*words), 5, "there is no me/model", "without --pr")
    assert ME not in hub.state["repos"]
    hub.put(ME, THEIRS, private=True)
    before = hub.head(ME)
    code, out, _ = push(*words)
    assert code == 0 and out.startswith("pushed   ") and "/discussions/1" in out
    assert "merged, it replaces a model that hftl did not publish: model.safetensors" in out
    assert push(*words)[0] == 0
    repo = hub.state["repos"][ME]
    assert sorted(repo["refs"]) == ["main", "refs/pr/1"] and hub.head(ME) == before
    proposed = repo["commits"][repo["refs"]["refs/pr/1"]]["files"]
    assert proposed.items() >= hash_files(run / "publish").items()


def test_dry_run_checks_what_a_push_checks_and_writes_nothing(
    hub: LocalHub, push: Pusher, run: Path, pushed: Path
) -> None:
    before, state = hash_files(run), hub.state
    code, out, _ = push("publish", run, "--repo-id", ME, "--dry-run")
    assert code == 0 and "adapter_model.safetensors" in out and "verdict: publish" in out
    assert "me/model would be made, private" in out and f"base     {BASE} at " in out
    assert hub.state == state and hash_files(run) == before
    writes = {line for line in requests(hub) if not line.startswith("GET ")}
    assert writes == {"POST /api/validate-yaml"}
    hub.control(restore="pushed")
    head, before = hub.state["repos"][ME]["refs"]["main"], hash_files(pushed)
    code, out, _ = push("publish", pushed, "--repo-id", ME, "--dry-run", "--public")
    assert code == 0 and f"me/model (private) would get one commit on {head[:8]}" in out
    assert "made public" in out and hub.state["repos"][ME]["private"]
    assert hash_files(pushed) == before


def test_dry_run_is_refused_as_the_push_would_be(hub: LocalHub, push: Pusher, run: Path) -> None:
    words = ("publish", run, "--dry-run", "--repo-id")
    assert_fails(push(*words, "other/model"), 5, "me is not other")
    assert_fails(push(*words, ME, "--pr"), 5, "there is no me/model to open a pull request on")
    hub.put(ME, {"model.safetensors": b"mine"})
    assert_fails(push(*words, ME), 5, "hftl did not publish: model.safetensors")
    hub.control(restore="base", drop=BASE)
    assert_fails(push(*words, ME), 5, BASE, "is not public")
    hub.control(restore="base", faults=[{"kind": "501", "path": "validate-yaml"}])
    assert_fails(push(*words, ME), 5, "HF_ENDPOINT")
    assert ME not in hub.state["repos"]


def test_dry_run_lists_all_that_is_in_the_way_and_exits_as_the_push_would(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    for name in ("record.json", "publish/hftl.json"):
        record = read(run, name)
        record["verdict"] = {"decision": "hold", "reasons": ["because"]}
        record["source"]["published_as"] = None
        finished_files.rewrite_finished_files(run, {name: to_json(record)})
    words = ("publish", run, "--repo-id", "other/model", "--public")
    code, out, err = push(*words, "--dry-run")
    assert code == 9 == push(*words)[0] and "the verdict is hold: because" in err
    assert "to: other/model, public" in out
    ways = [line for line in out.splitlines() if line.startswith("also in the way: ")]
    assert len(ways) == 2
    assert "no public id" in ways[0] and "source.published_as" in ways[0]
    assert "me is not other" in ways[1]


def test_dry_run_names_what_it_could_not_check(hub: LocalHub, push: Pusher, run: Path) -> None:
    for words, how, why in (
        ((), {}, "no repository is named"),
        (("--repo-id", ME), {"token": None}, "there is no token"),
        (("--repo-id", ME), {"offline": True}, "HF_HUB_OFFLINE=1"),
    ):
        code, out, _ = push("publish", run, "--dry-run", *words, **how)
        assert code == 0 and f"not asked of the hub, as {why}" in out
    assert hub.log == []
    assert_fails(push("publish", run), 2, "--repo-id", "publish.repo_id")


@pytest.mark.parametrize("case", ["other weights", "private", "missing"])
def test_base_that_others_cannot_load_is_refused(
    case: str, hub: LocalHub, push: Pusher, run: Path, tiny_model: Callable[..., Path]
) -> None:
    if case == "other weights":
        hub.put(BASE, {"model.safetensors": scaled(tiny_model() / "model.safetensors", 2)})
    else:
        hub.control(**{"hide" if case == "private" else "drop": BASE})
    reason = "other weights" if case == "other weights" else "is not public"
    assert_fails(push("publish", run, "--repo-id", ME), 5, BASE, reason)
    assert ME not in hub.state["repos"]


def test_base_of_the_same_tensors_in_another_file_is_accepted(
    hub: LocalHub, push: Pusher, run: Path, tiny_model: Callable[..., Path]
) -> None:
    again = scaled(tiny_model() / "model.safetensors", 1)
    assert again != (tiny_model() / "model.safetensors").read_bytes()
    head = hub.put(BASE, {"model.safetensors": again})
    assert push("publish", run, "--repo-id", ME, "--dry-run")[::2] == (0, "")
    assert f"at {head[:8]}" in push("publish", run, "--repo-id", ME, "--dry-run")[1]


# --- a run folder that is not as it was written --------------------------------------------------


@pytest.mark.parametrize("name", ["publish/README.md", "publish/hftl.json", "record.json"])
def test_file_changed_by_hand_is_not_pushed(
    name: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    (run / name).write_text((run / name).read_text().replace("0", "1"))
    assert_fails(push("publish", run, "--repo-id", ME), 4, name, "not what was written")
    assert hub.log == []


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors"])
def test_file_that_the_run_did_not_write_is_not_pushed(
    name: str, hub: LocalHub, push: Pusher, run: Path
) -> None:
    (run / "publish" / name).write_bytes(b"0")
    assert_fails(push("publish", run, "--repo-id", ME), 4, name, "was not written by the run")
    assert hub.log == []


def test_link_is_not_followed(hub: LocalHub, push: Pusher, run: Path, tmp_path: Path) -> None:
    # Not even to the very file that the run wrote.
    card = run / "publish" / "README.md"
    card.rename(tmp_path / "elsewhere.md")
    card.symlink_to(tmp_path / "elsewhere.md")
    assert_fails(push("publish", run, "--repo-id", ME), 4, "README.md is a link")
    assert hub.log == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
@pytest.mark.parametrize("command", ["card", "publish"])
def test_damaged_record_is_named(command: str, text: str, push: Pusher, run: Path) -> None:
    (run / "record.json").write_text(text, encoding="latin-1")
    assert_fails(push(command, run), 4, "record.json", "hftl run")


def test_card_of_a_changed_record_is_refused(push: Pusher, run: Path) -> None:
    record = run / "record.json"
    record.write_text(record.read_text().replace('"seeds": 1', '"seeds": 9'))
    assert_fails(push("card", run), 4, "record.json", "not what was written")
    assert "9 seeds" not in (run / "publish" / "README.md").read_text()


LOST = ["phases/report", "phases/report/files.json", "phases/data", "phases/package/model", "arms"]


@pytest.mark.parametrize("part", [*LOST, ".lock"])
def test_run_that_lost_a_part_is_refused(part: str, hub: LocalHub, push: Pusher, run: Path) -> None:
    (run / part).rename(run.parent / "lost")
    assert_fails(push("card", run), 4, str(run))
    if part == "phases/report":
        assert_fails(push("publish", run, "--repo-id", ME), 4, "is not finished")
        assert hub.log == []


def test_weights_without_a_reload_check_are_not_pushed(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    weights = run / "publish" / "adapter_model.safetensors"
    weights.write_bytes(scaled(weights, 1.5))
    finished_files.write_finished_files(run)
    assert_fails(push("publish", run, "--repo-id", ME), 4, "adapter_model.safetensors", "proved")
    assert hub.log == []


def test_run_that_was_killed_while_it_wrote_can_be_pushed(
    hub: LocalHub, push: Pusher, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    write_text = run_folder.write_text

    def write(path: Path, text: str) -> None:
        if path.name == "hftl.json":
            raise Killed
        write_text(path, text)

    changed = {f"publish/{name}": (run / "publish" / name).read_text() + " "
               for name in ("README.md", "hftl.json")}  # fmt: skip
    monkeypatch.setattr(finished_files, "write_text", write)
    with pytest.raises(Killed):
        finished_files.rewrite_finished_files(run, changed)
    monkeypatch.undo()
    assert (run / "publish" / "README.md").read_text() == changed["publish/README.md"]
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert hub.head(ME) == hash_files(run / "publish") | commits(hub)[0]["files"]


# --- what a push adds to the card ----------------------------------------------------------------


def test_missing_license_is_a_warning_and_the_option_wins_over_the_recipe(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    record = read(run, "record.json")
    record["recipe"]["publish"]["license"] = None
    rewrite_record(run, record)
    warning = "warning: no license is stated"
    words = ("publish", run, "--repo-id", ME)
    assert warning in push(*words, "--dry-run")[1] and warning in push(*words)[1]
    assert "license" not in read_front(run)
    for more in (("--dry-run",), ()):
        code, out, _ = push(*words, "--license", "bsd", *more)
        assert code == 0 and warning not in out
    assert read_front(run)["license"] == "bsd" and "license: bsd" in read_card_at_hub(hub)
    code, out, _ = push(*words)
    assert code == 0 and warning not in out and "holds the same already" in out
    assert_fails(push(*words, "--license", "mitt"), 2, "--license", "did you mean 'mit'?")
    assert_fails(push(*words, "--license", "other"), 2, "license other", "publish.license_name")


def read_card_at_hub(hub: LocalHub) -> str:
    body = base64.b64decode(next(r for r in hub.log[::-1] if "/commit/" in r["path"])["body"])
    changes = [json.loads(line)["value"] for line in body.splitlines()]
    card = next(c for c in changes if c.get("path") == "README.md")
    return base64.b64decode(card["content"]).decode()


def test_results_for_leaderboards_are_pushed_and_stay_the_same(
    hub: LocalHub, push: Pusher, run: Path, loads_in_this_process: None
) -> None:
    record = read(run, "record.json")
    benchmark = {"dataset": "org/reviews", "task_id": "default"}
    record["recipe"]["publish"] |= {"benchmark": benchmark, "examples": True}
    # A benchmark is a dataset of the hub, and the test set of the run.
    record["data"]["hub_revisions"]["test"] = "0" * 40
    table = record["recipe"]["data"]["train"] | {"path": "org/reviews", "format": "hub"}
    record["recipe"]["data"]["test"] = table
    rewrite_record(run, record)
    code, _, problem = push("card", run)
    assert code == 0, problem
    names = [".eval_results/hftl-org-reviews.yaml", "every_eval_ever.json"]
    code, out, _ = push("publish", run, "--repo-id", ME, "--dry-run")
    assert code == 0 and all(name in out for name in names)
    hub.put(ME, {".eval_results/org-reviews.yaml": b"theirs"}, private=True)
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert (hub.head(ME) or {}).keys() >= {*names, ".eval_results/org-reviews.yaml"}
    assert read(run, "publish/every_eval_ever.json")["model_info"]["id"] == ME
    assert push("publish", run, "--repo-id", ME)[1].startswith("me/model holds the same already")
    widgets = read_front(run)["widget"]
    titles = {widget["example_title"] for widget in widgets}
    assert titles == {"true label: negative", "true label: positive"}
    for widget in widgets:
        assert sum(one["score"] for one in widget["output"]) == pytest.approx(1, abs=1e-3)
    assert examine_adapter(run).exit_code == 0


# --- a repository that exists already ------------------------------------------------------------


def test_model_that_hftl_did_not_publish_is_left_alone(
    hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, THEIRS, private=True)
    before = hub.state
    result = push("publish", run, "--repo-id", ME)
    words = ("hftl did not publish: model.safetensors. Nothing", "another --repo-id", "remove it")
    assert_fails(result, 5, *words)
    assert "To repeat" not in result[2] and hub.state == before
    for name in ("model-00001-of-00002.safetensors", "config.json", "adapter_model.safetensors"):
        hub.control(restore="base")
        hub.put(ME, {name: b"mine"})
        result = push("publish", run, "--repo-id", ME, "--dry-run")
        assert_fails(result, 5, f"hftl did not publish: {name}")


def test_initial_card_of_the_hub_is_no_model(hub: LocalHub, push: Pusher, run: Path) -> None:
    hub.put(ME, {"README.md": b"---\nlicense: mit\n---\n"}, private=True)
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert (hub.head(ME) or {}).items() >= hash_files(run / "publish").items()


@pytest.mark.parametrize("more", [(), ("--pr",)])
def test_private_model_is_not_pushed_to_a_public_repository(
    more: tuple[str, ...], hub: LocalHub, push: Pusher, run: Path
) -> None:
    hub.put(ME, {"README.md": b"mine"})
    before = hub.state
    words = ("publish", run, "--repo-id", ME, *more)
    assert_fails(push(*words), 5, "is public already", "--public")
    assert hub.state == before
    assert push(*words, "--public")[1].endswith("(public)\n")
