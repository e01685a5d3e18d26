"""Pushes of every kind of run, and what a stranger then loads from the hub."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from localhub import ROOT, LocalHub
from published import BASE, Pusher, finished_run
from pushed import ME, fresh, hub, local, made, push, says

__all__ = ["hub", "made", "push"]

PEFT = """
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification
labels = {"num_labels": 2, "ignore_mismatched_sizes": True}
alone = AutoPeftModelForSequenceClassification.from_pretrained(repo, **labels)
from huggingface_hub import hf_hub_download
named = json.load(open(hf_hub_download(repo, "adapter_config.json")))
base = AutoModelForSequenceClassification.from_pretrained(
    named["base_model_name_or_path"], revision=named["revision"], **labels)
models = [alone, PeftModel.from_pretrained(base, repo)]
"""
WHOLE = """
from transformers import AutoModelForSequenceClassification
models = [AutoModelForSequenceClassification.from_pretrained(repo)]
"""
LOAD = """
import json, sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
repo, sample = sys.argv[1], json.load(open(sys.argv[2]))
{models}
words = AutoTokenizer.from_pretrained(repo)(
    [text for text, in sample["texts"]], padding=True, truncation=True,
    max_length=sample["max_length"], return_tensors="pt")
with torch.inference_mode():
    found = [model.eval()(**words).logits for model in models]
wanted = torch.tensor(sample["logits"])
card = ModelCard.load(repo).data
print(json.dumps({{
    "difference": max(float((logits - wanted).abs().max()) for logits in found),
    "card": card.to_dict(), "results": len(card.eval_results),
    "labels": models[0].config.num_labels, "hftl": "hftl" in sys.modules,
}}))
"""


def loaded(hub: LocalHub, folder: Path, run: Path, models: str) -> dict[str, Any]:
    """What a stranger gets, in a fresh process with an empty cache, without hftl."""
    found = subprocess.run(
        [sys.executable, "-c", LOAD.format(models=models), ME,
         str(run / "phases" / "package" / "sample.json")],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=hub.environment(folder / "empty-cache"),
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_a_stranger_loads_the_adapter_with_plain_libraries(
    hub: LocalHub, push: Pusher, made: Path, tmp_path: Path
) -> None:
    run = fresh(made, hub, tmp_path)
    assert push("publish", run, "--repo-id", ME, "--public")[0] == 0
    # Its base moves on; the pinned commit is what the adapter goes on.
    head = hub.state["repos"][BASE]["refs"]["main"]
    hub.put(BASE, {"model.safetensors": b"broken"})
    found = loaded(hub, tmp_path, run, PEFT)
    assert found["difference"] < 1e-5 and not found["hftl"] and found["results"] >= 2
    card = found["card"]
    assert (card["base_model"], card["base_model_relation"]) == (BASE, "adapter")
    assert (card["base_model_revision"], card["library_name"]) == (head, "peft")
    assert card["pipeline_tag"] == "text-classification" and "hftl" in card["tags"]


def made_run(folder: Path, model: Path, changes: dict[str, Any], decision: str = "publish") -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return finished_run(folder, model, patch, changes, decision)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A finished run of an adapter on a base that the run has adapted itself."""
    adapt = {"objective": "mlm", "method": "full", "guard": "off",
             "training": {"max_steps": 2, "bf16": False}}  # fmt: skip
    folder = tmp_path_factory.mktemp("adapted")
    return made_run(folder, tiny_model("bert", True), {"adapt": adapt})


def test_an_adapted_base_goes_first_and_is_pinned(
    hub: LocalHub, push: Pusher, adapted: Path, tmp_path: Path
) -> None:
    run = fresh(adapted, hub, tmp_path)
    code, out, err = push("publish", run, "--repo-id", ME)
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    repos = hub.state["repos"]
    base = repos[f"{ME}-base"]
    assert [len(repos[name]["commits"]) for name in (ME, f"{ME}-base")] == [2, 2]
    assert (hub.head(f"{ME}-base") or {}).items() >= local(run / "publish-base").items()
    named = json.loads((run / "publish" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == f"{ME}-base"
    assert named["revision"] == base["refs"]["main"]
    found = loaded(hub, tmp_path, run, PEFT)
    assert found["difference"] < 1e-5
    assert found["card"]["base_model"] == f"{ME}-base"
    again = push("publish", run, "--repo-id", ME)
    assert again[0] == 0 and hub.state["repos"] == repos


def test_a_stopped_push_of_two_goes_on_with_the_second(
    hub: LocalHub, push: Pusher, adapted: Path, tmp_path: Path
) -> None:
    run = fresh(adapted, hub, tmp_path)
    hub.control(faults=[{"kind": "500", "path": f"POST /api/models/{ME}/commit/"}])
    says(push("publish", run, "--repo-id", ME), 5, "To repeat only the push", ME)
    assert len(hub.state["repos"][f"{ME}-base"]["commits"]) == 2
    hub.control(faults=[])
    assert push("publish", run, "--repo-id", ME)[0] == 0
    assert len(hub.state["repos"][f"{ME}-base"]["commits"]) == 2
    assert (hub.head(ME) or {}).items() >= local(run / "publish").items()


@pytest.mark.slow
def test_a_whole_model_needs_no_base(
    hub: LocalHub, push: Pusher, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"finetune.strategy": "partial", "source.published_as": None}
    made = made_run(tmp_path, tiny_model(), changes)
    hub.control(restore=True, faults=[])
    assert push("publish", made, "--repo-id", ME)[0] == 0
    assert loaded(hub, tmp_path, made, WHOLE)["difference"] < 1e-5


def test_a_hold_goes_only_with_a_reason_which_the_card_tells(
    hub: LocalHub, push: Pusher, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = made_run(tmp_path, tiny_model(), {}, "hold")
    hub.control(restore=True, faults=[])
    says(push("publish", run, "--repo-id", ME), 9, "the verdict is hold: the test says so")
    assert hub.log == [] and ME not in hub.state["repos"]
    assert push("publish", run, "--dry-run")[0] == 9
    reason = "wanted *as it is* by the `maintainers`"
    assert push("publish", run, "--dry-run", "--force", reason)[0] == 0
    assert push("publish", run, "--repo-id", ME, "--force", reason)[0] == 0
    for name in ("record.json", "publish/hftl.json"):
        told = json.loads((run / name).read_text())
        assert told["forced"] == {"reason": reason}
        assert told["verdict"]["decision"] == "hold"
    card = (run / "publish" / "README.md").read_text()
    head = card.split("---\n", 2)[2].split("\n## ")[0]
    assert "**Published although the verdict is hold:** `wanted *as it is*" in head
    says(push("publish", run, "--repo-id", ME), 9, "hold")


def test_a_card_written_again_still_names_the_repository(
    hub: LocalHub, push: Pusher, made: Path, tmp_path: Path
) -> None:
    run = fresh(made, hub, tmp_path)
    push("publish", run, "--repo-id", ME)
    before = local(run / "publish")
    page = (run / "report.html").read_text()
    assert f"load(&quot;{ME}&quot;)" in page and "Where it is wrong" in page
    assert push("card", run)[0] == 0
    assert (run / "report.html").read_text() == page
    assert local(run / "publish")["README.md"] == before["README.md"]
    assert push("publish", run, "--repo-id", ME)[1].startswith("me/model holds the same already")
