"""Check gradual unfreezing: what trains when, when it stops, and how it continues after a stop."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from support.training import build_probed_model, copy_parameters
from torch import Tensor, nn
from transformers import BertModel

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.errors import DataWarning, RecipeError
from hftl.finetune import gradual
from hftl.finetune.arm import train_arm
from hftl.finetune.gradual import GradualProgress
from hftl.finetune.trainable import prepare, split_phases
from hftl.pipeline.pipeline import run
from hftl.retain.kl import KLToOriginal
from hftl.retain.regularizer import Retention
from hftl.retain.weights import L2SP
from hftl.train import step_checkpoint
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.optimizer import compute_depths
from hftl.train.step_checkpoint import CheckpointSpec, Rhythm, find_checkpoint
from hftl.train.trainer import TransferTrainer

pytestmark = pytest.mark.usefixtures("fast_reload")

RISING = [i / 100 for i in range(100)]
"""Scores of evaluations that always improve."""


@pytest.fixture(scope="module")
def tree(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    table = tmp_path_factory.mktemp("gradual") / "reviews.csv"
    write_csv(table, ["text", "label"], sentences(80))
    return {
        "source": {"model": str(bert)},
        "data": {"train": {"path": str(table)}, "max_length": 16, "shots": 20},
        "finetune": {"strategy": "gradual", "pooling": "mean",
                     "training": {"learning_rate": 5e-3, "bf16": False}},
        "measure": {"arms": [], "seeds": [0]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def context(tree: dict[str, Any]) -> Any:
    return bench_of(Recipe.parse(tree))


def make_section(**more: Any) -> Finetune:
    training = {"learning_rate": 5e-3, "bf16": False, "per_device_train_batch_size": 16}
    return Finetune.model_validate(
        {"strategy": "gradual", "pooling": "mean", "training": training} | more
    )


def set_scores(patch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Replace the scores that evaluations give, one after the other."""
    remaining = iter(scores)
    evaluate = BestWeightsCallback.on_evaluate

    def on_evaluate(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        more["metrics"] = dict(more["metrics"]) | {self.metric: next(remaining)}
        evaluate(self, args, state, control, **more)

    patch.setattr(BestWeightsCallback, "on_evaluate", on_evaluate)


@dataclass
class Phase:
    """Hold what one phase of a training did."""

    seeds: tuple[int, int]
    start: dict[str, Tensor]
    end: dict[str, Tensor] = field(default_factory=dict)
    has_frozen_gradients: bool = False
    optimized: int = 0
    """Parameters that the optimizer holds."""
    moments: int = 0
    """Parameters that it has taken a step of."""
    initial_rates: set[float] = field(default_factory=set)
    head_rates: list[float] = field(default_factory=list)
    live_dropouts: list[bool] = field(default_factory=list)
    """By block, after the last step."""

    @property
    def changed(self) -> set[str]:
        return {name for name in self.end if not torch.equal(self.start[name], self.end[name])}


def record_phases(patch: pytest.MonkeyPatch) -> list[Phase]:
    """Return a list to which each training from now on adds its phases."""
    phases: list[Phase] = []
    train, take_step = TransferTrainer.train, TransferTrainer.training_step

    def train_phase(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        model, seeds = trainer.model, (trainer.args.seed, trainer.args.data_seed)
        phases.append(phase := Phase(seeds, copy_parameters(model)))
        result = train(trainer, *args, **kwargs)
        phase.end = copy_parameters(model)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        phase.has_frozen_gradients = any(p.grad is not None for p in frozen)
        optimizer = trainer.optimizer.optimizer
        phase.optimized = sum(len(group["params"]) for group in optimizer.param_groups)
        phase.moments = len(optimizer.state)
        phase.initial_rates = {round(g["initial_lr"], 9) for g in optimizer.param_groups}
        return result

    def step(trainer: Any, *args: Any) -> Tensor:
        phases[-1].head_rates.append(trainer.optimizer.optimizer.param_groups[-1]["lr"])
        loss = take_step(trainer, *args)
        layers = trainer.model.encoder.encoder.layer
        phases[-1].live_dropouts = [layer.output.dropout.training for layer in layers]
        return loss

    patch.setattr(TransferTrainer, "train", train_phase)
    patch.setattr(TransferTrainer, "training_step", step)
    return phases


# What trains when


@pytest.fixture(scope="module")
def phases(context: Any) -> list[Phase]:
    """Record four phases that unfreeze and a final one, with layer-wise rates."""
    with pytest.MonkeyPatch.context() as patch:
        set_scores(patch, RISING)
        recorded = record_phases(patch)
        final = {"final_epochs": 1, "final_rate": 0.2}
        train_arm(context, make_section(layer_decay=0.5, gradual=final), 3)
    return recorded


@pytest.mark.parametrize("strategy", ["gradual", "lora"])
def test_phases_unfreeze_from_the_head_down(bert: Path, strategy: str) -> None:
    model = prepare(build_probed_model(bert, "full"), strategy)
    parts = split_phases(model)
    depth_of, blocks = compute_depths(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(parts) == blocks + 1 and parts[-1] == trains
    assert {depth_of[name] for name in parts[0]} == {blocks + 1}
    for number in range(1, blocks):
        new = parts[number] - parts[number - 1]
        assert parts[number - 1] < parts[number]
        assert {depth_of[name] for name in new} == {blocks + 1 - number}


def test_each_phase_changes_what_is_unfrozen_and_nothing_else(
    context: Any, phases: list[Phase]
) -> None:
    parts = split_phases(prepare(context.build_model("mean", 0).model, "gradual"))
    assert len(parts) == 4 and [phase.changed for phase in phases] == [*parts, parts[-1]]
    assert not any(phase.has_frozen_gradients for phase in phases)
    # The optimizer holds all parameters from the start, and has taken steps of the unfrozen ones.
    assert [phase.optimized for phase in phases] == [len(parts[-1])] * 5
    assert [phase.moments for phase in phases] == [len(phase.changed) for phase in phases]


def test_every_part_keeps_its_rate_and_the_final_phase_a_share_of_it(phases: list[Phase]) -> None:
    rates = [5e-3 * 0.5**k for k in range(5)]
    for phase, share in zip(phases, [1, 1, 1, 1, 0.2], strict=True):
        expected = [share * rate for rate in rates]
        assert sorted(phase.initial_rates, reverse=True) == pytest.approx(expected, abs=1e-8)


def test_each_phase_has_its_own_schedule_order_and_dropout(phases: list[Phase]) -> None:
    # 40 rows in batches of 16, and a linear schedule that ends at 0.
    rates = [5e-3, 5e-3 * 2 / 3, 5e-3 / 3]
    assert all(phase.head_rates == pytest.approx(rates) for phase in phases[:4])
    seeds = [phase.seeds for phase in phases]
    assert len(set(seeds)) == 5 and all(seed == data_seed for seed, data_seed in seeds)


def test_frozen_blocks_run_in_eval_mode(phases: list[Phase]) -> None:
    live = [phase.live_dropouts for phase in phases]
    assert [sum(modes) for modes in live] == [0, 1, 2, 3, 3]
    assert live[1] == [False, False, True]


# When it stops


def test_every_phase_trains_in_its_precision(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that one trainer has prepared and released is prepared by the next one, too."""
    set_scores(monkeypatch, RISING)
    halves: list[bool] = []
    take_step = BertModel.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        if torch.is_grad_enabled():
            halves.append(torch.is_autocast_enabled("cpu"))
        return take_step(self, *args, **more)

    monkeypatch.setattr(BertModel, "forward", forward)
    training = {"learning_rate": 5e-3, "bf16": True, "per_device_train_batch_size": 16}
    train_arm(context, make_section(training=training), 3)
    assert len(halves) > 8 and all(halves)


def test_unfreezing_stops_without_gain_and_the_final_phase_starts_from_the_best(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scores(monkeypatch, [0.5, 0.6, 0.55, 0.4, 0.3])
    recorded = record_phases(monkeypatch)
    outcome = train_arm(context, make_section(gradual={"final_epochs": 2}), 0)
    assert len(recorded) == 4, "three of four phases unfroze, then came the final one"
    best, final = recorded[1].end, recorded[3]
    assert all(torch.equal(final.start[name], tensor) for name, tensor in best.items())
    assert len(final.changed) > len(recorded[2].changed)
    assert all(torch.equal(outcome.weights[name], best[name]) for name in outcome.weights)


def test_patience_is_counted_in_each_phase_and_epochs_over_all(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scores(monkeypatch, [0.5, 0.4, 0.3, 0.45, 0.6, 0.5, 0.5, 0.1, 0.1])
    facts = train_arm(context, make_section(patience=2, gradual={"epochs": 4}), 0).facts
    evaluations = [(r["phase"], r["epoch"]) for r in facts["history"] if "eval_loss" in r]
    # The first phase waits for two; the second for one before its best, and two after it.
    by_phase = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert evaluations == list(zip(by_phase, range(1, 10), strict=True))
    assert (facts["epochs"], facts["best_epoch"]) == (9.0, 5.0)
    assert all({"loss", "eval_loss"} & row.keys() for row in facts["history"])


def test_phase_without_an_evaluation_is_judged_at_its_end(context: Any) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 1000, "learning_rate": 5e-3, "bf16": False}
    outcome = train_arm(context, make_section(training=training), 0)
    start = context.build_model("mean", 0).model.state_dict()
    assert not torch.equal(outcome.weights["head.weight"], start["head.weight"])
    assert {row["phase"] for row in outcome.facts["history"] if "eval_loss" in row} >= {0, 1}


# After a stop


@pytest.mark.parametrize("stopped", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_stopped_training_continues_to_the_same_weights(
    context: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: int
) -> None:
    def train(state: CheckpointSpec | None) -> Any:
        retention = Retention([KLToOriginal(0.5), L2SP(0.1)])
        return train_arm(context, make_section(), 0, retention, state)

    with monkeypatch.context() as patch:
        set_scores(patch, RISING)
        whole = train(CheckpointSpec(tmp_path / "whole", {"of": "a test"}))
    assert not (tmp_path / "whole").exists(), "a training of seconds writes nothing"
    state = CheckpointSpec(tmp_path / "state", {"of": "a test"}, every=1)
    save, saved = gradual._save_progress, []

    def save_and_stop(*args: Any) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == stopped:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gradual, "_save_progress", save_and_stop)
        set_scores(patch, RISING)
        train(state)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["phases"]
    newest = tmp_path / "state" / "phases" / f"step-{stopped}"
    assert find_checkpoint(newest.parent, state.cache_key) == newest
    set_scores(monkeypatch, RISING[stopped:])
    recorded = record_phases(monkeypatch)
    resumed = train(state)
    assert len(recorded) == 4 - stopped
    assert resumed.facts == whole.facts
    assert all(torch.equal(tensor, resumed.weights[n]) for n, tensor in whole.weights.items())


def test_progress_is_written_when_it_is_due_and_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(step_checkpoint.time, "monotonic", lambda: now[0])
    model, best = nn.Linear(2, 2), BestWeightsCallback("eval_loss", False, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    best.weights = {"w": torch.zeros(2)}
    spec, rhythm = CheckpointSpec(tmp_path / "phases", {"of": "a test"}), Rhythm(model)

    def save(phase: int) -> list[str]:
        within = tmp_path / f"phase-{phase}" / "step-3"
        within.mkdir(parents=True)
        done = GradualProgress(phase)
        gradual._save_progress(spec, rhythm, {"w": torch.ones(2)}, best, optimizer, done)
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*"))

    assert save(1) == ["phase-1/step-3"]
    now[0] += step_checkpoint.MIN_SECONDS
    # The phase that comes next keeps what it has.
    assert save(2) == ["phase-2/step-3", "phases/step-2"]
    assert save(3) == ["phase-2/step-3", "phase-3/step-3", "phases/step-2"]
    now[0] += step_checkpoint.MIN_SECONDS
    # As GaLore's, whose state holds projections.
    optimizer.state[model.weight] = {"projector": object()}
    with pytest.warns(DataWarning, match="state holds projector, a object.*starts over"):
        assert "phases/step-4" not in save(4)
    assert rhythm.interval == math.inf


def test_stopped_run_ends_with_the_same_files(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.parse(tree)
    with monkeypatch.context() as patch:
        set_scores(patch, RISING)
        run(recipe, tmp_path / "whole", until="finetune")
    # From here on each phase writes its end.
    monkeypatch.setattr(step_checkpoint, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(step_checkpoint, "COST_SHARE", math.inf)
    train = TransferTrainer.train

    def stop_after_a_phase(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "parts/checkpoints/gradual-seed0/phases/step-1").exists():
            raise KeyboardInterrupt
        return train(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransferTrainer, "train", stop_after_a_phase)
        set_scores(patch, RISING)
        run(recipe, tmp_path / "parts", until="finetune")
    set_scores(monkeypatch, RISING[1:])
    run(recipe, tmp_path / "parts", until="finetune")
    one, two = (tmp_path / name / "arms" / "gradual-seed0" for name in ("whole", "parts"))
    for name in ("weights.safetensors", "predictions.parquet", "logits.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    metrics = [json.loads((arm / "metrics.json").read_text()) for arm in (one, two)]
    assert metrics[0] | {"timings": 0} == metrics[1] | {"timings": 0}
    assert not (tmp_path / "parts" / "checkpoints").exists()


# Elsewhere


def test_refuses_what_unfreezing_cannot_honour(
    context: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = {**tree["finetune"], "training": {"max_steps": 5}}
    with pytest.raises(RecipeError, match="max_steps is of one training"):
        Recipe.parse({**tree, "finetune": finetune})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="does not run under FSDP"):
        train_arm(context, make_section(), 0)


@pytest.mark.slow
def test_whole_run_by_gradual_unfreezing(tree: dict[str, Any], tmp_path: Path) -> None:
    finetune = {**tree["finetune"], "layer_decay": 0.8}
    measure = {"arms": ["head", "full", "classical"], "seeds": [0, 1]}
    recipe = Recipe.parse({**tree, "finetune": finetune, "measure": measure})
    record = run(recipe, tmp_path / "run")
    assert record is not None and record["own_arm"] == "gradual"
    assert record["reload_difference"] <= 1e-5
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "A gradual fine-tuning of" in (tmp_path / "run/publish/README.md").read_text()
