"""Read the arguments of TrainingArguments and LoraConfig, against the real classes."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from torch._inductor import list_mode_options
from torch.distributed import rendezvous
from transformers import TrainingArguments

from hftl.config import upstream_args
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.arguments import build_training_arguments

CLASSES = {"training": TrainingArguments, "lora": LoraConfig}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_fields_and_types_are_those_of_the_class(kind: str) -> None:
    fields = [field for field in dataclasses.fields(CLASSES[kind]) if field.init]
    assert set(upstream_args.read_fields(kind)) == {field.name for field in fields}
    defaults = [f for f in fields if f.default is not dataclasses.MISSING]
    assert len(defaults) > 10
    for field in defaults:
        assert upstream_args.validate_value(kind, field.name, field.default) == field.default


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("training", "learning_rate", 1), ("training", "learning_rate", 1e-4),
        ("training", "bf16", True), ("training", "per_device_train_batch_size", 8),
        ("training", "report_to", ["none"]), ("lora", "r", 16),
        ("lora", "target_modules", ["query"]), ("lora", "use_rslora", True),
    ],
)  # fmt: skip
def test_values_of_the_right_type(kind: str, name: str, value: Any) -> None:
    assert upstream_args.validate_value(kind, name, value) == value


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected_type"),
    [
        ("training", "learning_rate", "high", "a number"),
        ("training", "learning_rate", [1e-4], "a number"),
        ("training", "per_device_train_batch_size", 2.5, "a whole number"),
        ("training", "bf16", "perhaps", "true or false"),
        ("lora", "r", "eight", "a whole number"),
        ("lora", "lora_dropout", "much", "a number"),
        ("lora", "peft_version", 3, "a text, or null"),
        (
            "lora",
            "layers_to_transform",
            "all",
            "a whole number, a list, each a whole number, or null",
        ),
    ],
)
def test_values_of_another_type(kind: str, name: str, value: Any, expected_type: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"^finetune\.{kind}\.{name} must be {expected_type}, got "
    ):
        upstream_args.validate_value(kind, f"finetune.{kind}.{name}", value)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upstream_args.UPSTREAM_CLASSES, "lora", [("no_such_package", "a.py", "A")])
    with pytest.raises(RecipeError, match="no_such_package is not installed"):
        upstream_args.read_fields.__wrapped__("lora")


REFUSED = {
    "gradient_accumulation_steps": [0, -1], "adam_beta1": [-0.1, 1.0], "adam_beta2": [-0.1, 1.0],
    "adam_epsilon": [-1e-8], "per_device_train_batch_size": [0], "per_device_eval_batch_size": [0],
    "eval_accumulation_steps": [0], "dataloader_num_workers": [-1, 100_000], "local_rank": [1],
    "dataloader_prefetch_factor": [0], "dataloader_persistent_workers": [True],
    "label_smoothing_factor": [-1, 1.0], "weight_decay": [-0.01], "max_grad_norm": [-1],
    "warmup_steps": [-1], "max_steps": [0, -2], "log_level": ["foo"], "log_level_replica": ["foo"],
    "train_sampling_strategy": ["foo"], "parallelism_config": [5, 0, {}],
    "torch_compile_mode": ["foo"], "logging_steps": [-5], "eval_steps": [-0.5], "eval_delay": [-1],
    "save_steps": [-1], "ddp_timeout": [0], "ddp_backend": ["foo"], "torch_empty_cache_steps": [0],
}  # fmt: skip
ALLOWED = {
    "adam_beta1": 0, "adam_epsilon": 0, "label_smoothing_factor": 0.99, "weight_decay": 0,
    "max_grad_norm": 0, "max_steps": -1, "eval_accumulation_steps": None, "log_level": "debug",
    "gradient_accumulation_steps": 1, "dataloader_num_workers": 1, "parallelism_config": None,
    "dataloader_persistent_workers": True,
}  # fmt: skip


@pytest.mark.parametrize("section", ["finetune", "adapt"])
def test_values_out_of_their_range(section: str) -> None:
    validate = upstream_args.validate_training_args
    assert validate(section, ALLOWED) == ALLOWED
    for name, values in REFUSED.items():
        for value in values:
            with pytest.raises(RecipeError, match=rf"^{section}\.training\.{name}\b"):
                validate(section, {name: value})
    for field in ({"lora_alpha": 10**300}, {"alpha_pattern": {"query": 1e300}}):
        with pytest.raises(RecipeError, match="must be a number above 0 and of at most 1e"):
            upstream_args.validate_lora_args(section, field)


def test_choices_are_those_of_the_class() -> None:
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, choices in upstream_args.TRAINING_CHOICES.items():
        if name == "torch_compile_mode":
            assert {*choices} - {None} == {*list_mode_options()}
        elif name != "parallelism_config":
            assert {*choices} - {None} == {*fields[name].metadata["choices"]}


def test_arguments_of_an_optimizer_are_pairs(tmp_path: Path) -> None:
    for given in ("x=y=z", "x", "x=1,", "momentum=1,momentum=0"):
        with pytest.raises(RecipeError, match=f"optim_args={given} is no list of name=value"):
            build_training_arguments("adapt", {"optim_args": given}, {}, str(tmp_path), 0, "cpu")


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optim_args": "beta1=0.5"}, r"takes no 'beta1' from it.* takes none"),
        ({"optim": "adafactor", "optim_args": "relative_step=1"}, "adafactor takes no"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"},
         r"did you mean 'momentum'\?.*momentum, dampening, weight_decay, nesterov;"),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9,beta=1"}, "takes no 'beta' from it"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum.* Correct optim_args"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "to float.* Correct optim_args"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "requires a momentum"),
        ({"use_liger_kernel": True}, "use_liger_kernel=true: its package is not installed"),
    ],
)  # fmt: skip
def test_arguments_that_would_be_ignored_or_fail_later(
    training: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for section in ("finetune", "adapt"):
        with pytest.raises(RecipeError, match=rf"^{section}\.training\..*{words}"):
            build_training_arguments(section, training, {}, str(tmp_path), 0, "cpu")


def test_arguments_that_an_optimizer_takes(tmp_path: Path) -> None:
    for optim, given in (
        ("sgd", "momentum=0.9, nesterov=true"), ("adagrad", "lr_decay=0"), ("rmsprop", "eps=1e-8"),
    ):  # fmt: skip
        training = {"optim": optim, "optim_args": given}
        args = build_training_arguments("adapt", training, {}, str(tmp_path), 0, "cpu")
        assert args.optim_args == given


@pytest.mark.parametrize("name", ["torch_compile_backend", "accelerator_config"])
def test_names_of_nothing_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"^adapt\.training.*{tmp_path}/no"):
        build_training_arguments("adapt", {name: f"{tmp_path}/no"}, {}, str(tmp_path), 0, "cpu")


class Refusing:
    """Stand for an optimizer that reads more than the trial parameter has."""

    def __init__(self, params: Any, **settings: Any) -> None:
        assert not settings, "no such setting"
        raise RuntimeError("no GPU")


@pytest.mark.parametrize(
    ("settings", "why"), [({}, "no GPU"), ({"a": 1}, "no such setting"), ({"model": 1}, None)]
)
def test_a_constructor_that_fails_is_no_bug(
    settings: dict[str, Any], why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = staticmethod(lambda args, model: (Refusing, settings))
    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", kind)
    with nullcontext() if why is None else pytest.raises(RecipeError, match=f"here: .*{why}"):
        build_training_arguments("adapt", {"optim": "lomo"}, {}, str(tmp_path), 0, "cpu")


def test_a_launcher_is_named_where_its_processes_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match="refuses it: .* Correct the section$"):
        build_training_arguments("adapt", {"lr": 1}, {}, str(tmp_path), 0, "cpu")
    connect = partial(rendezvous, "env://?rank=0&world_size=2")
    monkeypatch.setattr("hftl.train.arguments.TrainingArguments", lambda **_: next(connect()))
    with pytest.raises(RecipeError, match="MASTER_ADDR.* or unset WORLD_SIZE, RANK, LOCAL_RANK"):
        build_training_arguments("adapt", {}, {}, str(tmp_path), 0, "cpu")


def test_fp16_without_a_gpu_is_checked_and_not_trained(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_tree["finetune"]["training"]["fp16"] = True
    recipe = Recipe.parse(recipe_tree | {"measure": {"seeds": [0], "arms": []}})
    monkeypatch.setattr("hftl.pipeline.pipeline.get_device", lambda: "cpu")
    # It measures seconds.
    monkeypatch.setattr("hftl.pipeline.pipeline.build_header", lambda *_: {})
    _, facts = check_recipe(recipe)
    assert [w for w in facts.warnings if "finetune.training.fp16=true needs" in w]
    with pytest.raises(RecipeError, match="fp16=true needs an accelerator.* Leave it out"):
        run(recipe, tmp_path / "run")
