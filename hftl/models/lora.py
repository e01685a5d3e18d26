"""Names in a LoRA section: each must match a module, or it would do nothing without a word."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from hftl.config.errors import suggest_closest
from hftl.errors import RecipeError, format_error_line
from hftl.models.heads import PooledModel
from hftl.models.parts import ArchitectureSpec, get_stock_encoder, has_prefix, list_block_paths

ALL_LINEAR = "all-linear"
LIST_FIELDS = ("modules_to_save", "target_parameters")
"""Fields that peft reads letter by letter where they are one text."""
MAX_LISTED_NAMES = 12
"""Names that a message lists, at most."""


def check_module_names(model: nn.Module, settings: dict[str, Any], place: str) -> None:
    """Refuse names that match nothing in a model, before peft wraps it.

    Args:
        model: without an adapter.
        settings: fields of `peft.LoraConfig`.
        place: where they are in the recipe, as `finetune.lora`.

    Raises:
        RecipeError: naming the first one, and the closest name that there is.
    """
    check_lora_values(settings, place)
    modules = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = settings.get(field)
        if isinstance(names, str) and names != ALL_LINEAR:
            if not any(_match_pattern(names, path, f"{place}.{field}") for path in modules):
                raise _build_no_match_error(f"{place}.{field}", names, modules)
        elif names and names != ALL_LINEAR:
            _check_suffixes(f"{place}.{field}", names, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or {}:
            _match_pattern(pattern, "", f"{place}.{field}")
    parameters = [name for name, _ in model.named_parameters()]
    names_of_parameters = settings.get("target_parameters") or ()
    _check_suffixes(f"{place}.target_parameters", names_of_parameters, parameters)


def check_wrapped_names(layers: Sequence[str], settings: dict[str, Any], place: str) -> None:
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
            if not any(_has_suffix(path, name) for path in layers):
                raise RecipeError(
                    f"{place}.target_modules: {name!r} gets no adapter: it is excluded, saved "
                    "whole, or outside layers_to_transform",
                    "Remove it, or correct the other key",
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or {}:
            # As peft does, see get_pattern_key.
            regex = rf"(.*\.)?({pattern})"
            if not any(_match_pattern(regex, path, f"{place}.{field}") for path in layers):
                raise _build_no_match_error(f"{place}.{field}", pattern, layers)
    indices = settings.get("layers_to_transform")
    present = {int(n) for path in layers for n in re.findall(r"(?<=\.)\d+(?=\.)", path)}
    for index in [indices] if isinstance(indices, int) else indices or ():
        if index not in present:
            raise RecipeError(
                f"{place}.layers_to_transform: no adapted layer lies in block {index}",
                "Count the source model's blocks from 0",
            )


def check_lora_values(settings: dict[str, Any], place: str) -> None:
    """Refuse a text for a list, and ranks and scales of 0, with which nothing trains."""
    for field in LIST_FIELDS:
        if isinstance(settings.get(field), str):
            name = settings[field]
            raise RecipeError(f"{place}.{field} must be a list, got {name!r}", f"Write [{name}]")
    numbers = {name: settings[name] for name in ("r", "lora_alpha") if name in settings}
    for field in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{field}.{key}": value for key, value in (settings.get(field) or {}).items()}
    for name, value in numbers.items():
        if not value > 0:
            raise RecipeError(f"{place}.{name} must be above 0, got {value!r}", "Correct the value")


def _check_suffixes(place: str, names: Iterable[str], paths: Sequence[str]) -> None:
    for name in names:
        if not any(_has_suffix(path, name) for path in paths):
            raise _build_no_match_error(place, name, paths)


def _has_suffix(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _match_pattern(pattern: str, path: str, place: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise RecipeError(
            f"{place}: {pattern!r} is no regular expression: {error}", "Correct it"
        ) from error


def _build_no_match_error(place: str, name: str, paths: Sequence[str]) -> RecipeError:
    """Return the refusal, with the closest end of a path."""
    parts = name.count(".") + 1
    ends = {".".join(path.split(".")[-n:]) for path in paths for n in {1, parts}}
    options = sorted(end for end in ends if not end.split(".")[-1].isdigit())
    known = ", ".join(option for option in options if "." not in option)
    more = ", ..." if len(known.split(", ")) > MAX_LISTED_NAMES else ""
    known = ", ".join(known.split(", ")[:MAX_LISTED_NAMES])
    return RecipeError(
        f"{place}: no module matches {name!r}{suggest_closest(name, options)}",
        f"Known: {known}{more}",
    )


# LoRA on an encoder: what is wrapped, what is saved beside it.


BLOCK_PATH = re.compile(r"(.*?\.)(\d+)\.(.+)")
"""The path of a module in a block: before the block's number, the number, and inside the block."""


def add_lora(
    model: nn.Module, anatomy: ArchitectureSpec, lora: dict[str, Any], fresh: Sequence[str]
) -> nn.Module:
    """Wraps the linear layers of every block; head and fresh modules train and are saved whole.

    Args:
        model: a `PooledModel`, whose encoder is wrapped, or a stock task class.
        anatomy: where its parts lie.
        lora: fields of `peft.LoraConfig`; `target_modules` defaults to all linears of the blocks.
        fresh: modules whose weights the checkpoint does not have.

    Raises:
        RecipeError: if peft refuses the settings, or wraps another number of layers than asked.
    """
    given = dict(lora)
    pooled = isinstance(model, PooledModel)
    wrapped: Any = model.encoder if pooled else model
    check_lora_values(lora, "finetune.lora")
    saved = set(given.pop("modules_to_save", None) or [])
    if not pooled:
        saved |= {_get_saved_name(name, anatomy) for name in [*anatomy.head_parts, *fresh]}
    task = TaskType.FEATURE_EXTRACTION if pooled else _get_task_type(wrapped, anatomy)
    settings = given | {"task_type": task, "modules_to_save": sorted(saved) or None}
    adapted = wrap_with_lora(wrapped, anatomy, settings, "finetune")
    if not pooled:
        return adapted
    model.encoder = adapted
    for parameter in model.head.parameters():
        parameter.requires_grad = True
    return model


def wrap_with_lora(
    model: Any, anatomy: ArchitectureSpec, settings: dict[str, Any], section: str
) -> Any:
    """The model under an adapter; by default on every linear layer of every block, and no other.

    Args:
        model: an encoder, or a stock task class around it.
        anatomy: where its parts lie.
        settings: fields of `peft.LoraConfig`.
        section: where they stand in the recipe: `finetune` or `adapt`.

    Raises:
        RecipeError: if peft refuses the settings, or wraps another number of layers than asked.
    """
    place = f"{section}.lora"
    check_module_names(model, settings, place)
    given = dict(settings)
    every = given.get("target_modules") in (None, "all-linear")
    if every:
        given["target_modules"] = list(anatomy.lora_targets)
        given["exclude_modules"] = (
            given.get("exclude_modules") or _list_outside_namesakes(model, anatomy) or None
        )
    try:
        adapted = get_peft_model(model, LoraConfig(**given))
    except (ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise RecipeError(
            f"{place}: peft refuses it: {format_error_line(error)}", "Correct the section"
        ) from error
    # The user's own targets: in a subset of the blocks some of the default ones may be missing.
    checked = given | ({"target_modules": None} if every else {})
    check_wrapped_names(list_lora_layers(adapted.get_base_model()), checked, place)
    if every and not settings.get("exclude_modules") and not settings.get("layers_pattern"):
        _check_layer_count(adapted, anatomy, given, section)
    return adapted


def list_lora_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that carry a LoRA adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def get_peft_model_inside(model: nn.Module) -> PeftModel:
    """The peft model inside."""
    found = model.encoder if isinstance(model, PooledModel) else model
    if not isinstance(found, PeftModel):
        raise TypeError(f"{type(found).__name__} carries no adapter")
    return found


def build_path_pattern(paths: Sequence[str], modules: Sequence[str]) -> str:
    """Return a regular expression that matches these paths and no others of a model's modules.

    Where it can it matches the layers of any block, so that a base of more blocks shows by layers
    that the adapter lacks.

    Args:
        paths: of the adapted layers.
        modules: the paths of all modules.
    """
    blocks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        match = BLOCK_PATH.fullmatch(path)
        if match is None:
            return "|".join(map(re.escape, paths))
        stem, number, inside = match.groups()
        blocks[stem, inside].append(number)
    insides: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stem, inside), numbers in blocks.items():
        insides[stem, "|".join(sorted(numbers, key=int))].append(inside)
    opened, closed = (
        "|".join(
            rf"{re.escape(stem)}({number or numbers})\.({'|'.join(map(re.escape, sorted(names)))})"
            for (stem, numbers), names in sorted(insides.items())
        )
        for number in (r"\d+", "")
    )
    return opened if {m for m in modules if re.fullmatch(opened, m)} == set(paths) else closed


def _get_saved_name(name: str, anatomy: ArchitectureSpec) -> str:
    """A module's path without the encoder's name; peft matches by suffix.

    A module inside the head is saved with its whole head: peft wraps no module twice.
    """
    inside = name.removeprefix(f"{anatomy.encoder}.")
    return next((head for head in anatomy.head_parts if inside.startswith(f"{head}.")), inside)


def _get_task_type(model: nn.Module, anatomy: ArchitectureSpec) -> TaskType | None:
    """What peft calls the task; it knows none of images."""
    if anatomy.modality == "image":
        return None
    tokens = type(model).__name__.endswith("ForTokenClassification")
    return TaskType.TOKEN_CLS if tokens else TaskType.SEQ_CLS


def _list_outside_namesakes(model: nn.Module, anatomy: ArchitectureSpec) -> list[str]:
    """Layers outside the blocks that peft would take for theirs, as in SigLIP's unused head."""
    encoder = get_stock_encoder(model, anatomy)
    prefix = "" if encoder is model else f"{anatomy.encoder}."
    blocks = tuple(f"{prefix}{path}" for path in list_block_paths(encoder, anatomy.blocks))
    return [
        name
        for name, _ in model.named_modules()
        if not has_prefix(name, blocks)
        and any(name.endswith(f".{t}") for t in anatomy.lora_targets)
    ]


def _check_layer_count(
    adapted: Any, anatomy: ArchitectureSpec, given: dict[str, Any], section: str
) -> None:
    paths = list_block_paths(get_stock_encoder(adapted.base_model.model, anatomy), anatomy.blocks)
    chosen = given.get("layers_to_transform")
    if chosen is not None:
        indices = [chosen] if isinstance(chosen, int) else chosen
        # Of nested lists peft takes the outer index.
        paths = [p for p in paths if int(next(filter(str.isdigit, p.split(".")))) in indices]
    expected = len(paths) * len(anatomy.lora_targets)
    found = len(list_lora_layers(adapted))
    if found != expected:
        raise RecipeError(
            f"LoRA wrapped {found} layers, expected {expected}",
            f"Name {section}.lora.target_modules",
        )
