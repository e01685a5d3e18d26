"""What we read of TrainingArguments and LoraConfig, against the real classes."""

import dataclasses
from typing import Any

import pytest

from hftl.config import upstream_args
from hftl.errors import RecipeError


def real(kind: str) -> Any:
    if kind == "training":
        from transformers import TrainingArguments

        return TrainingArguments
    from peft import LoraConfig

    return LoraConfig


@pytest.mark.parametrize("kind", ["training", "lora"])
def test_the_fields_are_those_of_the_class(kind: str) -> None:
    real_names = {f.name for f in dataclasses.fields(real(kind)) if f.init}
    assert set(upstream_args.read_fields(kind)) == real_names


@pytest.mark.parametrize("kind", ["training", "lora"])
def test_every_default_is_of_the_type_that_we_read(kind: str) -> None:
    fields = [f for f in dataclasses.fields(real(kind)) if f.default is not dataclasses.MISSING]
    assert len(fields) > 10
    for field in fields:
        assert upstream_args.validate_value(kind, field.name, field.default) == field.default


@pytest.mark.parametrize(
    ("kind", "name", "value", "result"),
    [
        ("training", "learning_rate", 1, 1.0),
        ("training", "learning_rate", 1e-4, 1e-4),
        ("training", "bf16", True, True),
        ("training", "per_device_train_batch_size", 8, 8),
        ("training", "report_to", ["none"], ["none"]),
        ("lora", "r", 16, 16),
        ("lora", "target_modules", ["query"], ["query"]),
        ("lora", "use_rslora", True, True),
    ],
)
def test_values_of_the_right_type(kind: str, name: str, value: Any, result: Any) -> None:
    assert upstream_args.validate_value(kind, name, value) == result


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected_type"),
    [
        ("training", "learning_rate", "high", "float"),
        ("training", "learning_rate", [1e-4], "float"),
        ("training", "per_device_train_batch_size", 2.5, "int"),
        ("training", "bf16", "perhaps", "bool"),
        ("lora", "r", "eight", "int"),
        ("lora", "lora_dropout", "much", "float"),
        ("lora", "peft_version", 3, "str or null"),
        ("lora", "layers_to_transform", "all", "int or list or null"),
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
