"""Read and set the states of all random generators of a process, as tensors and numbers."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

RandomState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by generator, and what is no tensor."""


def collect_random_state(device: torch.device) -> RandomState:
    """Return the states of Python's, numpy's and torch's generators, and of the device's own."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["device"] = torch.mps.get_rng_state()
    numbers = {"python": [version, gauss], "numpy": [name, place, has_gauss, cached]}
    return tensors, numbers


def restore_random_state(
    tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device
) -> None:
    """Set all generators to what `collect_random_state` returned."""
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, place, has_gauss, cached = numbers["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, place, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(tensors["device"])
