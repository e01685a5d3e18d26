"""Describe each supported architecture: where its blocks, its head and its other parts lie.

To add an architecture, add its entry to `TEXT_ENCODERS` or `IMAGE_ENCODERS` and a tiny config to
`tests/support/tiny.py`: the tests compare every entry with its model's forward and backward pass.
An entry needs a stock class whose last linear layer reads one vector a row (EuroBERT's reads one a
token) and whose outputs do not depend on padding (YOSO's do).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from hftl.errors import RecipeError

TOKEN_CLASSIFICATION = "token-classification"


@dataclass(frozen=True)
class HeadSpec:
    """Describe the head of one stock class.

    Args:
        parts: modules after the encoder, new for every task.
        last_linear: path of the last layer, which the probe initialises.
        dropout: path of the dropout directly before it, where there is one.
    """

    parts: tuple[str, ...] = ("classifier",)
    last_linear: str = "classifier"
    dropout: str | None = "dropout"


@dataclass(frozen=True)
class ArchitectureSpec:
    """Describe the named parts of one architecture.

    Paths inside the encoder are relative to it, so they hold for `AutoModel` and for the stock
    task class alike. Blocks are whatever is unfrozen one after the other: transformer layers, or
    the residual blocks of a convolutional network's stages.

    Args:
        encoder: the encoder's attribute in the stock classification class.
        blocks: path in the encoder of the list of blocks, a `ModuleList` or `Sequential`, or
            several paths, bottom to top; `*` stands for every index of an outer list, as of
            stages.
        lora_targets: suffixes of the linear and convolutional layers that every block holds and
            LoRA wraps.
        modality: what the encoder reads.
        optional_targets: suffixes of layers that LoRA wraps and only some blocks hold, as the
            shortcut of the first residual block of a stage.
        skipped_layers: paths in a block of layers that LoRA leaves alone, as depthwise
            convolutions.
        pooler: path of the pooler in the encoder, where `AutoModel` or the stock class has one.
        final_parts: parts of the encoder after the blocks, on the way to the head; not the pooler.
        unused_parts: parts of the encoder that no output of the stock class depends on.
        head: the head of the sequence or image classification class.
        token_head: the head of the token classification class, where there is one.
        add_pooling_layer: `AutoModel` takes that argument.
        has_padding_offset: positions count from the padding id on, so that fewer are left.
        patch_size: the config's key for the side of an image patch; None: sides of any length.
        image_sizes: the encoder takes images of the config's size only (`fixed`), of any size
            with the argument `interpolate_pos_encoding` (`argument`), or of any size (`any`).
        masked_images: how masked-image pre-training hides patches: it drops them where blocks
            take any number of tokens (MAE), or covers them with a mask token (SimMIM).
        token_mixer: path in the last block of its layer that mixes positions, where all that
            comes after it sees one position at a time: masked-LM runs that at masked positions
            alone.
        adjust: returns the spec of a config whose settings change it.
    """

    encoder: str
    blocks: str | tuple[str, ...]
    lora_targets: tuple[str, ...]
    modality: Literal["text", "image"] = "text"
    optional_targets: tuple[str, ...] = ()
    skipped_layers: tuple[str, ...] = ()
    pooler: str | None = None
    final_parts: tuple[str, ...] = ()
    unused_parts: tuple[str, ...] = ()
    head: HeadSpec = HeadSpec()
    token_head: HeadSpec | None = HeadSpec()
    add_pooling_layer: bool = False
    has_padding_offset: bool = False
    patch_size: str | None = None
    image_sizes: Literal["fixed", "argument", "any"] = "fixed"
    masked_images: Literal["drop", "cover"] | None = None
    token_mixer: str | None = None
    adjust: Callable[["ArchitectureSpec", Any], "ArchitectureSpec"] | None = None

    def for_task(self, task: str) -> "ArchitectureSpec":
        """Return the spec of the task's stock class.

        Raises:
            RecipeError: if there is no such class.
        """
        if task != TOKEN_CLASSIFICATION:
            return self
        if self.token_head is None:
            raise RecipeError(
                f"data.task: {self.encoder} has no class for {TOKEN_CLASSIFICATION}",
                "Use another source.model or another data.task",
            )
        return replace(self, pooler=None, head=self.token_head)


# Text encoders.

BERT_LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
SWIGLU_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
DEBERTA_LINEARS = (
    "attention.self.in_proj", "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
DEBERTA_V2_LINEARS = (
    "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
    *BERT_LINEARS[3:],
)  # fmt: skip
DENSE_HEAD = HeadSpec(last_linear="classifier.out_proj", dropout="classifier.dropout")

POST_NORM = ArchitectureSpec("bert", "encoder.layer", BERT_LINEARS)
"""BERT's encoder without its pooler."""
POOLED = replace(POST_NORM, pooler="pooler", add_pooling_layer=True)
BERT = replace(POOLED, token_mixer="attention")
ROBERTA = replace(BERT, encoder="roberta", head=DENSE_HEAD, has_padding_offset=True)
PRE_NORM_ROBERTA = replace(ROBERTA, token_mixer=None)
ROTARY = ArchitectureSpec(
    "model", "layers", SWIGLU_LINEARS, pooler="pooler", add_pooling_layer=True
)  # fmt: skip


def _adjust_deberta(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Add the projections of relative positions that attention reads."""
    names = {"c2p": "attention.self.pos_proj", "p2c": "attention.self.pos_q_proj"}
    read = config.pos_att_type or () if config.relative_attention else ()
    positions = [names[kind] for kind in names if kind in read]
    return replace(spec, lora_targets=(*DEBERTA_LINEARS, *positions))


def _adjust_deberta_v2(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Add the projections of relative positions, where the content's are not shared with them."""
    if not config.relative_attention or getattr(config, "share_att_key", False):
        return spec
    positions = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
    return replace(spec, lora_targets=(*DEBERTA_V2_LINEARS, *positions))


def _adjust_esm(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Count positions from 0 where they are rotary."""
    return replace(spec, has_padding_offset=config.position_embedding_type == "absolute")


def _adjust_roc_bert(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the embeddings of shape and pronunciation that the config switches off."""
    used = {
        "embeddings.pronunciation_embed": config.concat_input and config.enable_pronunciation,
        "embeddings.shape_embed": config.concat_input and config.enable_shape,
    }
    unused = tuple(part for part, is_used in used.items() if not is_used)
    return replace(spec, unused_parts=unused)


TEXT_ENCODERS = {
    "bert": BERT,
    "ernie": replace(POOLED, encoder="ernie"),
    "rembert": replace(POOLED, encoder="rembert"),
    "roc_bert": replace(POOLED, encoder="roc_bert", adjust=_adjust_roc_bert),
    "megatron-bert": replace(POOLED, final_parts=("encoder.ln",)),
    "fnet": replace(POOLED, encoder="fnet", lora_targets=("intermediate.dense", "output.dense")),
    "big_bird": replace(POOLED, unused_parts=("pooler",), head=DENSE_HEAD),
    "mobilebert": replace(
        POOLED, encoder="mobilebert",
        lora_targets=(
            "bottleneck.input.dense", "bottleneck.attention.dense", *BERT_LINEARS[:4],
            *(f"ffn.{i}.{part}.dense" for i in range(3) for part in ("intermediate", "output")),
            "intermediate.dense", "output.dense", "output.bottleneck.dense",
        ),
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": replace(PRE_NORM_ROBERTA, encoder="data2vec_text"),
    "xlm-roberta-xl": replace(PRE_NORM_ROBERTA, final_parts=("encoder.LayerNorm",)),
    "roberta-prelayernorm": replace(
        PRE_NORM_ROBERTA, encoder="roberta_prelayernorm", final_parts=("LayerNorm",)
    ),
    "jina_embeddings_v3": ArchitectureSpec(
        "roberta", "layers", (*SWIGLU_LINEARS[:4], "mlp.fc1", "mlp.fc2"), pooler="pooler",
        head=DENSE_HEAD, add_pooling_layer=True,
    ),
    "electra": replace(POST_NORM, encoder="electra", head=DENSE_HEAD, token_mixer="attention"),
    "roformer": replace(
        POST_NORM, encoder="roformer", unused_parts=("encoder.embed_positions",), head=DENSE_HEAD
    ),
    "mpnet": ArchitectureSpec(
        "mpnet", "encoder.layer",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
         "intermediate.dense", "output.dense"),
        pooler="pooler", head=DENSE_HEAD, add_pooling_layer=True, has_padding_offset=True,
    ),
    "distilbert": ArchitectureSpec(
        "distilbert", "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
         "ffn.lin1", "ffn.lin2"),
        head=HeadSpec(("pre_classifier", "classifier")),
    ),
    "albert": ArchitectureSpec(
        "albert", "encoder.albert_layer_groups.*.albert_layers",
        ("attention.query", "attention.key", "attention.value", "attention.dense",
         "ffn", "ffn_output"),
        pooler="pooler", add_pooling_layer=True,
    ),
    "deberta": ArchitectureSpec(
        "deberta", "encoder.layer", DEBERTA_LINEARS, head=HeadSpec(("pooler", "classifier")),
        adjust=_adjust_deberta,
    ),
    "deberta-v2": ArchitectureSpec(
        "deberta", "encoder.layer", DEBERTA_V2_LINEARS,
        head=HeadSpec(("pooler", "classifier")), adjust=_adjust_deberta_v2,
    ),
    "modernbert": ArchitectureSpec(
        "model", "layers", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
        final_parts=("final_norm",), head=HeadSpec(("head", "classifier"), dropout="drop"),
        token_head=HeadSpec(("head", "classifier"), dropout="drop"),
    ),
    "nomic_bert": replace(ROTARY, encoder="nomic_bert"),
    "gte": replace(ROTARY, encoder="gte"),
    "ultrabert": ArchitectureSpec(
        "model", "layers", SWIGLU_LINEARS, final_parts=("norm",), head=HeadSpec(dropout="drop"),
        token_head=HeadSpec(dropout="drop"),
    ),
    "esm": replace(
        PRE_NORM_ROBERTA, encoder="esm", final_parts=("encoder.emb_layer_norm_after",),
        unused_parts=("contact_head",), adjust=_adjust_esm,
    ),
    "esmc": ArchitectureSpec(
        "esmc", "layers", SWIGLU_LINEARS, final_parts=("norm",), head=DENSE_HEAD,
        token_head=HeadSpec(("score",), "score"),
    ),
}  # fmt: skip

# Image encoders.

VIT_LINEARS = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
CLIP_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip

VIT = ArchitectureSpec(
    "vit", "layers", VIT_LINEARS, "image", final_parts=("layernorm",),
    head=HeadSpec(dropout=None), token_head=None, patch_size="patch_size",
    image_sizes="argument", masked_images="drop",
)  # fmt: skip
UNMASKED_VIT = replace(VIT, masked_images=None)
CLIP = replace(
    UNMASKED_VIT, encoder="vision_model", blocks="encoder.layers", lora_targets=CLIP_LINEARS,
    final_parts=(), unused_parts=("post_layernorm",),
)  # fmt: skip


def _adjust_beit(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the norm that stands for the pooler, and the mask token."""
    if not config.use_mean_pooling:
        spec = replace(spec, pooler=None, final_parts=("layernorm",))
    if config.use_mask_token:
        spec = replace(spec, unused_parts=("embeddings.mask_token",))
    return spec


def _adjust_dinov2(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Name the gated layers of the largest models."""
    gated = (*VIT_LINEARS[:4], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return replace(spec, lora_targets=gated) if config.use_swiglu_ffn else spec


BEIT = replace(
    VIT, encoder="beit", pooler="pooler", final_parts=(), masked_images="cover", adjust=_adjust_beit
)  # fmt: skip
DINOV2 = replace(
    VIT, encoder="dinov2", blocks="encoder.layer", unused_parts=("embeddings.mask_token",),
    image_sizes="any", adjust=_adjust_dinov2,
)  # fmt: skip
SWIN = replace(UNMASKED_VIT, encoder="swin", blocks="encoder.layers.*.blocks")

IMAGE_ENCODERS = {
    "vit": VIT,
    "deit": replace(VIT, encoder="deit"),
    "vit_msn": UNMASKED_VIT,
    "ijepa": replace(UNMASKED_VIT, encoder="ijepa"),
    "beit": BEIT,
    "data2vec-vision": replace(
        BEIT, encoder="data2vec_vision", blocks="encoder.layer", masked_images=None,
        lora_targets=(
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            *BERT_LINEARS[3:],
        ),
    ),
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, encoder="dinov2_with_registers"),
    "swin": SWIN,
    "swinv2": replace(
        SWIN, encoder="swinv2",
        lora_targets=(
            *BERT_LINEARS[:3], "attention.self.continuous_position_bias_mlp.0",
            "attention.self.continuous_position_bias_mlp.2", *BERT_LINEARS[3:],
        ),
    ),
    "donut-swin": replace(SWIN, encoder="donut", lora_targets=BERT_LINEARS, final_parts=()),
    "clip": CLIP,
    "metaclip_2": CLIP,
    "siglip": replace(CLIP, final_parts=("post_layernorm",), unused_parts=("head",)),
}  # fmt: skip

ARCHITECTURES = TEXT_ENCODERS | IMAGE_ENCODERS
READ_AS = {"vit_mae": "vit"}
"""Architectures without a classification class, and the one whose encoder is the same."""


def get_config_spec(config: Any) -> ArchitectureSpec:
    """Return the spec of a config's classification class.

    Raises:
        RecipeError: if the architecture is not supported, naming those that are.
    """
    spec = ARCHITECTURES.get(config.model_type)
    if spec is None or getattr(config, "is_decoder", False):
        reason = "hftl has no entry for it" if spec is None else "its config makes it a decoder"
        raise RecipeError(
            f"source.model: the architecture {config.model_type!r} is not supported: {reason}",
            f"Use one of {', '.join(sorted([*ARCHITECTURES, *READ_AS]))}, or add an entry to "
            "hftl/models/architectures.py",
        )
    return spec if spec.adjust is None else spec.adjust(spec, config)


# Sizes that a config names.


def get_encoder_config(config: Any) -> Any:
    """Return the config of the encoder: the vision part of a composite config, or the config."""
    return getattr(config, "vision_config", config)


def count_layers(config: Any) -> int:
    """Return how many layers an input passes; ALBERT has fewer blocks, which its layers share.

    Raises:
        RecipeError: if the config does not say.
    """
    inner = get_encoder_config(config)
    depth = getattr(inner, "depths", None) or getattr(inner, "num_hidden_layers", None)
    if depth is None:
        raise RecipeError(
            f"source.model: the config of {config.model_type!r} has no number of layers",
            "Use a transformer encoder",
        )
    return sum(depth) if isinstance(depth, (list, tuple)) else depth


def get_max_tokens(config: Any) -> int:
    """Return the longest text that the architecture's positions can hold, in tokens."""
    offset = config.pad_token_id + 1 if get_config_spec(config).has_padding_offset else 0
    return config.max_position_embeddings - offset


def get_patch_size(config: Any) -> int:
    """Return the side of an image patch in pixels; 1 where the encoder has no patches."""
    key = get_config_spec(config).patch_size
    return 1 if key is None else _get_square_side(getattr(get_encoder_config(config), key))


def get_native_image_size(config: Any) -> int | None:
    """Return the side in pixels of the images that the encoder was built for, if the config says.

    Raises:
        RecipeError: if they are not squares.
    """
    size = getattr(get_encoder_config(config), "image_size", None)
    return None if size is None else _get_square_side(size)


def _get_square_side(size: Any) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) > 1:
        raise RecipeError(
            f"source.model: it takes images or patches of {tuple(size)} pixels, expected squares",
            "Use a source model of square images",
        )
    return sides.pop()
