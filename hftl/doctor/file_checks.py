"""Examine files and settings for what could run code, and weights for values that cannot be.

Nothing here needs the base.
"""

import math
from collections.abc import Iterator
from typing import Any

from hftl.doctor.adapter_folder import (
    PICKLE_SUFFIXES,
    Examination,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.renamed_modules import get_module_path
from hftl.publish.published_metadata import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD_FILE
from hftl.runtime.paths import leaves_folder

CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".ipynb")
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "custom_pipelines")
"""Keys of any settings file that name code to be fetched or imported."""
TRUSTED_LIBRARIES = ("transformers", "peft")
IMPORTING_KEYS = ("megatron_config", "megatron_core", "tokenizer_kwargs", "runtime_config")
"""Keys of adapter_config.json whose values peft imports or passes on."""
HARMLESS_VALUES = {"megatron_core": "megatron.core"}
"""Values that peft itself writes."""


def find_foreign_code_key(settings: dict[str, Any]) -> str | None:
    """Return the first key of a model's config that brings code along; None if there is none."""
    return next((key for key, value in _walk_items(settings) if _brings_code(key, value)), None)


def check_file_types(examination: Examination) -> Iterator[Finding]:
    """Report pickles and program code."""
    names = examination.folder.files
    pickles = [n for n in names if n.lower().endswith(PICKLE_SUFFIXES)]
    code = [n for n in names if n.lower().endswith(CODE_SUFFIXES)]
    if pickles:
        secret = any(n.endswith("training_args.bin") for n in pickles)
        more = "; training_args.bin may hold the hub's token in clear" if secret else ""
        what = f"a pickle runs code when it is loaded{more}"
        fix = "Remove it; weights belong into safetensors"
        yield defect("unsafe", what, format_names(pickles), fix)
    if code:
        yield defect("unsafe", "program code beside the weights", format_names(code), "Remove it")


def check_settings(examination: Examination) -> Iterator[Finding]:
    """Report settings that make a loader run code, or read or write outside the folder."""
    for name, settings in examination.folder.json_files.items():
        if name == RECORD_FILE or name.endswith(".index.json"):
            continue
        for key, value in _walk_items(settings):
            if _brings_code(key, value):
                what = f"{key} makes the loader run code that is not transformers' own"
                yield defect("unsafe", what, name, f"Remove {key}")
            elif key.endswith("_file") and isinstance(value, str) and leaves_folder(value):
                what = f"{key} names a file outside the folder: {value}"
                yield defect("unsafe", what, name, f"Remove {key}")
        templates = _list_template_names(settings.get("chat_template"))
        unsafe = [n for n in templates if "/" in n or "\\" in n or ".." in n]
        if unsafe:
            what = f"chat_template would be written to {unsafe[0]}"
            yield defect("unsafe", what, name, "Rename it")


def check_adapter_settings(examination: Examination) -> Iterator[Finding]:
    """Report settings of peft that import a module or read a file."""
    settings = examination.folder.adapter_config.settings
    mapping = settings.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and str(library).split(".")[0] not in TRUSTED_LIBRARIES:
        what = f"auto_mapping imports {library!r}"
        fix = "Set auto_mapping to null, or to a class of transformers"
        yield defect("unsafe", what, ADAPTER_CONFIG, fix)
    for key in IMPORTING_KEYS:
        if settings.get(key) not in (None, {}, HARMLESS_VALUES.get(key)):
            what = f"{key} makes peft import or pass on what it names"
            yield defect("unsafe", what, ADAPTER_CONFIG, f"Remove {key}")
    tokenizer = settings.get("tokenizer_name_or_path")
    if isinstance(tokenizer, str) and leaves_folder(tokenizer):
        what = f"tokenizer_name_or_path is {tokenizer}"
        yield defect("unsafe", what, ADAPTER_CONFIG, "Name a hub id")


def check_shard_index(examination: Examination) -> Iterator[Finding]:
    """Report an index of weights that names a file outside the folder."""
    for name, index in examination.folder.json_files.items():
        shards = index.get("weight_map") if name.endswith(".index.json") else None
        files = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        outside = sorted(file for file in files if "/" in file or "\\" in file)
        if outside:
            what = f"it names a file outside the folder: {outside[0]}"
            yield defect("unsafe", what, name, "Save the weights again")


def _walk_items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, however deep."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from ((str(key), inner) for key, inner in item.items())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


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


def check_scaling(examination: Examination) -> Iterator[Finding]:
    """Report a rank or alpha of LoRA that cannot be, or that fits no tensor of the file."""
    settings = examination.folder.adapter_config.settings
    if settings.get("peft_type") != "LORA":
        return
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        yield _build_rank_defect(f"r is {r!r}, expected a whole number above 0")
    if not _is_finite_number(alpha) or alpha == 0:
        yield _build_rank_defect(f"lora_alpha is {alpha!r}, expected a number that is not 0")
    modules = {get_module_path(key) for key in examination.folder.shapes}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(_is_finite_number, pattern.values())):
            yield _build_rank_defect(f"{name} is {pattern!r}, expected a number for each name")
            continue
        for key in pattern:
            # peft reads the name as a regular expression; its plain end is enough to look for.
            end = key.rsplit(".", 1)[-1].strip("^$()\\")
            if modules and not any(end in module for module in modules):
                what = f"{name} names {key}, which the adapter does not have"
                yield warning("rank", what, ADAPTER_CONFIG, "Remove it")


def _build_rank_defect(what: str) -> Finding:
    return defect("rank", what, ADAPTER_CONFIG, "Write what it was trained with")


def _is_finite_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_finite_weights(examination: Examination) -> Iterator[Finding]:
    """Report files with NaN or infinity; one tensor is in memory at a time."""
    from safetensors import SafetensorError, safe_open

    for name in examination.folder.weight_files:
        try:
            with safe_open(examination.folder.path / name, "pt") as file:
                keys = sorted(file.keys())
                bad = [key for key in keys if not bool(file.get_tensor(key).isfinite().all())]
        except (SafetensorError, OSError):
            continue  # reported when the header was read
        if bad:
            what = f"NaN or infinity in {format_names(bad)}"
            yield defect("nan", what, name, "Train again with a lower learning rate")


def check_trained(examination: Examination) -> Iterator[Finding]:
    """Report an adapter whose `lora_B` are all zero, as before training: it changes nothing."""
    from safetensors import SafetensorError, safe_open

    folder = examination.folder
    keys = [key for key in folder.shapes if ".lora_B" in key or ".lora_embedding_B" in key]
    if not folder.is_adapter or not keys:
        return
    try:
        with safe_open(folder.path / ADAPTER_WEIGHTS, "pt") as file:
            if any(bool(file.get_tensor(key).any()) for key in keys):
                return
    except (SafetensorError, OSError):
        return  # reported when the header was read
    what = f"all {len(keys)} lora_B are zero: the adapter changes nothing"
    fix = "Save it after training, with its parameters in the optimizer"
    yield defect("untrained", what, ADAPTER_WEIGHTS, fix)
