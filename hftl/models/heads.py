"""Build the trainable model: the stock task class, or an encoder, a pooling and a linear layer.

The stock class is the one that `AutoModelFor{Sequence,Token,Image}Classification` builds.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn

from hftl.errors import RecipeError, is_out_of_memory
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION, ArchitectureSpec
from hftl.models.architectures import get_encoder_config, get_hidden_size
from hftl.models.config_limits import find_size_fault, may_be_oversized
from hftl.models.encoders import (
    build_on_meta,
    get_blocks,
    get_encoder_class,
    get_task_class,
    has_prefix,
    hide_padding,
)
from hftl.models.model_parts import (
    get_encoder,
    get_last_linear,
    get_last_linear_copies,
    get_model_spec,
    list_unused_parts,
)
from hftl.models.pooled_model import PooledImageModel, PooledModel
from hftl.models.pooling import pool_before_head
from hftl.models.quantization import build_quantization_config
from hftl.models.source import LOADING_ERRORS, SourceModel, describe_load_error
from hftl.models.timm_architecture import flatten_classifier
from hftl.models.weight_files import read_tensor_shapes
from hftl.runtime.hardware import get_device

CONSTANT_TARGET_SPREAD = 1e-3
"""The spread of targets that do not vary, as a share of their size: outputs stay near them."""
HEAD_STD = 0.02
"""Standard deviation of the last layer's initial weights, where the config has none (SigLIP)."""


@dataclass(frozen=True)
class LoadedModel:
    """Hold a model and the paths of the modules whose weights its checkpoint lacks (`fresh`)."""

    model: nn.Module
    architecture: ArchitectureSpec
    pooling: str
    fresh: tuple[str, ...]

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder, wrapped for LoRA or not."""
        return get_encoder(self.model, self.architecture)

    @property
    def last_linear(self) -> nn.Linear:
        """Return the layer that the probe initialises."""
        return get_last_linear(self.model, self.architecture)

    @property
    def has_head_bias(self) -> bool:
        """Return whether the last layer has a bias."""
        return self.last_linear.bias is not None

    @property
    def features_are_shared(self) -> bool:
        """Return whether the last layer's input is the same for every seed before training."""
        return all(self.architecture.head.last_linear == name for name in self.fresh)


def has_head_bias(source: SourceModel, task: str, pooling: str) -> bool:
    """Return whether the last layer has a bias: hftl's own has one, and most stock classes'."""
    return pooling != "native" or source.architecture_spec.for_task(task).head.has_bias


def build_model(
    source: SourceModel, task: str, pooling: str, outputs: int, names: Sequence[str], seed: int,
    scratch: bool = False,
) -> LoadedModel:  # fmt: skip
    """Load the source with a new head, whose last layer is drawn from `seed`.

    Args:
        source: the checkpoint.
        task: the recipe's `data.task`.
        pooling: native (the stock class), mean, cls, cls+mean or last.
        outputs: classes, or 1 for regression.
        names: the classes' names, empty for regression.
        seed: of every weight that the checkpoint lacks.
        scratch: draw all weights, by the architecture's own initialisation.

    Raises:
        RecipeError: if the checkpoint lacks weights of the encoder itself, or the architecture
            has no class for the task and pooling.
    """
    architecture = source.architecture_spec.for_task(task)
    kind = _get_model_class(source, architecture, task, pooling)
    config = deepcopy(source.config)
    extra: dict[str, Any] = {}
    if pooling == "native":
        config.update(build_label_settings(names, outputs, task))
    elif architecture.add_pooling_layer:
        extra = {"add_pooling_layer": False}
    torch.manual_seed(seed)
    if scratch:
        model, missing = kind(config, **extra), set()
        if architecture.initialize is not None:
            architecture.initialize(model)
        _adapt_forward(model)
    else:
        extra |= build_quantization_arguments(source, architecture)
        model, missing = load_class(source, kind, config, extra)
    if pooling != "native":
        model = _add_head(model, source, pooling, outputs)
        if source.quantization is not None:
            model.to(get_device())
    fresh = _list_fresh_modules(
        missing, source, architecture, list_unused_parts(model, architecture)
    )
    built = LoadedModel(model, architecture, pooling, fresh)
    get_blocks(built.encoder, architecture)
    std = getattr(get_encoder_config(source.config), "initializer_range", HEAD_STD)
    nn.init.normal_(built.last_linear.weight, std=std)
    if built.has_head_bias:
        nn.init.zeros_(built.last_linear.bias)
    return built


def _add_head(encoder: nn.Module, source: SourceModel, pooling: str, outputs: int) -> PooledModel:
    """Return the encoder under hftl's own pooling and head."""
    spec, width = source.architecture_spec, get_hidden_size(source.config)
    if spec.prefix_tokens:
        return PooledImageModel(encoder, pooling, width, outputs, spec.prefix_tokens)
    return PooledModel(encoder, pooling, width, outputs)


class LabelSettings(TypedDict, total=False):
    """Hold the entries of a config that name a model's outputs."""

    num_labels: int
    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None


def build_label_settings(names: Sequence[str], outputs: int, task: str) -> LabelSettings:
    """Return the config entries that name the outputs."""
    if not names:
        return {"num_labels": outputs, "problem_type": "regression"}
    kinds = {
        "classification": "single_label_classification",
        "multi-label": "multi_label_classification",
        TOKEN_CLASSIFICATION: None,
    }
    return {
        "num_labels": outputs,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": kinds[task],
    }


def _get_model_class(
    source: SourceModel, architecture: ArchitectureSpec, task: str, pooling: str
) -> Any:
    if architecture.reads_prompt != (pooling == "last"):
        raise _build_last_token_error(source, architecture, pooling)
    if pooling == "native":
        return _get_stock_class(source, architecture, task)
    if task == TOKEN_CLASSIFICATION:
        raise RecipeError(
            f"finetune.pooling={pooling} is for texts of one label, not for {task}",
            "Use finetune.pooling=native",
        )
    if architecture.modality == "image" and not architecture.reads_prompt:
        _check_image_pooling(source, architecture, pooling)
    elif pooling == "cls+mean":
        raise RecipeError(
            "finetune.pooling=cls+mean is for pictures, and source.model reads text",
            "Use mean, cls or native",
        )
    if architecture.is_causal and pooling == "cls":
        raise RecipeError(
            f"finetune.pooling=cls reads the first token, and in {source.architecture} that sees "
            "no other token of the text",
            "Use finetune.pooling=native, which reads the last token, or mean",
        )
    return get_encoder_class(source.config)


def _get_stock_class(source: SourceModel, architecture: ArchitectureSpec, task: str) -> Any:
    kind = get_task_class(source.config, task)
    if kind is None:
        raise RecipeError(
            f"finetune.pooling=native: transformers has no classification class for "
            f"{source.architecture}, and hftl's own head reads pooled tokens",
            "Set finetune.pooling=cls, mean or cls+mean",
        )
    if task == "regression" and not architecture.head.has_bias:
        raise RecipeError(
            f"data.task=regression: the head of {source.architecture}'s classification class has "
            "no bias, which the mean of the targets needs",
            "Use finetune.pooling=mean",
        )
    return kind


def _check_image_pooling(source: SourceModel, architecture: ArchitectureSpec, pooling: str) -> None:
    """Refuse to pool tokens of an encoder without a class token, which its stock class pools."""
    if architecture.prefix_tokens:
        return
    raise RecipeError(
        f"finetune.pooling={pooling} is for encoders with a class token beside those of patches, "
        f"and the stock class alone pools {source.architecture}",
        "Use finetune.pooling=native",
    )


def _build_last_token_error(
    source: SourceModel, architecture: ArchitectureSpec, pooling: str
) -> RecipeError:
    if architecture.reads_prompt:
        return RecipeError(
            f"finetune.pooling={pooling}: transformers has no classification class for "
            f"{source.architecture}, and hftl's head reads the last token of a prompt",
            "Set finetune.pooling=last",
        )
    is_text = architecture.modality == "text"
    return RecipeError(
        f"finetune.pooling=last is for vision-language sources, and {source.name} "
        f"({source.architecture}) is none",
        "Use native, which reads the last token of a decoder, or mean"
        if is_text
        else "Use finetune.pooling=native",
    )


def get_source_pooling(source: SourceModel) -> str:
    """Return the pooling by which embeddings of a source are compared."""
    spec = source.architecture_spec
    if spec.reads_prompt:
        return "last"
    if spec.modality == "text":
        return "mean"
    return "cls" if get_task_class(source.config, "classification") is None else "native"


def build_quantization_arguments(
    source: SourceModel, architecture: ArchitectureSpec
) -> dict[str, Any]:
    """Return the arguments of `load_class` that hold frozen weights as the recipe says.

    Args:
        source: the checkpoint.
        architecture: of the class that is loaded.
    """
    if source.quantization is None:
        return {}
    settings = build_quantization_config(architecture)
    return {"quantization_config": settings, "device_map": {"": get_device()}}


def find_oversize(kind: Any, config: Any, folder: Path) -> str | None:
    """Return how a config makes a model far larger than the weights beside it; None where not.

    Such a model may not fit into memory, whatever reads the weights afterwards.

    Args:
        kind: the class, or a function that builds a model of a config.
        config: of the model.
        folder: of the weights.
    """
    shapes = read_tensor_shapes(folder)
    encoder = get_encoder_config(config)
    side, patch = getattr(encoder, "image_size", None), getattr(encoder, "patch_size", None)
    patches = 0
    if isinstance(side, int) and isinstance(patch, int) and patch > 0:
        patches = (side // patch) ** 2
    held = sum(map(math.prod, shapes.values()))
    if not shapes or not may_be_oversized(config.to_dict(), patches, held):
        return None
    return find_size_fault(build_on_meta(kind, config), shapes)


def load_class(
    source: SourceModel, kind: Any, config: Any, extra: Mapping[str, object]
) -> tuple[Any, set[str]]:
    """Load a class of transformers from the checkpoint, in fp32.

    Args:
        source: the checkpoint.
        kind: the class.
        config: the model's, which may have another number of labels than the checkpoint.
        extra: further arguments of the class.

    Returns:
        The model, and the names of the tensors that the checkpoint lacks.

    Raises:
        RecipeError: if the checkpoint does not load.
    """
    try:
        why = find_oversize(kind, config, source.folder)
        if why is not None:
            raise ValueError(why)
        model, info = kind.from_pretrained(
            source.folder,
            config=config,
            **extra,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise RecipeError(
            f"source.model: {source.name} does not load: {describe_load_error(error)}",
            "Give a complete checkpoint of a supported architecture, in safetensors",
        ) from error
    _adapt_forward(model)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def _adapt_forward(model: nn.Module) -> None:
    """Let every model run without padding, and end in a linear layer of one vector an output."""
    hide_padding(model)
    pool_before_head(model)
    flatten_classifier(model)


def _list_fresh_modules(
    missing: set[str], source: SourceModel, architecture: ArchitectureSpec, unused: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the modules that missing keys belong to, all in the head or the pooler.

    Raises:
        RecipeError: if weights of the encoder itself are missing.
    """
    modules: set[str] = set()
    for key in missing:
        inside = key.removeprefix(f"{architecture.encoder}.")
        if has_prefix(inside, unused):
            continue
        of_head = has_prefix(key, architecture.head.parts)
        of_pooler = architecture.pooler is not None and has_prefix(inside, (architecture.pooler,))
        if not of_head and not of_pooler:
            raise _build_missing_error(source, key)
        modules.add(key.rsplit(".", 1)[0])
    return tuple(sorted(modules))


def _build_missing_error(source: SourceModel, key: str) -> RecipeError:
    """Build the error for a tensor of the encoder that is missing, or has another shape."""
    module = key.rsplit(".", 1)[0]
    shapes = read_tensor_shapes(source.folder)
    # A file may name it with the path of the encoder before it, or without.
    known = (name for name in shapes if f".{name}".endswith(f".{key}") or key.endswith(f".{name}"))
    name = next(known, None)
    if name is None:
        return RecipeError(
            f"source.model: {source.name} lacks the weights of {module}",
            "Give a complete checkpoint of this architecture",
        )
    return RecipeError(
        f"source.model: {name} of {source.name} has the shape {shapes[name]}, and its config.json "
        "makes another one",
        "Give the config.json that the weights were saved with",
    )


@dataclass(frozen=True)
class TargetScale:
    """Hold mean and standard deviation of regression targets, which are standardized in training.

    A loss in the label's unit moves an optimizer by the size of the unit: the bias of prices would
    take as many steps as the prices are large.
    """

    mean: float
    sd: float

    @classmethod
    def measure(cls, targets: np.ndarray) -> "TargetScale":
        """Return the scale of targets, float64 in the label's unit."""
        mean, sd = float(targets.mean()), float(targets.std())
        return cls(mean, sd or abs(mean) * CONSTANT_TARGET_SPREAD or 1.0)

    def standardize(self, targets: np.ndarray) -> np.ndarray:
        """Return targets, float64 in the label's unit, in standard deviations from the mean."""
        return (targets - self.mean) / self.sd

    def restore(self, outputs: np.ndarray) -> np.ndarray:
        """Return standardized outputs in the label's unit, float64."""
        return outputs.astype(np.float64) * self.sd + self.mean

    def standardize_head(self, model: nn.Module) -> None:
        """Fold the scale out of the head, so that the model returns standardized outputs."""
        self._rescale_head(model, 1 / self.sd, -self.mean / self.sd)

    def restore_head(self, model: nn.Module) -> None:
        """Fold the scale into the head, so that the model returns outputs in the label's unit."""
        self._rescale_head(model, self.sd, self.mean)

    def _rescale_head(self, model: nn.Module, factor: float, shift: float) -> None:
        with torch.no_grad():
            # The head under an adapter is the original's, and has the same unit.
            for layer in get_last_linear_copies(model, get_model_spec(model)):
                weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
                layer.weight.copy_(weight * factor)
                layer.bias.copy_(bias * factor + shift)


def get_placeholder_name(architecture: ArchitectureSpec) -> str:
    """Return the name of the empty tensor in a pooled model's file, the stock class's last weight.

    Its shape makes the stock task class refuse the file.
    """
    return f"{architecture.head.last_linear}.weight"
