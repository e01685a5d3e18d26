"""The time that a run is said to take: forward passes counted, against those that it makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from transformers import BertModel

from hftl.data.general import load_general
from hftl.data.load import Reading
from hftl.finetune import estimate, weight
from hftl.finetune.estimate import STEP, estimate_seconds
from hftl.pipeline import preflight, run
from hftl.recipe import Recipe, arms


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One arm and seed of a masked-language BERT, and general data."""
    rows = [(text, label) for text, label in sentences(120, seed=9)]
    general = write_csv(tmp_path / "general.csv", ["text", "label"], rows)
    recipe_tree["data"]["general"] = {"path": str(general)}
    recipe_tree["finetune"]["strategy"] = "full"
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    return recipe_tree


RETAIN: dict[str, Any] = {
    "none": None,
    "auto": {"kl": {"weight": "auto", "inputs": "general"}, "interpolate": [0.0, 0.5, 1.0]},
    "replay": {"kl": {"inputs": "both"}, "replay": {"ratio": 2.0}},
    "mlm": {"kl": {"on": "mlm"}},
    "ewc": {"ewc": {"samples": 32}},
}


@pytest.mark.parametrize("name", list(RETAIN))
def test_the_passes_of_a_run_within_a_factor_of_two(
    tree: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    tree["source"]["model"] = str(tiny_model("bert", True))
    tree["retain"] = RETAIN[name]
    monkeypatch.setattr(weight, "GRID", (0.1, 1.0))
    made = [0.0]
    plain = BertModel.forward

    def counted(self: Any, input_ids: Any = None, **more: Any) -> Any:
        # The backward pass and the optimizer go with a pass that has a gradient.
        made[0] += len(input_ids) * (STEP if torch.is_grad_enabled() else 1)
        return plain(self, input_ids=input_ids, **more)

    recipe = Recipe.parse(tree)
    bench = bench_of(recipe)
    bench.general = load_general(recipe.data, bench.prepared, Reading())
    monkeypatch.setattr(estimate, "_seconds_a_row", lambda *_: 1.0)
    told = estimate_seconds(bench, arms(recipe), recipe)
    # Nothing of the header's own is counted.
    monkeypatch.setattr(BertModel, "forward", counted)
    run(recipe, tmp_path / "run", until="finetune")
    assert 0.5 * told < made[0] < 2 * told


def test_every_seed_is_counted_before_a_run_too(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(
        "hftl.phases.ladder.estimate_seconds",
        lambda _, jobs, recipe: counts.append(len(jobs)) or 1.0,
    )
    tree["measure"]["seeds"] = [0, 1, 2]
    facts, _ = preflight(Recipe.parse(tree))
    assert counts == [3] and facts["arms"].endswith("3 to run")


def test_what_is_frozen_makes_a_step_cheaper(tree: dict[str, Any]) -> None:
    def step(**finetune: Any) -> float:
        recipe = Recipe.parse(tree | {"finetune": tree["finetune"] | finetune})
        return estimate._step(bench_of(recipe), arms(recipe)[0])

    full, lora = step(strategy="full"), step(strategy="lora")
    one, three = (step(strategy="partial", blocks=blocks) for blocks in (1, 3))
    assert 1 < one < three == full == STEP
    assert 1 < lora < full
