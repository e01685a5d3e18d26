"""A published folder, loaded as a stranger would: with plain peft and transformers.

`hftl predict` uses `load`. As a script it runs in a fresh process, without hftl, and compares:

    python reload.py FOLDER BASE REVISION SAMPLE DEVICE  ->  {"difference": ..., "largest": ...}

BASE and REVISION are what `from_pretrained` takes for an adapter's base (unused where the folder
holds the whole model); SAMPLE is a safetensors file with inputs and `expected` logits.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification


class Published(nn.Module):
    """A model whose forward gives logits; `head` is set where pooling is not native."""

    def __init__(self, model: nn.Module, head: nn.Linear | None, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.pooling = pooling

    def forward(self, **inputs: Tensor) -> Tensor:
        """(batch, outputs) logits."""
        output = self.model(**inputs)
        if self.head is None:
            return output.logits
        if self.pooling == "cls":
            return self.head(output.last_hidden_state[:, 0])
        mask = inputs["attention_mask"].unsqueeze(-1)
        return self.head((output.last_hidden_state * mask).sum(1) / mask.sum(1))


def load(folder: Path, base: str | None, revision: str | None) -> Published:
    """The model of a published folder, in eval mode and fp32.

    Args:
        folder: holds an adapter or a whole model, its config, and perhaps head.safetensors.
        base: a folder or hub id; needed by an adapter only.
        revision: the base's commit, where it comes from a hub.
    """
    head, pooling = _head(folder / "head.safetensors")
    auto: Any = AutoModel if head is not None else AutoModelForSequenceClassification
    if not (folder / "adapter_config.json").exists():
        return Published(auto.from_pretrained(folder, dtype=torch.float32), head, pooling).eval()
    config = AutoConfig.from_pretrained(folder)
    labels = {} if head is not None else {"id2label": config.id2label, "label2id": config.label2id}
    model = auto.from_pretrained(
        base, revision=revision, dtype=torch.float32, ignore_mismatched_sizes=True,
        trust_remote_code=False, **labels,
    )  # fmt: skip
    return Published(PeftModel.from_pretrained(model, folder), head, pooling).eval()


def _head(path: Path) -> tuple[nn.Linear | None, str]:
    if not path.exists():
        return None, "native"
    with safe_open(path, "pt") as file:
        pooling = file.metadata()["pooling"]
    tensors = load_file(path)
    outputs, width = tensors["weight"].shape
    head = nn.Linear(width, outputs)
    head.load_state_dict(tensors)
    return head, pooling


def main(folder: Path, base: str, revision: str | None, sample: Path, device: str) -> None:
    """Prints the comparison as JSON."""
    inputs = {key: tensor.to(device) for key, tensor in load_file(sample).items()}
    expected = inputs.pop("expected")
    # Other weights must be drawn for whatever the folder lacks, or the lack would not show.
    torch.manual_seed(20_010_101)
    model = load(folder, base, revision).to(device)
    with torch.inference_mode():
        found = model(**inputs).float()
    told = {
        "difference": float((found - expected).abs().max()),
        "largest": float(expected.abs().max()),
        "hftl_imported": "hftl" in sys.modules,
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    _, folder_, base_, revision_, sample_, device_ = sys.argv
    main(Path(folder_), base_, revision_ or None, Path(sample_), device_)
