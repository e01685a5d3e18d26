"""Let only those rows of a word embedding train whose tokens a training reads.

Of the others every gradient is zero, and AdamW without weight decay leaves them as they are to the
bit. Yet each step would clear their gradients, add up their norm, clip them and run the optimizer
over them: in MiniLM they are half of all weights, in XLM-R two thirds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _UsedEmbedding(nn.Embedding):
    """Look tokens up in a table that holds a part of the rows."""

    places: Tensor
    """The row of each token in the table; -1 of a token without one, which is an error."""
    used_padding: int | None
    """The row whose gradient stays zero."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the vectors (..., width) of tokens (...)."""
        return F.embedding(self.places[input], self.weight, self.used_padding)


def find_word_embedding(encoder: Any) -> nn.Embedding | None:
    """Return the word embedding of a text encoder that trains; None where it is more than a table.

    That is one which another layer shares, scales, or looks up with a norm.
    """
    embedding = encoder.get_input_embeddings()
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:
        return None
    owners = sum(
        parameter is embedding.weight
        for _, parameter in encoder.named_parameters(remove_duplicate=False)
    )
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq
    return embedding if owners == 1 and is_plain and not embedding.sparse else None


@contextmanager
def hold_used_rows(embedding: nn.Embedding, tokens: Tensor) -> Iterator[None]:
    """Hold the rows of some tokens alone as the weight of an embedding while the block runs.

    Afterwards the whole weight has these rows as they are then, and its others as they were.

    Args:
        embedding: see `find_word_embedding`.
        tokens: all that occur in the block.
    """
    whole, padding = embedding.weight, embedding.padding_idx
    if padding is not None:
        tokens = torch.cat([tokens, torch.tensor([padding])])
    used = tokens.unique().to(whole.device)
    places = torch.full((len(whole),), -1, device=whole.device)
    places[used] = torch.arange(len(used), device=whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used])
    embedding.register_buffer("places", places, persistent=False)
    vars(embedding)["used_padding"] = None if padding is None else int(places[padding])
    embedding.__class__ = _UsedEmbedding
    try:
        yield
    finally:
        trained = embedding.weight.detach()
        with torch.no_grad():
            whole.data = whole.data.to(trained.device)
            whole[used.to(trained.device)] = trained
        embedding.__class__ = nn.Embedding
        del embedding.places, vars(embedding)["used_padding"]
        embedding.weight = whole
