"""Where rows lie in an encoder's space, from which it is told what the encoder has forgotten."""

import numpy as np

from hftl.data.load import Row
from hftl.data.text import TextInputs
from hftl.finetune.own_heads import asked_again
from hftl.finetune.workbench import Workbench
from hftl.model.cache import frozen_features
from hftl.model.head import Built, PooledModel, build

NEW_ROWS = 2000
"""Test rows that are compared, at most; they stand in the order of a hash."""


def compared(bench: Workbench) -> dict[str, list[Row]]:
    """The rows: `general`, those of general data that measure, if any, and `new`, those of test."""
    new = bench.prepared.rows["test"][:NEW_ROWS]
    return (
        {"new": new} if bench.general is None else {"general": bench.general.measured, "new": new}
    )


def embed(bench: Workbench, built: Built) -> dict[str, np.ndarray]:
    """(rows, width) float32 for each part of `compared`, see `embed_rows`; and what the source's
    own heads say, see `asked_again`."""
    found = {part: embed_rows(bench, built, rows) for part, rows in compared(bench).items()}
    return found | asked_again(bench, built)


def embed_rows(bench: Workbench, built: Built, rows: list[Row]) -> np.ndarray:
    """(rows, width) float32, in eval mode and fp32.

    Of a text the mean of the encoder's last hidden states over its tokens, of a picture what the
    last linear layer sees. Every process must come here.
    """
    inputs, model, last = bench.inputs, built.model, built.last_linear
    if bench.prepared.modality == "text":
        # Words that are tagged one by one make up a text here, too.
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)  # pyright: ignore
        model = PooledModel(built.encoder, "mean", bench.source.config.hidden_size, 1)
        last = model.head
    model.to(bench.device)
    found = frozen_features(model, last, bench.encoded(rows), inputs, bench.device)
    return np.concatenate(found)


def embed_original(bench: Workbench, seed: int) -> dict[str, np.ndarray]:
    """The same of the source as it is.

    Args:
        bench: the source as it is, and the rows.
        seed: of weights above the encoder that the checkpoint lacks.
    """
    pooling = "mean" if bench.prepared.modality == "text" else "native"
    return embed(bench, build(bench.source, "regression", pooling, 1, [], seed))
