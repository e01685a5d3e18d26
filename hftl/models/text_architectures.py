"""List the supported architectures that read text."""

from dataclasses import replace
from typing import Any

from hftl.models.architecture_spec import (
    BERT_LINEARS,
    SWIGLU_LINEARS,
    ArchitectureSpec,
    HeadSpec,
    PostNormBlock,
)

DEBERTA_LINEARS = (
    "attention.self.in_proj", "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
DEBERTA_V2_LINEARS = (
    "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
    *BERT_LINEARS[3:],
)  # fmt: skip
DISTILBERT_LINEARS = (
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "ffn.lin1", "ffn.lin2",
)  # fmt: skip
DENSE_HEAD = HeadSpec(last_linear="classifier.out_proj", dropout="classifier.dropout")

POST_NORM = ArchitectureSpec("bert", "encoder.layer", BERT_LINEARS)
"""BERT's encoder without its pooler."""
POOLED = replace(POST_NORM, pooler="pooler", add_pooling_layer=True)
BERT = replace(POOLED, token_mixer="attention", packs=True, post_norm=PostNormBlock())
ROBERTA = replace(BERT, encoder="roberta", head=DENSE_HEAD, has_padding_offset=True)
PRE_NORM_ROBERTA = replace(ROBERTA, token_mixer=None, post_norm=None)
ROTARY = ArchitectureSpec(
    "model", "layers", SWIGLU_LINEARS, pooler="pooler", add_pooling_layer=True, packs=True
)  # fmt: skip

SCORE_HEAD = HeadSpec(("score",), "score", dropout=None, has_bias=False)
DECODER = ArchitectureSpec(
    "model", "layers", SWIGLU_LINEARS, final_parts=("norm",), head=SCORE_HEAD,
    token_head=HeadSpec(("score",), "score"), is_causal=True, pooled_logits="last",
)  # fmt: skip
"""A decoder as LLaMA's: transformers' generic classes put `score` on it."""


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


def _adjust_modernbert_decoder(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Tell whether the classifier has a bias."""
    return replace(spec, head=replace(spec.head, has_bias=config.classifier_bias))


def _adjust_eurobert(spec: ArchitectureSpec, config: Any) -> ArchitectureSpec:
    """Tell where the config pools: before the head, or the logits of all tokens (`late`)."""
    return replace(spec, pooled_logits="mean" if config.classifier_pooling == "late" else None)


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
    "ernie": replace(POOLED, encoder="ernie", packs=True, post_norm=PostNormBlock()),
    "rembert": replace(POOLED, encoder="rembert"),
    "roc_bert": replace(POOLED, encoder="roc_bert", adjust=_adjust_roc_bert),
    "megatron-bert": replace(POOLED, final_parts=("encoder.ln",)),
    "fnet": replace(POOLED, encoder="fnet", lora_targets=("intermediate.dense", "output.dense")),
    "longformer": ArchitectureSpec(
        "longformer", "encoder.layer",
        (*BERT_LINEARS[:3], "attention.self.query_global", "attention.self.key_global",
         "attention.self.value_global", *BERT_LINEARS[3:]),
        pooler="pooler", head=DENSE_HEAD, token_head=None, add_pooling_layer=True,
        has_padding_offset=True,
    ),
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
        head=DENSE_HEAD, add_pooling_layer=True, packs=True,
    ),
    "electra": replace(
        POST_NORM, encoder="electra", head=DENSE_HEAD, token_mixer="attention", packs=True,
        post_norm=PostNormBlock(),
    ),
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
        DISTILBERT_LINEARS,
        head=HeadSpec(("pre_classifier", "classifier")), packs=True,
        post_norm=PostNormBlock(
            DISTILBERT_LINEARS, "attention", (None, "ffn.dropout"),
            ("sa_layer_norm", "output_layer_norm"), "activation",
        ),
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
        PRE_NORM_ROBERTA, encoder="esm", packs=False, final_parts=("encoder.emb_layer_norm_after",),
        unused_parts=("contact_head",), adjust=_adjust_esm,
    ),
    "esmc": ArchitectureSpec(
        "esmc", "layers", SWIGLU_LINEARS, final_parts=("norm",), head=DENSE_HEAD,
        token_head=HeadSpec(("score",), "score"),
    ),
    "eurobert": ArchitectureSpec(
        "model", "layers", SWIGLU_LINEARS, final_parts=("norm",),
        head=HeadSpec(
            ("dense", "classifier"), dropout=None, before_last=("dense", "activation")
        ),
        token_head=HeadSpec(dropout=None), adjust=_adjust_eurobert,
    ),
}  # fmt: skip
DECODERS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3"), DECODER
    ),
    "gemma3_text": replace(DECODER, token_head=None),
    "starcoder2": replace(DECODER, lora_targets=(*SWIGLU_LINEARS[:4], "mlp.c_fc", "mlp.c_proj")),
    "modernbert-decoder": replace(
        DECODER,
        lora_targets=("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.Wo", "mlp.Wi", "mlp.Wo"),
        final_parts=("final_norm",), token_head=None, adjust=_adjust_modernbert_decoder,
        head=HeadSpec(("head", "classifier"), dropout="drop", before_last=("head", "drop")),
    ),
}  # fmt: skip
"""Decoders, which see a text from left to right; see `pooling.py` for how a text is pooled."""
