"""Compare the tensors of an adapter's file with those that peft would load on a base.

The stock class is built without weights, peft wraps it as adapter_config.json says, and names and
shapes of what it would save are compared with those in the file: peft itself loads an adapter of
another depth in silence.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch

from hftl.doctor.adapter_folder import AdapterFolder, Finding, defect, format_names
from hftl.doctor.examination import Examination
from hftl.doctor.renamed_modules import (
    find_renamed_keys,
    get_module_path,
    has_old_names,
    list_targets,
)
from hftl.errors import HftlError, format_error_line
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.architectures import get_encoder_config
from hftl.models.encoders import build_on_meta, get_encoder_class, get_task_class
from hftl.models.lora_concat import PEFT_PREFIX
from hftl.models.pairs import IMAGE_HALF_SUFFIX
from hftl.models.source import BUILD_ERRORS, SourceModel
from hftl.publish.settings_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PEFT_TYPES = ("LORA", "IA3", "LN_TUNING", "VERA", "LOHA", "LOKR", "OFT", "BOFT")
"""Kinds of adapter that only put tensors into the model when they are loaded."""
IGNORED_SETTINGS = (
    "auto_mapping", "megatron_config", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Settings that no loading needs, some of which import or fetch what they name."""
TASKS_BY_TYPE = {"SEQ_CLS": "classification", "TOKEN_CLS": TOKEN_CLASSIFICATION}
NAMED_KEY = re.compile(
    r"(\.(?:lora|ia3|vera|hada|lokr|oft|boft)_\w+|\.modules_to_save)\.(?!(?:weight|bias)$)[^.]+"
)
"""Match an adapter's name in the name of a tensor, as in `lora_A.default.weight`."""
WRAPPED_KEY = re.compile(r"\.(modules_to_save|original_module)\.")


class ModelBuildError(Exception):
    """Report settings that fit no model; the message is the library's own."""


@contextmanager
def translate_build_errors() -> Iterator[None]:
    """Turn what transformers and peft raise on settings that fit no model into one error.

    Raises:
        ModelBuildError: from the library's error.
    """
    try:
        yield
    except HftlError:
        raise
    except BUILD_ERRORS as error:
        raise ModelBuildError(str(error) or type(error).__name__) from error


def find_model_class(folder: AdapterFolder, source: SourceModel) -> Any:
    """Return the class of transformers that the adapter, or the whole model, was made of.

    None where the folder does not say it, or names no class of transformers.
    """
    names = folder.model_config.class_names
    if folder.has_own_head:
        is_half = bool(names) and names[0].endswith(IMAGE_HALF_SUFFIX)
        return _find_transformers_class(names[0]) if is_half else get_encoder_class(source.config)
    adapter = folder.adapter_config
    if isinstance(adapter.settings.get("auto_mapping"), dict):
        return _find_transformers_class(adapter.model_class)
    if adapter.task_type in TASKS_BY_TYPE:
        return get_task_class(source.config, TASKS_BY_TYPE[adapter.task_type])
    if adapter.task_type == "FEATURE_EXTRACTION":
        return get_encoder_class(source.config)
    model_class = _find_transformers_class(names[0] if names else None)
    if model_class is None and not adapter.settings.get("task_type"):
        return get_task_class(source.config, "classification")
    return model_class


def adjust_config(folder: AdapterFolder, source: SourceModel, model_class: Any) -> Any:
    """Return the base's config, or its image half's, with as many labels as the head has outputs.

    And with as many tokens as the adapter has embeddings, where it brings them, as peft does after
    the vocabulary was resized.
    """
    config = deepcopy(source.config)
    if model_class is not None and model_class.__name__.endswith(IMAGE_HALF_SUFFIX):
        config = get_encoder_config(config)
    outputs = count_outputs(folder, source, model_class)
    if outputs is not None:
        config.num_labels = outputs
    embeddings = count_saved_embeddings(folder, model_class, config)
    if embeddings is not None:
        config.vocab_size = embeddings
    return config


def count_saved_embeddings(folder: AdapterFolder, model_class: Any, config: Any) -> int | None:
    """Return how many tokens' embeddings the adapter brings; None where it brings none."""
    if not folder.is_adapter or model_class is None or not hasattr(config, "vocab_size"):
        return None
    try:
        with translate_build_errors():
            model = build_on_meta(model_class, config)
            table = model.get_input_embeddings()
    except ModelBuildError:
        return None
    path = next((name for name, module in model.named_modules() if module is table), None)
    shape = folder.shapes.get(f"{PEFT_PREFIX}{path}.weight")
    return shape[0] if shape else None


def count_outputs(folder: AdapterFolder, source: SourceModel, model_class: Any) -> int | None:
    """Return how many outputs the saved head has; None without one."""
    if model_class is None or not model_class.__name__.endswith("Classification"):
        return None
    architecture = source.architecture_spec
    if model_class.__name__.endswith("ForTokenClassification"):
        architecture = architecture.for_task(TOKEN_CLASSIFICATION)
    prefix = PEFT_PREFIX if folder.is_adapter else ""
    shape = folder.shapes.get(f"{prefix}{architecture.head.last_linear}.weight")
    return shape[0] if shape else None


def build_peft_config(settings: dict[str, object]) -> Any:
    """Build peft's config of these settings, without those that import anything."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(str(settings["peft_type"]))]
    known = {field.name for field in fields(kind)} - set(IGNORED_SETTINGS)
    return kind(**{key: value for key, value in settings.items() if key in known})


@dataclass(frozen=True)
class ExpectedTensors:
    """Hold name and shape of every tensor that peft reads from the file of an adapter.

    `adapter` are those that must be there. `own` are the base's own tensors, which peft overwrites
    where a file holds them, as it does after the vocabulary was resized.
    """

    adapter: dict[str, tuple[int, ...]]
    own: dict[str, tuple[int, ...]]


def list_expected_tensors(kind: Any, config: Any, settings: dict[str, object]) -> ExpectedTensors:
    """Wrap a model without weights as the settings say, and list what peft would load into it.

    Raises:
        ModelBuildError: if peft cannot wrap the model so.
    """
    from peft import get_peft_model

    with translate_build_errors():
        adapter = build_peft_config(settings)
        if hasattr(adapter, "init_lora_weights"):
            # A decomposition of the base's weights needs their values; shapes do not.
            adapter.init_lora_weights = False
    with translate_build_errors(), torch.device("meta"):
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
    """Return the paths of the class's modules.

    Raises:
        ModelBuildError: if the class cannot be built of this config.
    """
    with translate_build_errors():
        return [name for name, _ in build_on_meta(kind, config).named_modules()]


def check_fit(examination: Examination) -> list[Finding]:
    """Compare the file with what peft expects of it on this base."""
    folder, model_class, config = examination.folder, examination.model_class, examination.config
    if config is None or not folder.is_adapter:
        return []
    examination.misfits = _find_misfits(folder, model_class, config)
    return examination.misfits


def _find_misfits(folder: AdapterFolder, model_class: Any, config: Any) -> list[Finding]:
    try:
        modules = list_modules(model_class, config)
    except ModelBuildError:
        what = f"it was made of {model_class.__name__}, which cannot be built of this base's config"
        return [defect("base-shape", what, ADAPTER_CONFIG, "Give the base that it was trained on")]
    old = find_renamed_keys(folder.shapes, modules)
    if old:
        what = f"{len(old)} tensors have names of transformers 4"
        return [_build_old_names_defect(what, ADAPTER_WEIGHTS)]
    try:
        expected = list_expected_tensors(model_class, config, folder.adapter_config.settings)
    except ModelBuildError as error:
        return [_build_refusal_defect(folder, error, modules)]
    return compare_shapes(folder.shapes, expected)


def compare_shapes(shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors) -> list[Finding]:
    """Compare the tensors of an adapter's file with those that peft loads.

    Returns:
        A finding for each kind of tensor that is missing, left over, or of another shape.
    """
    named = map_adapter_keys(shapes, expected)
    if named:
        what = (
            f"{len(named)} tensors carry the adapter's own name, as peft neither writes nor always "
            "reads them"
        )
        return [defect("names", what, min(named), "Rename them: --fix")]
    adapter = expected.adapter
    overwritten = {key for key in shapes.keys() - adapter if expected.own.get(key) == shapes[key]}
    missing = sorted(adapter.keys() - shapes)
    unexpected = sorted(shapes.keys() - adapter - overwritten)
    unequal = sorted(k for k in adapter.keys() & shapes if adapter[k] != shapes[k])
    ranks = [k for k in unequal if _differs_in_rank(k, shapes[k], adapter[k])]
    dora = [k for k in missing + unexpected if ".lora_magnitude_vector" in k]
    wrong = [k for k in unequal if k not in ranks]
    wrong += [k for k in missing + unexpected if is_adapter_key(k) and k not in dora]
    heads = sorted({get_module_path(k) for k in missing if not is_adapter_key(k)})
    idle = [k for k in unexpected if not is_adapter_key(k)]
    findings = []
    if ranks:
        findings.append(_build_rank_defect(ranks, shapes, expected))
    if dora:
        findings.append(_build_dora_defect(dora, missing=dora[0] in missing))
    if wrong:
        findings.append(_build_shape_defect(wrong, shapes, expected))
    if heads:
        what = (
            "modules_to_save names it, and its weights were not saved: they are drawn at random on "
            "every load"
        )
        fix = "Save the adapter again from the trained model"
        findings.append(defect("fresh", what, format_names(heads), fix))
    if idle:
        findings.append(_build_unplaced_defect(idle, shapes, expected))
    return findings


def _build_rank_defect(
    keys: list[str], shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> Finding:
    key = keys[0]
    what = (
        f"{len(keys)} tensors have another rank than r and rank_pattern say: {shapes[key]} where "
        f"{expected.adapter[key]} is expected"
    )
    return defect("rank", what, key, "Correct r and rank_pattern")


def map_adapter_keys(
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


def _build_refusal_defect(
    folder: AdapterFolder, error: ModelBuildError, modules: list[str]
) -> Finding:
    """Say why peft cannot wrap the base: old names, or a base of another architecture."""
    from peft.utils.error import PeftError

    targets = folder.adapter_config.settings.get("target_modules")
    unmatched = isinstance(error.__cause__, PeftError)
    unmatched = unmatched or "not found in the base model" in str(error)
    if unmatched and has_old_names(targets) and set(list_targets(folder.shapes)) <= set(modules):
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
    """Return whether a tensor is of the adapter itself, not of a module that was saved whole."""
    return re.search(r"\.(lora|ia3|vera|hada|lokr|oft|boft)_", key) is not None


def _differs_in_rank(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(shape) != len(expected):
        return False
    differ = [
        axis for axis, pair in enumerate(zip(shape, expected, strict=True)) if len({*pair}) > 1
    ]
    return (".lora_A" in key and differ == [0]) or (".lora_B" in key and differ == [1])


def _find_transformers_class(name: Any) -> Any:
    """Return a model class of transformers by its name; None for any other name."""
    import transformers

    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w*", name):
        return None
    named = getattr(transformers, name, None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else None
