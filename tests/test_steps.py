"""Count the steps of a training against those that Trainer makes, and warn of long warm-ups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hftl.config.adapt import Adapt
from hftl.config.recipe import Recipe
from hftl.pipeline.objectives import list_adaptation_warnings
from hftl.train.steps import count_training_steps, warn_of_late_evaluation


@pytest.mark.parametrize("rows", [1, 7, 96])
@pytest.mark.parametrize(
    "training",
    [
        {}, {"per_device_train_batch_size": 5}, {"gradient_accumulation_steps": 4},
        {"max_steps": 3}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    ],
)  # fmt: skip
def test_steps_are_those_of_trainer(training: dict[str, Any], rows: int, tmp_path: Any) -> None:
    args = TrainingArguments(str(tmp_path), **training, num_train_epochs=2.5, report_to="none")
    data = DataLoader(torch.zeros(rows), batch_size=args.per_device_train_batch_size)
    trainer = Trainer(torch.nn.Linear(1, 1), args)
    made = trainer.set_initial_training_values(args, data)[-1]
    assert count_training_steps(training, rows, 2.5) == made


def list_warnings(recipe_tree: dict[str, Any], warmup: float, **finetune: Any) -> list[str]:
    """Return the warnings of warm-ups that a check and a run show."""
    training = {"num_train_epochs": 1, "learning_rate": 1e-4, "warmup_steps": warmup}
    recipe = Recipe.parse(
        recipe_tree
        | {"finetune": {"training": training | finetune.pop("training", {}), **finetune},
           "measure": {"seeds": [0], "arms": ["scratch", "head"]}}
    )  # fmt: skip
    facts = bench_of(recipe).run_preflight(recipe, recipe.arms)
    return [warning for warning in facts.warnings if "warmup_steps" in warning]


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
@pytest.mark.parametrize("delay", [5, 6, 30, 31])
def test_an_evaluation_after_the_end_is_named(strategy: str, delay: int, tmp_path: Path) -> None:
    # 30 steps in 5 epochs, as TrainerCallback counts them.
    training: dict[str, Any] = {"eval_delay": delay, "eval_strategy": strategy, "eval_steps": 7}
    args, flow = TrainingArguments(str(tmp_path), **training), DefaultFlowCallback()
    state = TrainerState(global_step=30, max_steps=30, epoch=5.0, eval_steps=7)
    at_end = (flow.on_step_end, flow.on_epoch_end)
    is_evaluated = any(end(args, state, TrainerControl()).should_evaluate for end in at_end)
    warnings = [*warn_of_late_evaluation(training, 30, 5, "lora")]
    assert bool(warnings) != is_evaluated
    length = "5 epochs" if strategy == "epoch" else "30 steps"
    assert all(f"eval_delay={delay} is more than the {length} of lora" in w for w in warnings)


def test_a_warm_up_longer_than_the_training_is_named(recipe_tree: dict[str, Any]) -> None:
    # 96 rows in batches of 8.
    first, second = list_warnings(recipe_tree, 500)
    assert "warmup_steps=500 is more than 12 steps of lora" in first
    assert "steps of a rate that scratch tries" in second
    assert "of a phase of gradual" in list_warnings(recipe_tree, 500, strategy="gradual")[0]
    phases = {"strategy": "gradual", "gradual": {"epochs": 2, "final_epochs": 0.5}}
    assert "more than 6 steps of a phase" in list_warnings(recipe_tree, 8, **phases)[0]
    assert not list_warnings(recipe_tree, 500, training={"lr_scheduler_type": "constant"})
    for fits in (0, 0.5, 1, 4):
        assert not list_warnings(recipe_tree, fits)


def test_steps_that_processes_share_are_fewer(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["finetune"]["training"] |= {"num_train_epochs": 1, "warmup_steps": 8}
    recipe_tree["measure"] = {"seeds": [0], "arms": []}
    recipe = Recipe.parse(recipe_tree)
    bench = bench_of(recipe)
    alone, shared = (bench.run_preflight(recipe, recipe.arms, n).warnings for n in (1, 2))
    assert not [w for w in alone if "warmup_steps" in w]
    assert [w for w in shared if "warmup_steps=8 is more than 6 steps of lora" in w]


def list_check_warnings(recipe_tree: dict[str, Any], key: str) -> list[str]:
    """Return the warnings of `hftl check` that name a key."""
    recipe = Recipe.parse(recipe_tree)
    warnings = bench_of(recipe).run_preflight(recipe, recipe.arms).warnings
    return [warning for warning in warnings if key in warning]


def test_words_and_revisions_that_say_nothing_are_named(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["source"]["revision"] = "a" * 40
    recipe_tree["data"]["label_names"] = {"negative": "a film", "positive": "a film"}
    (warned,) = list_check_warnings(recipe_tree, "label_names")
    assert "'a film' for 'negative' and 'positive'" in warned
    assert len(list_check_warnings(recipe_tree, "source.revision")) == 1
    # A push names the base at this commit.
    recipe_tree["source"]["published_as"] = "org/base"
    assert not list_check_warnings(recipe_tree, "source.revision")


def test_a_rate_that_is_high_for_adapters_is_named(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["measure"] = {"seeds": [0], "arms": ["scratch", "head"]}
    recipe_tree["finetune"]["training"]["learning_rate"] = 3.0
    recipe = Recipe.parse(recipe_tree)
    facts = bench_of(recipe).run_preflight(recipe, recipe.arms)
    assert [w for w in facts.warnings if "learning rate 3 is high for lora" in w]
    assert not [w for w in facts.warnings if "scratch" in w]
    recipe_tree["finetune"]["training"]["optim"] = "sgd"
    assert not list_check_warnings(recipe_tree, "learning rate")


def test_a_warm_up_longer_than_an_adaptation_is_named() -> None:
    stage = Adapt(objective="mlm", training={"num_train_epochs": 1, "warmup_steps": 90})
    (warning,) = list_adaptation_warnings(stage, 32 * 80, 1000)
    assert "adapt.training.warmup_steps=90 is more than 80 steps of mlm" in warning
    assert not list_adaptation_warnings(stage, 32 * 90, 1000)
