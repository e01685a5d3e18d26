"""Choose device and precision, and measure the energy of trainings.

Energy is estimated by codecarbon where it is installed.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hftl.runtime import distributed
from hftl.train.hf_compat import cpu_multiplies_bf16


@contextmanager
def measure_energy(sharers: int = 1) -> Iterator[dict[str, float]]:
    """Yield a mapping that holds `energy_kwh` of the block once it has ended.

    It stays empty without codecarbon and on other processes than the main one. Processor, memory
    and GPUs of the main process's machine are counted, whoever uses them. No network is used.

    Args:
        sharers: processes of this machine that train at the same time; each counts its share.
    """
    energy: dict[str, float] = {}
    if not distributed.is_main() or find_spec("codecarbon") is None:
        yield energy
        return
    codecarbon: Any = import_module("codecarbon")
    # The country only decides on emissions, which are computed from the recipe instead.
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA", save_to_file=False, allow_multiple_runs=True, log_level="critical"
    )
    tracker.start()
    try:
        yield energy
    finally:
        tracker.stop()
    energy["energy_kwh"] = float(tracker.final_emissions_data.energy_consumed) / sharers


def compute_emissions(spent: dict[str, float], grams_per_kwh: float | None) -> dict[str, float]:
    """Return `co2_grams` of the energy, where both it and the location's electricity are known."""
    if grams_per_kwh is None or "energy_kwh" not in spent:
        return {}
    return {"co2_grams": spent["energy_kwh"] * grams_per_kwh}


def sum_energy(timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return `energy_kwh` of all trainings; nothing unless every one was measured.

    Args:
        timings: by arm and seed; solved arms have no `predict_seconds` and are left out.
    """
    trained = [timing for timing in timings.values() if "predict_seconds" in timing]
    if not trained or any("energy_kwh" not in timing for timing in trained):
        return {}
    return {"energy_kwh": sum(timing["energy_kwh"] for timing in trained)}


def get_device() -> str:
    """Return cuda, mps or cpu: one device a process."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def count_devices() -> int:
    """Return how many accelerators this machine shows; a process uses one."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1


def count_cores(respects_threads: bool = False) -> int:
    """Return how many cores this process may use: of the system's, and of its container's share.

    Args:
        respects_threads: no more than the threads that torch would use, which users set.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = _read_control_group("cpu.max").split()
    if len(share) == 2 and share[0] != "max":
        cores = min(cores or 1, max(1, int(share[0]) // int(share[1])))
    return max(1, min(cores or 1, torch.get_num_threads() if respects_threads else cores or 1))


def get_memory_bytes() -> int:
    """Return the memory of this machine, or that its container may use."""
    limit = _read_control_group("memory.max").strip()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, int(limit)) if limit.isdecimal() else total


def _read_control_group(name: str) -> str:
    """Return what Linux says of this process's container; nothing elsewhere."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii") if path.is_file() else ""


def has_fast_bf16(device: str) -> bool:
    """Return whether the hardware multiplies bfloat16 natively; emulated it would be slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return cpu_multiplies_bf16()
    return False


def is_sharded() -> bool:
    """Return whether the launcher asked for FSDP, which cuts the model over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def choose_precision(training: Mapping[str, object]) -> dict[str, bool]:
    """Return `bf16` and `fp16` for TrainingArguments: the recipe's, else bf16 where it is fast."""
    if training.get("bf16") is not None or training.get("fp16"):
        return {"bf16": bool(training.get("bf16")), "fp16": bool(training.get("fp16"))}
    return {"bf16": has_fast_bf16(get_device()), "fp16": False}


def get_dtype_name(training: Mapping[str, object]) -> str:
    """Return bf16, fp16 or fp32: what training multiplies in. Predictions are always fp32."""
    chosen = choose_precision(training)
    return "bf16" if chosen["bf16"] else "fp16" if chosen["fp16"] else "fp32"
