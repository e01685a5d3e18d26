"""Where the parts of each architecture lie: one entry a family, checked against real modules.

An architecture without an entry is derived from its own modules (`derive.py`). To add one, add an
entry here and its line to `tests/test_strategy.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hftl.errors import RecipeError
from hftl.models.derive import derived
from hftl.models.parts import (
    Anatomy,
    Head,
    blocks_of,
    empty,
    encoder_config,
    encoder_of,
    layers,
    stock_class,
    submodule,
)

__all__ = [
    "ANATOMIES", "Anatomy", "anatomy_of", "blocks_of", "check_blocks", "count_blocks",
    "encoder_config", "encoder_of", "layers", "max_tokens", "native_image_size", "patch_size",
    "stock_class", "submodule",
]  # fmt: skip

BERT = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
DEBERTA = ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
           "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
VIT = (*ATTENTION, "mlp.fc1", "mlp.fc2")
TOWER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
         "mlp.fc1", "mlp.fc2")  # fmt: skip

DENSE_HEAD: dict[str, Any] = {
    "last_linear": "classifier.out_proj", "head_dropout": "classifier.dropout",
}  # fmt: skip
IMAGE: dict[str, Any] = {"modality": "image", "head_dropout": None, "tokens": None}

ROBERTA = Anatomy(
    "roberta", "encoder.layer", BERT, pooler="pooler", add_pooling_layer=True,
    positions_after_padding=True, **DENSE_HEAD,
)  # fmt: skip
BERT_HEAD: dict[str, Any] = {"pooler": "pooler", "add_pooling_layer": True}
DINO: dict[str, Any] = {"final": ("layernorm",), "unused": ("embeddings.mask_token",), **IMAGE}

ANATOMIES = {
    "bert": Anatomy("bert", "encoder.layer", BERT, **BERT_HEAD),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": Anatomy(
        "distilbert", "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
         "ffn.lin1", "ffn.lin2"),
        head=("pre_classifier", "classifier"),
    ),
    "albert": Anatomy(
        "albert", "encoder.albert_layer_groups.*.albert_layers",
        ("attention.query", "attention.key", "attention.value", "attention.dense",
         "ffn", "ffn_output"),
        **BERT_HEAD,
    ),
    "electra": Anatomy("electra", "encoder.layer", BERT, **DENSE_HEAD),
    "mpnet": Anatomy(
        "mpnet", "encoder.layer",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
         "intermediate.dense", "output.dense"),
        positions_after_padding=True, **BERT_HEAD, **DENSE_HEAD,
    ),
    "deberta-v2": Anatomy("deberta", "encoder.layer", DEBERTA, head=("pooler", "classifier")),
    "modernbert": Anatomy(
        "model", "layers", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), final=("final_norm",),
        head=("head", "classifier"), head_dropout="drop",
        tokens=Head(("head", "classifier"), "classifier", "drop"),
    ),
    "vit": Anatomy(
        "vit", "layers", VIT, final=("layernorm",), interpolate_pos_encoding=True, **IMAGE
    ),
    "deit": Anatomy(
        "deit", "layers", VIT, final=("layernorm",), interpolate_pos_encoding=True, **IMAGE
    ),
    "beit": Anatomy(
        "beit", "layers", VIT, pooler="pooler", interpolate_pos_encoding=True, **IMAGE
    ),
    "dinov2": Anatomy("dinov2", "encoder.layer", VIT, **DINO),
    "dinov2_with_registers": Anatomy("dinov2_with_registers", "encoder.layer", VIT, **DINO),
    "swin": Anatomy(
        "swin", "encoder.layers.*.blocks", VIT, final=("layernorm",),
        interpolate_pos_encoding=True, **IMAGE,
    ),
    "clip": Anatomy(
        "vision_model", "encoder.layers", TOWER, unused=("post_layernorm",),
        interpolate_pos_encoding=True, **IMAGE,
    ),
    "siglip": Anatomy(
        "vision_model", "encoder.layers", TOWER, final=("post_layernorm",), unused=("head",),
        interpolate_pos_encoding=True, **IMAGE,
    ),
}  # fmt: skip

SWIGLU = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

VARIANTS: list[tuple[str, Callable[[Any], bool], dict[str, Any]]] = [
    ("beit", lambda config: not config.use_mean_pooling, {"pooler": None, "final": ("layernorm",)}),
    ("beit", lambda config: config.use_mask_token, {"unused": ("embeddings.mask_token",)}),
    ("deberta-v2",
     lambda config: config.relative_attention and not getattr(config, "share_att_key", False),
     {"lora_targets": (*DEBERTA, "attention.self.pos_key_proj", "attention.self.pos_query_proj")}),
    ("dinov2", lambda config: config.use_swiglu_ffn, {"lora_targets": SWIGLU}),
    ("dinov2_with_registers", lambda config: config.use_swiglu_ffn, {"lora_targets": SWIGLU}),
]  # fmt: skip
"""Architecture, a question to its config, and what a yes changes in the entry."""


def anatomy_of(config: Any) -> Anatomy:
    """The anatomy of a config's classification class: the family's entry, or else derived.

    Raises:
        RecipeError: if there is no entry, and what the modules show cannot be verified.
    """
    found = ANATOMIES.get(config.model_type)
    if found is None:
        try:
            return derived(config)
        except RecipeError as error:
            raise RecipeError(
                error.what,
                f"Use one of {', '.join(sorted([*ANATOMIES, 'vit_mae']))}, or add an entry to "
                "hftl/models/architectures.py",
            ) from error
    for name, applies, changes in VARIANTS:
        if name == config.model_type and applies(config):
            found = replace(found, **changes)
    return found


def count_blocks(config: Any) -> int:
    """How many blocks the architecture builds, counted without weights.

    Raises:
        RecipeError: if the architecture is not supported.
    """
    anatomy = anatomy_of(config)
    model = empty(stock_class(config, "classification"), config)
    return len(blocks_of(encoder_of(model, anatomy), anatomy))


def check_blocks(section: str, wanted: int, present: int, passed: int) -> None:
    """Refuses to train more blocks than there are.

    Args:
        section: where the recipe says so: `finetune` or `adapt`.
        wanted: blocks to train.
        present: blocks that the model holds.
        passed: layers that an input passes; more than blocks where those are shared.

    Raises:
        RecipeError: naming the numbers.
    """
    if not 1 <= wanted <= present:
        plural = "s" if present > 1 else ""
        shared = f", which its {passed} layers share" if passed > present else ""
        raise RecipeError(
            f"{section}.blocks={wanted}, but the source model has {present} block{plural}{shared}",
            f"Use at most {present}, or train everything (full)",
        )


def max_tokens(config: Any) -> int:
    """The longest text that the architecture's positions can hold."""
    taken = config.pad_token_id + 1 if anatomy_of(config).positions_after_padding else 0
    return config.max_position_embeddings - taken


def patch_size(config: Any) -> int:
    """The side of an image patch, in pixels."""
    return _side(encoder_config(config).patch_size)


def native_image_size(config: Any) -> int:
    """The side of the images that the architecture was built for, in pixels."""
    return _side(encoder_config(config).image_size)


def _side(size: Any) -> int:
    """The side of a square.

    Raises:
        RecipeError: if it is none.
    """
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) > 1:
        raise RecipeError(
            f"source.model: it takes images or patches of {tuple(size)} pixels, expected squares",
            "Use a source model of square images",
        )
    return sides.pop()
