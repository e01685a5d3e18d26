"""Gradual unfreezing: what trains when, when it stops, and going on after a stop."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of
from support.regularizers import build_probed_model
from test_trainer import trainer_of, weights

from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.finetune import gradual as module
from hftl.finetune.arm import train_arm
from hftl.finetune.gradual import GradualCheckpoint, split_phases
from hftl.finetune.trainable import prepare
from hftl.pipeline.pipeline import run
from hftl.runtime import run_folder
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.optimizer import compute_depths
from hftl.train.trainer import TransferTrainer

READS = {"of": "a test"}


@pytest.fixture
def bench(recipe_tree: dict[str, Any]) -> Any:
    recipe_tree["data"]["shots"] = 20
    return bench_of(Recipe.parse(recipe_tree))


def settings(**more: Any) -> Finetune:
    training = {"learning_rate": 5e-3, "bf16": False, "per_device_train_batch_size": 16}
    return Finetune.model_validate(
        {"strategy": "gradual", "pooling": "mean", "training": training} | more
    )


class Steps:
    """What every optimizer step of a training changed, by the number of the phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed: list[set[str]] = []
        self.frozen_gradients = 0
        self.held: list[int] = []
        self.state: list[int] = []
        plain = TransferTrainer.train
        watch = self

        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            before = weights(trainer.model)
            found = plain(trainer, *args, **kwargs)
            now = weights(trainer.model)
            watch.changed.append({n for n in now if not torch.equal(now[n], before[n])})
            watch.frozen_gradients += sum(
                p.grad is not None for p in trainer.model.parameters() if not p.requires_grad
            )
            optimizer = trainer.optimizer.optimizer
            watch.held.append(sum(len(g["params"]) for g in optimizer.param_groups))
            watch.state.append(len(optimizer.state))
            return found

        monkeypatch.setattr(TransferTrainer, "train", train)


def always_better(monkeypatch: pytest.MonkeyPatch, values: list[float] | None = None) -> None:
    """Lets validation say what the test wants."""
    told = iter(values or [v / 100 for v in range(100)])
    plain = BestWeightsCallback.on_evaluate

    def on_evaluate(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        more["metrics"] = dict(more["metrics"]) | {self.metric: next(told)}
        plain(self, args, state, control, **more)

    monkeypatch.setattr(BestWeightsCallback, "on_evaluate", on_evaluate)


@pytest.mark.parametrize("strategy", ["gradual", "lora"])
def test_phases_go_from_the_top_down(tiny_model: Callable[..., Path], strategy: str) -> None:
    model = prepare(build_probed_model(tiny_model("bert"), "full"), strategy)
    parts = split_phases(model)
    depth_of, blocks = compute_depths(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(parts) == blocks + 1 and parts[-1] == trains
    assert {depth_of[name] for name in parts[0]} == {blocks + 1}
    for number in range(1, blocks):
        new = parts[number] - parts[number - 1]
        assert parts[number - 1] < parts[number]
        assert {depth_of[name] for name in new} == {blocks + 1 - number}


def test_what_is_unfrozen_changes_and_what_is_frozen_does_not(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch)
    watch = Steps(monkeypatch)
    outcome = train_arm(bench, settings(), 0)
    built = bench.build_model("mean", 0)
    parts = split_phases(prepare(built.model, "gradual"))
    assert len(watch.changed) == len(parts) == 4
    for changed, part in zip(watch.changed, parts, strict=True):
        # Words that no row has keep their embedding row, but the table as a whole changes.
        assert changed == part
    assert watch.frozen_gradients == 0
    everything = len(parts[-1])
    assert watch.held == [everything] * 4, "the optimizer holds all parameters from the start"
    assert watch.state == [len(part) for part in parts]
    assert {row["phase"] for row in outcome.facts["history"]} == {0, 1, 2, 3}


def test_it_stops_where_validation_stops_improving_and_keeps_the_best(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch, [0.5, 0.6, 0.55, 0.9, 0.9])
    watch = Steps(monkeypatch)
    kept = {}
    plain = module._save_progress

    def noted(state: Any, everything: Any, best: Any, *rest: Any) -> None:
        kept[len(watch.changed)] = {n: p.detach().clone() for n, p in everything.items()}
        plain(state, everything, best, *rest)

    monkeypatch.setattr(module, "_save_progress", noted)
    outcome = train_arm(bench, settings(), 0)
    assert len(watch.changed) == 3, "the third phase was no better, so there is no fourth"
    for name, tensor in outcome.weights.items():
        assert torch.equal(tensor, kept[2][name]), name
    assert not all(torch.equal(tensor, kept[3][name]) for name, tensor in outcome.weights.items())


def test_the_last_phase_trains_everything_at_a_low_rate(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch)
    watch, rates = Steps(monkeypatch), []
    plain = TransferTrainer.create_scheduler

    def noted(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(
            trainer.optimizer.param_groups[0].get("initial_lr", trainer.args.learning_rate)
        )
        return plain(trainer, *args, **kwargs)

    monkeypatch.setattr(TransferTrainer, "create_scheduler", noted)
    train_arm(bench, settings(gradual={"final_epochs": 1, "final_rate": 0.2}), 0)
    assert len(watch.changed) == 5 and watch.changed[4] == watch.changed[3]
    assert rates == pytest.approx([5e-3] * 4 + [1e-3])


def test_with_layer_rates_every_part_keeps_its_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch)
    seen: list[set[float]] = []
    plain = TransferTrainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(trainer, *args, **kwargs)
        groups = trainer.optimizer.optimizer.param_groups
        seen.append({round(g["initial_lr"], 9) for g in groups})
        return found

    monkeypatch.setattr(TransferTrainer, "train", train)
    train_arm(bench, settings(layer_decay=0.5), 0)
    assert seen == [{round(5e-3 * 0.5**k, 9) for k in range(5)}] * 4


@pytest.mark.parametrize(
    ("stopped", "retained"),
    [
        (1, True),
        (2, False),
        (3, True),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in [(1, False), (2, True), (3, False)]
        ),
    ],
)
def test_what_was_stopped_goes_on_to_the_same_weights(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: int, retained: bool
) -> None:
    from hftl.finetune.context import RegularizerSetup
    from hftl.retain.kl import KLToOriginal
    from hftl.retain.weights import L2SP

    def kept() -> Any:
        return RegularizerSetup([KLToOriginal(0.5), L2SP(0.1)]) if retained else RegularizerSetup()

    always_better(monkeypatch)
    whole = train_arm(bench, settings(), 0, kept())
    state = GradualCheckpoint(tmp_path / "state", READS)
    plain, count = module._save_progress, [0]

    def killed(*args: Any) -> None:
        plain(*args)
        count[0] += 1
        if count[0] == stopped:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save_progress", killed)
        always_better(patch)
        with pytest.raises(KeyboardInterrupt):
            train_arm(bench, settings(), 0, kept(), state)
    assert json.loads((tmp_path / "state" / "state.json").read_text())["phase"] == stopped
    with monkeypatch.context() as patch:
        always_better(patch, [stopped / 100 + v / 100 for v in range(100)])
        watch = Steps(patch)
        again = train_arm(bench, settings(), 0, kept(), state)
    assert len(watch.changed) == 4 - stopped
    assert again.facts == whole.facts
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, again.weights[name]), name
    other = GradualCheckpoint(tmp_path / "state", {"of": "another"})
    assert run_folder.read_stage_inputs(tmp_path / "state") == READS != other.cache_key


def test_every_phase_has_its_own_schedule_order_and_dropout(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch)
    rates: dict[int, list[float]] = {}
    seeds = []
    plain = TransferTrainer.training_step

    def noted(trainer: Any, *args: Any) -> torch.Tensor:
        if trainer.args.seed not in rates:
            seeds.append((trainer.args.seed, trainer.args.data_seed))
        told = rates.setdefault(trainer.args.seed, [])
        told.append(trainer.optimizer.optimizer.param_groups[-1]["lr"])
        return plain(trainer, *args)

    monkeypatch.setattr(TransferTrainer, "training_step", noted)
    train_arm(bench, settings(layer_decay=0.5), 3)
    # 40 rows in batches of 16, and a linear schedule that ends at 0.
    assert [told == pytest.approx([5e-3, 5e-3 * 2 / 3, 5e-3 / 3]) for told in rates.values()] == (
        [True] * 4
    )
    assert len({seed for seed, _ in seeds}) == 4 and all(one == two for one, two in seeds)


def test_the_last_phase_follows_a_stop_from_the_best_weights(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch, [0.5, 0.6, 0.55, 0.4, 0.3])
    at_start, at_end = [], []
    plain = TransferTrainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        at_start.append(weights(trainer.model))
        found = plain(trainer, *args, **kwargs)
        at_end.append(weights(trainer.model))
        return found

    monkeypatch.setattr(TransferTrainer, "train", train)
    outcome = train_arm(bench, settings(gradual={"final_epochs": 2}), 0)
    assert len(at_start) == 4, "three of five phases unfroze, then the last came"
    assert all(torch.equal(at_start[3][n], tensor) for n, tensor in at_end[1].items())
    assert all(not torch.equal(at_end[3][n], at_start[3][n]) for n in at_end[3] if "key" not in n)
    assert all(torch.equal(outcome.weights[n], at_end[1][n]) for n in outcome.weights)


def test_the_epochs_of_all_phases_are_counted(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always_better(monkeypatch, [0.1, 0.2, 0.3, 0.4, 0.35, 0.36])
    outcome = train_arm(bench, settings(gradual={"epochs": 2}), 0)
    facts = outcome.facts
    assert (facts["epochs"], facts["best_epoch"]) == (6.0, 4.0)
    looks = [(r["phase"], r["epoch"]) for r in facts["history"] if "eval_loss" in r]
    assert looks == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    assert all({"loss", "eval_loss"} & row.keys() for row in facts["history"])


def test_patience_is_counted_in_each_phase(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always_better(monkeypatch, [0.5, 0.4, 0.3, 0.45, 0.6, 0.5, 0.5, 0.1, 0.1])
    outcome = train_arm(bench, settings(patience=2, gradual={"epochs": 4}), 0)
    looks = [row["phase"] for row in outcome.facts["history"] if "eval_loss" in row]
    # The first phase waits for two; the second for one before its best, and two after it.
    assert looks == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_a_phase_without_an_evaluation_is_judged_at_its_end(bench: Any) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 1000, "learning_rate": 5e-3, "bf16": False}
    outcome = train_arm(bench, settings(training=training), 0)
    start = bench.build_model("mean", 0).model.state_dict()
    assert not torch.equal(outcome.weights["head.weight"], start["head.weight"])
    assert {row["phase"] for row in outcome.facts["history"] if "eval_loss" in row} >= {0, 1}


def test_frozen_blocks_run_in_eval_mode(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always_better(monkeypatch)
    live: dict[int, list[bool]] = {}
    plain = TransferTrainer.compute_loss

    def noted(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(trainer, model, *args, **kwargs)
        if kwargs.get("num_items_in_batch") is not None:
            layers = model.encoder.encoder.layer
            live[trainer.args.seed] = [layer.output.dropout.training for layer in layers]
        return found

    monkeypatch.setattr(TransferTrainer, "compute_loss", noted)
    train_arm(bench, settings(), 0)
    assert [sum(told) for told in live.values()] == [0, 1, 2, 3]
    assert list(live.values())[1] == [False, False, True]


def test_phases_work_in_a_script_of_its_own(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = build_probed_model(tiny_model("bert"), "gradual")
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for part in split_phases(model):
        before = weights(model)
        for name, parameter in named.items():
            parameter.requires_grad = name in part
        kind: Any = partial(TransferTrainer, optimizers=(optimizer, None))
        trainer_of(model, tmp_path, kind).train()
        moved = {name for name in named if not torch.equal(before[name], named[name])}
        assert moved == part


def test_it_is_refused_where_it_cannot_work(
    bench: Any, recipe_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="max_steps is of one training"):
        recipe_tree["finetune"] |= {"strategy": "gradual"}
        recipe_tree["finetune"]["training"]["max_steps"] = 5
        Recipe.parse(recipe_tree)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="does not run under FSDP"):
        train_arm(bench, settings(), 0)


def test_a_run_that_was_stopped_in_an_arm_ends_as_one_that_was_not(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_tree["data"]["shots"] = 20
    recipe_tree["finetune"] |= {"strategy": "gradual"}
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    always_better(monkeypatch)
    recipe = Recipe.parse(recipe_tree)
    run(recipe, tmp_path / "whole", until="finetune")
    plain = TransferTrainer.train

    def killed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "parts/checkpoints/gradual-seed0/MANIFEST.json").exists():
            raise KeyboardInterrupt
        return plain(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "train", killed)
        always_better(patch)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "parts", until="finetune")
    always_better(monkeypatch, [0.01, 0.02, 0.03])
    run(recipe, tmp_path / "parts", until="finetune")
    names = ["weights.safetensors", "predictions.parquet", "logits.safetensors"]
    one, two = (tmp_path / name / "arms" / "gradual-seed0" for name in ("whole", "parts"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    told = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert told[0] | {"timings": 0} == told[1] | {"timings": 0}
    assert not list((tmp_path / "parts" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_by_gradual_unfreezing(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    recipe_tree["data"]["shots"] = 20
    recipe_tree["finetune"] |= {"strategy": "gradual", "layer_decay": 0.8}
    recipe_tree["measure"] |= {"arms": ["head", "full", "classical"]}
    record = run(Recipe.parse(recipe_tree), tmp_path / "run")
    assert record is not None and record["own_arm"] == "gradual"
    assert record["reload_difference"] <= 1e-5
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "A gradual fine-tuning of" in (tmp_path / "run/publish/README.md").read_text()
