"""The energy of trainings, from a stand-in for codecarbon, or itself where it is installed."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hftl.card.sections import format_environment
from hftl.measure.record import describe_environment
from hftl.runtime import distributed
from hftl.runtime.hardware import measure_energy, sum_energy

STAND_IN = """
from types import SimpleNamespace


class OfflineEmissionsTracker:
    running = 0

    def __init__(self, **given):
        assert given["save_to_file"] is False

    def start(self):
        OfflineEmissionsTracker.running += 1

    def stop(self):
        OfflineEmissionsTracker.running -= 1
        self.final_emissions_data = SimpleNamespace(energy_consumed=0.25)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "codecarbon.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    yield importlib.import_module("codecarbon").OfflineEmissionsTracker
    sys.modules.pop("codecarbon")


def test_what_codecarbon_estimates_is_told(stand_in: Any) -> None:
    with measure_energy() as report:
        assert stand_in.running == 1 and report == {}
    assert report == {"energy_kwh": 0.25} and stand_in.running == 0


def test_a_failure_stops_the_tracker(stand_in: Any) -> None:
    with pytest.raises(KeyboardInterrupt), measure_energy():
        raise KeyboardInterrupt
    assert stand_in.running == 0


def test_another_process_tells_nothing(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with measure_energy() as report:
        assert stand_in.running == 0
    assert report == {}


@pytest.mark.skipif(find_spec("codecarbon") is not None, reason="codecarbon is installed")
def test_nothing_is_told_without_codecarbon() -> None:
    with measure_energy() as report:
        pass
    assert report == {}


@pytest.mark.skipif(find_spec("codecarbon") is None, reason="codecarbon is not installed")
def test_codecarbon_itself() -> None:
    with measure_energy() as report:
        sum(range(1_000_000))
    assert 0 < report["energy_kwh"] < 1


def test_the_record_tells_the_sum_where_every_training_was_measured() -> None:
    took = {"train_seconds": 1.0, "predict_seconds": 1.0, "energy_kwh": 0.5}
    solved = {"train_seconds": 1.0}
    assert sum_energy({"lora-seed0": took, "lora-seed1": took, "head-seed0": solved}) == {
        "energy_kwh": 1.0
    }
    assert sum_energy({"lora-seed0": took, "lora-seed1": took | {"energy_kwh": 0.0}}) != {}
    del took["energy_kwh"]
    assert sum_energy({"lora-seed0": took}) == {} == sum_energy({"head-seed0": solved})


def test_the_card_tells_it_with_its_unit() -> None:
    energy = "0.0123 kWh for all arms and seeds, as codecarbon estimates it"
    environment = describe_environment("cpu", "float32", {"energy_kwh": 0.01234})
    assert ("energy", energy) in format_environment(environment)
    assert "energy" not in dict(format_environment(describe_environment("cpu", "float32")))
