"""Draw dropout masks from 16 bits for each element, from torch's default generator.

On a CPU torch draws one number of 32 bits for each element, and that draw takes longer than the
product which it masks. The probability is a multiple of 2^-16, and the factor of what stays is
exact for it, so that the mean of what is masked is right.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 2**16


def draw_mask(shape: Sequence[int], probability: float) -> Tensor:
    """Return a uint8 mask, 0 where an element is dropped and else 1.

    Args:
        shape: of the mask.
        probability: of 0; in (0, 1).
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.int16)[:count] >= _count_levels(probability) - LEVELS // 2
    return mask.view(torch.uint8).view(*shape)


def get_factor(probability: float) -> float:
    """Return what the elements that stay are multiplied by; 1 without dropout."""
    return LEVELS / (LEVELS - _count_levels(probability))


def _count_levels(probability: float) -> int:
    return min(round(probability * LEVELS), LEVELS - 1)
