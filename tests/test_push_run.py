"""`hftl run` with a repository in its recipe: what it sees first, and what it does at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from localhub import LocalHub
from published import Pusher, pusher, small_recipe
from pushed import ME, hub, local, made, push, run, says

import hftl
from hftl.config.recipe import Recipe
from hftl.errors import HoldError, HubError
from hftl.pipeline import evaluate

__all__ = ["hub", "made", "push", "run"]


def test_without_a_network_all_is_trained_and_the_push_can_be_done_later(
    hub: LocalHub, push: Pusher, tmp_path: Path, tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.control(restore=True, faults=[])
    monkeypatch.setenv("HF_TOKEN", "hf_me_write")
    monkeypatch.setattr(
        evaluate, "decide_verdict", lambda *given: {"decision": "publish", "reasons": []}
    )
    recipe = Recipe.parse(small_recipe(tmp_path, tiny_model(), {"publish.repo_id": ME}))
    said: list[str] = []
    output = tmp_path / "run"
    with pytest.raises(HubError, match=f"To repeat only the push: hftl publish {output}"):
        hftl.run(recipe, output, say=said.append)
    assert any("the push will be tried at the end" in line for line in said)
    assert (output / "record.json").exists() and hub.log == []
    before = {path: path.stat().st_mtime_ns for path in (output / "arms").rglob("*")}
    code, out, err = push("publish", output)
    assert (code, err) == (0, "") and out.startswith("pushed   ")
    assert (hub.head(ME) or {}).items() >= local(output / "publish").items()
    # Said anew, the run has nothing left to train.
    with pytest.raises(HubError, match="To repeat only the push"):
        hftl.run(recipe, output)
    assert before == {path: path.stat().st_mtime_ns for path in (output / "arms").rglob("*")}
    assert push("publish", output)[1].startswith("me/model holds the same already")


def test_on_hold_nothing_is_pushed_and_the_exit_says_so(
    hub: LocalHub, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_me_write")
    verdict = {"decision": "hold", "reasons": ["no gain"]}
    monkeypatch.setattr(evaluate, "decide_verdict", lambda *given: verdict)
    recipe = Recipe.parse(small_recipe(tmp_path, tiny_model(), {"publish.repo_id": ME}))
    with pytest.raises(HoldError, match="the verdict is hold: no gain. Nothing was pushed") as told:
        hftl.run(recipe, tmp_path / "run")
    assert told.value.exit_code == 9
    assert (tmp_path / "run" / "publish" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("hf_me_read", ME, ["read-only"]),
        ("hf_me_write", "other/model", ["me is not other"]),
        ("hf_unknown1", ME, ["401", "hf auth login"]),
        (None, ME, ["needs a token"]),
    ],
)
def test_rights_are_seen_before_anything_trains(
    token: str | None, repo_id: str, words: list[str], hub: LocalHub, tmp_path: Path,
    tiny_model: Callable[..., Path],
) -> None:  # fmt: skip
    recipe = small_recipe(tmp_path, tiny_model(), {"publish.repo_id": repo_id})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pusher(hub.environment(tmp_path / "home", token)) as call:
        found = call("run", tmp_path / "small.yaml", "--output", tmp_path / "run")
    says(found, 5, *words)
    assert not (tmp_path / "run" / "phases").exists()
    assert json.loads((tmp_path / "run" / "error.json").read_text())["exit_code"] == 5


def test_where_it_goes_is_read_by_no_phase(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    import shutil

    from hftl.pipeline.cache_keys import refuse_changed

    shutil.copytree(made, tmp_path / "run")
    tree: dict[str, Any] = yaml.safe_load((made / "recipe.yaml").read_text())
    tree["publish"] |= {"repo_id": ME, "private": False}
    recipe = Recipe.parse(tree)
    refuse_changed(recipe, tmp_path / "run", recipe.arms)
