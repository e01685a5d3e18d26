"""Frozen outputs: what the head's last layer sees before any training, computed once a row."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hftl.data.load import Row
from hftl.data.split import content_key
from hftl.data.text import Encoded

BATCH_TOKENS = 4096


def frozen_features(
    model: nn.Module, last_linear: nn.Linear, encoded: list[Encoded], pad: Callable, device: str
) -> np.ndarray:
    """The input of `last_linear` for every row, in eval mode and fp32.

    Args:
        model: run without gradient; left in eval mode.
        last_linear: a layer of the model.
        encoded: token ids.
        pad: collates rows to tensors.
        device: where the model is.

    Returns:
        (rows, width) float32.
    """
    caught: list[Tensor] = []
    hook = last_linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        return _run(model, encoded, pad, device, lambda _: caught.pop())
    finally:
        hook.remove()


def logits(model: nn.Module, encoded: list[Encoded], pad: Callable, device: str) -> np.ndarray:
    """(rows, outputs) float32 logits, in eval mode and fp32."""
    return _run(model, encoded, pad, device, lambda output: output.logits)


def _run(
    model: nn.Module, encoded: list[Encoded], pad: Callable, device: str, keep: Callable
) -> np.ndarray:
    """What `keep` takes from each batch, in the rows' order.

    Rows of like length run together, so that little is padded; that changes no value.
    """
    model.eval()
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    order = np.argsort(lengths, kind="stable")
    found: list[Tensor] = []
    start = 0
    with torch.inference_mode():
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * lengths[order[end]] <= BATCH_TOKENS:
                end += 1
            batch = pad([dict(encoded[i]) for i in order[start:end]])
            output = model(**{key: value.to(device) for key, value in batch.items()})
            found.append(keep(output).float().cpu())
            start = end
    values = torch.cat(found).numpy()
    result = np.empty_like(values)
    result[order] = values
    return result


class Features:
    """Features of rows, each computed the first time it is asked for."""

    def __init__(self, compute: Callable[[list[Row]], np.ndarray]) -> None:
        self._compute = compute
        self._known: dict[bytes, np.ndarray] = {}

    def of(self, rows: list[Row]) -> np.ndarray:
        """(rows, width) float32."""
        keys = [content_key(row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        if new:
            found = self._compute(list(new.values()))
            self._known.update(zip(new, found, strict=True))
        return np.stack([self._known[key] for key in keys])
