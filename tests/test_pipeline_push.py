"""Push every kind of run, from `hftl run` too, and load it as a stranger would."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.local_hub import ROOT, LocalHub
from support.publishing import (
    BASE,
    ME,
    Pusher,
    assert_fails,
    build_small_recipe,
    copy_run,
    finish_run,
    hash_files,
)

import hftl
from hftl.config.recipe import Recipe
from hftl.errors import HoldError, HubError
from hftl.measure.record import Verdict
from hftl.pipeline.changed_inputs import refuse_changed

pytestmark = pytest.mark.usefixtures("fast_reload")

PEFT = """
def load_models(repo):
    from huggingface_hub import hf_hub_download
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification
    labels = {"num_labels": 2, "ignore_mismatched_sizes": True}
    alone = AutoPeftModelForSequenceClassification.from_pretrained(repo, **labels)
    named = json.load(open(hf_hub_download(repo, "adapter_config.json")))
    base = AutoModelForSequenceClassification.from_pretrained(
        named["base_model_name_or_path"], revision=named["revision"], **labels)
    return [alone, PeftModel.from_pretrained(base, repo)]
"""
WHOLE = """
def load_models(repo):
    from transformers import AutoModelForSequenceClassification
    return [AutoModelForSequenceClassification.from_pretrained(repo)]
"""
LOAD = """
import json, sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

for repo, path in json.loads(sys.argv[1]).items():
    sample = json.load(open(path))
    models = load_models(repo)
    words = AutoTokenizer.from_pretrained(repo)(
        [text for text, in sample["texts"]], padding=True, truncation=True,
        max_length=sample["max_length"], return_tensors="pt")
    with torch.inference_mode():
        logits = [model.eval()(**words).logits for model in models]
    expected = torch.tensor(sample["logits"])
    card = ModelCard.load(repo).data
    print(json.dumps({
        "difference": max(float((each - expected).abs().max()) for each in logits),
        "card": card.to_dict(), "results": len(card.eval_results), "hftl": "hftl" in sys.modules,
    }))
"""


def load_as_stranger(
    hub: LocalHub, folder: Path, runs: dict[str, Path], load_models: str
) -> list[dict[str, Any]]:
    """Load repositories in a fresh process with an empty cache and without hftl."""
    samples = {name: str(run / "phases" / "package" / "sample.json") for name, run in runs.items()}
    done = subprocess.run(
        [sys.executable, "-c", load_models + LOAD, json.dumps(samples)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=hub.environment(folder / "empty-cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Return a finished run of an adapter on a base that the run has adapted itself."""
    adapt = {"objective": "mlm", "method": "full", "guard": "off",
             "training": {"max_steps": 2, "bf16": False}}  # fmt: skip
    folder = tmp_path_factory.mktemp("adapted")
    return finish_run(folder, tiny_model("bert", True), {"adapt": adapt})


def test_plain_libraries_load_the_adapter_and_the_one_on_an_adapted_base(
    hub: LocalHub, push: Pusher, finished: Path, adapted: Path, tmp_path: Path
) -> None:
    run = copy_run(finished, hub, tmp_path / "plain")
    assert push("publish", run, "--repo-id", ME, "--public")[0] == 0
    # The base moves on; the adapter belongs to the pinned commit.
    head = hub.state["repos"][BASE]["refs"]["main"]
    hub.put(BASE, {"model.safetensors": b"broken"})
    other = Path(shutil.copytree(adapted, tmp_path / "adapted"))
    code, out, err = push("publish", other, "--repo-id", "me/other")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    repos = hub.state["repos"]
    assert [len(repos[name]["commits"]) for name in ("me/other", "me/other-base")] == [2, 2]
    base_files = hash_files(other / "publish-base")
    assert (hub.head("me/other-base") or {}).items() >= base_files.items()
    named = json.loads((other / "publish" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "me/other-base"
    assert named["revision"] == repos["me/other-base"]["refs"]["main"]
    again = push("publish", other, "--repo-id", "me/other")
    assert again[0] == 0 and hub.state["repos"] == repos
    plain, on_adapted = load_as_stranger(hub, tmp_path, {ME: run, "me/other": other}, PEFT)
    assert plain["difference"] < 1e-5 and not plain["hftl"] and plain["results"] >= 2
    card = plain["card"]
    assert (card["base_model"], card["base_model_relation"]) == (BASE, "adapter")
    assert (card["base_model_revision"], card["library_name"]) == (head, "peft")
    assert card["pipeline_tag"] == "text-classification" and "hftl" in card["tags"]
    assert on_adapted["difference"] < 1e-5
    assert on_adapted["card"]["base_model"] == "me/other-base"


def test_stopped_push_of_base_and_adapter_continues_with_the_adapter(
    hub: LocalHub, push: Pusher, adapted: Path, tmp_path: Path
) -> None:
    run = copy_run(adapted, hub, tmp_path)
    hub.control(faults=[{"kind": "403", "path": f"POST /api/models/{ME}/commit/"}])
    assert_fails(push("publish", run, "--repo-id", ME), 5, "To repeat only the push", ME)
    assert len(hub.state["repos"][f"{ME}-base"]["commits"]) == 2
    hub.control(faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert len(hub.state["repos"][f"{ME}-base"]["commits"]) == 2
    assert (hub.head(ME) or {}).items() >= hash_files(run / "publish").items()


@pytest.mark.slow
def test_whole_model_needs_no_base(
    hub: LocalHub, push: Pusher, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"finetune.strategy": "partial", "source.published_as": None}
    run = finish_run(tmp_path, tiny_model(), changes)
    hub.control(restore="base", faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert load_as_stranger(hub, tmp_path, {ME: run}, WHOLE)[0]["difference"] < 1e-5


def test_hold_is_pushed_only_with_a_reason_which_the_card_shows(
    hub: LocalHub, push: Pusher, tiny_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_me_write")
    hub.control(restore="base", faults=[])
    stop = r"the verdict is hold: the test says so\. Nothing was pushed"
    with pytest.raises(HoldError, match=stop) as caught:
        finish_run(tmp_path, tiny_model(), {"publish.repo_id": ME}, "hold")
    assert caught.value.exit_code == 9
    run = tmp_path / "run"
    assert (run / "publish" / "README.md").exists()
    words = ("publish", run, "--repo-id", ME)
    assert_fails(push(*words), 9, "the verdict is hold: the test says so")
    assert hub.log == [] and ME not in hub.state["repos"]
    assert push("publish", run, "--dry-run")[0] == 9
    reason = "wanted *as it is* by the `maintainers`"
    assert push(*words, "--dry-run", "--force", reason)[0] == 0
    assert push(*words, "--force", reason)[0] == 0
    for name in ("record.json", "publish/hftl.json"):
        record = json.loads((run / name).read_text())
        assert record["forced"] == {"reason": reason}
        assert record["verdict"]["decision"] == "hold"
    card = (run / "publish" / "README.md").read_text()
    head = card.split("---\n", 2)[2].split("\n## ")[0]
    assert "**Published although the verdict is hold:** `wanted *as it is*" in head
    assert_fails(push(*words), 9, "hold")


def test_run_without_a_network_trains_all_and_can_be_pushed_later(
    hub: LocalHub, push: Pusher, tmp_path: Path, tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.control(restore="base", faults=[])
    monkeypatch.setenv("HF_TOKEN", "hf_me_write")
    verdict = Verdict.model_validate({"decision": "publish", "reasons": []})
    monkeypatch.setattr("hftl.pipeline.evaluate.judge_record", lambda record: verdict)
    recipe = Recipe.parse(build_small_recipe(tmp_path, tiny_model(), {"publish.repo_id": ME}))
    messages: list[str] = []
    output = tmp_path / "run"
    with pytest.raises(HubError, match=f"To repeat only the push: hftl publish {output}"):
        hftl.run(recipe, output, say=messages.append)
    assert any("the push will be tried at the end" in line for line in messages)
    assert (output / "record.json").exists() and hub.log == []
    before = {path: path.stat().st_mtime_ns for path in (output / "arms").rglob("*")}
    code, out, err = push("publish", output)
    assert (code, err) == (0, "") and out.startswith("pushed   ")
    assert (hub.head(ME) or {}).items() >= hash_files(output / "publish").items()
    # The same command again has nothing left to train.
    with pytest.raises(HubError, match="To repeat only the push"):
        hftl.run(recipe, output)
    assert before == {path: path.stat().st_mtime_ns for path in (output / "arms").rglob("*")}
    assert push("publish", output)[1].startswith("me/model holds the same already")


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("hf_me_read", ME, ["read-only"]),
        ("hf_me_write", "other/model", ["me is not other"]),
        ("hf_unknown1", ME, ["401", "hf auth login"]),
        (None, ME, ["needs a token"]),
    ],
)
def test_missing_rights_stop_a_run_before_training(
    token: str | None, repo_id: str, words: list[str], push: Pusher, tmp_path: Path,
    tiny_model: Callable[..., Path],
) -> None:  # fmt: skip
    recipe = build_small_recipe(tmp_path, tiny_model(), {"publish.repo_id": repo_id})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    output = tmp_path / "run"
    assert_fails(push("run", tmp_path / "small.yaml", "--output", output, token=token), 5, *words)
    assert not (output / "phases").exists()
    assert json.loads((output / "error.json").read_text())["exit_code"] == 5


def test_repository_of_a_push_is_read_by_no_phase(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    tree: dict[str, Any] = yaml.safe_load((finished / "recipe.yaml").read_text())
    tree["publish"] |= {"repo_id": ME, "private": False}
    recipe = Recipe.parse(tree)
    refuse_changed(recipe, tmp_path / "run", recipe.arms)
