"""Check that runs without a fault are seldom called faulty, and that the simulations see faults."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

spec = spec_from_file_location("false_alarms", BENCHMARKS / "false_alarms.py")
assert spec is not None and spec.loader is not None
false_alarms = module_from_spec(spec)
spec.loader.exec_module(false_alarms)

PARTS = ("slices", "label_shift", "predicted_shift")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    text = (BENCHMARKS / "results" / "false_alarms.json").read_text("utf-8")
    return json.loads(text)


@pytest.mark.parametrize("part", PARTS)
def test_at_most_a_twentieth_of_the_stored_runs_alarm(part: str, stored: dict[str, Any]) -> None:
    assert len(stored[part]) >= 4
    for row in stored[part]:
        assert row["runs"] >= 200 and row["alarms"] <= row["runs"] / 20, row


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_stored_counts_are_drawn_again(part: str, stored: dict[str, Any]) -> None:
    assert false_alarms.PARTS[part](stored[part][0]["runs"]) == stored[part]


def test_a_lost_slice_and_moved_classes_alarm() -> None:
    rng = np.random.default_rng(0)
    assert all(false_alarms.has_losing_slice(rng, 3, 400, 0.05, lost=0.6) for _ in range(3))
    assert all(false_alarms.has_shifted_table(rng, 5, 1000, 1, moved=0.3) for _ in range(5))
