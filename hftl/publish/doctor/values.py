"""Weights that are no numbers."""

from collections.abc import Iterator

from hftl.publish.doctor.finding import Finding, defect, several
from hftl.publish.doctor.patient import Patient


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
