"""Check that runs without a fault are seldom called faulty, and that the simulations see faults."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

spec = spec_from_file_location("false_alarms", BENCHMARKS / "false_alarms.py")
assert spec is not None and spec.loader is not None
false_alarms = module_from_spec(spec)
spec.loader.exec_module(false_alarms)

PARTS = ("slices", "label_shift", "predicted_shift", "label_map")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    text = (BENCHMARKS / "results" / "false_alarms.json").read_text("utf-8")
    return json.loads(text)


def count_allowed(runs: int, level: float) -> float:
    """Return the most alarms that a test of this level gives in all but one of 1 000 counts, and
    of a lax level a twentieth of the runs."""
    return min(runs / 20, float(binom.isf(0.001, runs, level)))


@pytest.mark.parametrize("part", PARTS)
def test_the_stored_runs_alarm_no_more_often_than_their_level(
    part: str, stored: dict[str, Any]
) -> None:
    rows, level = stored[part], false_alarms.LEVELS[part]
    assert len(rows) >= 4
    for row in rows:
        assert row["runs"] >= 200 and row["alarms"] <= count_allowed(row["runs"], level), row
    runs, alarms = (sum(row[key] for row in rows) for key in ("runs", "alarms"))
    assert alarms <= count_allowed(runs, level)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_stored_counts_are_drawn_again(part: str, stored: dict[str, Any]) -> None:
    assert false_alarms.PARTS[part](stored[part][0]["runs"]) == stored[part]


def test_a_lost_slice_and_moved_classes_alarm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert all(false_alarms.has_losing_slice(rng, 3, 400, 0.05, lost=0.6) for _ in range(3))
    assert all(false_alarms.has_shifted_table(rng, 5, 1000, 1, moved=0.3) for _ in range(5))
    table = false_alarms.write_texts(tmp_path)
    for size in (1, 8):
        assert false_alarms.has_shifted_predictions(rng, table, 5, 400, size, moved=0.6)
    for classes in (3, 20, 150):
        assert false_alarms.has_exchanged_labels(rng, classes, 0.8, exchanged=True)
