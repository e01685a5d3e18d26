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
    ArchitectureSpec,
    HeadSpec,
    build_on_meta,
    get_blocks,
    get_encoder_config,
    get_stock_encoder,
    get_task_class,
)

BERT_LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
DEBERTA_LINEARS = (
    "attention.self.query_proj",
    "attention.self.key_proj",
    "attention.self.value_proj",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
ATTENTION_LINEARS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
VIT_LINEARS = (*ATTENTION_LINEARS, "mlp.fc1", "mlp.fc2")
CLIP_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
         "mlp.fc1", "mlp.fc2")  # fmt: skip

DENSE_HEAD: dict[str, Any] = {
    "last_linear": "classifier.out_proj", "head_dropout": "classifier.dropout",
}  # fmt: skip
IMAGE_HEAD: dict[str, Any] = {"modality": "image", "head_dropout": None, "tokens": None}

ROBERTA = ArchitectureSpec(
    "roberta", "encoder.layer", BERT_LINEARS, pooler="pooler", add_pooling_layer=True,
    has_padding_offset=True, **DENSE_HEAD,
)  # fmt: skip
BERT_HEAD: dict[str, Any] = {"pooler": "pooler", "add_pooling_layer": True}
DINO_PARTS: dict[str, Any] = {
    "final_parts": ("layernorm",),
    "unused_parts": ("embeddings.mask_token",),
    **IMAGE_HEAD,
}

ARCHITECTURES = {
    "bert": ArchitectureSpec("bert", "encoder.layer", BERT_LINEARS, **BERT_HEAD),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": ArchitectureSpec(
        "distilbert",
        "transformer.layer",
        (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
        head_parts=("pre_classifier", "classifier"),
    ),
    "albert": ArchitectureSpec(
        "albert",
        "encoder.albert_layer_groups.*.albert_layers",
        (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.dense",
            "ffn",
            "ffn_output",
        ),
        **BERT_HEAD,
    ),
    "electra": ArchitectureSpec("electra", "encoder.layer", BERT_LINEARS, **DENSE_HEAD),
    "mpnet": ArchitectureSpec(
        "mpnet",
        "encoder.layer",
        (
            "attention.attn.q",
            "attention.attn.k",
            "attention.attn.v",
            "attention.attn.o",
            "intermediate.dense",
            "output.dense",
        ),
        has_padding_offset=True,
        **BERT_HEAD,
        **DENSE_HEAD,
    ),
    "deberta-v2": ArchitectureSpec(
        "deberta", "encoder.layer", DEBERTA_LINEARS, head_parts=("pooler", "classifier")
    ),
    "modernbert": ArchitectureSpec(
        "model",
        "layers",
        ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
        final_parts=("final_norm",),
        head_parts=("head", "classifier"),
        head_dropout="drop",
        tokens=HeadSpec(("head", "classifier"), "classifier", "drop"),
    ),
    "vit": ArchitectureSpec(
        "vit",
        "layers",
        VIT_LINEARS,
        final_parts=("layernorm",),
        interpolate_pos_encoding=True,
        **IMAGE_HEAD,
    ),
    "deit": ArchitectureSpec(
        "deit",
        "layers",
        VIT_LINEARS,
        final_parts=("layernorm",),
        interpolate_pos_encoding=True,
        **IMAGE_HEAD,
    ),
    "beit": ArchitectureSpec(
        "beit", "layers", VIT_LINEARS, pooler="pooler", interpolate_pos_encoding=True, **IMAGE_HEAD
    ),
    "dinov2": ArchitectureSpec("dinov2", "encoder.layer", VIT_LINEARS, **DINO_PARTS),
    "dinov2_with_registers": ArchitectureSpec(
        "dinov2_with_registers", "encoder.layer", VIT_LINEARS, **DINO_PARTS
    ),
    "swin": ArchitectureSpec(
        "swin",
        "encoder.layers.*.blocks",
        VIT_LINEARS,
        final_parts=("layernorm",),
        interpolate_pos_encoding=True,
        **IMAGE_HEAD,
    ),
    "clip": ArchitectureSpec(
        "vision_model",
        "encoder.layers",
        CLIP_LINEARS,
        unused_parts=("post_layernorm",),
        interpolate_pos_encoding=True,
        **IMAGE_HEAD,
    ),
    "siglip": ArchitectureSpec(
        "vision_model",
        "encoder.layers",
        CLIP_LINEARS,
        final_parts=("post_layernorm",),
        unused_parts=("head",),
        interpolate_pos_encoding=True,
        **IMAGE_HEAD,
    ),
}

SWIGLU_LINEARS = (*ATTENTION_LINEARS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

VARIANTS: list[tuple[str, Callable[[Any], bool], dict[str, Any]]] = [
    ("beit", lambda config: not config.use_mean_pooling, {"pooler": None, "final_parts": ("layernorm",)}),
    ("beit", lambda config: config.use_mask_token, {"unused_parts": ("embeddings.mask_token",)}),
    (
        "deberta-v2",
        lambda config: config.relative_attention and not getattr(config, "share_att_key", False),
        {
            "lora_targets": (
                *DEBERTA_LINEARS,
                "attention.self.pos_key_proj",
                "attention.self.pos_query_proj",
            )
        },
    ),
    ("dinov2", lambda config: config.use_swiglu_ffn, {"lora_targets": SWIGLU_LINEARS}),
    (
        "dinov2_with_registers",
        lambda config: config.use_swiglu_ffn,
        {"lora_targets": SWIGLU_LINEARS},
    ),
]
"""Architecture, a question to its config, and what a yes changes in the entry."""


def get_architecture(config: Any) -> ArchitectureSpec:
    """The anatomy of a config's classification class: the family's entry, or else derived.

    Raises:
        RecipeError: if there is no entry, and what the modules show cannot be verified.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        try:
            return derived(config)
        except RecipeError as error:
            raise RecipeError(
                error.what,
                f"Use one of {', '.join(sorted([*ARCHITECTURES, 'vit_mae']))}, or add an entry to "
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
    anatomy = get_architecture(config)
    model = build_on_meta(get_task_class(config, "classification"), config)
    return len(get_blocks(get_stock_encoder(model, anatomy), anatomy))


def check_block_count(section: str, wanted: int, present: int, passed: int) -> None:
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


def get_max_tokens(config: Any) -> int:
    """The longest text that the architecture's positions can hold."""
    taken = config.pad_token_id + 1 if get_architecture(config).has_padding_offset else 0
    return config.max_position_embeddings - taken


def get_patch_size(config: Any) -> int:
    """The side of an image patch, in pixels."""
    return _get_square_side(get_encoder_config(config).patch_size)


def get_native_image_size(config: Any) -> int:
    """The side of the images that the architecture was built for, in pixels."""
    return _get_square_side(get_encoder_config(config).image_size)


def _get_square_side(size: Any) -> int:
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
