"""The device and the precision, decided once and recorded."""

import os
from typing import Any

import torch


def device() -> str:
    """cuda, mps or cpu: one device a process."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def visible_devices() -> int:
    """How many accelerators this machine shows; a process uses one."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1


def fast_bf16(where: str) -> bool:
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


def precision(training: dict[str, Any]) -> dict[str, bool]:
    """`bf16` and `fp16` for TrainingArguments: what the recipe says, else bf16 where it is fast."""
    if training.get("bf16") is not None or training.get("fp16"):
        return {"bf16": bool(training.get("bf16")), "fp16": bool(training.get("fp16"))}
    return {"bf16": fast_bf16(device()), "fp16": False}


def dtype_name(training: dict[str, Any]) -> str:
    """bf16, fp16 or fp32: what training multiplies in. Predictions are always fp32."""
    chosen = precision(training)
    return "bf16" if chosen["bf16"] else "fp16" if chosen["fp16"] else "fp32"
