"""Names of transformers 4 in a world of transformers 5: the ViT family was renamed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

PREFIX = "base_model.model."
MARKS = re.compile(
    r"\.(lora_|ia3_|vera_|hada_|lokr_|oft_|boft_|weight$|bias$|modules_to_save|original_module)"
)
STEPS = (
    (r"\battention\.attention\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.self\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
    (r"\bquery\b", "q_proj"),
    (r"\bkey\b", "k_proj"),
    (r"\bvalue\b", "v_proj"),
)
LISTS = ((r"\bencoder\.layer\.", "layers."), (r"$^", ""))
"""ViT's blocks have moved, DINOv2's have not."""
OLD = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
       "encoder.layer.")  # fmt: skip


def module_of(key: str) -> str:
    """The path in the model of the module that a tensor of an adapter belongs to."""
    inside = key.removeprefix(PREFIX)
    mark = MARKS.search(inside)
    return inside[: mark.start()] if mark else inside


def modern(name: str, modules: Iterable[str]) -> str | None:
    """What a module of transformers 4 is called in the model at hand; None if it is not there."""
    known = set(modules)
    return next((text for text in _candidates(name) if text != name and text in known), None)


def _candidates(name: str) -> Iterator[str]:
    """A name under the new rules: the layer's, the list's, or both."""
    moved = name
    for pattern, new in STEPS:
        moved = re.sub(pattern, new, moved)
    for text, (old, new) in product((moved, name), LISTS):
        yield re.sub(old, new, text)


def renamed_keys(keys: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """New names of the tensors whose module is in the model under a new name only."""
    known = set(modules)
    found: dict[str, str] = {}
    for key in keys:
        module = module_of(key)
        new = None if module in known else modern(module, known)
        if new is not None:
            found[key] = key.replace(module, new, 1)
    return found


def looks_old(targets: Any) -> bool:
    """Whether target modules are named as the ViT family's were."""
    names = [targets] if isinstance(targets, str) else list(targets or [])
    return any(old in str(name) for name in names for old in OLD)


def targets_of(keys: Iterable[str]) -> list[str]:
    """Full paths of the modules that carry an adapter, which match themselves and no other."""
    return sorted({module_of(key) for key in keys if ".lora_" in key})


def short_targets(paths: Iterable[str]) -> list[str]:
    """The last names of these paths; a name for every layer where all are adapted alike."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def renamed_patterns(patterns: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Keys of rank_pattern or alpha_pattern under the name that matches an adapted layer's path."""
    known = list(paths)
    return {
        next((text for text in _candidates(key) if _matches(text, known)), key): value
        for key, value in patterns.items()
    }


def _matches(pattern: str, paths: list[str]) -> bool:
    """Whether a layer's path ends so, as peft reads the names of its patterns."""
    return any(path == pattern or path.endswith(f".{pattern}") for path in paths)
