"""Check the energy of trainings, by a stand-in for codecarbon or by itself where installed."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hftl.card.sections import format_environment
from hftl.measure.record import describe_environment
from hftl.runtime import distributed
from hftl.runtime.hardware import measure_energy, sum_energy


class Tracker:
    """Stand in for codecarbon's tracker."""

    running = 0

    def __init__(self, **arguments: Any) -> None:
        assert arguments["save_to_file"] is False

    def start(self) -> None:
        Tracker.running += 1

    def stop(self) -> None:
        Tracker.running -= 1
        self.final_emissions_data = SimpleNamespace(energy_consumed=0.25)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    codecarbon: Any = ModuleType("codecarbon")
    codecarbon.OfflineEmissionsTracker = Tracker
    codecarbon.__spec__ = ModuleSpec("codecarbon", None)
    monkeypatch.setitem(sys.modules, "codecarbon", codecarbon)
    return Tracker


def test_energy_is_codecarbons_estimate(tracker: Any) -> None:
    with measure_energy() as report:
        assert tracker.running == 1 and report == {}
    assert report == {"energy_kwh": 0.25} and tracker.running == 0


def test_failure_stops_the_tracker(tracker: Any) -> None:
    with pytest.raises(KeyboardInterrupt), measure_energy():
        raise KeyboardInterrupt
    assert tracker.running == 0


def test_only_the_main_process_measures(tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with measure_energy() as report:
        assert tracker.running == 0
    assert report == {}


def test_energy_is_reported_only_with_codecarbon() -> None:
    with measure_energy() as report:
        sum(range(1_000_000))
    assert report == {} if find_spec("codecarbon") is None else 0 < report["energy_kwh"] < 1


def test_record_sums_energy_where_every_training_was_measured() -> None:
    took = {"train_seconds": 1.0, "predict_seconds": 1.0, "energy_kwh": 0.5}
    solved = {"train_seconds": 1.0}
    timings = {"lora-seed0": took, "lora-seed1": took, "head-seed0": solved}
    assert sum_energy(timings) == {"energy_kwh": 1.0}
    assert sum_energy({"lora-seed0": took, "lora-seed1": took | {"energy_kwh": 0.0}}) != {}
    del took["energy_kwh"]
    assert sum_energy({"lora-seed0": took}) == {} == sum_energy({"head-seed0": solved})


def test_card_shows_energy_with_its_unit() -> None:
    energy = "0.0123 kWh for all arms and seeds, as codecarbon estimates it"
    environment = describe_environment("cpu", "float32", {"energy_kwh": 0.01234})
    assert ("energy", energy) in format_environment(environment)
    assert "energy" not in dict(format_environment(describe_environment("cpu", "float32")))
