"""Wrap an encoder with LoRA, and check that every name in its settings matches a module.

peft ignores most names that match nothing, so a misspelt one would silently train less.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from hftl.errors import RecipeError, format_error_line, suggest_closest
from hftl.models.architecture_spec import WEIGHT_LAYERS, ArchitectureSpec
from hftl.models.encoders import (
    get_stock_encoder,
    get_submodule,
    has_prefix,
    has_suffix,
    list_block_paths,
    list_weight_layers,
)
from hftl.models.lora_kernels import fuse_lora
from hftl.models.pooled_model import PooledModel

ALL_LINEAR = "all-linear"
MAX_LISTED_NAMES = 12
"""At most so many names are listed in a message."""


def check_module_names(model: nn.Module, settings: Mapping[str, object], place: str) -> None:
    """Refuse names that match nothing in a model, before peft wraps it.

    Args:
        model: without an adapter.
        settings: fields of `peft.LoraConfig`.
        place: the recipe key of the settings, as `finetune.lora`.

    Raises:
        RecipeError: naming the first one and the closest existing name.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = settings.get(field)
        if not isinstance(names, str):
            _check_suffixes(f"{place}.{field}", _list_values(names), modules)
        elif names != ALL_LINEAR:
            if not any(_match_pattern(names, path, f"{place}.{field}") for path in modules):
                raise _build_no_match_error(f"{place}.{field}", names, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in _list_values(settings.get(field)):
            _match_pattern(pattern, "", f"{place}.{field}")
    parameters = [name for name, _ in model.named_parameters()]
    named = _list_values(settings.get("target_parameters"))
    _check_suffixes(f"{place}.target_parameters", named, parameters)


def check_wrapped_names(layers: Sequence[str], settings: Mapping[str, object], place: str) -> None:
    """Refuse names that match modules, but none that peft has wrapped.

    Args:
        layers: the paths of the wrapped layers.
        settings: fields of `peft.LoraConfig`.
        place: the recipe key of the settings.

    Raises:
        RecipeError: naming the first one.
    """
    targets = settings.get("target_modules")
    if not isinstance(targets, str):
        for name in _list_values(targets):
            if not any(has_suffix(path, (name,)) for path in layers):
                raise RecipeError(
                    f"{place}.target_modules: {name!r} gets no adapter: it is excluded, saved "
                    "whole, or outside layers_to_transform",
                    "Remove it, or correct the other key",
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in _list_values(settings.get(field)):
            # The expression that peft.utils.get_pattern_key matches.
            regex = rf"(.*\.)?({pattern})"
            if not any(_match_pattern(regex, path, f"{place}.{field}") for path in layers):
                raise _build_no_match_error(f"{place}.{field}", pattern, layers)
    indices = settings.get("layers_to_transform")
    present = {int(n) for path in layers for n in re.findall(r"(?<=\.)\d+(?=\.)", path)}
    for index in [indices] if isinstance(indices, int) else _list_values(indices):
        if index not in present:
            raise RecipeError(
                f"{place}.layers_to_transform: no adapted layer lies in block {index}",
                "Count the source model's blocks from 0",
            )


def _list_values(value: object) -> list[Any]:
    """Return the values of a field that holds several, the keys of a mapping; none if unset."""
    return list(value) if isinstance(value, Iterable) else []


def _check_suffixes(place: str, names: Iterable[str], paths: Sequence[str]) -> None:
    for name in names:
        if not any(has_suffix(path, (name,)) for path in paths):
            raise _build_no_match_error(place, name, paths)


def _match_pattern(pattern: str, path: str, place: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise RecipeError(
            f"{place}: {pattern!r} is no regular expression: {error}", "Correct it"
        ) from error


def _build_no_match_error(place: str, name: str, paths: Sequence[str]) -> RecipeError:
    """Build the error for a name that matches nothing, with the closest end of a path."""
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


BLOCK_PATH = re.compile(r"(.*?\.)(\d+)\.(.+)")
"""Match the path of a module in a block: up to the block, the block's index, inside the block."""


def add_lora(
    model: nn.Module, architecture: ArchitectureSpec, lora: Mapping[str, object],
    fresh: Sequence[str],
) -> nn.Module:  # fmt: skip
    """Wrap the layers of every block with LoRA; head and fresh modules train and are saved whole.

    Args:
        model: a `PooledModel`, whose encoder is wrapped, or a stock task class.
        architecture: the model's.
        lora: fields of `peft.LoraConfig`, see `check_lora_values`; `target_modules` defaults to
            every layer of the blocks.
        fresh: modules whose weights the checkpoint lacks.

    Raises:
        RecipeError: if peft refuses the settings, or wraps another number of layers than expected.
    """
    settings = dict(lora)
    pooled = isinstance(model, PooledModel)
    inner: Any = model.encoder if pooled else model
    saved = set(_list_values(settings.pop("modules_to_save", None)))
    if not pooled:
        saved |= {
            _get_saved_name(name, architecture) for name in [*architecture.head.parts, *fresh]
        }
    task = _get_task_type(inner, architecture)
    if pooled and task is not None:
        # For images peft has none: its class for features passes the arguments of text encoders.
        task = TaskType.FEATURE_EXTRACTION
    settings |= {"task_type": task, "modules_to_save": sorted(saved) or None}
    adapted = wrap_with_lora(inner, architecture, settings, "finetune")
    if not pooled:
        return adapted
    model.encoder = adapted
    for parameter in model.head.parameters():
        parameter.requires_grad = True
    return model


def build_lora_config(settings: Mapping[str, object], place: str) -> LoraConfig:
    """Construct `peft.LoraConfig`, which checks its fields against one another.

    Args:
        settings: its fields.
        place: where they are in the recipe, as `finetune.lora`.

    Raises:
        RecipeError: if peft refuses them.
    """
    try:
        return LoraConfig(**settings)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{place}: peft refuses it: {format_error_line(error)}", "Correct the section"
        ) from error


def wrap_with_lora(
    model: Any, architecture: ArchitectureSpec, settings: Mapping[str, object], section: str
) -> Any:
    """Wrap a model with an adapter, by default on every layer of every block and nowhere else.

    Args:
        model: an encoder, or a stock task class around it.
        architecture: the encoder's.
        settings: fields of `peft.LoraConfig`.
        section: of the recipe: `finetune` or `adapt`.

    Raises:
        RecipeError: if peft refuses the settings, or wraps another number of layers than expected;
            for a rank above both sides of every layer.
    """
    place = f"{section}.lora"
    check_module_names(model, settings, place)
    _check_ranks(model, architecture, settings, place)
    fields = dict(settings)
    all_layers = fields.get("target_modules") in (None, ALL_LINEAR)
    if all_layers:
        targets = [*architecture.lora_targets, *architecture.optional_targets]
        fields["target_modules"] = targets
        fields["exclude_modules"] = (
            fields.get("exclude_modules") or _list_namesakes(model, architecture, targets) or None
        )
    config = build_lora_config(fields, place)
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, IndexError, NotImplementedError) as error:
        # peft: ValueError for names that match nothing, TypeError for a value of another type,
        # IndexError for token indices beyond the vocabulary, NotImplementedError for a `bias`.
        raise RecipeError(
            f"{place}: peft refuses it: {format_error_line(error)}", "Correct the section"
        ) from error
    fuse_lora(adapted)
    # Only the user's own targets: a subset of the blocks may lack some of the default ones.
    checked = fields | ({"target_modules": None} if all_layers else {})
    check_wrapped_names(list_adapted_layers(adapted.get_base_model()), checked, place)
    if all_layers and not settings.get("exclude_modules") and not settings.get("layers_pattern"):
        _check_layer_count(adapted, architecture, config, section)
    return adapted


def list_adapted_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that carry a LoRA adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def get_peft_model_inside(model: nn.Module) -> PeftModel:
    """Return the peft model that a `PooledModel` holds, or the model itself.

    Raises:
        TypeError: if it carries no adapter.
    """
    peft_model = model.encoder if isinstance(model, PooledModel) else model
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"{type(peft_model).__name__} carries no adapter")
    return peft_model


def build_path_pattern(paths: Sequence[str], modules: Sequence[str]) -> str:
    """Build a regular expression that matches these paths and no other module of the model.

    If possible it matches the layers of any block, so that on a base with more blocks than the
    adapter was trained on, loading reports the missing layers.

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
    any_block, same_blocks = (
        "|".join(
            rf"{re.escape(stem)}({number or numbers})\.({'|'.join(map(re.escape, sorted(names)))})"
            for (stem, numbers), names in sorted(insides.items())
        )
        for number in (r"\d+", "")
    )
    matched = {module for module in modules if re.fullmatch(any_block, module)}
    return any_block if matched == set(paths) else same_blocks


def _check_ranks(
    model: nn.Module, architecture: ArchitectureSpec, settings: Mapping[str, object], place: str
) -> None:
    """Refuse a rank above both sides of every layer of the blocks, before memory is asked for it.

    No update has a rank above the smaller side of its layer: the rest is idle.
    """
    encoder = get_stock_encoder(model, architecture)
    sides = [
        side
        for path in list_block_paths(encoder, architecture)
        for layer in get_submodule(encoder, path).modules()
        if isinstance(layer, WEIGHT_LAYERS)
        for side in _get_sides(layer)
    ]
    pattern = settings.get("rank_pattern")
    ranks: dict[str, Any] = {"r": settings.get("r", 0)}
    if isinstance(pattern, Mapping):
        ranks |= {f"rank_pattern.{name}": rank for name, rank in pattern.items()}
    for name, rank in ranks.items():
        if sides and rank > max(sides):
            raise RecipeError(
                f"{place}.{name}={rank} is above both sides of every layer; the longest is "
                f"{max(sides)}",
                "Use a smaller rank, such as 8",
            )


def _get_sides(layer: Any) -> tuple[int, int]:
    """Return the numbers of a layer's inputs and outputs; weights in 4 bits have another shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _get_saved_name(name: str, architecture: ArchitectureSpec) -> str:
    """Return a module's path without the encoder's name, since peft matches by suffix.

    A module inside the head is saved with its whole head: peft wraps no module twice.
    """
    if name in architecture.head.parts:
        return name
    inside = name.removeprefix(f"{architecture.encoder}.")
    return next((head for head in architecture.head.parts if inside.startswith(f"{head}.")), inside)


def _get_task_type(model: nn.Module, architecture: ArchitectureSpec) -> TaskType | None:
    """Return peft's name of the task; it has none for images."""
    if architecture.modality == "image":
        return None
    tokens = type(model).__name__.endswith("ForTokenClassification")
    return TaskType.TOKEN_CLS if tokens else TaskType.SEQ_CLS


def _list_namesakes(
    model: nn.Module, architecture: ArchitectureSpec, targets: Sequence[str]
) -> list[str]:
    """Return layers that end like a target and are none.

    They lie outside the blocks, as in SigLIP's unused head, are skipped inside them, or are no
    layers there, as the shortcut of a block that keeps its width.
    """
    encoder = get_stock_encoder(model, architecture)
    prefix = "" if encoder is model else f"{architecture.encoder}."
    blocks = tuple(f"{prefix}{path}" for path in list_block_paths(encoder, architecture))
    return [
        name
        for name, module in model.named_modules()
        if has_suffix(name, tuple(targets))
        and (
            not has_prefix(name, blocks)
            or has_suffix(name, architecture.skipped_layers)
            or not isinstance(module, WEIGHT_LAYERS)
        )
    ]


def _check_layer_count(
    adapted: Any, architecture: ArchitectureSpec, config: LoraConfig, section: str
) -> None:
    """Refuse an adapter that does not cover the blocks' layers, which would train less."""
    encoder = get_stock_encoder(adapted.base_model.model, architecture)
    paths = list_block_paths(encoder, architecture)
    chosen = config.layers_to_transform
    if chosen is not None:
        indices = [chosen] if isinstance(chosen, int) else chosen
        # Of nested lists peft takes the outer index.
        paths = [p for p in paths if int(next(filter(str.isdigit, p.split(".")))) in indices]
    layers = [list_weight_layers(get_submodule(encoder, path)) for path in paths]
    skipped = architecture.skipped_layers
    expected = sum(not has_suffix(name, skipped) for names in layers for name in names)
    wrapped = len(list_adapted_layers(adapted))
    if wrapped != expected:
        raise RecipeError(
            f"LoRA wrapped {wrapped} layers, expected {expected}",
            f"Name {section}.lora.target_modules",
        )
