"""Check the estimated time of a run: forward passes counted, against those that it makes."""

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from support.adaptations import build_stage, build_task, load_objective
from transformers import BertModel

from hftl.adapt import adaptation
from hftl.adapt.adaptation import estimate_adaptation_seconds
from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.rows import InputSpec
from hftl.pipeline import weight_grid
from hftl.pipeline.estimate import (
    EVALUATE,
    FINISH_SECONDS,
    PREDICT,
    RowCosts,
    estimate_seconds,
    measure_costs,
)
from hftl.pipeline.header import build_header
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.callbacks import PassTime, _measure_seconds

pytestmark = pytest.mark.usefixtures("fast_reload")

STEP = 4.0
"""Forward passes that a training step is counted as."""


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of one arm and seed, and general data."""
    general = write_csv(tmp_path / "general.csv", ["text", "label"], sentences(120, seed=9))
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
def test_estimate_is_within_a_factor_of_two_of_the_passes_of_a_run(
    tree: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    tree["source"]["model"] = str(tiny_model("bert", True))
    tree["retain"] = RETAIN[name]
    monkeypatch.setattr(weight_grid, "WEIGHT_GRID", (0.1, 1.0))
    passes = [0.0]
    forward = BertModel.forward

    @wraps(forward)
    def count_rows(self: Any, input_ids: Any = None, **more: Any) -> Any:
        # The backward pass and the optimizer go with a pass that has a gradient.
        # Packed, the rows of a batch are one long row.
        rows = more["packing"].batch if more.get("packing") else len(input_ids)
        passes[0] += rows * (STEP if torch.is_grad_enabled() else 1)
        return forward(self, input_ids=input_ids, **more)

    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    context.general = load_general(recipe.data, context.prepared, InputSpec())
    costs = RowCosts(1.0, 1.0, {arm.name: STEP for arm in recipe.arms})
    estimate = estimate_seconds(context, recipe.arms, recipe, costs) - FINISH_SECONDS
    monkeypatch.setattr(BertModel, "forward", count_rows)
    run(recipe, tmp_path / "run", until="finetune")
    assert 0.5 * estimate < passes[0] < 2 * estimate


def test_every_seed_is_counted_before_a_run(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(
        "hftl.pipeline.header.estimate_placed_seconds",
        lambda _, jobs, *rest: counts.append(len(jobs)) or 1.0,
    )
    tree["measure"]["seeds"] = [0, 1, 2]
    facts, _ = check_recipe(Recipe.parse(tree))
    assert counts == [3] and facts["arms"].endswith("3 to run")


def test_a_command_that_measures_nothing_takes_no_time_for_it(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs, recipe = RowCosts(1.0, 1.0, {}), Recipe.parse(tree)
    monkeypatch.setattr("hftl.pipeline.header.measure_costs", lambda *_: costs)
    seconds = 60.0 + FINISH_SECONDS
    monkeypatch.setattr("hftl.pipeline.header.estimate_placed_seconds", lambda *_: seconds)
    header = build_header(recipe, bench_of(recipe), [(recipe.arms[0], 0)], measures=False)
    assert header["time"] == "about 60 s"


@pytest.mark.parametrize(("slowdown", "shown"), [(1.2, "about 10 min"), (3.0, "about 10 min (the")])
def test_a_busy_machine_does_not_change_the_estimate(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, slowdown: float, shown: str
) -> None:
    costs = RowCosts(1.0, 1.0, {}, slowdown)
    monkeypatch.setattr("hftl.pipeline.header.measure_costs", lambda *_: costs)
    monkeypatch.setattr("hftl.pipeline.header.estimate_placed_seconds", lambda *_: 600.0)
    facts, _ = check_recipe(Recipe.parse(tree))
    assert facts["time"].startswith(shown)
    assert ("busy: 30 min" in facts["time"]) == (slowdown > 2)


def test_waiting_for_a_core_is_not_counted_as_work() -> None:
    passed = _measure_seconds(lambda: time.sleep(0.02), "cpu")
    assert passed.worked < 0.01 < passed.elapsed
    calls: list[int] = []
    _measure_seconds(lambda: calls.append(1) or time.sleep(0.2), "cpu")
    assert len(calls) == 2, "one that is not timed, and one"


def test_the_lesser_of_two_timings_counts(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def time_passes(*_: Any) -> dict[str, PassTime]:
        # On a busy machine two threads wait for each other longer than one works alone.
        threads.append(torch.get_num_threads())
        seconds = 4.0 if threads[-1] == 2 else 1.5
        return dict.fromkeys((PREDICT, EVALUATE, "full"), PassTime(seconds, 6.0))

    monkeypatch.setattr("hftl.pipeline.estimate._time_passes", time_passes)
    recipe, usual = Recipe.parse(tree), torch.get_num_threads()
    costs = measure_costs(bench_of(recipe), recipe.arms, threads=2)
    assert costs == RowCosts(1.5, 1.5, {"full": 1.5}, 4.0, {"full": 0.0})
    assert threads == [2, 1] and torch.get_num_threads() == usual


def test_one_timing_is_enough_on_a_quiet_machine(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = dict.fromkeys((PREDICT, EVALUATE, "full"), PassTime(1.0, 1.1))
    calls: list[int] = []
    monkeypatch.setattr("hftl.pipeline.estimate._time_passes", lambda *_: calls.append(1) or passes)
    recipe = Recipe.parse(tree)
    assert measure_costs(bench_of(recipe), recipe.arms).slowdown == pytest.approx(1.1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("cache", "epochs", "stored"), [("auto", 4, True), ("never", 4, False), ("auto", 1, False)]
)
def test_blocks_that_run_once_a_row_are_counted_once(
    tree: dict[str, Any], cache: str, epochs: int, stored: bool
) -> None:
    tree["finetune"] |= {"strategy": "partial", "blocks": 1, "cache": cache}
    tree["finetune"]["training"]["num_train_epochs"] = epochs
    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    costs = [
        RowCosts(1.0, 1.0, {"partial": STEP}, 1.0, {"partial": frozen}) for frozen in (0.0, 0.5)
    ]
    running, once = (estimate_seconds(context, recipe.arms, recipe, cost) for cost in costs)
    rows = len(context.select_train_rows(0)) + len(context.prepared.rows["validation"])
    assert running - once == pytest.approx(0.5 * (epochs - 1) * rows if stored else 0.0)


def test_every_training_arm_is_timed(tree: dict[str, Any]) -> None:
    tree["measure"]["arms"] = ["scratch", "head", {"lora": {}}, {"partial": {"finetune.blocks": 1}}]
    tree["data"]["shots"] = 3  # Steps are timed on rows that are trained on.
    recipe = Recipe.parse(tree)
    costs = measure_costs(bench_of(recipe), recipe.arms)
    assert costs.step.keys() == {"full", "scratch", "lora", "partial"}
    assert all(seconds > 0 for seconds in (costs.predict, costs.evaluate, *costs.step.values()))


def test_processes_share_the_rows(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.parse(tree)
    context, costs = bench_of(recipe), RowCosts(1.0, 1.0, {"full": STEP})
    alone = estimate_seconds(context, recipe.arms, recipe, costs)
    monkeypatch.setattr("hftl.runtime.distributed.get_world_size", lambda: 2)
    shared = estimate_seconds(context, recipe.arms, recipe, costs)
    assert shared - FINISH_SECONDS == pytest.approx((alone - FINISH_SECONDS) / 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_length_in_steps_is_counted_in_rows(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Steps that processes share hold the rows of each."""
    monkeypatch.setattr("hftl.runtime.distributed.get_world_size", lambda: processes)
    tree["measure"]["arms"] = ["scratch"]
    training, seconds = tree["finetune"]["training"], []
    rows = len(bench_of(Recipe.parse(tree)).select_train_rows(0))
    for length in ({"num_train_epochs": 5 * 4 * 3 * processes / rows}, {"max_steps": 5}):
        tree["finetune"]["training"] = training | length | {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3,
        }  # fmt: skip
        recipe = Recipe.parse(tree)
        costs = RowCosts(1.0, 1.0, {"full": STEP, "scratch": STEP})
        seconds.append(estimate_seconds(bench_of(recipe), recipe.arms, recipe, costs))
    assert seconds[1] == pytest.approx(seconds[0])


def test_timing_an_adaptation_moves_no_weight(tiny_model: Callable[..., Path]) -> None:
    source = tiny_model("bert", True)
    model, task = load_objective("mlm", source), build_task("mlm", source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert estimate_adaptation_seconds(model, task, build_stage("mlm"), "cpu") > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("device", "timed"), [("cpu", 8), ("cuda", 12)])
def test_an_accelerator_is_timed_on_steps_of_an_adaptation_as_large_as_its_own(
    device: str, timed: int, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works no longer on many rows than on few, which a CPU does."""
    rows: list[int] = []

    def count(model: Any, batch: dict[str, torch.Tensor], *_: Any) -> PassTime:
        rows.append(len(batch["input_ids"]))
        return PassTime(1.0, 1.0)

    source = tiny_model("bert", True)
    model, task = load_objective("mlm", source), build_task("mlm", source)
    stage = build_stage("mlm", per_device_train_batch_size=12)
    for name in ("time_step", "time_forward"):
        monkeypatch.setattr(adaptation, name, count)
    monkeypatch.setattr(adaptation, "EVAL_BATCH_SIZE", 2)
    estimate_adaptation_seconds(model, task, stage, device)
    assert rows[0] == timed
