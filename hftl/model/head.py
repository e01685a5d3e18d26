"""The trainable model: the stock task class, or an encoder, a pooling and one linear layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hftl.errors import RecipeError
from hftl.model.anatomy import Anatomy, blocks_of, encoder_of
from hftl.model.source import SourceModel


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
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
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (batch, outputs) of (batch, length) ids; the loss is the trainer's business."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)
        hidden = encoded.last_hidden_state
        pooled = pool(hidden, attention_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.head(pooled))  # pyright: ignore


@dataclass(frozen=True)
class Built:
    """A model with what the loader found missing.

    `fresh` are the modules, by path, whose weights the checkpoint does not have.
    """

    model: nn.Module
    anatomy: Anatomy
    pooling: str
    fresh: tuple[str, ...]

    @property
    def encoder(self) -> nn.Module:
        """The encoder, wrapped for LoRA or not."""
        return encoder_in(self.model, self.anatomy)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer the probe stands for."""
        return last_linear(self.model, self.anatomy)

    @property
    def frozen_is_shared(self) -> bool:
        """Whether the last layer's input is the same for every seed before training."""
        return all(self.anatomy.last_linear == name for name in self.fresh)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under a peft adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def encoder_in(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The encoder of a `PooledModel`, a stock task class or an adapter over either."""
    if isinstance(model, PooledModel):
        return unwrapped(model.encoder)
    return encoder_of(unwrapped(model), anatomy)


def last_linear(model: nn.Module, anatomy: Anatomy) -> nn.Linear:
    """The head's last layer; under an adapter, the copy that trains."""
    if isinstance(model, PooledModel):
        return model.head
    found: Any = unwrapped(model)
    for name in anatomy.last_linear.split("."):
        found = getattr(found, name)
        if isinstance(found, ModulesToSaveWrapper):
            found = found.modules_to_save[found.active_adapters[0]]
    return found


def build(
    source: SourceModel, pooling: str, outputs: int, names: Sequence[str], seed: int,
    scratch: bool = False,
) -> Built:  # fmt: skip
    """Loads the source with a new head; its last layer is drawn from `seed`.

    Args:
        source: the checkpoint.
        pooling: native (the stock class), mean or cls.
        outputs: classes, or 1 for regression.
        names: the classes' names, empty for regression.
        seed: of every weight the checkpoint lacks.
        scratch: draw all weights anew, from the architecture's own initialisation.

    Raises:
        RecipeError: if the checkpoint lacks weights of the encoder itself.
    """
    torch.manual_seed(seed)
    labels = label_settings(names, outputs)
    extra: dict[str, Any] = {}
    if pooling == "native":
        auto: Any = AutoModelForSequenceClassification
        extra = labels
    else:
        auto = AutoModel
        if source.anatomy.pooler:
            extra = {"add_pooling_layer": False}
    if scratch:
        encoder = auto.from_config(_config(source, pooling, labels), **_scratch_extra(extra))
        missing: set[str] = set()
    else:
        encoder, missing = _load(source, auto, extra)
    model = encoder
    if pooling != "native":
        model = PooledModel(encoder, pooling, source.config.hidden_size, outputs)
    fresh = _fresh_modules(missing, source)
    built = Built(model, source.anatomy, pooling, fresh)
    blocks_of(built.encoder, source.anatomy)
    nn.init.normal_(built.last_linear.weight, std=source.config.initializer_range)
    nn.init.zeros_(built.last_linear.bias)
    return built


def label_settings(names: Sequence[str], outputs: int) -> dict[str, Any]:
    """The config entries that say what the outputs mean."""
    if not names:
        return {"num_labels": outputs, "problem_type": "regression"}
    return {
        "num_labels": outputs,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _load(source: SourceModel, auto: Any, extra: dict[str, Any]) -> tuple[Any, set[str]]:
    try:
        model, info = auto.from_pretrained(
            source.folder,
            **extra,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"source.model: {source.spec} does not load: {str(error).splitlines()[0]}",
            "Give a complete checkpoint of a supported architecture",
        ) from error
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def _config(source: SourceModel, pooling: str, labels: dict[str, Any]) -> Any:
    config = type(source.config).from_dict(source.config.to_dict())
    if pooling == "native":
        config.update(labels)
    return config


def _scratch_extra(extra: dict[str, Any]) -> dict[str, Any]:
    """What `from_config` still takes; the labels stand in the config by then."""
    return {key: value for key, value in extra.items() if key == "add_pooling_layer"}


def _fresh_modules(missing: set[str], source: SourceModel) -> tuple[str, ...]:
    """The modules that missing keys belong to; the encoder's own blocks must not be among them."""
    modules = {key.rsplit(".", 1)[0] for key in missing}
    anatomy = source.anatomy
    for name in sorted(modules):
        inside = name.removeprefix(f"{anatomy.encoder}.")
        if inside.startswith((anatomy.embeddings, anatomy.blocks.split(".")[0])):
            raise RecipeError(
                f"source.model: {source.spec} lacks the weights of {name}",
                "Give a complete checkpoint of this architecture",
            )
    return tuple(sorted(modules))
