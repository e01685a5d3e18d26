"""Decide where a training reads so few tokens that the others' vectors need not take part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hftl.config.finetune import Finetune
from hftl.data.text_inputs import TextInputs
from hftl.finetune.context import ExperimentContext
from hftl.models.used_embedding import find_word_embedding, hold_used_rows
from hftl.retain.regularizer import Retention
from hftl.runtime.hardware import is_sharded

ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
"""Optimizers that change each weight by its own gradients alone."""


@contextmanager
def train_used_tokens(
    context: ExperimentContext, encoder: nn.Module, finetune: Finetune, args: TrainingArguments,
    seed: int, retention: Retention | None = None,
) -> Iterator[None]:  # fmt: skip
    """Let only the word vectors train that this training reads, where that changes no number.

    With weight decay all vectors shrink, retention may read all weights, and what the lower blocks
    return is stored under the hash of all that is below them: there the table stays whole.

    Args:
        context: its rows, those of train by the seed.
        encoder: its table of word vectors is replaced while the block runs.
        finetune: the recipe's section.
        args: of the training.
        seed: of the training.
        retention: what else reads the model.
    """
    spec = finetune.spec
    reads_weights = retention is not None and (retention.regularizers or retention.general)
    is_plain = args.weight_decay == 0 and args.optim in ADAMW and not args.optim_args
    embedding = None
    if isinstance(context.inputs, TextInputs) and spec.schedule == "epochs" and is_plain:
        embedding = None if reads_weights or is_sharded() else find_word_embedding(encoder)
    if embedding is None:
        yield
        return
    tokenizer: Any = context.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    rows = [*context.select_train_rows(seed), *context.prepared.rows["validation"]]
    tokens = {token for row in context.encode_rows(rows) for token in row["input_ids"]}
    tokens.add(tokenizer.pad_token_id)
    with hold_used_rows(embedding, torch.tensor(sorted(tokens))):
        yield
