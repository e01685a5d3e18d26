"""Load a published folder as a stranger would, with plain peft and transformers.

`hftl predict` uses `load_folder`. As a script it runs in a fresh process, without
hftl, and compares:

    python reload_check.py FOLDER BASE SAMPLE DEVICE  ->  {"difference": ..., "largest": ...}

Without arguments it waits for them, a JSON list on a line of its standard input.
BASE is the folder of an adapter's base (unused where FOLDER holds the whole model); SAMPLE is a
JSON file with `texts`, `words` or `images` (files beside it; with `prompts` for a vision-language
model), and the `logits` expected for them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput

AUTO_CLASSES = {
    "ForImageClassification": AutoModelForImageClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}
"""By the end of the stock class's name, which the published config tells."""


POOLINGS = ("cls", "mean", "last", "embedding", "cls+mean")
"""Ways from the encoder's outputs to those of a head of hftl's."""


class PublishedModel(nn.Module):
    """Hold a model whose forward gives logits; `head` is set where pooling is not native.

    `projection`, (width of the head, width of the encoder), comes before it where there is one;
    `prefix` counts an image's tokens before those of its patches, where the head pools them.
    """

    def __init__(
        self, model: nn.Module, head: nn.Linear | None, pooling: str,
        projection: Tensor | None = None, prefix: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.head = head
        self.pooling = pooling
        self.prefix = prefix
        self.register_buffer("projection", projection)

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits of shape (batch, outputs)."""
        if self.head is None:
            return self.model(**inputs)
        if self.model.config.model_type == "longformer":  # pyright: ignore
            mask = torch.zeros_like(inputs["input_ids"])
            mask[:, 0] = 1
            inputs["global_attention_mask"] = mask
        output = self.model(**inputs)
        if self.pooling == "embedding":
            return SequenceClassifierOutput(logits=self.head(self._embed(output.pooler_output)))  # pyright: ignore
        hidden = output.last_hidden_state
        if self.prefix:
            parts = {"cls": hidden[:, 0], "mean": hidden[:, self.prefix :].mean(1)}
            pooled = torch.cat([parts[name] for name in self.pooling.split("+")], -1)
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            mask = inputs["attention_mask"]
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            pooled = hidden[torch.arange(len(hidden)), last]
        else:
            # FNet's tokenizer gives no mask.
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.head(pooled))  # pyright: ignore

    def _embed(self, pooled: Tensor) -> Tensor:
        """Return the embeddings of length 1 that a pair of encoders compares."""
        projection: Any = self.projection
        embedding = pooled if projection is None else pooled @ projection.T
        return embedding / embedding.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class LoadedBase:
    """Hold a model before any adapter, and how its file differs from it, as transformers reports.

    `missing` and `mismatched` are drawn at random, `mismatched` with the shapes of file and model;
    `unexpected` tensors of the file were passed over.
    """

    model: Any
    missing: frozenset[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: frozenset[str]


def load_folder(
    folder: Path, base: Path | None, quantization: dict[str, Any] | None = None
) -> PublishedModel:
    """Load the model of a published folder, in eval mode and fp32.

    Args:
        folder: holds an adapter or a whole model, its config, and perhaps head.safetensors.
        base: the folder of the base; needed by an adapter only.
        quantization: settings by which the base's weights are quantized; None: they are whole.
    """
    if not (folder / "adapter_config.json").exists():
        return attach_head(folder, load_base(folder, folder).model)
    assert base is not None
    settings = None if quantization is None else BitsAndBytesConfig.from_dict(quantization)
    model = load_base(folder, base, quantization=settings).model
    return attach_head(folder, PeftModel.from_pretrained(model, folder))


def load_base(folder: Path, base: Path, config: Any = None, quantization: Any = None) -> LoadedBase:
    """Load what an adapter goes on, or the whole model where `base` is the folder itself.

    Args:
        folder: of the adapter or model.
        base: of the weights.
        config: of the model, with its labels and class; None takes the folder's.
        quantization: transformers' settings of it; None: the weights are whole.
    """
    pooled = (folder / "head.safetensors").exists()
    config = (
        AutoConfig.from_pretrained(folder, trust_remote_code=False) if config is None else config
    )
    auto: Any = _find_encoder_class(config) if pooled else _find_auto_class(config)
    # The config says which class stands on the base, and its labels. An encoder alone has the
    # base's own, but where the base is of an architecture that hides patches.
    own = pooled and (_names_image_half(config) or _has_type(base, config.model_type))
    known = {} if base == folder or own else {"config": config}
    if quantization is not None:
        known["quantization_config"] = quantization
    model, report = auto.from_pretrained(
        base, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False,
        output_loading_info=True, **known,
    )  # fmt: skip
    mismatched = {
        key: (tuple(in_file), tuple(in_model))
        for key, in_file, in_model in report["mismatched_keys"]
    }
    return LoadedBase(
        model, frozenset(report["missing_keys"]), mismatched, frozenset(report["unexpected_keys"])
    )


def attach_head(folder: Path, model: nn.Module) -> PublishedModel:
    """Return the model under the folder's own head, where it has one, in eval mode."""
    return PublishedModel(model, *_load_head(folder / "head.safetensors")).eval()


def _find_encoder_class(config: Any) -> Any:
    """Return the class of the image half of a pair, which the config names; else the encoder's.

    `AutoModel` would take that of the base's config, and a ViTMAE's hides patches.
    """
    if _names_image_half(config):
        return getattr(transformers, config.architectures[0])
    return MODEL_MAPPING[type(config)]


def _has_type(folder: Path, model_type: str) -> bool:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type == model_type


def _names_image_half(config: Any) -> bool:
    return (config.architectures or [""])[0].endswith("VisionModel")


def _find_auto_class(config: Any) -> Any:
    kind = (config.architectures or [""])[0]
    return next(
        (auto for end, auto in AUTO_CLASSES.items() if kind.endswith(end)),
        AutoModelForSequenceClassification,
    )


def _load_head(path: Path) -> tuple[nn.Linear | None, str, Tensor | None, int]:
    """Read head.safetensors.

    Raises:
        SafetensorError, OSError: if it does not open.
        ValueError: if it holds no head.
    """
    if not path.exists():
        return None, "native", None, 0
    with safe_open(path, "pt") as file:
        described = file.metadata() or {}
    pooling, prefix = described.get("pooling"), described.get("prefix_tokens", "0")
    if pooling not in POOLINGS or not prefix.isdecimal():
        raise ValueError(f"{path.name} says pooling {pooling!r} after {prefix!r} tokens")
    tensors = load_file(path)
    projection = tensors.pop("projection", None)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    outputs, width = (*shapes.get("weight", ()), 0, 0)[:2]
    if not outputs * width or shapes != {"weight": (outputs, width), "bias": (outputs,)}:
        held = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))
        raise ValueError(f"{path.name} holds {held or 'nothing'}, expected a weight and its bias")
    if projection is not None and (projection.ndim != 2 or len(projection) != width):
        raise ValueError(f"{path.name} holds a projection {tuple(projection.shape)} for {width}")
    head = nn.Linear(width, outputs)
    head.load_state_dict(tensors)
    return head, pooling, projection, int(prefix)


Batch = tuple[dict[str, Tensor | bool], Tensor | None]
"""What the model takes, and for words the mask of the tokens whose outputs count."""


def build_sample_batches(folder: Path, sample: Path, alone: bool) -> list[Batch]:
    """Return the model's inputs for the sample, batch by batch.

    Of a word the first token counts.

    Args:
        folder: the published one.
        sample: the file that `write_reload_sample` wrote.
        alone: each text in a batch of its own, as `transformers.pipeline` runs it, or all in one.
    """
    content = json.loads(sample.read_text(encoding="utf-8"))
    if "prompts" in content:
        return _build_prompted_batches(folder, sample, content)
    if "images" in content:
        from PIL import Image

        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
        images = [Image.open(sample.parent / name) for name in content["images"]]
        return [({**processor(images, return_tensors="pt"), **content["arguments"]}, None)]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    cut = {"truncation": True, "max_length": content["max_length"], "return_tensors": "pt"}
    cut["padding"] = not alone
    rows = content["texts" if "texts" in content else "words"]
    batches = [[row] for row in rows] if alone else [rows]
    if "texts" in content:
        columns = [[list(column) for column in zip(*batch, strict=True)] for batch in batches]
        return [(dict(tokenizer(*texts, **cut)), None) for texts in columns]
    words = []
    for batch in batches:
        inputs = tokenizer(batch, is_split_into_words=True, **cut)
        ids = [inputs.word_ids(i) for i in range(len(batch))]
        first = [
            [w is not None and (p == 0 or row[p - 1] != w) for p, w in enumerate(row)]
            for row in ids
        ]
        words.append((dict(inputs), torch.tensor(first)))
    return words


def _build_prompted_batches(folder: Path, sample: Path, content: dict[str, Any]) -> list[Batch]:
    """Return the inputs of a vision-language model, each row in a batch of its own.

    Where the tokens are given, a package is missing that the processor needs for videos.
    """
    from PIL import Image

    images = [Image.open(sample.parent / name) for name in content["images"]]
    if "token_ids" not in content:
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        return [
            (dict(processor(text=[text], images=[image], return_tensors="pt")), None)
            for text, image in zip(content["prompts"], images, strict=True)
        ]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    batches: list[Batch] = []
    for row, image in zip(content["token_ids"], images, strict=True):
        ids = torch.tensor([row])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.model_type.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        batches.append(({**inputs, **processor([image], return_tensors="pt")}, None))
    return batches


def compute_sample_logits(model: nn.Module, batches: list[Batch], device: str) -> Tensor:
    """Return the logits of a sample, (outputs of the rows, outputs) float32."""
    parts = []
    for inputs, first in batches:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.inference_mode():
            logits = model(**moved).logits.float().cpu()
        parts.append(logits if first is None else logits[first])
    return torch.cat(parts)


def main(folder: Path, base: Path, sample: Path, device: str) -> None:
    """Print the comparison as JSON.

    The texts run alone and all together, and the nearer one counts: a head of large weights makes
    the rounding of another shape of batch visible, and an encoder without a mask reads padding.
    """
    content = json.loads(sample.read_text(encoding="utf-8"))
    expected = torch.tensor(content["logits"])
    # Other weights must be drawn for whatever the folder lacks, or the lack would not show.
    torch.manual_seed(20_010_101)
    model = load_folder(folder, base, content.get("quantization")).to(device)
    differences = [
        float((compute_sample_logits(model, batches, device) - expected).abs().max())
        for batches in (build_sample_batches(folder, sample, alone) for alone in (True, False))
    ]
    comparison = {
        "difference": min(differences),
        "largest": float(expected.abs().max()),
        "hftl_imported": "hftl" in sys.modules,
    }
    print(json.dumps(comparison))  # noqa: T201


if __name__ == "__main__":
    # Nothing comes from a process that has ended without a folder to check.
    arguments = sys.argv[1:] or json.loads(sys.stdin.readline() or "[]")
    if arguments:
        folder_, base_, sample_, device_ = arguments
        main(Path(folder_), Path(base_), Path(sample_), device_)
