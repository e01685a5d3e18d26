"""Sizes that a config claims and no file of weights bears out, seen before anything is built."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST = 1000
"""Layers, groups or experts; the deepest encoders have some hundred."""
MOST_LABELS = 1_000_000
REPEATED = re.compile(
    r"(num|n)_(\w+_)?(layers?|groups?|blocks?|experts?|stages?)|\w*layers|depths?"
)
"""Keys that say how often a part is built, in every family's words."""
LARGER, SLACK = 2, 50_000_000
"""How many times the file's numbers a model may have, and how many more: a head drawn anew."""


def absurd(config: Any) -> str | None:
    """The first key of a config that claims more than any model has, with its value.

    Args:
        config: what config.json holds, which may be of any shape.
    """
    for key, value in _counts(config):
        most = MOST_LABELS if key == "num_labels" else MOST
        if value > most:
            return f"{key} is {value}, and no model has more than {most:,}"
    return None


def absurd_in(folder: Path) -> str | None:
    """The same of a folder's config.json; None where there is none to be read."""
    try:
        return absurd(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def contradicted(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whether a model is far larger than its file of weights.

    Args:
        model: built of the config, without weights.
        shapes: of the file's tensors.
    """
    built = sum(one.numel() for one in [*model.parameters(), *model.buffers()])
    held = sum(map(math.prod, shapes.values()))
    if built <= LARGER * held + SLACK:
        return None
    return f"its config makes a model of {built:,} numbers, and its weights hold {held:,}"


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, from the headers alone.

    Raises:
        SafetensorError: if a file does not open.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    return found


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """Every count, however deep; of a list, as of blocks by stage, the sum."""
    waiting = [config]
    while waiting:
        told = waiting.pop()
        if not isinstance(told, dict):
            continue
        waiting.extend(told.values())
        for key, value in told.items():
            numbers = value if isinstance(value, list) else [value]
            repeated = REPEATED.fullmatch(key) or key == "num_labels"
            if repeated and all(isinstance(number, int) for number in numbers):
                yield key, sum(numbers)
