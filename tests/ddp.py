"""Training under DistributedDataParallel in this one process."""

import gc
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def two_steps(model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    """Two backward passes; a parameter without a gradient stops the second.

    Args:
        model: what trains.
        loss: of the wrapped model.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _two_steps(model, loss)
    finally:
        # What outlives the group is the last to hold its threads, and may wait for them for ever.
        gc.collect()
        dist.destroy_process_group()


def _two_steps(model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        loss(wrapped).backward()
