"""Run one adaptation: guarded, its head warmed, and the same however often it was stopped."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.adaptations import (
    ARCHITECTURES,
    OPEN_GUARD,
    Outcome,
    adapt,
    build_stage,
    build_task,
    copy_trainable,
    load_cold,
    load_objective,
)

from hftl.adapt import adaptation
from hftl.adapt.encoder_io import merge_encoder_state
from hftl.adapt.guard import GuardedCheckpoint, GuardRule
from hftl.errors import NumericError
from hftl.train import step_checkpoint
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.step_checkpoint import CheckpointSpec, find_checkpoint
from hftl.train.trainer import TransferTrainer

Tiny = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
KEY = {"of": "a test"}


class Adaptation:
    """Run one recipe's adaptation, as often as it takes."""

    def __init__(
        self, objective: str, method: str, source: Path, folder: Path,
        rule: GuardRule = OPEN_GUARD, general: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        self.objective, self.method, self.source, self.folder = objective, method, source, folder
        self.rule, self.general = rule, general
        self.stage = build_stage(objective, method, **more)

    def __call__(self, measure: Any = None, folder: Path | None = None) -> Outcome:
        torch.manual_seed(torch.seed())  # What was drawn before must not matter.
        model = load_objective(self.objective, self.source, self.method, 0.1, LORA)
        task = build_task(self.objective, self.source, self.general)
        return adapt(model, task, self.stage, folder or self.folder, self.rule, measure)

    def stop_at(self, step: int) -> None:
        """Stop it as Ctrl-C does in the middle of a step."""
        train_batch = TransferTrainer.training_step

        def stop(trainer: TransferTrainer, *args: Any) -> torch.Tensor:
            if trainer.state.global_step == step:
                raise KeyboardInterrupt
            return train_batch(trainer, *args)

        self.interrupt(TransferTrainer, "training_step", stop)

    def interrupt(self, owner: Any, name: str, interrupting: Any) -> None:
        """Run it until the replaced function interrupts it."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, interrupting)
            self()


@pytest.fixture(scope="module")
def whole(
    tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Outcome]:
    """`whole(objective, method)`: the outcome of an adaptation that was never stopped."""
    outcomes: dict[tuple[str, str], Outcome] = {}

    def run(objective: str = "mlm", method: str = "full") -> Outcome:
        if (objective, method) not in outcomes:
            folder = tmp_path_factory.mktemp("whole")
            source = tiny_model(ARCHITECTURES[objective])
            outcomes[objective, method] = Adaptation(
                objective, method, source, folder, general=True
            )()
        return outcomes[objective, method]

    return run


@pytest.fixture
def run(tiny_model: Tiny, tmp_path: Path) -> Adaptation:
    """Prepare a full adaptation of the tiny BERT."""
    return Adaptation("mlm", "full", tiny_model(), tmp_path, general=True)


def assert_same(one: Outcome, other: Outcome) -> None:
    """Compare facts and, bit for bit, weights."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


# Stops


@pytest.mark.parametrize(
    ("objective", "method", "stops"),
    [
        ("mlm", "lora", [10]), ("mae", "full", [10]),
        # Before any checkpoint, from one checkpoint to the next, and at an epoch's end.
        ("mlm", "full", [3, 7, 13]),
        pytest.param("mae", "lora", [10], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_resume_reaches_the_same_weights(
    objective: str, method: str, stops: list[int], whole: Any, tiny_model: Tiny, tmp_path: Path
) -> None:
    source = tiny_model(ARCHITECTURES[objective])
    run = Adaptation(objective, method, source, tmp_path, general=True)
    for step in stops:
        run.stop_at(step)
    if stops == [10]:
        assert find_checkpoint(tmp_path, KEY) == tmp_path / "step-8"
    expected = whole(objective, method)
    assert_same(run(), expected)
    facts = expected[0]
    assert facts["kept"] == "adapted" and facts["steps"] == 18
    assert [evaluation["step"] for evaluation in facts["history"]] == [0, 3, 6, 9, 12, 15, 18]
    assert all(evaluation["general"] is not None for evaluation in facts["history"])
    # No more than two checkpoints stay, and each holds what trains and nothing else.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-12", "step-16"]
    folder = tmp_path / "step-16"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert load_file(folder / "weights.safetensors").keys() == expected[1].keys()
    held = load_file(folder / "callbacks.safetensors").keys()
    assert {name.split(".", 1)[1] for name in held} == expected[1].keys()
    if method == "lora":
        assert any("lora_A" in name for name in expected[1])
        assert not any("base_layer" in n or "embeddings" in n for n in expected[1])


def test_resume_without_the_random_state_reaches_other_weights(
    run: Adaptation, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Show that dropout and masks depend on it: else the test above could not fail."""
    monkeypatch.setattr(TransferTrainer, "load_checkpoint_random_state", lambda *_: None)
    run.stop_at(10)
    _, weights = run()
    assert any(not torch.equal(tensor, whole()[1][name]) for name, tensor in weights.items())


def test_adaptation_that_was_lost_after_its_end_ends_the_same(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    """Stop by patience, at step 8; what follows the training may be cut off as well."""
    more = {"patience": 2, "learning_rate": 3.0}
    run = Adaptation("mlm", "full", tiny_model(), tmp_path, eval_steps=4, **more)
    first = run()
    assert first[0]["steps"] == 8
    assert_same(run(), first)


@pytest.mark.parametrize("place", ["state", "fsync"])
def test_unfinished_checkpoint_is_ignored(
    place: str, run: Adaptation, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Find the one before it still there, and of the first one nothing before its last byte."""
    write, calls = step_checkpoint.write_training_state, iter(range(1, 100))

    def interrupt(*args: Any) -> None:
        if place == "fsync":
            raise KeyboardInterrupt
        write(*args)
        if next(calls) == 3:
            raise KeyboardInterrupt

    if place == "fsync":
        run.interrupt(os, "fsync", interrupt)
    else:
        run.interrupt(step_checkpoint, "write_training_state", interrupt)
    expected = [] if place == "fsync" else ["step-4", "step-8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert_same(run(), whole())


# The guard


@pytest.mark.parametrize("objective", ["mlm", "mae"])
def test_weights_of_the_best_evaluation_are_restored(
    objective: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a guard that is best at step 6, and measure the recorded loss again."""
    weights: dict[int, dict[str, torch.Tensor]] = {}
    evaluate = GuardedCheckpoint.on_evaluate

    def watch(self: GuardedCheckpoint, args: Any, state: Any, control: Any, **more: Any) -> None:
        weights[state.global_step] = copy_trainable(more["model"])
        evaluate(self, args, state, control, **more)

    monkeypatch.setattr(GuardedCheckpoint, "on_evaluate", watch)
    source, rule = tiny_model(ARCHITECTURES[objective]), replace(OPEN_GUARD, by_guard=True)
    run = Adaptation(objective, "full", source, tmp_path, rule, num_train_epochs=2)
    facts, restored = run(iter([0, 1, 5, 2, 3]).__next__)
    best = facts["history"][2]
    assert facts["step"] == best["step"] == 6
    assert all(torch.equal(tensor, weights[6][name]) for name, tensor in restored.items())
    model, task = load_objective(objective, source), build_task(objective, source)
    start = compute_held_out_loss(model, task)
    assert start == pytest.approx(facts["history"][0]["target"], abs=1e-5)
    model.load_state_dict(restored, strict=False)
    assert compute_held_out_loss(model, task) == pytest.approx(best["target"], abs=1e-5)


def compute_held_out_loss(model: Any, task: Any) -> float:
    """Return the mean over all that is hidden, row by row."""
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
                hidden = labels[labels >= 0]
                total += float(F.cross_entropy(logits, hidden, reduction="sum"))
                count += len(hidden)
    return total / count


def test_original_stays_where_nothing_passes_the_guard(tiny_model: Tiny, tmp_path: Path) -> None:
    """Guard by minus the length of the weights, which grows."""
    run = Adaptation("mlm", "full", tiny_model(), tmp_path, GuardRule("probe", 0.0), patience=2)
    facts, _ = run()
    assert facts["kept"] == "original" and facts["step"] == 0
    assert facts["steps"] == 6, "two evaluations of three steps, none of them better"
    assert facts["history"][1]["target"] < facts["history"][0]["target"]
    assert facts["why"].startswith("the guard (probe) was below")
    assert not load_file(tmp_path / "step-4" / "callbacks.safetensors"), "no weights are held"


def test_general_loss_guards(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model()
    model, task = load_objective("mlm", source), build_task("mlm", source, general=True)
    facts = adaptation.adapt_encoder(
        model, task, build_stage("mlm", max_steps=3), GuardRule("general", 0.1), None, 3, "cpu",
        CheckpointSpec(tmp_path, KEY),
    )  # fmt: skip
    assert all(seen["guard"] == -seen["general"] for seen in facts["history"])
    general = replace(task, held_out=task.general)  # pyright: ignore
    start = compute_held_out_loss(load_objective("mlm", source), general)
    assert facts["history"][0]["general"] == pytest.approx(start, abs=1e-5)


def test_nan_loss_stops(tiny_model: Tiny, tmp_path: Path) -> None:
    model = load_objective("mlm", tiny_model())
    with torch.no_grad():
        model.stock.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(NumericError, match="the held-out loss is NaN at step 0"):
        adapt(model, build_task("mlm", tiny_model()), build_stage("mlm"), tmp_path)


# Training a new head


def test_new_head_of_a_small_corpus_is_trained_as_patiently(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluate as rarely where an epoch has one step: a step gains little."""
    monkeypatch.setattr(adaptation, "HEAD_EVAL_STEPS", 8)
    folder = tiny_model("bert")
    model, fresh = load_cold("mlm", folder)
    facts = adaptation.train_new_head(
        model, fresh, build_task("mlm", folder), build_stage("mlm"), 0, "cpu"
    )
    assert facts["steps"] >= 3 * 8 and facts["loss"][1] < facts["loss"][0]


@pytest.mark.parametrize("objective", ["mlm", "mae"])
def test_new_head_alone_trains_until_it_levels_off(
    objective: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    evaluate = BestWeightsCallback.on_evaluate

    def watch(self: BestWeightsCallback, *args: Any, **more: Any) -> None:
        losses.append(more["metrics"]["eval_loss"])
        evaluate(self, *args, **more)

    monkeypatch.setattr(BestWeightsCallback, "on_evaluate", watch)
    monkeypatch.setattr(adaptation, "HEAD_LEARNING_RATE", 2e-2)
    monkeypatch.setattr(adaptation, "HEAD_EVAL_STEPS", 6)
    folder = tiny_model(ARCHITECTURES[objective])
    model, fresh = load_cold(objective, folder)
    task = build_task(objective, folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder = {name: t.clone() for name, t in merge_encoder_state(model).items()}
    start = compute_held_out_loss(model, task)
    facts = adaptation.train_new_head(model, fresh, task, build_stage(objective), 0, "cpu")
    for name, tensor in merge_encoder_state(model).items():
        assert torch.equal(tensor, encoder[name]), name
    places = {id(model.head_parameters()[name]) for name in fresh}
    assert find_moved(model, before) == {n for n, p in model.named_parameters() if id(p) in places}

    assert facts["loss"] == [losses[0], min(losses)] and min(losses) < losses[0] < start
    assert compute_held_out_loss(model, task) == pytest.approx(facts["loss"][1], abs=1e-5)
    assert facts["steps"] == adaptation.HEAD_EVAL_STEPS * len(losses) < adaptation.HEAD_MAX_STEPS
    assert is_level(losses)
    assert not any(is_level(losses[:end]) for end in range(1, len(losses)))


def find_moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def is_level(losses: list[float]) -> bool:
    """Return whether neither of the last two is half a percent below the best before it."""
    return len(losses) > 2 and all(
        losses[i] >= min(losses[:i]) * (1 - adaptation.HEAD_MIN_IMPROVEMENT) for i in (-2, -1)
    )


def test_head_of_the_checkpoint_stays(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the one bias that is missing, and nothing else."""
    monkeypatch.setattr(adaptation, "HEAD_MAX_STEPS", 6)
    model, _ = load_cold("mlm", tiny_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fresh, task = ("cls.predictions.bias",), build_task("mlm", tiny_model())
    adaptation.train_new_head(model, fresh, task, build_stage("mlm"), 0, "cpu")
    assert find_moved(model, before) == {"stock.cls.predictions.bias"}


@pytest.mark.parametrize(("save_steps", "every"), [(0, 0), (0.1, 2), (0.5, 9), (1, 1), (4, 4)])
def test_save_steps_below_one_are_a_share_of_all_steps(save_steps: float, every: int) -> None:
    stage = build_stage("mlm", save_steps=save_steps)
    assert adaptation.count_steps(stage, 24) == 18
    assert adaptation._count_save_steps(stage, 24) == every


def test_warm_up_of_less_than_a_step_is_none(tiny_model: Tiny, tmp_path: Path) -> None:
    """transformers rounds it up, and the first step of a warm-up has rate 0."""
    model = load_objective("mlm", tiny_model(), "full", 0.0, LORA)
    before = copy_trainable(model)
    stage = build_stage("mlm", max_steps=1, warmup_steps=0.06, eval_steps=1, save_steps=1)
    facts, after = adapt(model, build_task("mlm", tiny_model()), stage, tmp_path)
    assert facts["steps"] == 1
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
