"""Describe any architecture of timm by what timm and one run without weights say of it.

transformers holds every timm model in one wrapper. Which modules are its blocks follows from the
patterns of timm's `group_matcher`; their order, the layers that run as layers, and what comes after
the last block follow from a forward pass on torch's meta device.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hftl.errors import RecipeError, suggest_closest
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


@dataclass
class _Trace:
    """Hold the order in which modules ended, and the shape of what the classifier read."""

    calls: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()


@lru_cache(maxsize=32)
def _describe(
    wrapped: str, name: str, model_args: str, input_size: tuple[int, ...]
) -> ArchitectureSpec:
    arguments: Mapping[str, Any] = json.loads(model_args)
    with torch.device("meta"):
        model: Any = import_timm().create_model(name, num_classes=2, **arguments).eval()
    paths = {module: path for path, module in model.named_modules()}
    classifier = _get_classifier(model, name)
    trace = _run_on_meta(model, classifier, input_size)
    blocks = _order_blocks(model, name, trace)
    targets, skipped = _sort_layers(model, blocks, set(trace.calls))
    head = paths[classifier]
    before = trace.calls[trace.calls.index(head) - 1]
    is_dropout = isinstance(model.get_submodule(before), nn.Dropout)
    last = trace.calls.index(blocks[-1])
    return ArchitectureSpec(
        wrapped, blocks, (), "image", optional_targets=targets, skipped_layers=skipped,
        final_parts=tuple(
            path
            for path in trace.calls[last + 1 :]
            if _owns(model, path) and not blocks[-1].startswith(f"{path}.")
        ),
        head=HeadSpec(
            (f"{wrapped}.{head}",), f"{wrapped}.{head}",
            f"{wrapped}.{before}" if is_dropout else None,
        ),
        token_head=None, blocks_are_listed=True, initialize=draw_timm_weights,
    )  # fmt: skip


def _get_classifier(model: Any, name: str) -> nn.Linear:
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise RecipeError(
            f"source.model: the classifier of timm's {name!r} is a {type(classifier).__name__}, "
            "expected one linear layer",
            TIMM_FIX,
        )
    return classifier


def _run_on_meta(model: Any, classifier: nn.Module, input_size: tuple[int, ...]) -> _Trace:
    """Run a model without weights on one image without pixels, and record its calls."""
    trace = _Trace()

    def record(path: str, inputs: tuple[Tensor, ...], is_head: bool) -> None:
        trace.calls.append(path)
        if is_head:
            trace.shape = tuple(inputs[0].shape)

    handles = [
        module.register_forward_hook(
            lambda m, inputs, _, path=path: record(path, inputs, m is classifier)
        )
        for path, module in model.named_modules()
        if path
    ]
    with torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    for handle in handles:
        handle.remove()
    return trace


def _order_blocks(model: Any, name: str, trace: _Trace) -> tuple[str, ...]:
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
    blocks = {path for path in trace.calls if _is_block(path, rules) and _owns(model, path)}
    ordered = tuple(path for path in dict.fromkeys(trace.calls) if path in blocks)
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
