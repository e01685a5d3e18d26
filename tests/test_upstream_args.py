"""Read the arguments of TrainingArguments and LoraConfig, against the real classes."""

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from hftl.config import upstream_args
from hftl.errors import RecipeError

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
        ("training", "learning_rate", "high", "float"),
        ("training", "learning_rate", [1e-4], "float"),
        ("training", "per_device_train_batch_size", 2.5, "int"),
        ("training", "bf16", "perhaps", "bool"),
        ("lora", "r", "eight", "int"),
        ("lora", "lora_dropout", "much", "float"),
        ("lora", "peft_version", 3, "str or null"),
        ("lora", "layers_to_transform", "all", "(int or list|list or int) or null"),
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
