"""Train under DistributedDataParallel in this one process."""

import gc
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def run_two_backward_passes(model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    """Compute the loss twice; DDP refuses the second after a parameter without gradient."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _run_passes(DistributedDataParallel(model), loss)
    finally:
        # What outlives the group is the last to hold its threads, and may wait for them for ever.
        gc.collect()
        dist.destroy_process_group()


def _run_passes(wrapped: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    for _ in range(2):
        loss(wrapped).backward()
