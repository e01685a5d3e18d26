"""Build tiny random models of every architecture, and a tokenizer of the test words."""

from pathlib import Path
from typing import Any

GOOD = "good fine great lovely warm bright clever fresh happy sweet".split()
BAD = "bad dull poor awful cold grim silly stale sad bitter".split()
FILLER = "the a film plot story actor scene music was is and very with of it this".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IMAGE_SIZE = 32


def tiny_tokenizer(folder: Path) -> None:
    """Save a lower-casing WordPiece tokenizer of the test words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + sorted({*GOOD, *BAD, *FILLER})
    core = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = Lowercase()  # pyright: ignore
    core.pre_tokenizer = Whitespace()  # pyright: ignore
    core.post_processor = TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def tiny_causal_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of the test words, as decoders have: nothing around a text, and
    no padding token."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = ByteLevelDecoder()  # pyright: ignore
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore  # fmt: skip
    core.train_from_iterator([" ".join(["", *GOOD, *BAD, *FILLER])], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


TEXT = {
    "vocab_size": len(SPECIAL) + len({*GOOD, *BAD, *FILLER}), "hidden_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
CAUSAL = TEXT | {
    "vocab_size": 512, "bos_token_id": 2, "eos_token_id": 3, "num_key_value_heads": 1,
    "head_dim": 8,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": IMAGE_SIZE, "patch_size": 8,
}  # fmt: skip
WINDOWS = {
    "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 2],
    "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
TOWERS = {
    "vision_config": IMAGE, "projection_dim": 8,
    "text_config": {
        **TEXT, "num_hidden_layers": 2, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    },
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "bert": TEXT, "roberta": TEXT, "xlm-roberta": TEXT, "camembert": TEXT, "mpnet": TEXT,
    "electra": TEXT | {"embedding_size": 8},
    "distilbert": {
        "vocab_size": TEXT["vocab_size"], "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32,
        "max_position_embeddings": 40, "pad_token_id": 0,
    },
    "albert": TEXT | {"embedding_size": 8, "num_hidden_groups": 1},
    "deberta-v2": TEXT | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3,
        "conv_act": "gelu", "position_biased_input": False, "type_vocab_size": 0,
    },
    "modernbert": TEXT | {
        "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3,
    },
    "vit": IMAGE, "deit": IMAGE, "beit": IMAGE | {
        "use_relative_position_bias": True, "use_mask_token": True,
    },
    "dinov2": IMAGE | {"mlp_ratio": 2}, "dinov2_with_registers": IMAGE | {"mlp_ratio": 2},
    "vit_mae": IMAGE | {
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "swin": WINDOWS, "clip": TOWERS, "siglip": {k: TOWERS[k] for k in TOWERS if k[0] != "p"},
    "siglip2": {
        "vision_config": {k: IMAGE[k] for k in IMAGE if k != "image_size"} | {"num_patches": 16},
        "text_config": TOWERS["text_config"],
    },
    "ernie": TEXT, "megatron-bert": TEXT, "rembert": TEXT | {
        "input_embedding_size": 8, "output_embedding_size": 8, "bos_token_id": 2, "eos_token_id": 3,
    },
    "roc_bert": TEXT | {
        "pronunciation_embed_dim": 4, "pronunciation_vocab_size": 50, "shape_embed_dim": 4,
        "shape_vocab_size": 50,
    },
    "mobilebert": TEXT | {"embedding_size": 8, "intra_bottleneck_size": 8},
    "deberta": TEXT | {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8,
        "position_biased_input": False, "type_vocab_size": 0,
    },
    "roformer": TEXT | {"embedding_size": 16}, "roberta-prelayernorm": TEXT,
    "xlm-roberta-xl": TEXT, "jina_embeddings_v3": TEXT, "gte": TEXT, "ultrabert": TEXT,
    "esm": TEXT | {"mask_token_id": 4, "emb_layer_norm_before": False}, "esmc": TEXT,
    "longformer": TEXT | {"attention_window": 4}, "nomic_bert": TEXT,
    "data2vec-text": TEXT, "fnet": TEXT, "big_bird": TEXT | {
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "attention_type": "original_full",
    },
    "metaclip_2": TOWERS, "donut-swin": WINDOWS, "vit_msn": IMAGE, "swinv2": WINDOWS,
    "ijepa": IMAGE, "data2vec-vision": IMAGE,
    "eurobert": TEXT | {"mask_token_id": 4, "bos_token_id": 2, "eos_token_id": 3},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "starcoder2"), CAUSAL),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), CAUSAL | {"sliding_window": 4}),
    "modernbert-decoder": CAUSAL | {"local_attention": 8},
    "dinov3_vit": IMAGE | {"num_register_tokens": 2},
    "dinov3_convnext": STAGES | {"layer_scale_init_value": 1.0},
    "bit": STAGES | {"num_groups": 2}, "resnet": STAGES, "regnet": STAGES | {"groups_width": 8},
    "convnext": STAGES | {"num_stages": 2}, "convnextv2": STAGES | {"num_stages": 2},
    "efficientnet": {
        "image_size": IMAGE_SIZE, "width_coefficient": 0.25, "hidden_dim": 320,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24],
        "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 6],
    },
    "mobilevit": {
        "image_size": IMAGE_SIZE, "hidden_sizes": [8, 12, 16],
        "neck_hidden_sizes": [4, 8, 8, 8, 12, 16, 32],
    },
    "pvt_v2": {
        "image_size": IMAGE_SIZE, "hidden_sizes": [8, 16], "depths": [1, 2],
        "num_attention_heads": [1, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
    },
    "hiera": {
        "image_size": [IMAGE_SIZE, IMAGE_SIZE], "embed_dim": 8, "depths": [1, 1, 2],
        "num_heads": [1, 2, 4], "query_stride": [2, 2], "num_query_pool": 2,
        "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False],
    },
}  # fmt: skip


def tiny_config(model_type: str, **more: Any) -> Any:
    """Return a three-block config of the architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **FIELDS[model_type] | more)


def is_image(model_type: str) -> bool:
    """Return whether it reads images."""
    return not FIELDS[model_type].keys().isdisjoint({"image_size", "vision_config", "hidden_sizes"})


def draw_images(
    model_type: str, rows: int, side: int = IMAGE_SIZE, generator: Any = None
) -> dict[str, Any]:
    """Return random images as the model takes them."""
    import torch

    if model_type != "siglip2":
        return {"pixel_values": torch.rand(rows, 3, side, side, generator=generator)}
    # Of 3 x 5 patches and one of padding.
    mask = (torch.arange(16) < 15).long().expand(rows, 16)
    pixels = torch.rand(rows, 16, 3 * 8 * 8, generator=generator) * mask[0, :, None]
    grids = torch.tensor([[3, 5]]).expand(rows, 2)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}


CAUSAL_MODELS = [name for name, fields in FIELDS.items() if "num_key_value_heads" in fields]
TEXT_MODELS = [name for name in FIELDS if not is_image(name)]


def save_tiny(model_type: str, folder: Path, masked: bool = False) -> Path:
    """Save a random checkpoint with its tokenizer or processor; ViTMAE's is always masked.

    Args:
        model_type: one of `FIELDS`.
        folder: where.
        masked: the class of pre-training instead of `AutoModel`: masked-language, causal-language
            or masked-image.
    """
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedImageModeling,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        BeitForMaskedImageModeling,
    )

    images = is_image(model_type)
    auto: Any = AutoModel
    if model_type == "vit_mae":
        auto = AutoModelForPreTraining
    elif masked and model_type in CAUSAL_MODELS:
        auto = AutoModelForCausalLM
    elif masked:
        auto = AutoModelForMaskedImageModeling if images else AutoModelForMaskedLM
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if (model_type, masked) == ("beit", True):
        model: Any = BeitForMaskedImageModeling(config)  # no Auto class has it
    else:
        model = auto.from_config(config)
    if images:
        measure_statistics(model)
    model.save_pretrained(folder)
    if images:
        tiny_processor(folder, model_type)
    else:
        save_tokenizer = tiny_causal_tokenizer if model_type in CAUSAL_MODELS else tiny_tokenizer
        save_tokenizer(folder)
    return folder


def measure_statistics(model: Any, side: int = IMAGE_SIZE) -> None:
    """Draw convolutions that keep the variance, and measure BatchNorm's statistics on grey noise.

    Otherwise activations vanish before the last layer.
    """
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        with torch.no_grad():
            brightness = 2 * torch.rand(8, 1, 1, 1) - 1
            model.train()(brightness + 0.2 * torch.randn(8, 3, side, side))
            # A channel that this noise hardly reaches would else enlarge other images, and the
            # rounding of their pixels, by up to 1 / sqrt(eps) in every block.
            for norm in norms:
                norm.running_var.clamp_(min=float(norm.running_var.mean()))
        model.eval()


def tiny_processor(folder: Path, model_type: str = "vit") -> None:
    """Save an image processor of the tiny size, that of the model."""
    from transformers import Siglip2ImageProcessorPil, ViTImageProcessorPil

    if model_type == "siglip2":
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
        return
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
