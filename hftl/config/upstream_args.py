"""The fields of TrainingArguments and LoraConfig, read without importing them.

Importing transformers takes seconds; a misspelt key should be answered at once. The classes are
plain dataclasses, so their fields and simple types stand in the source.
"""

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Optional, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from hftl.config.errors import suggest_closest
from hftl.errors import RecipeError

UPSTREAM_CLASSES = {
    "training": [("transformers", "training_args.py", "TrainingArguments")],
    "lora": [
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ],
}
SIMPLE_TYPES: dict[str, Any] = {t.__name__: t for t in (int, float, str, bool, list, dict)}


@cache
def read_fields(kind: str) -> dict[str, Any]:
    """Names and types of the fields of `training` or `lora`; a type we cannot tell is Any."""
    found: dict[str, Any] = {}
    for package, file, name in UPSTREAM_CLASSES[kind]:
        tree = ast.parse(_read_source(package, file))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found[item.target.id] = _parse_annotation(item.annotation)
    return found


def validate_value(kind: str, name: str, value: Any) -> Any:
    """`value` as the upstream field's type.

    Raises:
        RecipeError: if it is of another type. `name` is the full dotted key, for the message.
    """
    expected = read_fields(kind)[name.rsplit(".", 1)[-1]]
    try:
        return TypeAdapter(expected).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"{name} must be {_describe_type(expected)}, got {value!r}", "Correct the value"
        ) from error


def _read_source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"the package {package} is not installed", f"Install it: pip install {package}"
        )
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


def _parse_annotation(node: ast.expr) -> Any:
    """The annotation as a type where it is built of simple ones, else Any."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name):
            return SIMPLE_TYPES.get(name, Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build_union(_parse_annotation(left), _parse_annotation(right))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _build_union(_parse_annotation(inner), None)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return _build_union(*(_parse_annotation(part) for part in parts))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_parse_annotation(inner)]
    return Any


def _describe_type(expected: Any) -> str:
    """The type in words: `str or null`."""
    parts = get_args(expected) if get_origin(expected) is Union else (expected,)
    return " or ".join("null" if part is NoneType else part.__name__ for part in parts)


def _build_union(*types: Any) -> Any:
    if Any in types:
        return Any
    return Optional[Union[types]] if None in types else Union[types]  # noqa: UP007,UP045


# The parts of a recipe that speak other libraries' names: `training` and `lora`.


RESERVED_ARGS = (
    "seed", "data_seed", "output_dir", "push_to_hub", "resume_from_checkpoint", "use_cpu",
    "disable_tqdm", "remove_unused_columns", "label_names",
)  # fmt: skip
RESERVED_DATA_ARGS = (
    "dataloader_drop_last", "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches",
    "eval_use_gather_object", "include_for_metrics", "bf16_full_eval", "fp16_full_eval",
    "logging_nan_inf_filter",
)  # fmt: skip
"""Every row trains and is measured, evaluation is hftl's, and what is not finite stops."""
RESERVED_STAGE_ARGS = ("do_train", "do_eval", "do_predict")
RESERVED_CHECKPOINT_ARGS = (
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node",
    "load_best_model_at_end", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
    "ignore_data_skip",
)  # fmt: skip
"""The best epoch is kept, and a run that is stopped goes on, without the Trainer's own."""
RESERVED_ADAPT_ARGS = (
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_only_model",
    "eval_on_start", "save_strategy", "eval_strategy",
)  # fmt: skip
UNSUPPORTED_TRAINING_ARGS = (
    "gradient_checkpointing", "activation_checkpointing", "neftune_noise_alpha", "deepspeed",
    "fsdp", "auto_find_batch_size",
)  # fmt: skip
RESERVED_LORA_ARGS = (
    "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision",
    "auto_mapping", "peft_version",
)  # fmt: skip
BASE_CHANGING_INITS = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga")
"""Beginnings of the values of `init_lora_weights` that change the base, or need data to start."""
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal")
"""Values known to leave the base's own weights alone; False starts from a random update."""
ZERO_UPDATE_INITS = (True, "gaussian", "orthogonal")
"""Values that also start from an update of zero."""
UNSUPPORTED_LORA_ARGS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config",
)  # fmt: skip
COMMON_ALIASES = {
    "lr": "learning_rate", "batch_size": "per_device_train_batch_size",
    "batch": "per_device_train_batch_size", "rank": "r",
}  # fmt: skip
"""Names that people give whose letters lead to no field, or to another."""
UPSTREAM_NAMES = {"training": "transformers.TrainingArguments", "lora": "peft.LoraConfig"}


def validate_training_args(section: str, given: Any) -> dict[str, Any]:
    """`given` as fields of transformers.TrainingArguments.

    Args:
        section: where `training` stands in the recipe: `finetune` or `adapt`.
        given: what the recipe says.

    Raises:
        RecipeError: for an unknown key, a value of another type, or what hftl decides itself.
    """
    given = _validate_values(section, "training", given)
    for name, value in given.items():
        key = f"{section}.training.{name}"
        if name in RESERVED_ARGS or name.startswith("hub_"):
            raise RecipeError(f"{key} belongs to hftl", "Remove it; see measure.seeds")
        if name in RESERVED_DATA_ARGS + RESERVED_STAGE_ARGS:
            raise RecipeError(
                f"{key} belongs to hftl", "Remove it: every row trains once and is measured"
            )
        if section == "finetune" and name in RESERVED_CHECKPOINT_ARGS:
            raise RecipeError(
                f"{key} belongs to hftl", "Remove it: the epoch that is best on validation is kept"
            )
        if section == "adapt" and name in RESERVED_ADAPT_ARGS:
            raise RecipeError(f"{key} belongs to hftl", "Remove it; the guard chooses the weights")
        if name in UNSUPPORTED_TRAINING_ARGS and value:
            raise RecipeError(f"{key} is not built yet", "Remove it")
        if name == "eval_strategy" and value == "no":
            raise RecipeError(f"{key}=no leaves no best epoch to keep", "Use epoch or steps")
        if name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size"):
            _check_positive(key, value)
    return given


def validate_lora_args(section: str, given: Any) -> dict[str, Any]:
    """`given` as fields of peft.LoraConfig.

    Raises:
        RecipeError: for an unknown key, a value of another type, or one that an adapter for a
            public base cannot have.
    """
    given = _validate_values(section, "lora", given)
    for name, value in given.items():
        key = f"{section}.lora.{name}"
        if name in RESERVED_LORA_ARGS:
            raise RecipeError(f"{key} belongs to hftl", "Remove it")
        if name in UNSUPPORTED_LORA_ARGS and value:
            raise RecipeError(f"{key} does not fit an encoder's adapter here", "Remove it")
        if name in ("r", "lora_alpha"):
            _check_positive(key, value)
    start = given.get("init_lora_weights")
    if section == "adapt" and start is False:
        raise RecipeError(
            "adapt.lora.init_lora_weights=false starts from other weights than the source's",
            "Use true, gaussian or orthogonal",
        )
    if isinstance(start, str) and start.startswith(BASE_CHANGING_INITS):
        raise RecipeError(
            f"{section}.lora.init_lora_weights={start} changes the base's own weights, so the "
            "adapter would not fit the public base",
            "Use true, gaussian or orthogonal",
        )
    return given


def _validate_values(section: str, kind: str, given: Any) -> dict[str, Any]:
    """`given` with every key known upstream and every value of its type."""
    if not isinstance(given, dict):
        raise ValueError(f"must be a mapping, got {given!r}")
    options = list(read_fields(kind))
    place = f"{section}.{kind}."
    for name in given:
        if name not in options:
            raise RecipeError(
                f"unknown key '{place}{name}'"
                + suggest_closest(COMMON_ALIASES.get(name, str(name)), options, place),
                f"The names are those of {UPSTREAM_NAMES[kind]}",
            )
    return {name: validate_value(kind, place + name, v) for name, v in given.items()}


def _check_positive(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise RecipeError(f"{name} must be a number above 0, got {value!r}", "Correct the value")
