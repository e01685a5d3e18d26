"""The energy that work takes, where codecarbon is installed to estimate it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from hftl.runtime import distributed


@contextmanager
def measure_energy() -> Iterator[dict[str, float]]:
    """Estimates the energy of the work within: `energy_kwh`, once it has ended.

    Nothing is told without codecarbon, or on another process than the main one, whose machine's
    processor, memory and GPUs are counted, whoever uses them. It asks nothing of the network.
    """
    told: dict[str, float] = {}
    if not distributed.is_main() or find_spec("codecarbon") is None:
        yield told
        return
    codecarbon: Any = import_module("codecarbon")
    # The country decides on emissions, which are not told: where the machine stands is not known.
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA", save_to_file=False, allow_multiple_runs=True, log_level="critical"
    )
    tracker.start()
    try:
        yield told
    finally:
        tracker.stop()
    told["energy_kwh"] = float(tracker.final_emissions_data.energy_consumed)


def compute_emissions(spent: dict[str, float], grams_per_kwh: float | None) -> dict[str, float]:
    """Return `co2_grams` of the energy, where both it and the location's electricity are known."""
    if grams_per_kwh is None or "energy_kwh" not in spent:
        return {}
    return {"co2_grams": spent["energy_kwh"] * grams_per_kwh}


def sum_energy(timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """`energy_kwh` of all trainings, where it was told of every one; those predict themselves."""
    trained = [took for took in timings.values() if "predict_seconds" in took]
    if not trained or any("energy_kwh" not in took for took in trained):
        return {}
    return {"energy_kwh": sum(took["energy_kwh"] for took in trained)}


# The device and the precision, decided once and recorded.


def get_device() -> str:
    """cuda, mps or cpu: one device a process."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def count_devices() -> int:
    """How many accelerators this machine shows; a process uses one."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1


def has_fast_bf16(where: str) -> bool:
    """Whether the hardware multiplies bfloat16 natively; emulated it would be slower."""
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if where == "cpu":
        return bool(
            torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportAttributeAccessIssue]
            or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportAttributeAccessIssue]
        )
    return False


def is_sharded() -> bool:
    """Whether the launcher asked for FSDP, which cuts the model over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def choose_precision(training: dict[str, Any]) -> dict[str, bool]:
    """`bf16` and `fp16` for TrainingArguments: what the recipe says, else bf16 where it is fast."""
    if training.get("bf16") is not None or training.get("fp16"):
        return {"bf16": bool(training.get("bf16")), "fp16": bool(training.get("fp16"))}
    return {"bf16": has_fast_bf16(get_device()), "fp16": False}


def get_dtype_name(training: dict[str, Any]) -> str:
    """bf16, fp16 or fp32: what training multiplies in. Predictions are always fp32."""
    chosen = choose_precision(training)
    return "bf16" if chosen["bf16"] else "fp16" if chosen["fp16"] else "fp32"
