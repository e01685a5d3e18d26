"""Check what the benchmark of speed runs and prints, without a clock."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hftl.config.recipe import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_every_job_is_a_recipe_of_its_strategy(load: Any, tmp_path: Path) -> None:
    jobs, hftl = load("speed_jobs"), load("speed_hftl")
    for name, job in jobs.JOBS.items():
        if job.kind in ("steps", "predict"):
            continue
        inputs = jobs.Inputs(tmp_path, "model", True, job)
        recipe = Recipe.parse(hftl.build_recipe(inputs))
        assert bool(recipe.stages) == (job.kind == "adapt"), name
        if job.kind != "adapt":
            assert recipe.finetune.strategy == job.strategy, name
            assert (recipe.retain is not None) == (job.kl > 0), name
            assert len(recipe.measure.seeds) == job.seeds, name
            assert len(recipe.arms) == (8 if job.kind == "rates" else 1), name


def test_a_job_survives_the_way_to_its_contenders(load: Any, tmp_path: Path) -> None:
    jobs = load("speed_jobs")
    job = jobs.JOBS["lora-top-2-kl"].scale(40)
    assert (job.train, job.validation, job.test) == (40, 10, 40)
    inputs = jobs.Inputs(tmp_path, "model", True, job)
    inputs.write()
    assert jobs.Inputs.read(tmp_path) == inputs


def test_the_stored_tables_are_those_of_the_stored_pairs(load: Any) -> None:
    figures = load("speed_figures")
    stored = figures.SpeedResults.read(figures.RESULT)
    assert stored.jobs
    assert stored.table == figures.format_table(stored)
    assert stored.short_table == figures.format_short_table(stored)
    for job in stored.jobs.values():
        assert job.difference is None or job.difference <= 1e-4


def build_figures(load: Any, *pairs: tuple[float, float]) -> Any:
    figures, usage = load("speed_figures"), load("speed_process").Usage
    environment = figures.Environment(
        cpu="", cores=2, threads=2, device="cpu", code="", versions={}
    )
    peak = load("speed_flops").Peak(fp32=100, bf16=400, trains_bf16=True, device="cpu")
    taken = [
        {
            name: usage(train=t, whole=2 * t, cpu=t, anonymous=None, resident=1)
            for name, t in zip(("hftl", "tuned"), pair, strict=True)
        }
        for pair in pairs
    ]
    return figures.JobFigures(
        environment=environment, peak=peak, rows={}, precision="bf16", flops=4e11,
        difference=None, pairs=taken,
    )  # fmt: skip


def test_ratios_are_taken_within_pairs_and_use_is_a_share_of_the_peak(load: Any) -> None:
    figures, peer = load("speed_figures"), load("speed_jobs").Peer("tuned")
    job = build_figures(load, (2, 3), (4, 4), (1, 5))
    assert job.list_ratios(peer, "train") == [1.5, 1, 5]
    assert figures.format_ratio(job, peer, "whole") == "1.50 [1.00, 5.00]"
    assert figures.format_median(job, peer, "anonymous") == "-"
    assert job.utilisation == pytest.approx(4e11 / 2 / 400e9)
    part = replace(peer, share=0.25)
    assert job.list_ratios(part, "train") and not job.list_ratios(part, "whole")


def test_the_slope_over_rows_is_one_where_seconds_grow_with_them(load: Any) -> None:
    figures = [build_figures(load, (seconds, 1)) for seconds in (1, 4, 16)]
    sweep = load("speed_figures").Sweep(values=[250, 1000, 4000], figures=figures)
    assert sweep.compute_slope() == pytest.approx(1.0)


def test_a_process_s_seconds_lines_and_memory_are_measured(load: Any) -> None:
    code = "import time; big = bytearray(b'x') * (60 << 20); print(1); time.sleep(.3); print(2)"
    usage, lines = load("speed_process").run_process([sys.executable, "-uc", code], {})
    assert [line for _, line in lines] == ["1", "2"]
    assert usage.whole >= lines[1][0] >= lines[0][0] + 0.25
    assert 60 <= usage.anonymous < 110
    assert usage.anonymous <= usage.resident
    with pytest.raises(SystemExit, match="ended with 3\n.*broken"):
        code = "import sys; print('broken', file=sys.stderr); sys.exit(3)"
        load("speed_process").run_process([sys.executable, "-c", code], {})


def test_flops_are_those_of_the_cheapest_exact_algorithm(load: Any, tmp_path: Path) -> None:
    jobs, flops = load("speed_jobs"), load("speed_flops")
    full = replace(jobs.JOBS["full"], epochs=2, source="vit-small", train=10, validation=5, test=5)
    row = flops.Shape(**load("speed_inputs").SHAPES["vit-small"]).count_layer([50])
    assert row == 50 * (24 * 384**2 + 4 * 50 * 384)

    def count(job: Any) -> float:
        return flops.count_training(jobs.Inputs(tmp_path, "", False, job)) / row

    assert count(full) == pytest.approx(2 * 12 * (3 * 10 + 5))
    top = replace(full, strategy="partial", blocks=1)
    assert count(top) == pytest.approx(11 * 15 + 2 * (3 * 10 + 5))
    assert count(replace(full, strategy="head")) == pytest.approx(12 * 20)


def test_operations_are_counted(load: Any) -> None:
    import torch

    with load("speed_counts").count_operations("Linear") as counts:
        layer = torch.nn.Linear(4, 8)
        layer(torch.ones(3, 5, 4)).sum().item()
    assert counts.tokens == 15
    assert counts.flops == 2 * 15 * 4 * 8
    assert counts.syncs == 1


def test_hftl_does_no_more_than_its_peers(load: Any) -> None:
    assert len(load("speed_quick").check_counts(["lora", "top-1"])) == 2


@pytest.mark.slow
def test_hftl_does_no_more_than_its_peers_in_any_job(load: Any) -> None:
    quick = load("speed_quick")
    assert len(quick.check_counts()) == len(quick.BOUNDS)
