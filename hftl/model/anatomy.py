"""Where the parts of each architecture lie: one entry a family, checked against real modules.

Paths inside the encoder are relative to it, so they hold for `AutoModel` and for the stock task
class alike.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hftl.errors import RecipeError


@dataclass(frozen=True)
class Anatomy:
    """The named parts of one family.

    Args:
        encoder: the encoder's attribute in the stock classification class.
        embeddings: path of the embeddings in the encoder.
        blocks: path of the ordered list of blocks in the encoder.
        pooler: path of the pooler in the encoder, where there is one.
        head: modules of the stock class after the encoder, new for every task.
        last_linear: the head's last layer, which the probe stands for.
        head_dropout: the dropout directly before it.
        lora_targets: suffixes of every linear layer of a block, and of nothing else.
        positions_after_padding: positions count from the padding id on, so that fewer are left.
    """

    encoder: str
    embeddings: str
    blocks: str
    pooler: str | None
    head: tuple[str, ...]
    last_linear: str
    head_dropout: str
    lora_targets: tuple[str, ...]
    positions_after_padding: bool = False


BERT_LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip

ANATOMIES = {
    "bert": Anatomy(
        "bert", "embeddings", "encoder.layer", "pooler", ("classifier",), "classifier", "dropout",
        BERT_LINEARS,
    ),
    "roberta": Anatomy(
        "roberta", "embeddings", "encoder.layer", "pooler", ("classifier",), "classifier.out_proj",
        "classifier.dropout", BERT_LINEARS, positions_after_padding=True,
    ),
    "distilbert": Anatomy(
        "distilbert", "embeddings", "transformer.layer", None, ("pre_classifier", "classifier"),
        "classifier", "dropout",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
         "ffn.lin1", "ffn.lin2"),
    ),
}  # fmt: skip


def anatomy_of(model_type: str) -> Anatomy:
    """The family's entry.

    Raises:
        RecipeError: if the architecture is not supported.
    """
    if model_type not in ANATOMIES:
        raise RecipeError(
            f"source.model: the architecture {model_type!r} is not supported yet",
            f"Use one of: {', '.join(ANATOMIES)}",
        )
    return ANATOMIES[model_type]


def max_tokens(config: Any) -> int:
    """The longest text that the architecture's positions can hold."""
    taken = config.pad_token_id + 1 if anatomy_of(config.model_type).positions_after_padding else 0
    return config.max_position_embeddings - taken


def encoder_of(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The encoder inside a stock task class, or the model itself where it is one."""
    return getattr(model, anatomy.encoder, model)


def blocks_of(encoder: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The blocks from bottom to top.

    Raises:
        RecipeError: if the modules do not stand where the anatomy says.
    """
    for path in (anatomy.embeddings, anatomy.blocks):
        submodule(encoder, path)
    blocks = submodule(encoder, anatomy.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise RecipeError(
            f"{anatomy.blocks} is a {type(blocks).__name__}, expected a list of blocks",
            "Use a transformers version in hftl's range",
        )
    linears = {
        name
        for name, module in blocks[0].named_modules()
        if isinstance(module, nn.Linear) or hasattr(module, "base_layer")
    }
    missing = [t for t in anatomy.lora_targets if t not in linears]
    if missing:
        raise RecipeError(
            f"a block has no linear layer {missing[0]!r}; it has {', '.join(sorted(linears))}",
            "Use a transformers version in hftl's range",
        )
    return list(blocks)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        RecipeError: if there is none; the architecture is not what its name says.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise RecipeError(
            f"{type(module).__name__} has no module {path!r}",
            "Use a transformers version in hftl's range",
        ) from error
