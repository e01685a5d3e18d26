"""The anatomy of an architecture without an entry, from its own modules, where it verifies.

The stock class is built without weights and run once, forward and backward, on tensors that have
a shape and no values. The order of the calls tells what stands before and after the blocks; the
gradients that stay away tell what no output depends on.
"""

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import pytorch_utils

from hftl.errors import RecipeError, format_error_line
from hftl.models.parts import (
    TOKEN_CLASSIFICATION,
    ArchitectureSpec,
    HeadSpec,
    build_on_meta,
    count_layers,
    get_encoder_class,
    get_encoder_config,
    get_task_class,
    has_prefix,
    list_block_paths,
    list_linear_layers,
)

LABELS = 7
"""Outputs of the probed head; no width of an encoder."""
LENGTH = 8
CANNOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)
"""What a foreign architecture raises on tensors without values."""


def derived(config: Any) -> ArchitectureSpec:
    """What the modules show, every part of it verified.

    Raises:
        RecipeError: naming what could not be verified.
    """
    return _derived(type(config), config.to_json_string(use_diff=False))


@contextmanager
def _uncached() -> Iterator[None]:
    """Let no module keep a table without values for its class's later models, as BEiT's would."""
    module: Any = pytorch_utils
    asked = module.is_torchdynamo_compiling
    module.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        module.is_torchdynamo_compiling = asked


@lru_cache
def _derived(kind: Any, told: str) -> ArchitectureSpec:
    config = kind.from_dict(json.loads(told))
    _need_encoder(config)
    config.num_labels = LABELS
    seen = Trace(config, "classification")
    text = seen.model.main_input_name == "input_ids"
    bare = get_encoder_class(config)
    takes = inspect.signature(bare.__init__).parameters
    poolers = [getattr(seen.encoder, "pooler", None)]
    if text:
        poolers.append(getattr(build_on_meta(bare, config), "pooler", None))
    found = ArchitectureSpec(
        encoder=seen.encoder_name,
        blocks=seen.blocks,
        lora_targets=seen.linears(),
        modality="text" if text else "image",
        embeddings=seen.embeddings(),
        pooler="pooler" if any(p is not None and list(p.parameters()) for p in poolers) else None,
        final_parts=tuple(name for name in seen.after_blocks() if name != "pooler"),
        unused_parts=seen.unused(),
        **seen.head()._asdict(),
        tokens=None,
        add_pooling_layer=text and "add_pooling_layer" in takes,
        interpolate_pos_encoding="interpolate_pos_encoding"
        in inspect.signature(seen.encoder.forward).parameters,
        has_padding_offset=text and _positions_after_padding(config, seen.encoder),
    )
    tokens = _tokens(config, found) if text else None
    return ArchitectureSpec(**{**vars(found), "tokens": tokens})


def _refuse(config: Any, why: str) -> NoReturn:
    raise RecipeError(
        f"source.model: the architecture {config.model_type!r} is not supported: {why}",
        "Add its entry to hftl/models/architectures.py",
    )


def _need_encoder(config: Any) -> None:
    """Refuses what no classification class reads both ways."""
    from transformers.models.auto import modeling_auto as auto

    if get_task_class(config, "classification") is None:
        _refuse(config, "transformers has no sequence or image classification class for it")
    reads_on = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    reads_both = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.model_type in reads_on and config.model_type not in reads_both:
        _refuse(config, "it is a decoder, which reads one way only")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        _refuse(config, "its config makes it a decoder")


def _tokens(config: Any, found: ArchitectureSpec) -> HeadSpec | None:
    """The token class's head; its encoder must use what the other class uses, the pooler aside."""
    if get_task_class(config, TOKEN_CLASSIFICATION) is None:
        return None
    seen = Trace(config, TOKEN_CLASSIFICATION)
    aside = (*found.unused_parts, *([found.pooler] if found.pooler else []))
    names = [name for name, _ in seen.encoder.named_parameters()]
    if {name for name in names if has_prefix(name, aside)} != seen.idle:
        _refuse(config, "its token classification class uses other parts of the encoder")
    return seen.head()


def _positions_after_padding(config: Any, encoder: nn.Module) -> bool:
    """RoBERTa's positions skip the padding id, which their table then knows."""
    if getattr(config, "max_position_embeddings", None) is None:
        _refuse(config, "its config has no max_position_embeddings")
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in encoder.named_modules()
    )


class Trace:
    """One forward and backward pass of a stock class without weights.

    Raises:
        RecipeError: if it does not run, or its blocks cannot be told.
    """

    def __init__(self, config: Any, task: str) -> None:
        from transformers import PreTrainedModel

        self.config = config
        try:
            self.model = build_on_meta(get_task_class(config, task), config)
        except CANNOT_RUN as error:
            _refuse(config, f"it cannot be built: {format_error_line(error)}")
        inside = [n for n, m in self.model.named_children() if isinstance(m, PreTrainedModel)]
        if len(inside) != 1:
            _refuse(config, f"its classification class holds {len(inside)} encoders, expected one")
        self.encoder_name = inside[0]
        self.encoder: Any = self.model.get_submodule(inside[0])
        self.blocks = self._find_blocks()
        self.paths = list_block_paths(self.encoder, self.blocks)
        self.calls = self._run()
        gone = {n for n, p in self.model.named_parameters() if p.grad is None}
        self.idle = {n.removeprefix(f"{inside[0]}.") for n in gone if n.startswith(f"{inside[0]}.")}
        if len(gone) > len(self.idle):
            _refuse(config, f"the output does not depend on {sorted(gone)[0]} of the head")

    def _find_blocks(self) -> str:
        """The list, or the lists of one pattern, that hold as many blocks as the config tells."""
        lists: dict[str, int] = {}
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.ModuleList) and all(map(list_linear_layers, module)):
                pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
                lists[pattern] = lists.get(pattern, 0) + len(module)
        wanted = count_layers(self.config)
        fitting = [pattern for pattern, count in lists.items() if count == wanted]
        if len(fitting) != 1:
            _refuse(
                self.config, f"{len(fitting)} lists of modules hold {wanted} blocks, expected one"
            )
        return fitting[0]

    def _run(self) -> list[str]:
        """The order in which modules with weights, dropouts and blocks are done."""
        calls: list[str] = []
        whole = {f"{self.encoder_name}.{path}" for path in self.paths}
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            if own or isinstance(module, nn.Dropout) or name in whole:
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        try:
            with _uncached(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
                self.model(**self._inputs()).logits.sum().backward()
        except CANNOT_RUN as error:
            _refuse(self.config, f"it does not run without weights: {format_error_line(error)}")
        return calls

    def _inputs(self) -> dict[str, torch.Tensor]:
        name = self.model.main_input_name
        if name == "input_ids":
            ones = torch.ones(1, LENGTH, dtype=torch.long)
            return {name: ones, "attention_mask": ones}
        if name != "pixel_values":
            _refuse(self.config, f"it reads {name}, neither text nor images")
        inner = get_encoder_config(self.config)
        size = getattr(inner, "image_size", 224)
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.ones(1, getattr(inner, "num_channels", 3), *sides)}

    def linears(self) -> tuple[str, ...]:
        """The linear layers of a block, the same for all, and all of its matrices on the way."""
        found = [list_linear_layers(self.encoder.get_submodule(path)) for path in self.paths]
        if any(linears != found[0] for linears in found):
            _refuse(self.config, "its blocks are not alike")
        for path in self.paths:
            for name, module in self.encoder.get_submodule(path).named_modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    _refuse(self.config, f"its blocks hold a convolution, {name}")
        if any(has_prefix(name, tuple(self.paths)) for name in self.idle):
            _refuse(self.config, "the output does not depend on all of a block")
        order = [call.removeprefix(f"{self.encoder_name}.{self.paths[0]}.") for call in self.calls]
        targets = tuple(sorted(found[0], key=order.index))
        for name, module in self.encoder.named_modules():
            outside = not has_prefix(name, tuple(self.paths)) and f"{name}.weight" not in self.idle
            if outside and isinstance(module, nn.Linear) and name.endswith(targets):
                _refuse(self.config, f"{name} outside the blocks is named like a layer of theirs")
        return targets

    def embeddings(self) -> str:
        """The encoder's part that runs first; it embeds tokens or patches."""
        first = self.calls[0].removeprefix(f"{self.encoder_name}.").split(".")[0]
        kinds = (nn.Embedding, nn.Conv2d)
        if not any(isinstance(m, kinds) for m in self.encoder.get_submodule(first).modules()):
            _refuse(self.config, f"{first} runs first and is no embedding")
        return first

    def after_blocks(self) -> list[str]:
        """The encoder's parts with weights that run after the last block; blocks run in order."""
        blocks = [f"{self.encoder_name}.{path}" for path in self.paths]
        if [call for call in self.calls if call in blocks] != blocks:
            _refuse(self.config, "its blocks do not run once each, in their order")
        after = self.calls[self.calls.index(blocks[-1]) + 1 :]
        stem = self.blocks.split(".")[0]
        found: list[str] = []
        for call in after:
            name = call.removeprefix(f"{self.encoder_name}.")
            if name == call or isinstance(self.model.get_submodule(call), nn.Dropout):
                continue
            part = name if name.split(".")[0] == stem else name.split(".")[0]
            if part not in found and not self._idle(part):
                found.append(part)
        return found

    def unused(self) -> tuple[str, ...]:
        """The largest parts of the encoder that no output depends on."""
        found: list[str] = []
        for name in sorted(self.idle):
            steps = name.split(".")
            paths = [".".join(steps[: i + 1]) for i in range(len(steps))]
            part = next(path for path in paths if self._idle(path))
            if part not in found:
                found.append(part)
        return tuple(found)

    def head(self) -> HeadSpec:
        """The modules with weights beside the encoder, their last linear layer and its dropout."""
        parts = [
            name
            for name, module in self.model.named_children()
            if name != self.encoder_name and list(module.parameters())
        ]
        last = self.calls[-1]
        layer = self.model.get_submodule(last)
        if not has_prefix(last, tuple(parts)) or not isinstance(layer, nn.Linear):
            _refuse(self.config, f"{last} runs last and is no linear layer of a head")
        if layer.out_features != LABELS:
            _refuse(self.config, f"{last}, which runs last, does not give the labels")
        before = self.calls[-2]
        dropout = isinstance(self.model.get_submodule(before), nn.Dropout)
        outside = not has_prefix(before, (self.encoder_name,))
        return HeadSpec(tuple(parts), last, before if dropout and outside else None)

    def _idle(self, path: str) -> bool:
        names = [name for name, _ in self.encoder.named_parameters() if has_prefix(name, (path,))]
        return bool(names) and self.idle.issuperset(names)
