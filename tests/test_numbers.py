"""Break the numbers of a training: it stops before the step, and names step and rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import bench_of
from support.training import (
    Rows,
    build_classifier,
    build_trainer,
    copy_parameters,
    watch_batches,
)

from hftl.config.recipe import Recipe
from hftl.errors import NumericError
from hftl.finetune.arm import train_arm
from hftl.train.numbers import DIVERGED_STEPS, FIRST_STEPS, NumberWatch, StepNumbers, format_rows
from hftl.train.trainer import TransferTrainer


class BrokenTerm:
    """Add NaN to the loss from the fifth step on."""

    def prepare(self, start: Any) -> None:
        pass

    def loss(self, step: Any) -> torch.Tensor:
        return torch.tensor(float("nan") if step.epoch else 0.0)


def break_loss(trainer: Any) -> None:
    compute_loss = trainer.compute_loss

    def compute(*args: Any, **kwargs: Any) -> Any:
        return compute_loss(*args, **kwargs) / (trainer.state.global_step != 4)

    trainer.compute_loss = compute


def break_gradient(trainer: Any) -> None:
    parameter = trainer.model.classifier.bias
    parameter.register_hook(lambda g: g * torch.nan if trainer.state.global_step == 4 else g)


@pytest.mark.parametrize(("case", "message"), [
    ("loss", "the loss is inf at step 4"),
    ("gradient", "the norm of the gradients is nan at step 4"),
    ("regularizer", "the loss of retain's regularizers is nan at step 3"),
])  # fmt: skip
@pytest.mark.parametrize("accumulated", [1, 2])
def test_broken_number_stops_before_the_step_and_names_its_rows(
    case: str, message: str, accumulated: int, bert: Path, tmp_path: Path
) -> None:
    model = build_classifier(bert, "full")
    terms = [BrokenTerm()] if case == "regularizer" else []
    trainer = build_trainer(
        model, tmp_path, terms, num_train_epochs=3, gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=8 // accumulated, logging_steps=1, logging_strategy="steps",
    )  # fmt: skip
    if case != "regularizer":
        {"loss": break_loss, "gradient": break_gradient}[case](trainer)
    batches: list[torch.Tensor] = []
    states: list[dict[str, torch.Tensor]] = []
    watch_batches(trainer, lambda batch: batches.append(batch["input_ids"]))
    train_batch = trainer.training_step

    def watch(*args: Any) -> Any:
        states.append(copy_parameters(model))
        return train_batch(*args)

    trainer.training_step = watch
    with pytest.raises(NumericError, match=message) as caught:
        trainer.train()
    assert all(torch.equal(states[-1][name], p) for name, p in model.named_parameters())
    seen = torch.cat(batches[-accumulated:]).tolist()
    named = [i for i, ids in enumerate(Rows().ids.tolist()) if ids in seen]
    words = caught.value.fix.split("rows of the step: ")[1].split(", ")
    assert sorted(words) == sorted(f"row {number}" for number in named)
    assert all(torch.tensor(row["loss"]).isfinite() and row["loss"]
               for row in trainer.state.log_history if "loss" in row)  # fmt: skip


def test_arm_names_the_lines_of_the_table(
    recipe_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferTrainer, "compute_loss", lambda self, model, inputs, **_: (
        next(model.parameters()).sum() * torch.nan
    ))  # fmt: skip
    recipe = Recipe.parse(
        recipe_tree | {"finetune": recipe_tree["finetune"] | {"strategy": "full"}}
    )
    with pytest.raises(NumericError, match="the loss is nan at step 0") as caught:
        train_arm(bench_of(recipe), recipe.finetune, 0)
    assert "reviews.csv line" in caught.value.fix and "reviews" not in caught.value.what


@pytest.mark.parametrize(("start", "then", "stops"), [
    (0.7, 11.0, True), (0.7, 9.0, False), (0.01, 9.0, False), (4.0, 39.0, False), (4.0, 41.0, True),
])  # fmt: skip
def test_loss_far_above_its_start_for_long_has_diverged(
    start: float, then: float, stops: bool
) -> None:
    watch = NumberWatch()
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)

    def step(loss: float, added: float = 0.0) -> None:
        watch.add_loss(torch.tensor(loss + added))
        watch.add_regularization(added)
        watch.finish_step(5, 1.0, accelerator, list)

    for _ in range(FIRST_STEPS):
        step(start)
    for _ in range(DIVERGED_STEPS - 1):
        step(then)
    step(start, 1e4)  # A step that is better starts the count anew; regularizers do not count.
    for _ in range(DIVERGED_STEPS - 1):
        step(then)
    if stops:
        with pytest.raises(NumericError, match="the loss diverged: it is"):
            step(then)
    else:
        step(then)


@pytest.mark.parametrize("follows", ["should_log", "should_evaluate", "should_save", None, "end"])
def test_number_on_its_way_is_read_before_anything_is_made_of_the_weights(
    follows: str | None,
) -> None:
    watch = NumberWatch()
    values = torch.tensor([torch.nan, 0.0, 1.0])
    watch._pending = StepNumbers(7, lambda: ["row 1"], values, lambda: None)
    control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False)
    state = SimpleNamespace(global_step=8, max_steps=8 if follows == "end" else 9)
    if follows in vars(control):
        setattr(control, follows, True)
    if follows is None:
        watch.on_step_end(None, state, control)
        with pytest.raises(NumericError, match="step 7"):
            watch.on_epoch_end(None, state, control)
        return
    with pytest.raises(NumericError, match="the loss is nan at step 7"):
        watch.on_step_end(None, state, control)


def test_first_rows_are_named() -> None:
    assert format_rows(["row 1", "row 5"]) == "row 1, row 5"
    assert format_rows([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@pytest.mark.gpu
def test_accelerator_stops_one_step_later_and_waits_at_no_step(bert: Path, tmp_path: Path) -> None:
    trainer = build_trainer(build_classifier(bert, "full"), tmp_path, num_train_epochs=3,
                            use_cpu=False)  # fmt: skip
    break_loss(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(NumericError, match="the loss is inf at step 4"):
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 5
