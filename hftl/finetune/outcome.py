"""What an arm leaves behind."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass
class Outcome:
    """Predictions, weights and facts of one arm and seed.

    `logits` are (rows, outputs) for each split, for tokens (words, outputs), NaN where a word was
    cut off; `weights` the tensors that training changed or drew; `facts` tells how training went;
    `embeddings` are those of `embed`, none where the encoder is not trained from the source.
    """

    logits: dict[str, np.ndarray]
    weights: dict[str, Tensor]
    trainable_parameters: int
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
