"""Weights that are no numbers, or that change nothing."""

from collections.abc import Iterator

from hftl.publish.doctor.finding import Finding, defect, several
from hftl.publish.doctor.patient import WEIGHTS, Patient


def not_finite(patient: Patient) -> Iterator[Finding]:
    """Every file with NaN or infinity in it; one tensor is in memory at a time."""
    from safetensors import SafetensorError, safe_open

    for name in patient.weight_files:
        try:
            with safe_open(patient.folder / name, "pt") as file:
                keys = sorted(file.keys())
                bad = [key for key in keys if not bool(file.get_tensor(key).isfinite().all())]
        except (SafetensorError, OSError):
            # The header did not open either, which is told already.
            continue
        if bad:
            yield defect("nan", f"NaN or infinity in {several(bad)}", name,
                         "Train again with a lower learning rate")  # fmt: skip


def untrained(patient: Patient) -> Iterator[Finding]:
    """Say where every `lora_B` is zero, as before training: such an adapter changes nothing."""
    from safetensors import SafetensorError, safe_open

    keys = [key for key in patient.shapes if ".lora_B" in key or ".lora_embedding_B" in key]
    if not patient.is_adapter or not keys:
        return
    try:
        with safe_open(patient.folder / WEIGHTS, "pt") as file:
            if any(bool(file.get_tensor(key).any()) for key in keys):
                return
    except (SafetensorError, OSError):
        return  # reported already
    yield defect(
        "untrained", f"all {len(keys)} lora_B are zero: the adapter changes nothing", WEIGHTS,
        "Save it after training, with its parameters in the optimizer",
    )  # fmt: skip
