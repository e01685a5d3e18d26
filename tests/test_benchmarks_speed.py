"""Check what the benchmark of speed runs and prints, without a clock."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from hftl.config.recipe import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed")


def test_every_job_is_a_recipe_of_its_strategy(speed: Any, tmp_path: Path) -> None:
    for job in speed.JOBS.values():
        recipe = Recipe.parse(speed.build_recipe(job, tmp_path))
        assert recipe.finetune.strategy == job.strategy
        assert (recipe.retain is not None) == (job.kl > 0)


def test_the_stored_table_is_that_of_the_stored_pairs(speed: Any) -> None:
    stored = speed.json.loads(speed.RESULT.read_text())
    assert stored["table"] == speed.format_table(stored["jobs"])
    for figures in stored["jobs"].values():
        ratios = [pair["peer"]["train"] / pair["hftl"]["train"] for pair in figures["pairs"]]
        assert figures["train"] == [speed.statistics.median(ratios), min(ratios), max(ratios)]
        assert figures["loss_difference"] <= 1e-4
