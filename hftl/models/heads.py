"""The trainable model: the stock task class, or an encoder, a pooling and one linear layer.

The stock class is `AutoModelFor<Task>`'s: of sequences, of tokens, or of images.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hftl.errors import RecipeError
from hftl.models.architectures import get_architecture
from hftl.models.padding import hide_padding
from hftl.models.parts import (
    TOKEN_CLASSIFICATION,
    ArchitectureSpec,
    get_blocks,
    get_encoder_class,
    get_encoder_config,
    get_stock_encoder,
    get_task_class,
    has_prefix,
)
from hftl.models.source import SourceModel, describe_load_error

HEAD_STD = 0.02
"""Of the last layer's initial weights, where the architecture's config names none (SigLIP)."""


def pool_tokens(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector a row.

    Args:
        hidden: (batch, length, width).
        mask: (batch, length), 1 where a token counts.
        pooling: `mean` over the tokens that count, or `cls`, the first token.

    Returns:
        (batch, width).
    """
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class PooledModel(nn.Module):
    """An encoder, `mean` or `cls` pooling, and one linear head."""

    def __init__(self, encoder: nn.Module, pooling: str, width: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.head = nn.Linear(width, outputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (batch, outputs) of (batch, length) ids; the loss is the trainer's business."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        hidden = self.encoder(input_ids=input_ids, **given).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = pool_tokens(hidden, mask, self.pooling)
        return SequenceClassifierOutput(logits=self.head(pooled))  # pyright: ignore


@dataclass(frozen=True)
class LoadedModel:
    """A model with what the loader found missing.

    `fresh` are the modules, by path, whose weights the checkpoint does not have.
    """

    model: nn.Module
    architecture: ArchitectureSpec
    pooling: str
    fresh: tuple[str, ...]

    @property
    def encoder(self) -> nn.Module:
        """The encoder, wrapped for LoRA or not."""
        return get_encoder(self.model, self.architecture)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer the probe stands for."""
        return get_last_linear(self.model, self.architecture)

    @property
    def features_are_shared(self) -> bool:
        """Whether the last layer's input is the same for every seed before training."""
        return all(self.architecture.last_linear == name for name in self.fresh)


def unwrap_adapter(model: nn.Module) -> nn.Module:
    """The model under a peft adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def get_encoder(model: nn.Module, anatomy: ArchitectureSpec) -> nn.Module:
    """The encoder of a `PooledModel`, a stock task class or an adapter over either."""
    if isinstance(model, PooledModel):
        return unwrap_adapter(model.encoder)
    return get_stock_encoder(unwrap_adapter(model), anatomy)


def get_last_linear(model: nn.Module, anatomy: ArchitectureSpec) -> nn.Linear:
    """The head's last layer; under an adapter, the copy that trains."""
    return get_last_linear_copies(model, anatomy)[-1]


def get_last_linear_copies(model: nn.Module, anatomy: ArchitectureSpec) -> list[nn.Linear]:
    """Return the copies of the head's last layer: under an adapter the original, then the one that
    trains; else the layer alone."""
    if isinstance(model, PooledModel):
        return [model.head]
    copies: list[Any] = [unwrap_adapter(model)]
    for name in anatomy.last_linear.split("."):
        copies = [getattr(copy, name) for copy in copies]
        if isinstance(copies[-1], ModulesToSaveWrapper):
            (wrapper,) = copies
            trained = wrapper.modules_to_save[wrapper.active_adapters[0]]
            copies = [wrapper.original_module, trained]
    return copies


def get_model_architecture(model: nn.Module) -> ArchitectureSpec:
    """The anatomy of a `PooledModel`, a stock task class or an adapter over either.

    Raises:
        RecipeError: if the architecture is not supported, or the class is none of those.
    """
    found = unwrap_adapter(model.encoder if isinstance(model, PooledModel) else model)
    config = getattr(found, "config", None)
    if config is not None:
        if isinstance(model, PooledModel):
            return get_architecture(config)
        for task in ("classification", TOKEN_CLASSIFICATION):
            stock = get_task_class(config, task)
            if stock is not None and isinstance(found, stock):
                return get_architecture(config).for_task(task)
    raise RecipeError(
        f"{type(found).__name__} is no sequence, token or image classification model of "
        "transformers",
        "Load it with one of AutoModelFor{Sequence,Token,Image}Classification",
    )


def list_unused_parts(model: nn.Module, anatomy: ArchitectureSpec) -> tuple[str, ...]:
    """The parts of the encoder that none of this model's outputs depends on."""
    beside = (anatomy.pooler,) if isinstance(model, PooledModel) and anatomy.pooler else ()
    return (*anatomy.unused_parts, *beside)


def build_model(
    source: SourceModel, task: str, pooling: str, outputs: int, names: Sequence[str], seed: int,
    scratch: bool = False,
) -> LoadedModel:  # fmt: skip
    """Loads the source with a new head; its last layer is drawn from `seed`.

    Args:
        source: the checkpoint.
        task: the recipe's `data.task`.
        pooling: native (the stock class), mean or cls.
        outputs: classes, or 1 for regression.
        names: the classes' names, empty for regression.
        seed: of every weight the checkpoint lacks.
        scratch: draw all weights anew, from the architecture's own initialisation.

    Raises:
        RecipeError: if the checkpoint lacks weights of the encoder itself, or the architecture
            has no class for the task and pooling.
    """
    anatomy = source.architecture_spec.for_task(task)
    kind = _get_model_class(source, anatomy, task, pooling)
    config = deepcopy(source.config)
    extra = {}
    if pooling == "native":
        config.update(build_label_settings(names, outputs, task))
    elif anatomy.add_pooling_layer:
        extra = {"add_pooling_layer": False}
    torch.manual_seed(seed)
    if scratch:
        model, missing = kind(config, **extra), set()
        hide_padding(model)
    else:
        model, missing = load_class(source, kind, config, extra)
    if pooling != "native":
        model = PooledModel(model, pooling, source.config.hidden_size, outputs)
    fresh = _list_fresh_modules(missing, source, anatomy, list_unused_parts(model, anatomy))
    built = LoadedModel(model, anatomy, pooling, fresh)
    get_blocks(built.encoder, anatomy)
    std = getattr(get_encoder_config(source.config), "initializer_range", HEAD_STD)
    nn.init.normal_(built.last_linear.weight, std=std)
    nn.init.zeros_(built.last_linear.bias)
    return built


def build_label_settings(names: Sequence[str], outputs: int, task: str) -> dict[str, Any]:
    """The config entries that say what the outputs mean."""
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
    source: SourceModel, anatomy: ArchitectureSpec, task: str, pooling: str
) -> Any:
    if pooling == "native":
        return get_task_class(source.config, task)
    if anatomy.modality == "image" or task == TOKEN_CLASSIFICATION:
        what = "images" if anatomy.modality == "image" else task
        raise RecipeError(
            f"finetune.pooling={pooling} is for texts of one label, not for {what}",
            "Use finetune.pooling=native",
        )
    return get_encoder_class(source.config)


def load_class(
    source: SourceModel, kind: Any, config: Any, extra: dict[str, Any]
) -> tuple[Any, set[str]]:
    """A class of transformers from the checkpoint, in fp32, and the names of what it lacks.

    Args:
        source: the checkpoint.
        kind: the class.
        config: which may say another number of labels than the checkpoint's.
        extra: further arguments of the class.

    Raises:
        RecipeError: if the checkpoint does not load.
    """
    try:
        model, info = kind.from_pretrained(
            source.folder,
            config=config,
            **extra,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, EOFError, UnpicklingError) as error:
        raise RecipeError(
            f"source.model: {source.name} does not load: {describe_load_error(error)}",
            "Give a complete checkpoint of a supported architecture, in safetensors",
        ) from error
    hide_padding(model)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def _list_fresh_modules(
    missing: set[str], source: SourceModel, anatomy: ArchitectureSpec, unused: tuple[str, ...]
) -> tuple[str, ...]:
    """The modules that missing keys belong to, all of the head or the pooler."""
    found: set[str] = set()
    for key in missing:
        inside = key.removeprefix(f"{anatomy.encoder}.")
        if has_prefix(inside, unused):
            continue
        of_head = has_prefix(key, anatomy.head_parts)
        of_pooler = anatomy.pooler is not None and has_prefix(inside, (anatomy.pooler,))
        if not of_head and not of_pooler:
            raise RecipeError(
                f"source.model: {source.name} lacks the weights of {key.rsplit('.', 1)[0]}",
                "Give a complete checkpoint of this architecture",
            )
        found.add(key.rsplit(".", 1)[0])
    return tuple(sorted(found))
