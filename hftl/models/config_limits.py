"""Refuse a config that names absurd sizes, before a model of it is built."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hftl.runtime.run_folder import UnreadableJsonError, read_json

MAX_REPEATS = 1000
"""Layers, groups or experts of a config, at most; the deepest encoders have some hundred."""
MAX_LABELS = 1_000_000
REPEAT_KEYS = re.compile(
    r"(num|n)_(\w+_)?(layers?|groups?|blocks?|experts?|stages?)|\w*layers|depths?"
)
"""Keys of configs that say how often a part is repeated, in every family's spelling."""
MAX_WIDTH = 10_000_000
WIDTH_KEYS = re.compile(
    r"(\w+_)?(hidden|intermediate|embedding|vocab|ffn)_(size|dim)s?|d_model|d_ff"
)
"""Keys of configs that say how wide a part is."""
POSITIONS = "max_position_embeddings"
"""May be of any size where positions are turned, not stored."""
OTHER_COUNTS = ("num_labels", POSITIONS)
MAX_SIZE_RATIO, SIZE_SLACK = 2, 50_000_000
"""A model may hold so many times the numbers of its file, and so many more for a new head."""


def find_config_fault(config: object) -> str | None:
    """Return what is wrong with a config that names no class, or what is larger than any model's.

    Args:
        config: the parsed config.json, which may be of any shape.
    """
    names = config.get("architectures") if isinstance(config, dict) else None
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        return f"architectures is {names!r}, expected a list of names"
    for key, value in _iterate_counts(config):
        most = MAX_REPEATS if REPEAT_KEYS.fullmatch(key) else MAX_WIDTH
        most = MAX_LABELS if key == "num_labels" else most
        if value > most and key != POSITIONS:
            return f"{key} is {value}, and no model has more than {most:,}"
    return None


def find_folder_fault(folder: Path) -> str | None:
    """Return `find_config_fault` of a folder's config.json; None where it cannot be read."""
    try:
        return find_config_fault(read_json(folder / "config.json"))
    except (OSError, UnreadableJsonError):
        return None


def find_size_fault(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return how a model is far larger than its file of weights; None where it is not.

    Args:
        model: built from the config, without weights.
        shapes: of the file's tensors.
    """
    built = sum(one.numel() for one in [*model.parameters(), *model.buffers()])
    held = sum(map(math.prod, shapes.values()))
    if built <= MAX_SIZE_RATIO * held + SIZE_SLACK:
        return None
    return f"its config makes a model of {built:,} numbers, and its weights hold {held:,}"


def may_be_oversized(config: Mapping[str, object], patches: int, held: int) -> bool:
    """Return whether a config may make a model far larger than its file of weights.

    From a few products of its sizes, in no time: to know it, the model has to be built.

    Args:
        config: as in config.json.
        patches: of its images, each of which has a position.
        held: the numbers in the file.
    """
    counts = list(_iterate_counts(config))
    widths = [n for key, n in counts if WIDTH_KEYS.fullmatch(key) and "vocab" not in key] or [0]
    rows = [n for key, n in counts if "vocab" in key or key == POSITIONS]
    layers = [n for key, n in counts if REPEAT_KEYS.fullmatch(key)]
    most = max(
        max(widths) ** 2, max([patches, *rows]) * min(widths),
        max(layers, default=1) * max(widths) ** 2 // 4,
    )  # fmt: skip
    return most > MAX_SIZE_RATIO * held + SIZE_SLACK


def _iterate_counts(config: object) -> Iterator[tuple[str, int]]:
    """Yield every count at any depth; of a list, such as blocks by stage, the sum."""
    nodes = [config]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            continue
        nodes.extend(node.values())
        for name, value in node.items():
            key = str(name)  # a config in memory numbers its labels
            numbers = value if isinstance(value, list) else [value]
            counts = REPEAT_KEYS.fullmatch(key) or WIDTH_KEYS.fullmatch(key) or key in OTHER_COUNTS
            if counts and all(isinstance(number, int) for number in numbers):
                yield key, sum(numbers)
