"""Build tiny random vision-language models, with processor and chat format."""

import json
from pathlib import Path
from typing import Any

from support.tiny import CAUSAL, tiny_causal_tokenizer

VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
LANGUAGE = {**CAUSAL, "vocab_size": 520, "max_position_embeddings": 256, "pad_token_id": 3}
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4}
SPECIAL_TOKENS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|image_pad|>",
    "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)  # fmt: skip
IDEFICS3 = {
    "vision_config": VISION, "text_config": {**LANGUAGE, "model_type": "llama"},
    "scale_factor": 2, "pad_token_id": 3,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        "text_config": {**LANGUAGE, "model_type": "llama"},
    },
    "idefics2": {
        "vision_config": VISION, "text_config": {**LANGUAGE, "model_type": "mistral"},
        "perceiver_config": {
            "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 16,
        },
    },
    "idefics3": IDEFICS3, "smolvlm": IDEFICS3,
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
            "patch_size": 8, "spatial_merge_size": 2, "out_hidden_size": 16, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**LANGUAGE, "model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
    },
}  # fmt: skip
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
PROCESSORS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "LlavaProcessor", "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"patch_size": 8, "vision_feature_select_strategy": "default",
         "num_additional_image_tokens": 1},
    ),
    "idefics2": (
        "Idefics2Processor", "Idefics2ImageProcessorPil",
        {"size": {"shortest_edge": 24, "longest_edge": 32}, "do_image_splitting": False},
        {"image_seq_len": 4},
    ),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessorPil", TILES, {"image_seq_len": 4}),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessorPil", TILES, {"image_seq_len": 4}),
    "qwen2_5_vl": (
        "Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil",
        {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}},
        {},
    ),
}  # fmt: skip
CHAT_FORMAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} film:"
)


def save_vision_language_model(name: str, folder: Path, chat: bool = True) -> Path:
    """Save a random model of the architecture, its processor, and a chat format if `chat`."""
    import torch
    import transformers
    from support.training import perturb

    tiny_causal_tokenizer(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.save_pretrained(folder)
    is_qwen = name.startswith("qwen")
    tokens = {
        "image_token_index" if name == "llava" else "image_token_id":
            "<|image_pad|>" if is_qwen else "<image>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        "video_token_id": "<|video_pad|>",
    }  # fmt: skip
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}
    config = transformers.AutoConfig.for_model(name, **FIELDS[name] | ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    perturb(model, 0.2)
    model.save_pretrained(folder)
    kind, image_kind, sizes, more = PROCESSORS[name]
    getattr(transformers, image_kind)(**sizes).save_pretrained(folder)
    settings = {"processor_class": kind, **more}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if chat:
        place = "<|vision_start|><|image_pad|><|vision_end|>" if is_qwen else "<image>"
        text = CHAT_FORMAT.replace("IMAGE", place)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder
