"""Translate names of modules from transformers 4, where the layers of the ViT family had others."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from hftl.models.lora_concat import PEFT_PREFIX

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
"""ViT's list of blocks was renamed, DINOv2's was not."""
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
    """Return the path of the module that a tensor of an adapter belongs to."""
    inside = key.removeprefix(PEFT_PREFIX)
    mark = PARAMETER_MARK.search(inside)
    return inside[: mark.start()] if mark else inside


def find_new_name(name: str, modules: Iterable[str]) -> str | None:
    """Return today's name of a module of transformers 4; None if the model has no such module."""
    known = set(modules)
    return next((text for text in _list_new_names(name) if text != name and text in known), None)


def _list_new_names(name: str) -> Iterator[str]:
    """Yield a name under the new rules: the layer's, the list's, or both."""
    moved = name
    for pattern, new in RENAMING_RULES:
        moved = re.sub(pattern, new, moved)
    for text, (old, new) in product((moved, name), BLOCK_LIST_RULES):
        yield re.sub(old, new, text)


def find_renamed_keys(keys: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Return the new names of the tensors whose module the model has under a new name only."""
    known = set(modules)
    renamed: dict[str, str] = {}
    for key in keys:
        module = get_module_path(key)
        new = None if module in known else find_new_name(module, known)
        if new is not None:
            renamed[key] = key.replace(module, new, 1)
    return renamed


def has_old_names(targets: object) -> bool:
    """Return whether target modules are named as the ViT family's were."""
    names = targets if isinstance(targets, list) else [targets]
    return any(old in str(name) for name in names for old in OLD_NAMES)


def list_targets(keys: Iterable[str]) -> list[str]:
    """Return the full paths of the modules that carry an adapter: each matches itself alone."""
    return sorted({get_module_path(key) for key in keys if ".lora_" in key})


def shorten_targets(paths: Iterable[str]) -> list[str]:
    """Return the last names of these paths, which match the same module in every layer."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def rename_patterns(patterns: Mapping[str, object], paths: Iterable[str]) -> dict[str, object]:
    """Rename the keys of rank_pattern or alpha_pattern so that they match adapted layers."""
    known = list(paths)
    return {
        next((text for text in _list_new_names(key) if _matches_path(text, known)), key): value
        for key, value in patterns.items()
    }


def _matches_path(pattern: str, paths: list[str]) -> bool:
    """Return whether a layer's path ends so, as peft reads the names of its patterns."""
    return any(path == pattern or path.endswith(f".{pattern}") for path in paths)
