"""Train many arms in one process: memory stays flat, and no file stays open or behind."""

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import bench_of

from hftl.config.recipe import Recipe
from hftl.finetune.arm import train_arm

RUNS = 200
WARM_UP = 40
MAX_GROWTH = 0.05


def measure_resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def list_open_files() -> list[str]:
    paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sorted(path for path in paths if not path.startswith("/proc"))


@pytest.mark.slow
def test_many_short_trainings_leave_nothing_behind(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    training = recipe_tree["finetune"]["training"] | {"max_steps": 3}
    finetune = {"pooling": "mean", "training": training}
    contexts = [
        (bench_of(recipe), recipe)
        for strategy in ("lora", "full", "partial")
        for recipe in [Recipe.parse(recipe_tree | {"finetune": finetune | {"strategy": strategy}})]
    ]
    before: tuple[int, list[str]] | None = None
    for number in range(RUNS):
        context, recipe = contexts[number % len(contexts)]
        train_arm(context, recipe.finetune, number % 2, compared=False)
        if number + 1 == WARM_UP:
            before = measure_resident_bytes(), list_open_files()
    assert before is not None
    grown = measure_resident_bytes() / before[0] - 1
    print(f"{RUNS - WARM_UP} trainings: {before[0] / 2**20:.0f} MB, grown by {grown:.2%}")
    assert grown < MAX_GROWTH
    assert list_open_files() == before[1]
    assert not list((tmp_path / "temporary").iterdir())
