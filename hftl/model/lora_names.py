"""Names in a LoRA section: each must match a module, or it would do nothing without a word."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from hftl.errors import RecipeError
from hftl.explain import closest

ALL = "all-linear"
LISTS = ("modules_to_save", "target_parameters")
"""Fields that peft reads letter by letter where they are one text."""
LISTED = 12
"""Names that a message lists, at most."""


def check_names(model: nn.Module, settings: dict[str, Any], place: str) -> None:
    """Refuse names that match nothing in a model, before peft wraps it.

    Args:
        model: without an adapter.
        settings: fields of `peft.LoraConfig`.
        place: where they are in the recipe, as `finetune.lora`.

    Raises:
        RecipeError: naming the first one, and the closest name that there is.
    """
    check_values(settings, place)
    modules = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = settings.get(field)
        if isinstance(names, str) and names != ALL:
            if not any(_full_match(names, path, f"{place}.{field}") for path in modules):
                raise _no_match(f"{place}.{field}", names, modules)
        elif names and names != ALL:
            _check_each(f"{place}.{field}", names, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or {}:
            _full_match(pattern, "", f"{place}.{field}")
    parameters = [name for name, _ in model.named_parameters()]
    names_of_parameters = settings.get("target_parameters") or ()
    _check_each(f"{place}.target_parameters", names_of_parameters, parameters)


def check_wrapped(layers: Sequence[str], settings: dict[str, Any], place: str) -> None:
    """Refuse names that match modules, but none that peft has wrapped.

    Args:
        layers: the paths of the wrapped layers.
        settings: fields of `peft.LoraConfig`.
        place: where they are in the recipe.

    Raises:
        RecipeError: naming the first one.
    """
    targets = settings.get("target_modules")
    if targets and not isinstance(targets, str):
        for name in targets:
            if not any(_ends_with(path, name) for path in layers):
                raise RecipeError(
                    f"{place}.target_modules: {name!r} gets no adapter: it is excluded, saved "
                    "whole, or outside layers_to_transform",
                    "Remove it, or correct the other key",
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or {}:
            # As peft does, see get_pattern_key.
            regex = rf"(.*\.)?({pattern})"
            if not any(_full_match(regex, path, f"{place}.{field}") for path in layers):
                raise _no_match(f"{place}.{field}", pattern, layers)
    indices = settings.get("layers_to_transform")
    present = {int(n) for path in layers for n in re.findall(r"(?<=\.)\d+(?=\.)", path)}
    for index in [indices] if isinstance(indices, int) else indices or ():
        if index not in present:
            raise RecipeError(
                f"{place}.layers_to_transform: no adapted layer lies in block {index}",
                "Count the source model's blocks from 0",
            )


def check_values(settings: dict[str, Any], place: str) -> None:
    """Refuse a text for a list, and ranks and scales of 0, with which nothing trains."""
    for field in LISTS:
        if isinstance(settings.get(field), str):
            name = settings[field]
            raise RecipeError(f"{place}.{field} must be a list, got {name!r}", f"Write [{name}]")
    numbers = {name: settings[name] for name in ("r", "lora_alpha") if name in settings}
    for field in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{field}.{key}": value for key, value in (settings.get(field) or {}).items()}
    for name, value in numbers.items():
        if not value > 0:
            raise RecipeError(f"{place}.{name} must be above 0, got {value!r}", "Correct the value")


def _check_each(place: str, names: Iterable[str], paths: Sequence[str]) -> None:
    for name in names:
        if not any(_ends_with(path, name) for path in paths):
            raise _no_match(place, name, paths)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _full_match(pattern: str, path: str, place: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise RecipeError(
            f"{place}: {pattern!r} is no regular expression: {error}", "Correct it"
        ) from error


def _no_match(place: str, name: str, paths: Sequence[str]) -> RecipeError:
    """Return the refusal, with the closest end of a path."""
    parts = name.count(".") + 1
    ends = {".".join(path.split(".")[-n:]) for path in paths for n in {1, parts}}
    options = sorted(end for end in ends if not end.split(".")[-1].isdigit())
    known = ", ".join(option for option in options if "." not in option)
    more = ", ..." if len(known.split(", ")) > LISTED else ""
    known = ", ".join(known.split(", ")[:LISTED])
    return RecipeError(
        f"{place}: no module matches {name!r}{closest(name, options)}",
        f"Known: {known}{more}",
    )
