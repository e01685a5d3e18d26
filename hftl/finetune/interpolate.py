"""Weights between the original and what was trained, of which the best on validation is kept.

theta(alpha) = (1 - alpha) theta0 + alpha theta1 (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903,
equation 1). Under LoRA the effective weight is W0 + alpha s B A, so B alone is scaled.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hftl.statistics import one_standard_error
from hftl.train.checkpoint import local, trained

FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.")
"""How peft names the factors of an update."""


def interpolate(
    model: nn.Module, start: dict[str, Tensor], alphas: Sequence[float],
    score: Callable[[], tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    """Puts the model at the best place between its start and where it is.

    That is the smallest alpha within one standard error of the best score, since the nearer the
    original the less is forgotten. It costs an evaluation for each alpha.

    Args:
        model: trained; what trains must have the same head at both ends.
        start: the trained parameters at the start, by name.
        alphas: shares of the way, 0 the original.
        score: of the model as it is: the score on validation, more is better, and its standard
            error.

    Returns:
        `alpha`, the one kept, and what was `tried`: {alpha, score, error} each.
    """
    end = {name: tensor.clone() for name, tensor in trained(model)}
    seen = []
    for alpha in alphas:
        put_between(model, start, end, alpha)
        seen.append(score())
    scores, errors = zip(*seen, strict=True)
    chosen = one_standard_error(scores, errors, alphas)
    put_between(model, start, end, alphas[chosen])
    return {
        "alpha": alphas[chosen],
        "tried": [
            {"alpha": alpha, "score": value, "error": error}
            for alpha, (value, error) in zip(alphas, seen, strict=True)
        ],
    }


def put_between(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], alpha: float
) -> None:
    """Sets what trains to a share of the way; 0 and 1 are the ends exactly.

    Args:
        model: with the parameters of both.
        start: by name.
        end: by name.
        alpha: the share.
    """
    with torch.no_grad():
        for name, parameter in trained(model):
            here, factor = local(parameter), FACTOR.search(name)
            if factor is not None:
                here.copy_(end[name] if factor[1] == "A" else alpha * end[name])
            elif alpha in (0, 1):
                here.copy_((start, end)[int(alpha)][name])
            else:
                here.copy_(torch.lerp(start[name].to(here), end[name].to(here), alpha))
