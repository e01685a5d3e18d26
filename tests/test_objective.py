"""Whose loss is learnt: the model's own, or the same one counted over the whole step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import model_of, trainer_of
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
from hftl.train.checkpoint import iterate_trainable
from hftl.train.trainer import TransferTrainer


@dataclass
class Answer(ModelOutput):
    """What a user's own model returns."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Weighted(nn.Module):
    """A user's own classifier, whose loss weighs its classes."""

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
        return {"loss": loss, "logits": logits} if self.form == "dict" else Answer(loss, logits)


def points(rows: int = 8) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(3, generator=draw), "labels": i % 2} for i in range(rows)]


def moved(kind: type[Trainer], model: nn.Module, rows: Any, folder: Path, **more: Any) -> Any:
    """The model's weights after one step of plain descent over all rows."""
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        **{"max_steps": 1, "per_device_train_batch_size": len(rows), "optim": "sgd",
           "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 1e9} | more,
    )  # fmt: skip
    kind(model=model, args=args, train_dataset=rows).train()  # pyright: ignore
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("form", ["output", "dict", "tuple"])
def test_a_loss_of_the_models_own_is_asked(form: str, tmp_path: Path) -> None:
    ours = moved(TransferTrainer, Weighted(form), points(), tmp_path)
    assert torch.allclose(ours, moved(Trainer, Weighted(form), points(), tmp_path), atol=1e-6)
    plain = [{"x": row["x"], "labels": row["labels"]} for row in points()]
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert ours.isfinite().all() and len(moved(TransferTrainer, Weighted(), plain, tmp_path, **cut))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("integers", [False, True])
def test_targets_are_learnt_by_squares(
    outputs: int, integers: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Not as yes or no for each output, which (batch, k) floats were taken for."""
    folder = tiny_model("bert")

    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=outputs, problem_type="regression"
        ).eval()  # fmt: skip

    rows = []
    for i in range(4):
        label: Any = i if integers else i + 0.5
        row = {"input_ids": [2, 5 + i, 7, 3], "attention_mask": [1] * 4}
        rows.append(row | {"labels": label if outputs == 1 else [label, -label, 2 * label]})
    found = []
    for kind in (Trainer, TransferTrainer):
        instance = model()
        for module in instance.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        typed = [row | {"labels": torch.tensor(row["labels"]).float()} for row in rows]
        given = typed if kind is Trainer else rows
        found.append(moved(kind, instance, given, tmp_path, learning_rate=0.05))
    assert torch.allclose(*found, atol=1e-5)


def test_a_causal_model_learns_the_next_token(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    rows = [{"input_ids": [3 + i, 5, 7, 9], "labels": [3 + i, 5, 7, 9]} for i in range(4)]
    found = []
    for kind in (Trainer, TransferTrainer):
        torch.manual_seed(0)
        found.append(moved(kind, LlamaForCausalLM(config), rows, tmp_path, learning_rate=0.1))
    assert torch.allclose(*found, atol=1e-6)


def test_question_answering_trains_as_with_the_trainer(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"input_ids": [2, 5 + i, 7, 3], "start_positions": 1, "end_positions": 2}
            for i in range(4)]  # fmt: skip
    found, folder = [], tiny_model("bert")
    for kind in (Trainer, TransferTrainer):
        torch.manual_seed(0)
        model = AutoModelForQuestionAnswering.from_pretrained(folder)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found.append(moved(kind, model, rows, tmp_path, learning_rate=0.05))
    assert torch.allclose(*found, atol=1e-5)


def test_a_model_that_returns_tuples_trains_and_is_evaluated(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"input_ids": [2, 5 + i, 7, 3], "labels": i % 2} for i in range(4)]
    found, folder = [], tiny_model("bert")
    for as_mapping in (True, False):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, return_dict=as_mapping, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        weights = moved(TransferTrainer, model, rows, tmp_path)
        found.append((weights, trainer_of(model, tmp_path).evaluate(rows)["eval_loss"]))
    (mapped, loss), (tupled, same) = found
    assert torch.equal(mapped, tupled) and loss == pytest.approx(same)


def test_training_on_no_rows_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(RecipeError, match="train_dataset holds no rows"):
        TransferTrainer(model=model, args=args, train_dataset=[]).train()  # pyright: ignore


def test_the_callers_arguments_stay_as_they_are(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1,
                             label_smoothing_factor=0.1)  # fmt: skip
    before = args.to_dict()
    TransferTrainer(model=nn.Linear(3, 2), args=args)
    assert args.to_dict() == before


def test_what_a_plain_module_is_saved_with(tmp_path: Path) -> None:
    """All of it: frozen weights and buffers too, and the arguments."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    TransferTrainer(model=model, args=args).save_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert (tmp_path / "out" / "training_args.bin").exists()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_gradient_checkpointing_recomputes_under_lora(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    passes, weights = [], []
    for recompute in (False, True):
        model = model_of(tiny_model(kind), "lora")
        calls = [0]
        block = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        inside = next(m for m in block.modules() if isinstance(m, nn.Linear))
        inside.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        trainer_of(model, tmp_path, activation_checkpointing=recompute, max_steps=2).train()
        passes.append(calls[0])
        weights.append(torch.cat([p.detach().flatten() for _, p in iterate_trainable(model)]))
    # Two steps, and once more each where the backward pass recomputes.
    assert passes[1] - passes[0] == 2
    assert torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused(
    dtype: torch.dtype, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), dtype=dtype)
    with pytest.raises(RecipeError, match="trains and is b?float16: most of its updates"):
        trainer_of(model, tmp_path)
    model.requires_grad_(False)
    model.classifier.float().requires_grad_(True)
    trainer_of(model, tmp_path)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_smoothing_of_what_is_no_class_is_refused(
    problem: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert"), num_labels=2, problem_type=problem
    )
    with pytest.raises(RecipeError, match="label_smoothing_factor spreads the weight of a class"):
        trainer_of(model, tmp_path, label_smoothing_factor=0.1)


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


def test_a_schedule_with_its_settings_is_taken(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    recipe_tree["finetune"]["training"] |= {
        "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4},
    }  # fmt: skip
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_smoothing_without_classes_is_refused_in_a_recipe(
    recipe_tree: dict[str, Any], task: str
) -> None:
    recipe_tree["data"]["task"] = task
    recipe_tree["finetune"]["training"]["label_smoothing_factor"] = 0.1
    with pytest.raises(RecipeError, match=f"label_smoothing_factor=0.1 .* data.task={task}"):
        Recipe.parse(recipe_tree)


def test_a_model_made_by_model_init_trains(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=1
    )
    TransferTrainer(model_init=Weighted, args=args, train_dataset=points()).train()  # pyright: ignore
