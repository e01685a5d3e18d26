"""Make many whole runs in one process: memory stays flat, and no file stays open or behind."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures, sentences, write_csv

import hftl
from hftl.config.recipe import Recipe

pytestmark = pytest.mark.usefixtures("fast_reload")

RUNS = 200
WARM_UP = 40
MAX_GROWTH = 0.05


def measure_resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def list_open_files() -> list[str]:
    paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sorted(path for path in paths if not path.startswith("/proc"))


def build_recipes(folder: Path, tiny_model: Callable[..., Path]) -> list[Recipe]:
    """Return recipes of texts and of pictures, by strategies that keep different things."""
    table = write_csv(folder / "a.csv", ["text", "label"], sentences(40))
    text: dict[str, Any] = {"train": {"path": str(table)}, "max_length": 16}
    image: dict[str, Any] = {"train": {"path": str(pictures(folder / "photos", 10))}}
    training = {"max_steps": 3, "learning_rate": 1e-3, "bf16": False}
    return [
        Recipe.parse({
            "source": {"model": str(tiny_model(model))}, "data": data,
            "finetune": {"strategy": strategy, "training": training},
            "measure": {"seeds": [0], "arms": ["head"]},
        })
        for model, data, strategy in (
            ("bert", text, "lora"), ("vit", image, "full"), ("bert", text, "partial"),
            ("vit", image, "lora"),
        )
    ]  # fmt: skip


@pytest.mark.slow
def test_many_short_runs_leave_nothing_behind(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make runs from their data to the published folder, each in a folder of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    recipes = build_recipes(tmp_path, tiny_model)
    before: tuple[int, list[str]] | None = None
    for number in range(RUNS):
        assert hftl.run(recipes[number % len(recipes)], tmp_path / "run", progress=False)
        assert (tmp_path / "run" / "publish" / "README.md").exists()
        shutil.rmtree(tmp_path / "run")
        if number + 1 == WARM_UP:
            before = measure_resident_bytes(), list_open_files()
    assert before is not None
    grown = measure_resident_bytes() / before[0] - 1
    print(f"{RUNS - WARM_UP} runs: {before[0] / 2**20:.0f} MB, grown by {grown:.2%}")
    assert grown < MAX_GROWTH
    assert list_open_files() == before[1]
    assert not list((tmp_path / "temporary").iterdir())
