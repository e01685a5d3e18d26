"""Compute the outputs of a frozen model, and the features that its last layer reads, once a row.

Texts run without padding and LoRA runs merged, where that gives the same outputs but for rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.data.image_inputs import ImageInputs
from hftl.data.rows import Row
from hftl.data.splits import hash_row
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.errors import NumericError
from hftl.models.lora_kernels import merge_lora
from hftl.models.packing import pack_predictions
from hftl.runtime import distributed, watchdog
from hftl.runtime.progress import track

BATCH_TOKENS = 4096
CPU_BATCH_TOKENS = 2048
"""The same on a CPU, which is as busy with half of them: predictions hold the most of a run."""


def compute_frozen_features(
    model: nn.Module, last_linear: nn.Linear, encoded: list[EncodedRow],
    inputs: TextInputs | ImageInputs, device: str,
) -> list[np.ndarray]:  # fmt: skip
    """Return the input of `last_linear` for every row, in eval mode and fp32. Collective.

    Args:
        model: run without gradient, and left in eval mode.
        last_linear: a layer of the model.
        encoded: rows as the encoder takes them.
        inputs: collates them and splits a batch's outputs into rows.
        device: the model's.

    Returns:
        (outputs, width) float32 for each row: one output, or one a word.
    """
    caught: list[Tensor] = []
    hook = last_linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with run_fast(model):
            return run_batches(model, encoded, inputs, device, lambda _: caught.pop(), "features")
    finally:
        hook.remove()


@contextmanager
def run_fast(model: nn.Module) -> Iterator[None]:
    """Let a model compute outputs in fp32 without padding and with LoRA merged, where it can."""
    with merge_lora(model), pack_predictions(model):
        yield


def predict_logits(
    model: nn.Module, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs, device: str,
    stock: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return logits (outputs of all rows, classes) float32, in eval mode and fp32. Collective.

    Args:
        model: run without gradient, and left in eval mode.
        encoded: rows as the encoder takes them.
        inputs: collates them and splits a batch's outputs into rows.
        device: the model's.
        stock: run the model as transformers and peft run it.
    """
    with nullcontext() if stock else run_fast(model):
        return np.concatenate(
            run_batches(model, encoded, inputs, device, lambda output: output.logits, "predictions")
        )


def predict_with_features(
    model: nn.Module, last_linear: nn.Linear, encoded: list[EncodedRow],
    inputs: TextInputs | ImageInputs, device: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return `predict_logits` and the input of `last_linear`, from one pass. Collective.

    Returns:
        (outputs of all rows, classes) and (outputs of all rows, width), float32.
    """
    caught: list[Tensor] = []
    hook = last_linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))

    def read(output: Any) -> Tensor:
        return torch.cat([caught.pop().float(), output.logits.float()], -1)

    try:
        with run_fast(model):
            parts = run_batches(model, encoded, inputs, device, read, "predictions")
    finally:
        hook.remove()
    values, width = np.concatenate(parts), last_linear.in_features
    return np.ascontiguousarray(values[:, width:]), np.ascontiguousarray(values[:, :width])


def run_batches(
    model: nn.Module, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs, device: str,
    read: Callable[[Any], Tensor], title: str,
) -> list[np.ndarray]:  # fmt: skip
    """Return what `read` takes from each batch's output, split into rows.

    Processes share the batches. Rows of similar length run together, to pad little; values do not
    depend on that.

    Raises:
        NumericError: on every process, if a value is not finite.
    """
    model.eval()
    tokens = min(BATCH_TOKENS, CPU_BATCH_TOKENS) if device == "cpu" else BATCH_TOKENS
    batches = batch_by_length([inputs.length(row) for row in encoded], tokens)
    computed: dict[int, np.ndarray] = {}
    is_finite = True
    # Not inference_mode: BEiT caches its table of positions, and training would reuse it.
    with torch.no_grad():
        for numbers in track(distributed.shard_items(batches), title):
            rows = [encoded[i] for i in numbers]
            batch = inputs.collate([dict(row) for row in rows])
            output = model(**{k: v.to(device) if isinstance(v, Tensor) else v
                              for k, v in batch.items()})  # fmt: skip
            values = read(output).float().cpu()
            is_finite = is_finite and bool(values.isfinite().all())
            by_row = inputs.split_outputs(values, rows)
            computed.update(zip(numbers, (value.numpy() for value in by_row), strict=True))
            # A guard reads its rows in the middle of a training.
            watchdog.beat()
    parts = distributed.gather_values((is_finite, computed))
    if not all(is_finite for is_finite, _ in parts):
        raise NumericError(
            "the model's outputs are not finite",
            "Lower the learning rate, or give a source or model whose weights are sound",
        )
    merged = {number: value for _, part in parts for number, value in part.items()}
    return [merged[number] for number in range(len(encoded))]


def batch_by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Return row numbers in batches of similar length, of at most `budget` tokens once padded."""
    batches: list[list[int]] = []
    for number in np.argsort(np.array(lengths), kind="stable").tolist():
        if batches and (len(batches[-1]) + 1) * lengths[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


class FeatureCache:
    """Cache features by the content of rows, each computed when it is first needed."""

    def __init__(
        self, compute: Callable[[list[Row]], list[np.ndarray]],
        known: Mapping[bytes, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._compute = compute
        self.known: dict[bytes, np.ndarray] = dict(known or {})

    def get(self, rows: list[Row]) -> np.ndarray:
        """Return (outputs of all rows, width) float32, row after row."""
        keyed = [(hash_row(row), row) for row in rows]
        self.fill(dict(keyed))
        return np.concatenate([self.known[key] for key, _ in keyed])

    def fill(self, rows: Mapping[bytes, Row]) -> None:
        """Compute the features of rows that are not known, by their hashes, in one pass."""
        new = {key: row for key, row in rows.items() if key not in self.known}
        if new:
            features = self._compute(list(new.values()))
            self.known.update(zip(new, features, strict=True))
