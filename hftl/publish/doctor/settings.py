"""adapter_config.json by itself: the numbers that scale an adapter."""

import math
from collections.abc import Iterator
from typing import Any

from hftl.publish.doctor.finding import Finding, defect, warning
from hftl.publish.doctor.patient import ADAPTER, Patient
from hftl.publish.doctor.stale import module_of


def scaling(patient: Patient) -> Iterator[Finding]:
    """Rank and alpha that cannot be, or that fit no tensor of the file."""
    told = patient.settings
    if told.get("peft_type") != "LORA":
        return
    r, alpha = told.get("r"), told.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        yield _rank(f"r is {r!r}, expected a whole number above 0")
    if not _finite(alpha) or alpha == 0:
        yield _rank(f"lora_alpha is {alpha!r}, expected a number that is not 0")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = told.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(_finite, pattern.values())):
            yield _rank(f"{name} is {pattern!r}, expected a number for each name")
            continue
        modules = {module_of(key) for key in patient.shapes}
        for key in pattern:
            # peft reads the name as an expression; the plain end of it is enough to look for.
            end = key.rsplit(".", 1)[-1].strip("^$()\\")
            if modules and not any(end in module for module in modules):
                yield warning("rank", f"{name} names {key}, which the adapter has not", ADAPTER,
                              "Remove it")  # fmt: skip


def _rank(what: str) -> Finding:
    return defect("rank", what, ADAPTER, "Write what it was trained with")


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
