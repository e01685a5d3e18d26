"""Frozen outputs: what the head's last layer sees before any training, computed once a row."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.data.image_processing import ImageInputs
from hftl.data.load import Row
from hftl.data.splits import hash_row
from hftl.data.text import EncodedRow, TextInputs
from hftl.errors import NumericError
from hftl.runtime import distributed
from hftl.runtime.progress import track

BATCH_TOKENS = 4096


def compute_frozen_features(
    model: nn.Module, last_linear: nn.Linear, encoded: list[EncodedRow],
    inputs: TextInputs | ImageInputs, device: str,
) -> list[np.ndarray]:  # fmt: skip
    """The input of `last_linear` for every row, in eval mode and fp32.

    Args:
        model: run without gradient; left in eval mode.
        last_linear: a layer of the model.
        encoded: rows as the encoder takes them.
        inputs: collates them, and finds each row's values in a batch.
        device: where the model is.

    Returns:
        For each row (outputs, width) float32: one output, or one a word.
    """
    caught: list[Tensor] = []
    hook = last_linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        return _run_batches(model, encoded, inputs, device, lambda _: caught.pop(), "features")
    finally:
        hook.remove()


def predict_logits(
    model: nn.Module, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs, device: str
) -> np.ndarray:
    """(outputs of the rows, outputs) float32 logits, row after row, in eval mode and fp32."""
    return np.concatenate(
        _run_batches(model, encoded, inputs, device, lambda output: output.logits, "predictions")
    )


def _run_batches(
    model: nn.Module, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs, device: str,
    keep: Callable[[Any], Tensor], title: str,
) -> list[np.ndarray]:  # fmt: skip
    """What `keep` takes from each batch, row by row; the batches are shared among the processes.

    Rows of like length run together, so that little is padded; that changes no value.

    Raises:
        NumericError: on every process, if a value is not finite.
    """
    model.eval()
    batches = batch_by_length([inputs.length(row) for row in encoded], BATCH_TOKENS)
    mine: dict[int, np.ndarray] = {}
    sound = True
    # Not inference_mode: BEiT keeps its table of positions for the trainings that follow.
    with torch.no_grad():
        for numbers in track(distributed.shard_items(batches), title):
            rows = [encoded[i] for i in numbers]
            batch = inputs.collate([dict(row) for row in rows])
            output = model(**{k: v.to(device) if isinstance(v, Tensor) else v
                              for k, v in batch.items()})  # fmt: skip
            kept = keep(output).float().cpu()
            sound = sound and bool(kept.isfinite().all())
            values = inputs.split_outputs(kept, rows)
            mine.update(zip(numbers, (value.numpy() for value in values), strict=True))
    parts = distributed.gather_values((sound, mine))
    if not all(sound for sound, _ in parts):
        raise NumericError("the model's outputs are not finite", "Lower the learning rate")
    found = {number: value for _, part in parts for number, value in part.items()}
    return [found[number] for number in range(len(encoded))]


def batch_by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Row numbers in batches of like length, each of at most `budget` tokens once padded."""
    batches: list[list[int]] = []
    for number in np.argsort(np.array(lengths), kind="stable").tolist():
        if batches and (len(batches[-1]) + 1) * lengths[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


class FeatureCache:
    """Features of rows, each computed the first time it is asked for."""

    def __init__(self, compute: Callable[[list[Row]], list[np.ndarray]]) -> None:
        self._compute = compute
        self._known: dict[bytes, np.ndarray] = {}

    def get(self, rows: list[Row]) -> np.ndarray:
        """(outputs of the rows, width) float32, row after row."""
        keys = [hash_row(row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        if new:
            found = self._compute(list(new.values()))
            self._known.update(zip(new, found, strict=True))
        return np.concatenate([self._known[key] for key in keys])
