"""One adaptation: warmed, guarded, and the same however often it was stopped."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adaptations import KINDS, OPEN, adapted, model_of, stage_of, task_of, weights
from safetensors.torch import load_file

from hftl.adapt import adaptation as training
from hftl.adapt.encoder_io import merge_encoder_state
from hftl.adapt.guard import GuardedCheckpoint, GuardRule, find_complete_checkpoint
from hftl.adapt.mae import load_mae
from hftl.adapt.mlm import load_mlm
from hftl.config.section import Source
from hftl.errors import NumericError
from hftl.models.source import find_source
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.trainer import TransferTrainer

Tiny = Callable[..., Path]
Outcome = tuple[dict[str, Any], dict[str, torch.Tensor]]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


class Adaptation:
    """One recipe's adaptation, as often as it takes."""

    def __init__(
        self, objective: str, method: str, source: Path, folder: Path, rule: GuardRule = OPEN,
        general: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        self.objective, self.method, self.source, self.folder = objective, method, source, folder
        self.rule, self.general = rule, general
        self.stage = stage_of(objective, method, **more)

    def __call__(self, folder: str = "run", measure: Any = None) -> Outcome:
        torch.manual_seed(torch.seed())  # What was drawn before must not matter.
        model = model_of(self.objective, self.source, self.method, 0.1, LORA)
        task = task_of(self.objective, self.source, general=self.general)
        return adapted(model, task, self.stage, self.folder / folder, self.rule, measure)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As Ctrl-C in the middle of a step."""
    plain = TransferTrainer.training_step

    def stopped(self: TransferTrainer, *args: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(TransferTrainer, "training_step", stopped)
    return monkeypatch


@pytest.fixture(scope="module")
def whole(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Full adaptation of the tiny BERT, never stopped."""
    return Adaptation("mlm", "full", tiny_model(), tmp_path_factory.mktemp("whole"))()


def assert_same(one: Outcome, other: Outcome) -> None:
    """The same story and, bit for bit, the same weights."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


@pytest.mark.parametrize(
    ("objective", "method"),
    [("mlm", "full"), ("mae", "full"), ("mlm", "lora"),
     pytest.param("mae", "lora", marks=pytest.mark.slow)],
)  # fmt: skip
def test_stopped_in_mid_epoch_it_ends_as_if_never_stopped(
    objective: str, method: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = Adaptation(objective, method, tiny_model(KINDS[objective]), tmp_path, general=True)
    whole = run("whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(10, patch)
        run("parts")
    assert find_complete_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoint-8"
    assert_same(run("parts"), whole)
    told = whole[0]
    assert told["kept"] == "adapted" and told["steps"] == 18
    assert [seen["step"] for seen in told["history"]] == [0, 3, 6, 9, 12, 15, 18]
    assert all(seen["general"] is not None for seen in told["history"])


def test_dropout_and_masks_make_the_training_depend_on_its_random_state(
    whole: Outcome, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without which the test above could not fail."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path)
    monkeypatch.setattr(TransferTrainer, "_load_rng_state", lambda *_: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(10, patch)
        run("parts")
    found = run("parts")
    assert any(not torch.equal(tensor, whole[1][name]) for name, tensor in found[1].items())


def test_stopped_anywhere_and_more_than_once(
    whole: Outcome, tiny_model: Tiny, tmp_path: Path
) -> None:
    """Before any checkpoint, from one checkpoint to the next, and at an epoch's end."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path)
    for stop in (3, 5, 7, 13):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(stop, patch)
            run("parts")
    assert_same(run("parts"), whole)


@pytest.mark.parametrize("more", [{"max_steps": 8}, {"patience": 1, "learning_rate": 3.0}])
def test_what_had_ended_takes_no_further_step(
    more: dict[str, Any], tiny_model: Tiny, tmp_path: Path
) -> None:
    """Also where the last step is not an epoch's end, and where patience ended it."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path, eval_steps=4, **more)
    first = run()
    assert first[0]["steps"] == more.get("max_steps", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", lambda *_: pytest.fail("it trains again"))
        again = run()
    assert again[0] == first[0]
    if first[0]["kept"] == "adapted":
        assert_same(again, first)


def kill_in_save(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill when transformers has written its files of the checkpoint, and we none."""
    plain, calls = GuardedCheckpoint.on_save, iter(range(1, 100))

    def killed(self: GuardedCheckpoint, *args: Any, **kwargs: Any) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        plain(self, *args, **kwargs)

    monkeypatch.setattr(GuardedCheckpoint, "on_save", killed)


@pytest.mark.parametrize("limit", [{}, {"save_total_limit": 1}])
def test_a_checkpoint_that_was_not_finished_is_ignored(
    limit: dict[str, Any], whole: Outcome, tiny_model: Tiny, tmp_path: Path
) -> None:
    """And the one before it is still there, whatever limit the recipe gives."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path, **limit)
    folder = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_in_save(3, patch)
        run("parts")
    broken = folder / "checkpoint-12"
    assert (broken / "model.safetensors").exists()
    assert find_complete_checkpoint(folder) == folder / "checkpoint-8"
    for name in ("model.safetensors", "optimizer.pt"):
        os.truncate(broken / name, 100)
    (broken / "rng_state.pth").unlink()
    assert_same(run("parts"), whole)


def test_a_checkpoint_is_complete_with_the_last_byte_of_its_last_file(
    whole: Outcome, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = Adaptation("mlm", "full", tiny_model(), tmp_path)
    folder = tmp_path / "parts"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        run("parts")
    assert (folder / "checkpoint-4" / "kept.safetensors").exists()
    assert find_complete_checkpoint(folder) is None
    assert_same(run("parts"), whole)


def test_no_more_than_two_checkpoints_lie_there(tiny_model: Tiny, tmp_path: Path) -> None:
    Adaptation("mlm", "full", tiny_model(), tmp_path)()
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["checkpoint-16", "checkpoint-18"]
    files = {path.name for path in (tmp_path / "run" / "checkpoint-18").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "kept.safetensors", "seen.json"} <= files


def test_a_checkpoint_holds_what_trains_and_nothing_else(tiny_model: Tiny, tmp_path: Path) -> None:
    run = Adaptation("mlm", "lora", tiny_model(), tmp_path)
    _, left = run()
    folder = tmp_path / "run" / "checkpoint-18"
    for name in ("model.safetensors", "kept.safetensors"):
        assert load_file(folder / name).keys() == left.keys()
    assert any("lora_A" in name for name in left)
    assert not any("base_layer" in name or "embeddings" in name for name in left)


@pytest.mark.parametrize("objective", ["mlm", "mae"])
def test_the_kept_weights_are_those_of_the_best_evaluation(
    objective: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by a guard that is best at step 6; what is told of them can be measured again."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    plain = GuardedCheckpoint.on_evaluate

    def watched(self: GuardedCheckpoint, args: Any, state: Any, control: Any, **more: Any) -> None:
        seen[state.global_step] = weights(more["model"])
        plain(self, args, state, control, **more)

    monkeypatch.setattr(GuardedCheckpoint, "on_evaluate", watched)
    run = Adaptation(
        objective, "full", tiny_model(KINDS[objective]), tmp_path, replace(OPEN, by_guard=True)
    )
    told, left = run(measure=iter([0, 1, 5, 2, 3, 1, 1]).__next__)
    best = told["history"][2]
    assert told["step"] == best["step"] == 6
    assert all(torch.equal(tensor, seen[best["step"]][name]) for name, tensor in left.items())
    model = model_of(objective, run.source)
    model.load_state_dict(left, strict=False)
    task = task_of(objective, run.source)
    assert held_out_loss(model, task) == pytest.approx(best["target"], abs=1e-5)
    start = model_of(objective, run.source)
    assert held_out_loss(start, task) == pytest.approx(told["history"][0]["target"], abs=1e-5)


def held_out_loss(model: Any, task: Any) -> float:
    """The mean over all that is hidden, row by row."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(task.held_out)):
            batch = task.collate([task.held_out[i]])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if labels.is_floating_point():
                total += float((logits - labels).square().sum())
                count += labels.numel()
            else:
                asked = labels[labels >= 0]
                total += float(F.cross_entropy(logits, asked, reduction="sum"))
                count += len(asked)
    return total / count


def test_a_guard_that_nothing_passes_keeps_the_original(tiny_model: Tiny, tmp_path: Path) -> None:
    """The guard is minus the length of the weights, which grows."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path, GuardRule("probe", 0.0), patience=2)
    told, _ = run()
    assert told["kept"] == "original" and told["step"] == 0
    assert told["steps"] == 6, "two looks of three steps, none of them better"
    assert told["history"][1]["target"] < told["history"][0]["target"]
    assert told["why"].startswith("the guard (probe) was below")
    assert not (tmp_path / "run" / "checkpoint-4" / "kept.safetensors").exists()
    assert len(json.loads((tmp_path / "run" / "checkpoint-4" / "seen.json").read_text())) == 2


def test_the_general_loss_guards(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model()
    model, task = model_of("mlm", source), task_of("mlm", source, general=True)
    told = training.adapt_encoder(
        model, task, stage_of("mlm"), GuardRule("general", 0.1), None, 3, "cpu", tmp_path
    )
    assert all(seen["guard"] == -seen["general"] for seen in told["history"])
    general = training.AdaptationTask(task.train, task.general, None, task.collate)  # pyright: ignore
    start = model_of("mlm", source)
    assert told["history"][0]["general"] == pytest.approx(held_out_loss(start, general), abs=1e-5)


def test_a_loss_that_breaks_stops(tiny_model: Tiny, tmp_path: Path) -> None:
    model = model_of("mlm", tiny_model())
    with torch.no_grad():
        model.stock.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(NumericError, match="the held-out loss is NaN at step 0"):
        adapted(model, task_of("mlm", tiny_model()), stage_of("mlm"), tmp_path)


# Warming


def cold(objective: str, folder: Path) -> tuple[Any, tuple[str, ...]]:
    source = find_source(Source(model=str(folder)))
    if objective == "mlm":
        return load_mlm(source, seed=0)
    return load_mae(source, 32, 0.5, {"width": 16, "depth": 1, "heads": 2}, seed=0)


def test_a_small_corpus_is_warmed_as_patiently_as_a_large_one(tiny_model: Tiny) -> None:
    """An epoch of one step is no reason to look at every step and find little gained by it."""
    folder = tiny_model(KINDS["mlm"])
    model, fresh = cold("mlm", folder)
    told = training.train_new_head(model, fresh, task_of("mlm", folder), stage_of("mlm"), 0, "cpu")
    assert told["steps"] >= 3 * training.HEAD_EVAL_STEPS and told["loss"][1] < told["loss"][0]


@pytest.mark.parametrize("objective", ["mlm", "mae"])
def test_warming_trains_the_fresh_head_alone_until_it_levels_off(
    objective: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    plain = BestWeightsCallback.on_evaluate

    def watched(self: BestWeightsCallback, *args: Any, **more: Any) -> None:
        losses.append(more["metrics"]["eval_loss"])
        plain(self, *args, **more)

    monkeypatch.setattr(BestWeightsCallback, "on_evaluate", watched)
    monkeypatch.setattr(training, "HEAD_LEARNING_RATE", 2e-2)
    monkeypatch.setattr(training, "HEAD_EVAL_STEPS", 6)
    folder = tiny_model(KINDS[objective])
    model, fresh = cold(objective, folder)
    task = task_of(objective, folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder = {name: t.clone() for name, t in merge_encoder_state(model).items()}
    start = held_out_loss(model, task)
    told = training.train_new_head(model, fresh, task, stage_of(objective), 0, "cpu")
    for name, tensor in merge_encoder_state(model).items():
        assert torch.equal(tensor, encoder[name]), name
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    places = {id(model.head_parameters()[name]) for name in fresh}
    assert moved == {n for n, p in model.named_parameters() if id(p) in places}

    assert told["loss"] == [losses[0], min(losses)] and min(losses) < losses[0] < start
    assert held_out_loss(model, task) == pytest.approx(told["loss"][1], abs=1e-5)
    assert told["steps"] == training.HEAD_EVAL_STEPS * len(losses) < training.HEAD_MAX_STEPS
    assert level(losses) and not any(level(losses[:end]) for end in range(1, len(losses)))


def level(losses: list[float]) -> bool:
    """Whether neither of the last two is half a percent below the best before it."""
    return len(losses) > 2 and all(
        losses[i] >= min(losses[:i]) * (1 - training.HEAD_MIN_IMPROVEMENT) for i in (-2, -1)
    )


def test_a_head_that_is_not_fresh_stays(tiny_model: Tiny) -> None:
    """Here one bias alone is missing."""
    model, _ = cold("mlm", tiny_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fresh = ("cls.predictions.bias",)
    training.train_new_head(model, fresh, task_of("mlm", tiny_model()), stage_of("mlm"), 0, "cpu")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"stock.cls.predictions.bias"}


def test_a_warm_up_of_less_than_a_step_is_none(tiny_model: Tiny, tmp_path: Path) -> None:
    """transformers rounds it up, and the first step of a warm-up has rate 0."""
    model = model_of("mlm", tiny_model(), "full", 0.0, LORA)
    before = weights(model)
    stage = stage_of("mlm", max_steps=1, warmup_steps=0.06, eval_steps=1, save_steps=1)
    told, after = adapted(model, task_of("mlm", tiny_model()), stage, tmp_path)
    assert told["steps"] == 1
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
