"""Check which loss is trained: the model's own, or the same one counted over the whole step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import assert_same_parameters, build_classifier, build_trainer
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.trainer import TransferTrainer

KINDS = (Trainer, TransferTrainer)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class WeightedOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class WeightedModel(nn.Module):
    """Weigh classes in the loss, as a user's own classifier may."""

    def __init__(self, form: str = "output") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 2)
        self.form = form

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.inner(x)
        weight = torch.tensor([1.0, 9.0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, weight)
        if self.form == "tuple":
            return (logits,) if loss is None else (loss, logits)
        if self.form == "dict":
            return {"loss": loss, "logits": logits}
        return WeightedOutput(loss, logits)


def make_points(rows: int = 8) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(3, generator=draw), "labels": i % 2} for i in range(rows)]


def make_token_rows(**labels: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Return four rows of tokens, with labels by the row's number."""
    return [
        {"input_ids": [2, 5 + i, 7, 3]} | {key: make(i) for key, make in labels.items()}
        for i in range(4)
    ]


def take_step(kind: Any, model: nn.Module, rows: Any, folder: Path, **more: Any) -> nn.Module:
    """Return the model after one step of plain descent over all rows."""
    settings = {"max_steps": 1, "per_device_train_batch_size": len(rows), "max_grad_norm": 1e9,
                "learning_rate": 0.05}  # fmt: skip
    build_trainer(model, folder, kind=kind, data=rows, **settings | more).train()
    return model


@pytest.mark.parametrize("form", ["output", "dict", "tuple"])
def test_models_own_loss_is_trained(form: str, tmp_path: Path) -> None:
    models = [take_step(kind, WeightedModel(form), make_points(), tmp_path) for kind in KINDS]
    assert_same_parameters(*models, atol=1e-6)


@pytest.mark.parametrize(("outputs", "integers"), [(1, True), (3, False)])
def test_regression_targets_are_trained_by_squares(
    outputs: int, integers: bool, bert: Path, tmp_path: Path
) -> None:
    """Read several numbers a row as targets, and not as a yes or no for each output."""

    def label(i: int) -> Any:
        value = i if integers else i + 0.5
        return value if outputs == 1 else [value, -value, 2 * value]

    rows = make_token_rows(labels=label)
    typed = [row | {"labels": torch.tensor(row["labels"]).float()} for row in rows]
    models = []
    for kind, data in zip(KINDS, (typed, rows), strict=True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            bert, num_labels=outputs, problem_type="regression", **NO_DROPOUT
        )
        models.append(take_step(kind, model, data, tmp_path))
    assert_same_parameters(*models, atol=1e-5)


@pytest.mark.parametrize("task", ["causal", "question answering"])
def test_losses_of_other_tasks_are_the_stock_trainers(
    task: str, bert: Path, tmp_path: Path
) -> None:
    models = []
    for kind in KINDS:
        torch.manual_seed(0)
        if task == "causal":
            rows = [row | {"labels": row["input_ids"]} for row in make_token_rows()]
            model: Any = LlamaForCausalLM(LlamaConfig(
                vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
            ))  # fmt: skip
        else:
            rows = make_token_rows(start_positions=lambda _: 1, end_positions=lambda _: 2)
            model = AutoModelForQuestionAnswering.from_pretrained(bert, **NO_DROPOUT)
        models.append(take_step(kind, model, rows, tmp_path))
    assert_same_parameters(*models, atol=1e-5)


def test_model_that_returns_tuples_trains_and_is_evaluated(bert: Path, tmp_path: Path) -> None:
    rows, models, losses = make_token_rows(labels=lambda i: i % 2), [], []
    for as_mapping in (True, False):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            bert, return_dict=as_mapping, **NO_DROPOUT
        )
        models.append(take_step(TransferTrainer, model, rows, tmp_path))
        losses.append(build_trainer(model, tmp_path).evaluate(rows)["eval_loss"])
    assert_same_parameters(*models)
    assert losses[0] == pytest.approx(losses[1])


def test_model_made_by_model_init_trains_and_arguments_stay(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=1,
        label_smoothing_factor=0.1,
    )  # fmt: skip
    before = args.to_dict()
    trainer: Any = TransferTrainer(model_init=WeightedModel, args=args, train_dataset=make_points())
    assert args.to_dict() == before
    trainer.args.label_smoothing_factor = 0.0
    trainer.train()


def test_training_on_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train_dataset holds no rows"):
        take_step(TransferTrainer, WeightedModel(), [], tmp_path, per_device_train_batch_size=1)


def test_plain_module_is_saved_with_all_weights_buffers_and_arguments(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    build_trainer(model, tmp_path).save_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert (tmp_path / "out" / "training_args.bin").exists()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_gradient_checkpointing_recomputes_under_lora(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    passes, models = [], []
    for recompute in (False, True):
        models.append(model := build_classifier(tiny_model(kind), "lora"))
        calls: list[Any] = []
        block = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        inside = next(m for m in block.modules() if hasattr(m, "lora_A"))
        inside.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        build_trainer(model, tmp_path, activation_checkpointing=recompute, max_steps=2).train()
        passes.append(len(calls))
    # Two steps, and once more each where the backward pass recomputes.
    assert passes[1] - passes[0] == 2
    assert_same_parameters(*models)


def test_trainable_weights_in_half_precision_are_refused(bert: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForSequenceClassification.from_pretrained(bert, dtype=dtype)
        with pytest.raises(RecipeError, match="trains and is b?float16: most of its updates"):
            build_trainer(model, tmp_path)
        model.requires_grad_(False)
        model.classifier.float().requires_grad_(True)
        build_trainer(model, tmp_path)


@pytest.mark.parametrize(
    ("task", "problem"),
    [("multi-label", "multi_label_classification"), ("regression", "regression")],
)
def test_smoothing_without_classes_is_refused_by_trainer_and_recipe(
    recipe_tree: dict[str, Any], task: str, problem: str, bert: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, problem_type=problem)
    with pytest.raises(RecipeError, match="label_smoothing_factor spreads the weight of a class"):
        build_trainer(model, tmp_path, label_smoothing_factor=0.1)
    recipe_tree["data"]["task"] = task
    recipe_tree["finetune"]["training"]["label_smoothing_factor"] = 0.1
    with pytest.raises(RecipeError, match=f"label_smoothing_factor=0.1 .* data.task={task}"):
        Recipe.parse(recipe_tree)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("report_to", "wandb", "report_to=wandb: its package is not installed"),
        ("report_to", ["tensorboard"], "report_to=tensorboard: its package is not installed"),
        ("lr_scheduler_type", "warmup_stable_decay", "lr_scheduler_type=warmup_stable_decay does"),
        ("optim", "adamw_bnb_8bit", "optim=adamw_bnb_8bit does not work here"),
        ("optim", "galore_adamw", "optim=galore_adamw does not work here"),
        ("dataloader_drop_last", True, "dataloader_drop_last belongs to hftl"),
        ("prediction_loss_only", True, "prediction_loss_only belongs to hftl"),
        ("batch_eval_metrics", True, "batch_eval_metrics belongs to hftl"),
        ("load_best_model_at_end", True, "load_best_model_at_end belongs to hftl"),
        ("save_strategy", "epoch", "save_strategy belongs to hftl"),
        ("do_train", False, "do_train belongs to hftl"),
        ("optim", "no_such", "training: transformers refuses it"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_check_and_run(
    recipe_tree: dict[str, Any], tmp_path: Path, key: str, value: Any, words: str
) -> None:
    recipe_tree["finetune"]["training"][key] = value
    for call in (check_recipe, lambda recipe: run(recipe, tmp_path / "run")):
        with pytest.raises(RecipeError, match=words):
            call(Recipe.parse(recipe_tree))


def test_schedule_with_its_settings_is_accepted(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["finetune"]["training"] |= {
        "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4},
    }  # fmt: skip
    check_recipe(Recipe.parse(recipe_tree))
