"""Check `training` and `lora` against the arguments of transformers and peft.

Importing transformers takes seconds, and a misspelt key or a value of the wrong type should be
answered at once. Names and simple types are therefore read from the source of the two dataclasses;
a test compares them with `dataclasses.fields` of the real classes. Everything else is validated by
constructing the real `TrainingArguments` and `LoraConfig`, which `hftl check` and `hftl run` do
before anything trains.
"""

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Optional, Union

from pydantic import TypeAdapter, ValidationError

from hftl.config.refusals import describe_type, show_value
from hftl.config.upstream_ranges import (
    LORA_RANGES,
    PATTERN_RANGES,
    TRAINING_CHOICES,
    TRAINING_RANGES,
    Range,
)
from hftl.errors import RecipeError, suggest_closest

UPSTREAM_CLASSES = {
    "training": [("transformers", "training_args.py", "TrainingArguments")],
    "lora": [
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ],
}
EXAMPLES = {"training": "learning_rate: 5.0e-4", "lora": "r: 8"}
UPSTREAM_NAMES = {"training": "transformers.TrainingArguments", "lora": "peft.LoraConfig"}
ANNOTATION_NAMES: dict[str, object] = {"Any": Any, "Optional": Optional, "Union": Union}
COMMON_ALIASES = {
    "lr": "learning_rate", "batch_size": "per_device_train_batch_size",
    "batch": "per_device_train_batch_size", "rank": "r",
}  # fmt: skip
"""Names that people write and whose spelling is closest to another field, or to none."""

RESERVED_ARGS = (
    "seed", "data_seed", "output_dir", "push_to_hub", "resume_from_checkpoint", "use_cpu",
    "disable_tqdm", "remove_unused_columns", "label_names", "local_rank",
)  # fmt: skip
RESERVED_DATA_ARGS = (
    "dataloader_drop_last", "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches",
    "eval_use_gather_object", "include_for_metrics", "bf16_full_eval", "fp16_full_eval",
    "logging_nan_inf_filter", "do_train", "do_eval", "do_predict",
)  # fmt: skip
RESERVED_CHECKPOINT_ARGS = (
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node",
    "load_best_model_at_end", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
    "ignore_data_skip",
)  # fmt: skip
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
UNSUPPORTED_LORA_ARGS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config",
)  # fmt: skip

LORA_LIST_ARGS = ("modules_to_save", "target_parameters")
"""Fields that peft iterates over: a string would be read letter by letter."""

BASE_CHANGING_INITS = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga")
"""Beginnings of the values of `init_lora_weights` that change the base, or need data to start."""
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal")
"""Values known to leave the base's own weights alone; False starts from a random update."""
ZERO_UPDATE_INITS = (True, "gaussian", "orthogonal")
"""Values that also start from an update of zero."""


def validate_training_args(section: str, values: Any) -> dict[str, object]:
    """Return `values` as fields of transformers.TrainingArguments, each of the field's type.

    Args:
        section: the recipe section that holds `training`: `finetune` or `adapt`.
        values: `training` as the recipe gives it.

    Raises:
        RecipeError: for an unknown key, a value of another type or out of its range, or what hftl
            decides itself.
    """
    values = _validate_values(section, "training", values)
    # null is refused as another type where it may not be.
    given = {name: value for name, value in values.items() if value is not None}
    _check_ranges(given, TRAINING_RANGES, f"{section}.training")
    _check_choices(values, TRAINING_CHOICES, f"{section}.training")
    if values.get("dataloader_persistent_workers") and not values.get("dataloader_num_workers"):
        raise RecipeError(
            f"{section}.training.dataloader_persistent_workers=true keeps workers, and "
            "dataloader_num_workers is 0",
            "Set dataloader_num_workers, or remove it",
        )
    for name, value in values.items():
        key = f"{section}.training.{name}"
        if name in RESERVED_ARGS or name.startswith("hub_"):
            raise RecipeError(f"{key} belongs to hftl", "Remove it; see measure.seeds")
        if name in RESERVED_DATA_ARGS:
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
    return values


def validate_lora_args(section: str, values: Any) -> dict[str, object]:
    """Return `values` as fields of peft.LoraConfig, each of the field's type.

    Raises:
        RecipeError: for an unknown key, a value of another type, or one that an adapter for a
            public base cannot have.
    """
    values = _validate_values(section, "lora", values)
    for name, value in values.items():
        key = f"{section}.lora.{name}"
        if name in RESERVED_LORA_ARGS:
            raise RecipeError(f"{key} belongs to hftl", "Remove it")
        if name in UNSUPPORTED_LORA_ARGS and value:
            raise RecipeError(f"{key} does not fit an encoder's adapter here", "Remove it")
    check_lora_values(values, f"{section}.lora")
    init = values.get("init_lora_weights")
    if section == "adapt" and init is False:
        raise RecipeError(
            "adapt.lora.init_lora_weights=false starts from other weights than the source's",
            "Use true, gaussian or orthogonal",
        )
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
        raise RecipeError(
            f"{section}.lora.init_lora_weights={init} changes the base's own weights, so the "
            "adapter would not fit the public base",
            "Use true, gaussian or orthogonal",
        )
    return values


def check_lora_values(settings: Mapping[str, object], place: str) -> None:
    """Refuse a string where peft expects a list, and numbers out of their range.

    Of a recipe `validate_lora_args` calls it, of a user's own script `prepare`; what is left to
    check of a model are the names of its modules.

    Raises:
        RecipeError: naming the field.
    """
    for field in LORA_LIST_ARGS:
        if isinstance(settings.get(field), str):
            name = settings[field]
            raise RecipeError(f"{place}.{field} must be a list, got {name!r}", f"Write [{name}]")
    _check_ranges(settings, LORA_RANGES, place)
    for field, allowed in PATTERN_RANGES.items():
        pattern = settings.get(field)
        if isinstance(pattern, Mapping):
            _check_ranges(pattern, dict.fromkeys(pattern, allowed), f"{place}.{field}")


def _check_ranges(values: Mapping[str, object], ranges: Mapping[str, Range], place: str) -> None:
    """Refuse a value outside its range; names without one pass.

    Args:
        values: by name.
        ranges: by the same names.
        place: the recipe key that holds them, as `finetune.training`.

    Raises:
        RecipeError: naming the key, the range and the value.
    """
    for name, value in values.items():
        if name in ranges and value not in ranges[name]:
            raise RecipeError(
                f"{place}.{name} must be {ranges[name]}, got {show_value(value)}",
                "Correct the value",
            )


def _check_choices(
    values: Mapping[str, object], choices: Mapping[str, tuple[str | None, ...]], place: str
) -> None:
    """Refuse a value that is none of its choices; names without choices pass.

    Raises:
        RecipeError: naming the key, the choices and the value.
    """
    for name, value in values.items():
        if name in choices and value not in choices[name]:
            known = " or ".join(word or "null" for word in choices[name])
            raise RecipeError(f"{place}.{name} must be {known}, got {value!r}", "Correct the value")


def _validate_values(section: str, kind: str, values: Any) -> dict[str, object]:
    """Return `values` with every key known upstream and every value of the field's type."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"'{section}.{kind}' must be a mapping of fields of {UPSTREAM_NAMES[kind]}, got "
            f"{show_value(values)}",
            f"Write {kind}: {{{EXAMPLES[kind]}}}",
        )
    options = list(read_fields(kind))
    prefix = f"{section}.{kind}."
    for name in values:
        if name not in options:
            raise RecipeError(
                f"unknown key '{prefix}{name}'"
                + suggest_closest(COMMON_ALIASES.get(name, str(name)), options, prefix),
                f"The names are those of {UPSTREAM_NAMES[kind]}",
            )
    values = {name: validate_value(kind, prefix + name, value) for name, value in values.items()}
    return values


def validate_value(kind: str, key: str, value: Any) -> Any:
    """Return `value` converted to the upstream field's type.

    Args:
        kind: `training` or `lora`.
        key: the dotted recipe key, which ends in the field's name.
        value: as the recipe gives it.

    Raises:
        RecipeError: if it is of another type.
    """
    expected: Any = read_fields(kind)[key.rsplit(".", 1)[-1]]
    # Python takes true and false for 1 and 0.
    if isinstance(value, bool) and expected in (int, float, int | None, float | None):
        shown = str(value).lower()
        raise RecipeError(f"{key} must be a number, got {shown}", "Correct the value")
    try:
        return TypeAdapter(expected).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"{key} must be {describe_type(expected)}, got {show_value(value)}", "Correct the value"
        ) from error


@cache
def read_fields(kind: str) -> dict[str, object]:
    """Return names and types of the fields of `training` or `lora`; Any for types not built in.

    Raises:
        RecipeError: if the package is not installed.
    """
    return {
        item.target.id: _evaluate_annotation(item.annotation)
        for package, file, name in UPSTREAM_CLASSES[kind]
        for node in ast.parse(_read_source(package, file)).body
        if isinstance(node, ast.ClassDef) and node.name == name
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _read_source(package: str, file: str) -> str:
    """Return the text of a module without importing its package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"the package {package} is not installed", f"Install it: pip install {package}"
        )
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


def _evaluate_annotation(node: ast.expr) -> Any:
    """Return an annotation as a type where it is made of builtins, else Any."""
    try:
        return eval(ast.unparse(node), dict(ANNOTATION_NAMES))  # noqa: S307 (an installed library)
    except NameError:
        # An enum or a class of the library: its own constructor converts or refuses the value.
        return Any
