"""Names of transformers 4 in a world of transformers 5: the ViT family was renamed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch

from hftl.doctor.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterFolder,
    Finding,
    defect,
    format_names,
)
from hftl.errors import format_error_line
from hftl.models.architectures import TOKEN_CLASSIFICATION
from hftl.models.encoders import build_on_meta, get_encoder_class, get_task_class
from hftl.models.source import SourceModel

PREFIX = "base_model.model."
PARAMETER_MARK = re.compile(
    r"\.(lora_|ia3_|vera_|hada_|lokr_|oft_|boft_|weight$|bias$|modules_to_save|original_module)"
)
RENAMING_RULES = (
    (r"\battention\.attention\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.self\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
    (r"\bquery\b", "q_proj"),
    (r"\bkey\b", "k_proj"),
    (r"\bvalue\b", "v_proj"),
)
BLOCK_LIST_RULES = ((r"\bencoder\.layer\.", "layers."), (r"$^", ""))
"""ViT's blocks have moved, DINOv2's have not."""
OLD_NAMES = (
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "encoder.layer.",
)


def get_module_path(key: str) -> str:
    """The path in the model of the module that a tensor of an adapter belongs to."""
    inside = key.removeprefix(PREFIX)
    mark = PARAMETER_MARK.search(inside)
    return inside[: mark.start()] if mark else inside


def find_new_name(name: str, modules: Iterable[str]) -> str | None:
    """What a module of transformers 4 is called in the model at hand; None if it is not there."""
    known = set(modules)
    return next((text for text in _list_new_names(name) if text != name and text in known), None)


def _list_new_names(name: str) -> Iterator[str]:
    """A name under the new rules: the layer's, the list's, or both."""
    moved = name
    for pattern, new in RENAMING_RULES:
        moved = re.sub(pattern, new, moved)
    for text, (old, new) in product((moved, name), BLOCK_LIST_RULES):
        yield re.sub(old, new, text)


def find_renamed_keys(keys: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """New names of the tensors whose module is in the model under a new name only."""
    known = set(modules)
    found: dict[str, str] = {}
    for key in keys:
        module = get_module_path(key)
        new = None if module in known else find_new_name(module, known)
        if new is not None:
            found[key] = key.replace(module, new, 1)
    return found


def has_old_names(targets: Any) -> bool:
    """Whether target modules are named as the ViT family's were."""
    names = [targets] if isinstance(targets, str) else list(targets or [])
    return any(old in str(name) for name in names for old in OLD_NAMES)


def list_targets(keys: Iterable[str]) -> list[str]:
    """Full paths of the modules that carry an adapter, which match themselves and no other."""
    return sorted({get_module_path(key) for key in keys if ".lora_" in key})


def shorten_targets(paths: Iterable[str]) -> list[str]:
    """The last names of these paths; a name for every layer where all are adapted alike."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def rename_patterns(patterns: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Keys of rank_pattern or alpha_pattern under the name that matches an adapted layer's path."""
    known = list(paths)
    return {
        next((text for text in _list_new_names(key) if _matches_path(text, known)), key): value
        for key, value in patterns.items()
    }


def _matches_path(pattern: str, paths: list[str]) -> bool:
    """Whether a layer's path ends so, as peft reads the names of its patterns."""
    return any(path == pattern or path.endswith(f".{pattern}") for path in paths)


# Whether the adapter's tensors are those that peft would load on this base.
#
# The stock class is built without weights, peft wraps it as adapter_config.json says, and names and
# shapes of what it would save are compared with what stands in the file. peft itself loads an
# adapter of another depth without a word.


PEFT_TYPES = ("LORA", "IA3", "LN_TUNING", "VERA", "LOHA", "LOKR", "OFT", "BOFT")
"""Kinds of adapter that only put tensors into the model when they are loaded."""
IGNORED_SETTINGS = (
    "auto_mapping", "megatron_config", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Settings that no loading needs, some of which import or fetch what they name."""
TASKS_BY_TYPE = {
    "SEQ_CLS": "classification", "TOKEN_CLS": TOKEN_CLASSIFICATION,
}  # fmt: skip
NAMED_KEY = re.compile(
    r"(\.(?:lora|ia3|vera|hada|lokr|oft|boft)_\w+|\.modules_to_save)\.(?!(?:weight|bias)$)[^.]+"
)
"""An adapter's name in the name of a tensor, as in `lora_A.default.weight`."""
WRAPPED_KEY = re.compile(r"\.(modules_to_save|original_module)\.")
PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, re.error)
"""What peft raises on settings that make no sense for a model."""


def find_model_class(patient: AdapterFolder, source: SourceModel) -> Any:
    """The class of transformers that the adapter, or the whole model, was made of.

    None where it is not told, or is none of transformers' own.
    """
    if patient.has_own_head:
        return get_encoder_class(source.config)
    mapping = patient.adapter_config.get("auto_mapping")
    if isinstance(mapping, dict):
        return _find_transformers_class(mapping.get("base_model_class"))
    task = patient.adapter_config.get("task_type")
    if isinstance(task, str) and task in TASKS_BY_TYPE:
        return get_task_class(source.config, TASKS_BY_TYPE[task])
    if task == "FEATURE_EXTRACTION":
        return get_encoder_class(source.config)
    kinds = patient.model_config.get("architectures") or [None]
    return _find_transformers_class(kinds[0]) or (
        None if task else get_task_class(source.config, "classification")
    )


def adjust_config(patient: AdapterFolder, source: SourceModel, kind: Any) -> Any:
    """The base's config with as many labels as the adapter's head has outputs.

    And with as many tokens as the adapter has embeddings, where it brings them, as peft does after
    the vocabulary was resized.
    """
    config = deepcopy(source.config)
    count = count_outputs(patient, source, kind)
    if count is not None:
        config.num_labels = count
    rows = count_saved_embeddings(patient, kind, config)
    if rows is not None:
        config.vocab_size = rows
    return config


def count_saved_embeddings(patient: AdapterFolder, kind: Any, config: Any) -> int | None:
    """Return how many tokens' embeddings the adapter brings; None where it brings none."""
    if not patient.is_adapter or kind is None or not hasattr(config, "vocab_size"):
        return None
    try:
        model = build_on_meta(kind, config)
        table = model.get_input_embeddings()
    except (*PEFT_ERRORS, NotImplementedError):
        return None
    path = next((name for name, module in model.named_modules() if module is table), None)
    shape = patient.shapes.get(f"{PREFIX}{path}.weight")
    return shape[0] if shape else None


def count_outputs(patient: AdapterFolder, source: SourceModel, kind: Any) -> int | None:
    """How many outputs the saved head has; None without one."""
    if kind is None or not kind.__name__.endswith("Classification"):
        return None
    tokens = kind.__name__.endswith("ForTokenClassification")
    architecture = (
        source.architecture_spec.for_task(TOKEN_CLASSIFICATION)
        if tokens
        else source.architecture_spec
    )
    prefix = PREFIX if patient.is_adapter else ""
    shape = patient.shapes.get(f"{prefix}{architecture.head.last_linear}.weight")
    return shape[0] if shape else None


def build_peft_config(settings: dict[str, Any]) -> Any:
    """peft's config of these settings, without those that import anything.

    Raises:
        ValueError: with the rest of CANNOT, if peft refuses them.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    known = {field.name for field in fields(kind)} - set(IGNORED_SETTINGS)
    return kind(**{key: value for key, value in settings.items() if key in known})


@dataclass(frozen=True)
class ExpectedTensors:
    """Return what peft reads from the file of an adapter: name and shape of every tensor.

    `adapter` are those that must be there. `own` are the base's own tensors, which peft overwrites
    where a file holds them, as it does after the vocabulary was resized.
    """

    adapter: dict[str, tuple[int, ...]]
    own: dict[str, tuple[int, ...]]


def list_expected_tensors(kind: Any, config: Any, settings: dict[str, Any]) -> ExpectedTensors:
    """Wrap a model without weights as the settings say, and list what peft would load into it.

    Raises:
        ValueError: with the rest of CANNOT, if peft cannot wrap the model so.
    """
    from peft import get_peft_model

    adapter = build_peft_config(settings)
    if hasattr(adapter, "init_lora_weights"):
        # A decomposition of the base's weights needs their values; shapes do not.
        adapter.init_lora_weights = False
    with torch.device("meta"):
        model: Any = get_peft_model(build_on_meta(kind, config), adapter, low_cpu_mem_usage=True)
        return list_adapter_tensors(model, "default")


def list_adapter_tensors(model: Any, name: str) -> ExpectedTensors:
    """List the tensors that peft loads into a model for its adapter of this name."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = model.state_dict().items()
    own = {k: v for k, v in state if not is_adapter_key(k) and not WRAPPED_KEY.search(k)}
    return ExpectedTensors(
        {key: tuple(tensor.shape) for key, tensor in saved.items()},
        {key: tuple(tensor.shape) for key, tensor in own.items()},
    )


def list_modules(kind: Any, config: Any) -> list[str]:
    """The paths of the class's modules."""
    return [name for name, _ in build_on_meta(kind, config).named_modules()]


def check_fit(patient: AdapterFolder, kind: Any, config: Any) -> list[Finding]:
    """Compares the file with what peft expects."""
    try:
        modules = list_modules(kind, config)
    except PEFT_ERRORS:
        what = f"it was made of {kind.__name__}, which cannot be built of this base's config"
        return [defect("base-shape", what, ADAPTER_CONFIG, "Give the base that it was trained on")]
    old = find_renamed_keys(patient.shapes, modules)
    if old:
        return [
            _build_old_names_defect(
                f"{len(old)} tensors have names of transformers 4", ADAPTER_WEIGHTS
            )
        ]
    try:
        expected = list_expected_tensors(kind, config, patient.adapter_config)
    except PEFT_ERRORS as error:
        return [_build_refusal_defect(patient, error, modules)]
    return compare_shapes(patient.shapes, expected)


def compare_shapes(shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors) -> list[Finding]:
    """Compare the tensors of an adapter's file with those that peft loads.

    Returns:
        A finding for each kind of tensor that is missing, left over, or of another shape.
    """
    named = find_named_keys(shapes, expected)
    if named:
        return [defect(
            "names", f"{len(named)} tensors carry the adapter's own name, as peft neither writes "
            "nor always reads them", min(named), "Rename them: --fix",
        )]  # fmt: skip
    wanted = expected.adapter
    straight = {key for key in shapes.keys() - wanted if expected.own.get(key) == shapes[key]}
    lacking = sorted(wanted.keys() - shapes)
    strange = sorted(shapes.keys() - wanted - straight)
    unlike = sorted(k for k in wanted.keys() & shapes if wanted[k] != shapes[k])
    ranks = [k for k in unlike if _differs_in_rank(k, shapes[k], wanted[k])]
    found = []
    if ranks:
        key = ranks[0]
        found.append(defect(
            "rank", f"{len(ranks)} tensors have another rank than r and rank_pattern say: "
            f"{shapes[key]} where {wanted[key]} is expected", key, "Correct r and rank_pattern",
        ))  # fmt: skip
    dora = [k for k in lacking + strange if ".lora_magnitude_vector" in k]
    if dora:
        found.append(_build_dora_defect(dora, missing=dora[0] in lacking))
    wrong = [k for k in unlike if k not in ranks]
    wrong += [k for k in lacking + strange if is_adapter_key(k) and k not in dora]
    if wrong:
        found.append(_build_shape_defect(wrong, shapes, expected))
    heads = sorted({get_module_path(k) for k in lacking if not is_adapter_key(k)})
    if heads:
        found.append(
            defect(
                "fresh",
                "modules_to_save names it, and its weights were not saved: they are drawn at "
                "random on every load",
                format_names(heads),
                "Save the adapter again from the trained model",
            )
        )
    idle = [k for k in strange if not is_adapter_key(k)]
    if idle:
        found.append(_build_unplaced_defect(idle, shapes, expected))
    return found


def find_named_keys(
    shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> dict[str, str]:
    """Return the names that peft writes for tensors whose names hold that of the adapter."""
    renamed: dict[str, str] = {}
    for key in shapes.keys() - expected.adapter:
        short = NAMED_KEY.sub(r"\1", key).replace(".modules_to_save.", ".")
        for name in (short, short.removesuffix(".weight")):
            if name != key and name in expected.adapter and name not in shapes:
                renamed[key] = name
                break
    return renamed


def _build_dora_defect(keys: list[str], missing: bool) -> Finding:
    """Say how the settings contradict the tensors of a DoRA adapter."""
    if missing:
        what = f"use_dora is set, and {len(keys)} magnitudes are not in the file"
        fix = "Save it again; remove use_dora only if it was trained without"
    else:
        what = f"the file holds {len(keys)} magnitudes of DoRA, which peft passes over"
        fix = "Set use_dora to true in adapter_config.json"
    return defect("config", what, keys[0], fix)


def _build_shape_defect(
    wrong: list[str], shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> Finding:
    key = wrong[0]
    if all(k in expected.adapter and k not in shapes for k in wrong):
        layers = {get_module_path(k) for k in wrong}
        partial = {get_module_path(k) for k in shapes} & layers
        if partial:
            what = f"{len(wrong)} tensors of its layers are not in the file"
            return defect("corrupt", what, key, "Save it again, or fetch it again")
        what = "the base has a layer that the adapter has not"
    elif key not in shapes:
        what = "the base has a layer that the adapter has not"
    elif key not in expected.adapter:
        what = "the adapter has a layer that the base has not"
    else:
        what = f"the adapter has {shapes[key]} where the base takes {expected.adapter[key]}"
    return defect(
        "base-shape", f"{what} ({len(wrong)} tensors; peft may load the rest without a word)", key,
        "Give the base that it was trained on, or save the adapter again",
    )  # fmt: skip


def _build_unplaced_defect(
    keys: list[str], shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> Finding:
    """Say that tensors of whole modules, which the adapter brings, do not enter the model."""
    key = keys[0]
    if key in expected.own:
        what = f"the adapter has {shapes[key]} where the base takes {expected.own[key]}"
        return defect("base-shape", what, key, "Give the base that it was trained on")
    return defect(
        "fresh",
        "its weights are in the file, and the model has no such module: peft leaves them out",
        format_names(sorted({get_module_path(k) for k in keys})),
        "Give the class it was trained with",
    )


def _build_refusal_defect(patient: AdapterFolder, error: Exception, modules: list[str]) -> Finding:
    """peft cannot wrap the base: the names are old, or the base is another architecture."""
    from peft.utils.error import PeftError

    targets = patient.adapter_config.get("target_modules")
    unmatched = isinstance(error, PeftError) or "not found in the base model" in str(error)
    if unmatched and has_old_names(targets) and set(list_targets(patient.shapes)) <= set(modules):
        return _build_old_names_defect(
            "target_modules match nothing: they are names of transformers 4", ADAPTER_CONFIG
        )
    if unmatched:
        return defect("base-shape", "target_modules match nothing in the base", ADAPTER_CONFIG,
                      "Give the base that it was trained on")  # fmt: skip
    return defect(
        "config", f"peft refuses it: {format_error_line(error)}", ADAPTER_CONFIG, "Correct it"
    )


def _build_old_names_defect(what: str, where: str) -> Finding:
    return defect("stale-names", what, where, "Rename them: --fix")


def is_adapter_key(key: str) -> bool:
    """Whether a tensor is of the adapter itself, not of a module that was saved whole."""
    return re.search(r"\.(lora|ia3|vera|hada|lokr|oft|boft)_", key) is not None


def _differs_in_rank(key: str, told: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(told) != len(expected):
        return False
    differ = [
        axis for axis, pair in enumerate(zip(told, expected, strict=True)) if len({*pair}) > 1
    ]
    return (".lora_A" in key and differ == [0]) or (".lora_B" in key and differ == [1])


def _find_transformers_class(name: Any) -> Any:
    """A model class of transformers by its name."""
    import transformers

    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w*", name):
        return None
    found = getattr(transformers, name, None)
    own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if own else None
