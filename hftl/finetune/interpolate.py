"""Interpolate the weights of a trained model with those that it started from.

theta(alpha) = (1 - alpha) theta0 + alpha theta1 (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903,
equation 1). Under LoRA the effective weight is W0 + alpha s B A, so B alone is scaled.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hftl.measure.statistics import select_within_one_standard_error
from hftl.train.checkpoint import iterate_trainable, to_local_shard
from hftl.train.facts import InterpolationFacts, TriedAlpha

LORA_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.")
"""How peft names the factors of an update."""


def select_alpha(
    model: nn.Module, start: dict[str, Tensor], alphas: Sequence[float],
    score: Callable[[], tuple[float, float]],
) -> InterpolationFacts:  # fmt: skip
    """Set the model to the best interpolation between its start and its trained weights.

    That is the smallest alpha within one standard error of the best score, since the nearer the
    original the less is forgotten. It costs an evaluation for each alpha.

    Args:
        model: trained; what trains must have the same head at both ends.
        start: the trained parameters at the start, by name.
        alphas: shares of the way, 0 the original.
        score: of the model as it is: the score on validation, more is better, and its standard
            error.
    """
    end = {name: tensor.clone() for name, tensor in iterate_trainable(model)}
    seen = []
    for alpha in alphas:
        set_interpolated_weights(model, start, end, alpha)
        seen.append(score())
    scores, errors = zip(*seen, strict=True)
    chosen = select_within_one_standard_error(scores, errors, alphas)
    set_interpolated_weights(model, start, end, alphas[chosen])
    return InterpolationFacts(
        alpha=alphas[chosen],
        tried=[
            TriedAlpha(alpha=alpha, score=value, error=error)
            for alpha, (value, error) in zip(alphas, seen, strict=True)
        ],
    )


def set_interpolated_weights(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], alpha: float
) -> None:
    """Set what trains between start and end; 0 and 1 are the ends exactly.

    Args:
        model: with the parameters of both.
        start: by name.
        end: by name.
        alpha: the share.
    """
    with torch.no_grad():
        for name, parameter in iterate_trainable(model):
            here, factor = to_local_shard(parameter), LORA_FACTOR.search(name)
            if factor is not None:
                here.copy_(end[name] if factor[1] == "A" else alpha * end[name])
            elif alpha in (0, 1):
                here.copy_((start, end)[int(alpha)][name])
            else:
                here.copy_(torch.lerp(start[name].to(here), end[name].to(here), alpha))
