"""Run a small sample of benchmarks/calibration.py: p-values and verdicts err as often as said."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hftl.measure.gain import SplitPredictions, compute_gain
from hftl.measure.metrics import find_metric
from hftl.measure.statistics import assign_blocks, jackknife

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import calibration  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / "calibration.json").read_text("utf-8"))


@pytest.mark.parametrize("units", [np.arange(30), np.arange(900), calibration.build_groups(90)])
def test_block_values_are_those_of_the_jackknife(units: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    differences = rng.integers(-1, 2, size=(2, len(units)))
    values = calibration.compute_block_values(differences, units)
    for row, block in zip(differences, values, strict=True):
        np.testing.assert_allclose(block, jackknife(lambda i, r=row: float(r[i].mean()), units))
    assert values.shape == (2, len(np.unique(assign_blocks(units))))


def test_the_simulation_estimates_what_a_run_estimates() -> None:
    units = calibration.build_groups(60)
    rng = np.random.default_rng(1)
    rights = rng.random((2, 6, len(units))) < 0.7
    labels = np.zeros(len(units), int)
    predictions = SplitPredictions(
        labels, units, {"a": (~rights[0]).astype(int), "b": (~rights[1]).astype(int)}
    )
    measured = compute_gain(find_metric("accuracy", "classification"), predictions, "a", "b")
    differences = rights[0].astype(int) - rights[1]
    error = calibration.compute_error(calibration.compute_block_values(differences, units), units)
    assert measured["p_value"] == pytest.approx(error.p_value(float(differences.mean())))
    assert measured["ci95"] == pytest.approx(error.interval(float(differences.mean())))


@pytest.mark.parametrize("seeds", [6, 8])
@pytest.mark.parametrize("units", [np.arange(200), calibration.build_groups(200)])
def test_p_of_equal_arms_is_uniform(seeds: int, units: np.ndarray) -> None:
    p = calibration.simulate_p_values(np.random.default_rng(0), seeds, units, 0.01, 1000)
    for level in (0.05, 0.01):
        assert abs(np.mean(p <= level) - level) <= 2 * (level * (1 - level) / len(p)) ** 0.5


@pytest.mark.parametrize("behind", [-0.03, 0.02])
def test_runs_without_a_gain_are_hardly_called_positive(behind: float) -> None:
    outcomes = calibration.simulate_null_outcomes(
        np.random.default_rng(0), 3, 400, 0.005, behind, 300
    )
    assert np.mean(outcomes["lesser"] == "positive") <= 0.05
    by_validation = np.mean(outcomes["validation"] == "positive")
    assert behind < 0 or by_validation > 0.05, "the choice on validation favours scratch"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["p_values", "positive"])
def test_every_setting_at_a_size_that_can_tell(part: str) -> None:
    check(part, calibration.PARTS[part](2000), 3.5)


@pytest.mark.parametrize("part", ["p_values", "positive"])
def test_the_stored_figures_are_right(part: str, stored: dict[str, Any]) -> None:
    check(part, stored[part], 3.0)


def test_the_stored_coverage_of_forgetting_is_right(stored: dict[str, Any]) -> None:
    """Each share is of a few hundred runs at most; probes err to the safe side."""
    rows = stored["forgetting"]
    names = [name for name in rows[-1] if name not in calibration.SETTING_KEYS]
    assert {"neighbours", "kl", "cka", "document same", "tone probe_fixed"} <= set(names)
    for name in names:
        shares = [row[name] for row in rows if name in row]
        assert min(shares) >= 0.9, name
        assert 0.93 <= np.mean(shares) <= (1 if "probe" in name else 0.975), name


def check(part: str, rows: list[dict[str, Any]], errors: float) -> None:
    """Assert of every setting that it is right; of many the worst may be `errors` away.

    16 groups of 1 to 11 rows are few and unequal enough that p errs to the safe side.
    """
    for row in rows:
        if part == "positive":
            assert row["positive"] <= 0.05 and row["negative"] <= 0.05, row
            continue
        slack = 1 if row["groups"] == 16 else 0
        for level in (0.05, 0.01):
            assert -errors - slack <= row[f"standard_errors_{level}"] <= errors, row
    if part == "p_values":
        off = [abs(row[f"standard_errors_{level}"]) for row in rows for level in (0.05, 0.01)]
        assert np.mean(np.array(off) <= 2) >= 0.85
