"""Describe any architecture of timm by what timm and one run without weights say of it.

transformers holds every timm model in one wrapper. Which modules are its blocks follows from the
patterns of timm's `group_matcher`; their order, the layers that run as layers, and what comes after
the last block follow from a forward pass on torch's meta device.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hftl.errors import RecipeError, format_error_line, suggest_closest
from hftl.models.architecture_spec import WEIGHT_LAYERS, ArchitectureSpec, HeadSpec

TIMM_WRAPPER = "timm_wrapper"
"""The model type of transformers' wrapper."""
TIMM_FIX = "Use another architecture of timm, or the model of transformers of that name"


def describe_timm(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the parts of the timm model that a config builds.

    Raises:
        RecipeError: if timm is not installed or has no such architecture, or hftl cannot train it.
    """
    data = read_data_config(config)
    is_fixed = bool((getattr(config, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    arguments = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
    described = _describe(
        spec.encoder, config.architecture, json.dumps(arguments), tuple(data["input_size"])
    )
    return replace(described, image_sizes="fixed" if is_fixed else "any")


def drop_old_labels(config: Any) -> None:
    """Drop what timm wrote of the labels: id2label says the same, and new ones must replace it.

    The wrapper cannot load a config with `num_classes` among the arguments, where timm 1.0.31
    writes it.
    """
    vars(config).pop("label_names", None)
    if config.model_args:
        config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}


def import_timm() -> Any:
    """Return the package timm.

    Raises:
        RecipeError: if it is not installed.
    """
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise build_missing_timm_error() from error
    return timm


def build_missing_timm_error() -> RecipeError:
    """Build the error for a timm model on a machine without timm."""
    return RecipeError(
        "source.model: it is a model of timm, which is not installed", "pip install 'hftl[timm]'"
    )


def read_data_config(config: Any) -> dict[str, Any]:
    """Return timm's own settings of preprocessing: input_size, mean, std, interpolation, crop."""
    timm = import_timm()
    _check_name(timm, config.architecture)
    own = getattr(config, "pretrained_cfg", None)
    own = own or timm.get_pretrained_cfg(config.architecture).to_dict()
    with _refuse_settings(config.architecture):
        return timm.data.resolve_data_config(own, verbose=False)


def set_timm_image_size(config: Any, side: int) -> None:
    """Write the side of the images, in pixels, where transformers reads it for a timm model."""
    own = dict(getattr(config, "pretrained_cfg", None) or {})
    config.pretrained_cfg = own | {"input_size": [3, side, side]}


def draw_timm_weights(model: Any) -> None:
    """Draw all weights by timm's own initialisation; the wrapper's draws plain normal values."""
    config = model.config
    own = import_timm().create_model(
        config.architecture, num_classes=config.num_labels, **(config.model_args or {})
    )
    model.timm_model.load_state_dict(own.state_dict())


def _check_name(timm: Any, name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        raise RecipeError(
            f"source.model: timm {timm.__version__} has no architecture {name!r}"
            f"{suggest_closest(name, timm.list_models())}",
            "Correct its config.json, or upgrade timm",
        )


@contextmanager
def _refuse_settings(name: str) -> Iterator[None]:
    """Turn what timm and torch raise on settings that make no sense into a RecipeError."""
    try:
        yield
    except (
        TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError,
    ) as error:  # fmt: skip
        raise RecipeError(
            f"source.model: timm does not build {name!r} as its config.json says: "
            f"{format_error_line(error)}",
            "Correct model_args and pretrained_cfg there",
        ) from error


@lru_cache(maxsize=32)
def _describe(
    wrapped: str, name: str, model_args: str, input_size: tuple[int, ...]
) -> ArchitectureSpec:
    arguments: Mapping[str, Any] = json.loads(model_args)
    with _refuse_settings(name), torch.device("meta"):
        model: Any = import_timm().create_model(name, num_classes=2, **arguments).eval()
    paths = {module: path for path, module in model.named_modules()}
    classifier = _get_classifier(model, name)
    with _refuse_settings(name):
        calls = _run_on_meta(model, input_size)
    blocks = _order_blocks(model, name, calls)
    targets, skipped = _sort_layers(model, blocks, set(calls))
    head = paths[classifier]
    before = calls[calls.index(head) - 1]
    is_dropout = isinstance(model.get_submodule(before), nn.Dropout)
    last = calls.index(blocks[-1])
    return ArchitectureSpec(
        wrapped, blocks, (), "image", optional_targets=targets, skipped_layers=skipped,
        final_parts=tuple(
            path
            for path in calls[last + 1 :]
            if _owns(model, path) and not blocks[-1].startswith(f"{path}.")
        ),
        head=HeadSpec(
            (f"{wrapped}.{head}",), f"{wrapped}.{head}",
            f"{wrapped}.{before}" if is_dropout else None,
        ),
        token_head=None, blocks_are_listed=True, initialize=draw_timm_weights,
    )  # fmt: skip


def _get_classifier(model: Any, name: str) -> nn.Module:
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) and not _is_pooled_convolution(model):
        raise RecipeError(
            f"source.model: the classifier of timm's {name!r} is a {type(classifier).__name__}, "
            "expected one linear layer",
            TIMM_FIX,
        )
    return classifier


def _is_pooled_convolution(model: Any) -> bool:
    """Return whether the classifier is a 1x1 convolution of the pooled image, as of ResNetV2."""
    head: Any = getattr(model, "head", None)
    return (
        isinstance(head, import_timm().layers.ClassifierHead)
        and isinstance(head.fc, nn.Conv2d)
        and head.fc.kernel_size == (1, 1)
    )


def flatten_classifier(model: Any) -> None:
    """Replace a classifier that convolves the pooled image by the linear layer that it equals.

    Its parameters are then those of any other head; in state dicts, and so in files, they keep the
    shapes that timm loads.
    """
    timm_model = getattr(model, "timm_model", None)
    if timm_model is None or not _is_pooled_convolution(timm_model):
        return
    head = timm_model.head
    linear = nn.Linear(head.fc.in_channels, head.fc.out_channels)
    linear.weight, linear.bias = nn.Parameter(head.fc.weight.detach().flatten(1)), head.fc.bias
    linear.register_state_dict_post_hook(_write_as_convolution)
    linear.register_load_state_dict_pre_hook(_read_as_linear)
    head.global_pool.flatten, head.fc = nn.Flatten(1), linear.train(head.fc.training)


def _write_as_convolution(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    del module, metadata
    state[f"{prefix}weight"] = state[f"{prefix}weight"][..., None, None]


def _read_as_linear(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    del module
    if f"{prefix}weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].flatten(1)


def _run_on_meta(model: Any, input_size: tuple[int, ...]) -> list[str]:
    """Run a model without weights on one image without pixels; return modules as they ended."""
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
        for path, module in model.named_modules()
        if path
    ]
    with torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    for handle in handles:
        handle.remove()
    return calls


def _order_blocks(model: Any, name: str, calls: list[str]) -> tuple[str, ...]:
    """Return the paths of the blocks in the order in which they run.

    timm's patterns match parameters, the first pattern counts, and one that captures numbers
    matches a block.
    """
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else None
    rules: list[tuple[re.Pattern[str], bool]] = []
    for group, patterns in matcher.items() if isinstance(matcher, dict) else ():
        listed = [(patterns, None)] if isinstance(patterns, str) else patterns
        for pattern, ordinal in listed:
            regex = re.compile(pattern)
            is_block = ordinal is None and regex.groups > 0 and not group.startswith("stem")
            rules.append((regex, is_block))
    blocks = {path for path in calls if _is_block(path, rules) and _owns(model, path)}
    ordered = tuple(path for path in dict.fromkeys(calls) if path in blocks)
    single = [path for path in ordered if isinstance(model.get_submodule(path), WEIGHT_LAYERS)]
    if not ordered or single:
        what = "whose blocks are single layers" if single else "whose blocks timm does not name"
        raise RecipeError(f"source.model: {name!r} is a model {what}", TIMM_FIX)
    return ordered


def _is_block(path: str, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    for regex, is_block in rules:
        if regex.match(path):
            return is_block and regex.fullmatch(path) is not None
    return False


def _owns(model: Any, path: str) -> bool:
    """Return whether a module holds parameters."""
    return any(True for _ in model.get_submodule(path).parameters())


def _sort_layers(
    model: Any, blocks: tuple[str, ...], called: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths in blocks of the layers that LoRA wraps, and of those that it cannot.

    The latter are convolutions of groups of channels, and layers whose weights their owner reads
    without calling them (EVA's qkv), so that an adapter would not be read.
    """
    targets: set[str] = set()
    skipped: set[str] = set()
    for block in blocks:
        for inside, module in model.get_submodule(block).named_modules():
            if isinstance(module, WEIGHT_LAYERS):
                is_target = getattr(module, "groups", 1) == 1 and f"{block}.{inside}" in called
                (targets if is_target else skipped).add(inside)
    return tuple(sorted(targets - skipped)), tuple(sorted(skipped))
