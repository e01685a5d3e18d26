"""The energy that work takes, where codecarbon is installed to estimate it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hftl import processes


@contextmanager
def metered() -> Iterator[dict[str, float]]:
    """Estimates the energy of the work within: `energy_kwh`, once it has ended.

    Nothing is told without codecarbon, or on another process than the main one, whose machine's
    processor, memory and GPUs are counted, whoever uses them. It asks nothing of the network.
    """
    told: dict[str, float] = {}
    if not processes.is_main() or find_spec("codecarbon") is None:
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


def emissions(spent: dict[str, float], grams_per_kwh: float | None) -> dict[str, float]:
    """Return `co2_grams` of the energy, where both it and the location's electricity are known."""
    if grams_per_kwh is None or "energy_kwh" not in spent:
        return {}
    return {"co2_grams": spent["energy_kwh"] * grams_per_kwh}


def total(timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """`energy_kwh` of all trainings, where it was told of every one; those predict themselves."""
    trained = [took for took in timings.values() if "predict_seconds" in took]
    if not trained or any("energy_kwh" not in took for took in trained):
        return {}
    return {"energy_kwh": sum(took["energy_kwh"] for took in trained)}
