"""Count the FLOPs that a job needs, and measure what the machine multiplies at its best.

    python benchmarks/speed_flops.py            # prints Peak as JSON

FLOPs are those of the cheapest exact algorithm: real tokens only, a frozen prefix once, the
original's outputs once, masked tokens alone through the head of a masked-language model. They are
counted from shapes: torch's FlopCounterMode counts no attention of a CPU's flash kernel, and
Trainer's `total_flos` takes frozen weights and padding for trained tokens. Utilisation is these
FLOPs by the training's seconds, as a share of the peak of one matrix product.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pydantic import BaseModel
from speed_inputs import SHAPES, SIDE
from speed_jobs import MAX_LENGTH, Inputs

VOCABULARY = 30522
MASKED_SHARE, HELD_OUT, EVALUATIONS = 0.15, 0.1, 10
"""Of masked-language adaptation."""
PATCH = 16
PEAK_SIZE, PEAK_SECONDS = 2048, 1.0


class Peak(BaseModel):
    """Hold the machine's best speed of one matrix product, in GFLOP/s, by precision."""

    fp32: float
    bf16: float
    trains_bf16: bool
    """Whether hftl trains in bf16 here: the hardware multiplies it natively."""
    device: str


class Shape(BaseModel):
    """Describe an encoder's layers."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    def count_layer(self, lengths: list[int]) -> float:
        """Return the FLOPs of one layer's forward of rows of these lengths."""
        width = self.hidden_size
        dense = 8 * width**2 + 4 * width * self.intermediate_size
        return sum(length * (dense + 4 * length * width) for length in lengths)


def count_training(inputs: Inputs) -> float | None:
    """Return the FLOPs that the job's training needs; None where nothing is counted.

    Evaluation on validation after every epoch counts, as do the features of a solved probe. The
    head's own FLOPs, far below a layer's, do not, but for a masked-language model's.
    """
    job, shape = inputs.job, Shape(**SHAPES[inputs.job.source])
    if job.kind == "adapt":
        return count_adaptation(inputs, shape)
    if job.kind != "finetune" or job.processes > 1 or job.strategy == "gradual":
        # Rows decide how many phases gradual unfreezing runs.
        return None
    layer = {split: shape.count_layer(count_lengths(inputs, split)) for split in job.rows}
    train, validation = layer["train"], layer["validation"]
    layers = shape.num_hidden_layers
    if job.strategy == "head":
        return layers * sum(layer.values())
    count = len(job.lora_layers) or (layers if job.strategy != "partial" else job.blocks)
    passes = 2 if job.strategy == "lora" else 3
    prefix = (layers - count) * (train + validation)
    original = count * train if job.kl else 0.0
    return prefix + original + job.epochs * count * (passes * train + validation)


def count_adaptation(inputs: Inputs, shape: Shape) -> float:
    """Return the FLOPs of masked-language adaptation on packed blocks."""
    tokens = sum(count_lengths(inputs, "train"))
    blocks = [MAX_LENGTH] * (tokens // MAX_LENGTH)
    head = 2 * shape.hidden_size * (shape.hidden_size + VOCABULARY) * MASKED_SHARE * tokens
    forward = shape.num_hidden_layers * shape.count_layer(blocks) + head
    trained = 3 * inputs.job.epochs * (1 - HELD_OUT)
    return forward * (trained + EVALUATIONS * HELD_OUT)


def count_lengths(inputs: Inputs, split: str) -> list[int]:
    """Return the number of tokens, or of patches and the class token, of each row of a split."""
    if inputs.job.source == "vit-small":
        return [(SIDE // PATCH) ** 2 + 1] * inputs.job.rows[split]
    import pandas as pd
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(inputs.source) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    texts = pd.read_csv(inputs.folder / f"{split}.csv")["text"].tolist()
    return [len(row.ids) for row in tokenizer.encode_batch(texts)]


def measure_peak() -> Peak:
    """Return the speed of the fastest of repeated products of square matrices, by precision."""
    import torch

    from hftl.runtime.hardware import get_device, has_fast_bf16

    device, speeds = get_device(), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=dtype, device=device)
        product, seconds = torch.empty_like(left), []
        end = time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < end or len(seconds) < 3:
            started = time.perf_counter()
            torch.mm(left, left, out=product)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        # The median of the faster half: one lucky product is no peak.
        faster = sorted(seconds)[: max(1, len(seconds) // 2)]
        speeds[name] = 2 * PEAK_SIZE**3 / faster[len(faster) // 2] / 1e9
    return Peak(**speeds, trains_bf16=has_fast_bf16(device), device=device)


if __name__ == "__main__":
    print(json.dumps(measure_peak().model_dump()))
