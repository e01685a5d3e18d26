"""What could run code, or read or write a file elsewhere, when somebody loads the folder."""

import math
from collections.abc import Iterator
from typing import Any

from hftl.doctor.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PICKLE_SUFFIXES,
    AdapterFolder,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.shape_check import get_module_path
from hftl.runtime.paths import leaves_folder

CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".ipynb")
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "custom_pipelines")
"""Keys of any settings file that name code to be fetched or imported."""
TRUSTED_LIBRARIES = ("transformers", "peft")
IMPORTING_KEYS = ("megatron_config", "megatron_core", "tokenizer_kwargs", "runtime_config")
"""Keys of adapter_config.json that peft imports or hands on what they name."""
HARMLESS_VALUES = {"megatron_core": "megatron.core"}
"""What peft itself writes."""


def check_unsafe_files(patient: AdapterFolder) -> list[Finding]:
    """Every file and setting that nobody should have to trust."""
    return [
        *_check_file_types(patient),
        *_check_settings(patient),
        *_check_adapter_config(patient.adapter_config),
        *_check_shard_index(patient),
    ]


def find_foreign_code_key(settings: dict[str, Any]) -> str | None:
    """The first key of a model's config that would bring code along; None if there is none."""
    return next((key for key, value in _walk_items(settings) if _brings_code(key, value)), None)


def _check_file_types(patient: AdapterFolder) -> Iterator[Finding]:
    pickles = [n for n in patient.files if n.lower().endswith(PICKLE_SUFFIXES)]
    code = [n for n in patient.files if n.lower().endswith(CODE_SUFFIXES)]
    if pickles:
        secret = any(n.endswith("training_args.bin") for n in pickles)
        more = "; training_args.bin may hold the hub's token in clear" if secret else ""
        yield defect(
            "unsafe", f"a pickle runs code when it is loaded{more}", format_names(pickles),
            "Remove it; weights belong into safetensors",
        )  # fmt: skip
    if code:
        yield defect("unsafe", "program code beside the weights", format_names(code), "Remove it")


def _check_settings(patient: AdapterFolder) -> Iterator[Finding]:
    for name, told in patient.json_files.items():
        if name == "hftl.json" or name.endswith(".index.json"):
            continue
        for key, value in _walk_items(told):
            if _brings_code(key, value):
                yield defect(
                    "unsafe", f"{key} makes the loader run code that is not transformers' own",
                    name, f"Remove {key}",
                )  # fmt: skip
            elif key.endswith("_file") and isinstance(value, str) and leaves_folder(value):
                yield defect(
                    "unsafe", f"{key} names a file outside the folder: {value}", name,
                    f"Remove {key}",
                )  # fmt: skip
        templates = told.get("chat_template")
        strange = [n for n in _list_template_names(templates) if "/" in n or "\\" in n or ".." in n]
        if strange:
            yield defect(
                "unsafe", f"chat_template would be written to {strange[0]}", name, "Rename it"
            )


def _check_adapter_config(settings: dict[str, Any]) -> Iterator[Finding]:
    mapping = settings.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and str(library).split(".")[0] not in TRUSTED_LIBRARIES:
        yield defect(
            "unsafe", f"auto_mapping imports {library!r}", ADAPTER_CONFIG,
            "Set auto_mapping to null, or to a class of transformers",
        )  # fmt: skip
    for key in IMPORTING_KEYS:
        if settings.get(key) not in (None, {}, HARMLESS_VALUES.get(key)):
            yield defect(
                "unsafe",
                f"{key} makes peft import or pass on what it names",
                ADAPTER_CONFIG,
                f"Remove {key}",
            )
    tokenizer = settings.get("tokenizer_name_or_path")
    if isinstance(tokenizer, str) and leaves_folder(tokenizer):
        yield defect(
            "unsafe", f"tokenizer_name_or_path is {tokenizer}", ADAPTER_CONFIG, "Name a hub id"
        )


def _check_shard_index(patient: AdapterFolder) -> Iterator[Finding]:
    for name, told in patient.json_files.items():
        shards = told.get("weight_map") if name.endswith(".index.json") else None
        files = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        out = sorted(file for file in files if "/" in file or "\\" in file)
        if out:
            yield defect("unsafe", f"it names a file outside the folder: {out[0]}", name,
                         "Save the weights again")  # fmt: skip


def _walk_items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from ((str(key), inner) for key, inner in item.items())
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _brings_code(key: str, value: Any) -> bool:
    if key in CODE_KEYS or (key == "trust_remote_code" and value):
        return value not in (None, {}, "")
    # transformers fetches an attention kernel of that hub id.
    return key in ("_attn_implementation", "attn_implementation") and "/" in str(value)


def _list_template_names(templates: Any) -> list[str]:
    if isinstance(templates, dict):
        return list(map(str, templates))
    if isinstance(templates, list):
        return [str(item.get("name", "")) for item in templates if isinstance(item, dict)]
    return []


# adapter_config.json by itself: the numbers that scale an adapter.


def check_scaling(patient: AdapterFolder) -> Iterator[Finding]:
    """Rank and alpha that cannot be, or that fit no tensor of the file."""
    told = patient.adapter_config
    if told.get("peft_type") != "LORA":
        return
    r, alpha = told.get("r"), told.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        yield _build_rank_defect(f"r is {r!r}, expected a whole number above 0")
    if not _is_finite_number(alpha) or alpha == 0:
        yield _build_rank_defect(f"lora_alpha is {alpha!r}, expected a number that is not 0")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = told.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(_is_finite_number, pattern.values())):
            yield _build_rank_defect(f"{name} is {pattern!r}, expected a number for each name")
            continue
        modules = {get_module_path(key) for key in patient.shapes}
        for key in pattern:
            # peft reads the name as an expression; the plain end of it is enough to look for.
            end = key.rsplit(".", 1)[-1].strip("^$()\\")
            if modules and not any(end in module for module in modules):
                yield warning(
                    "rank",
                    f"{name} names {key}, which the adapter has not",
                    ADAPTER_CONFIG,
                    "Remove it",
                )


def _build_rank_defect(what: str) -> Finding:
    return defect("rank", what, ADAPTER_CONFIG, "Write what it was trained with")


def _is_finite_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


# Weights that are no numbers, or that change nothing.


def check_finite_weights(patient: AdapterFolder) -> Iterator[Finding]:
    """Every file with NaN or infinity in it; one tensor is in memory at a time."""
    from safetensors import SafetensorError, safe_open

    for name in patient.weight_files:
        try:
            with safe_open(patient.folder / name, "pt") as file:
                keys = sorted(file.keys())
                bad = [key for key in keys if not bool(file.get_tensor(key).isfinite().all())]
        except (SafetensorError, OSError):
            # The header did not open either, which is told already.
            continue
        if bad:
            yield defect("nan", f"NaN or infinity in {format_names(bad)}", name,
                         "Train again with a lower learning rate")  # fmt: skip


def check_trained(patient: AdapterFolder) -> Iterator[Finding]:
    """Say where every `lora_B` is zero, as before training: such an adapter changes nothing."""
    from safetensors import SafetensorError, safe_open

    keys = [key for key in patient.shapes if ".lora_B" in key or ".lora_embedding_B" in key]
    if not patient.is_adapter or not keys:
        return
    try:
        with safe_open(patient.folder / ADAPTER_WEIGHTS, "pt") as file:
            if any(bool(file.get_tensor(key).any()) for key in keys):
                return
    except (SafetensorError, OSError):
        return  # reported already
    yield defect(
        "untrained",
        f"all {len(keys)} lora_B are zero: the adapter changes nothing",
        ADAPTER_WEIGHTS,
        "Save it after training, with its parameters in the optimizer",
    )
