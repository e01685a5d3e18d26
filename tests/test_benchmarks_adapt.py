"""Run the benchmarks of adaptation on tiny shapes: they compare like with like."""

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def mlm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("adapt_mlm")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("adapt_memory")


@pytest.fixture
def shape(mlm: Any) -> Any:
    return mlm.Shape(16, 2, 2, 32, speed=1, memory=1, steps=3, vocabulary=1200, rows=4, length=32)


@pytest.fixture
def calls(mlm: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run tasks in this process, not in fresh ones, and list them with their settings."""
    calls: list[Any] = []

    def run_alone(task: Any, *arguments: Any, **settings: str) -> Any:
        calls.append((task.__name__, arguments[0], bool(settings)))
        return task(*arguments)

    monkeypatch.setattr(mlm, "run_alone", run_alone)
    return calls


def test_both_contenders_train_alike_and_are_measured_in_turn(
    mlm: Any, shape: Any, calls: list[Any]
) -> None:
    result = mlm.compare(shape, 2)
    assert result["loss_difference"] < 1e-5
    assert calls[:2] == [("compute_losses", "hftl", False), ("compute_losses", "trainer", False)]
    order = [(who, settings) for task, who, settings in calls if task == "measure"]
    assert order == [
        ("hftl", False), ("trainer", False), ("trainer", False), ("hftl", False),
        ("hftl", True), ("trainer", True),
    ]  # fmt: skip
    one = result["pairs"][0]
    assert one["hftl"]["gradients"] == one["trainer"]["gradients"] > 0
    assert one["hftl"]["state"] == pytest.approx(2 * one["hftl"]["gradients"], rel=1e-3)
    speeds = [pair["hftl"]["tokens_per_second"] / pair["trainer"]["tokens_per_second"]
              for pair in result["pairs"]]  # fmt: skip
    assert result["speed"] == {"median": sum(speeds) / 2, "min": min(speeds), "max": max(speeds)}
    assert len(mlm.format_table({"tiny": result})) == 6


def test_nothing_is_timed_where_the_losses_differ(
    mlm: Any, shape: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mlm.build_stock_collator

    def shifted(data: Any) -> Any:
        collate = whole(data)
        return lambda rows: collate(rows[::-1][1:])

    monkeypatch.setattr(mlm, "build_stock_collator", shifted)
    with pytest.raises(SystemExit, match="do not train alike"):
        mlm.compare(shape, 1)
    assert {task for task, *_ in calls} == {"compute_losses"}


def test_the_peer_s_batches_hold_the_same_tokens_and_labels(
    mlm: Any, shape: Any, tmp_path: Path
) -> None:
    mlm.write_inputs(replace(shape, rows=8), tmp_path)
    data = mlm.load_masked_blocks(shape, tmp_path)
    rows = [data[i] for i in range(5)]
    ours, theirs = data.collate(rows), mlm.build_stock_collator(data)(rows)
    assert theirs["input_ids"].shape == theirs["labels"].shape == (5, shape.length)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    for row, labels in zip(rows, theirs["labels"], strict=True):
        assert labels[row["positions"]].tolist() == row["labels"].tolist()
        assert (labels != -100).sum() == len(row["positions"]) > 0


def test_a_fresh_process_has_its_settings_and_this_one_keeps_its_own(
    mlm: Any,
) -> None:
    assert mlm.run_alone(os.getenv, "HFTL_SEEN", HFTL_SEEN="yes") == "yes"
    assert "HFTL_SEEN" not in os.environ
    assert mlm.run_alone(os.getpid) != os.getpid()


def test_the_corpus_has_its_size_and_distinct_lines(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "list_words", lambda: ["the", "of", "cat", "house"])
    monkeypatch.setattr(memory, "WORDS_AT_ONCE", 100)
    file = tmp_path / "corpus.txt"
    lines = memory.write_corpus(file, 50_000, 80)
    written = file.read_text(encoding="utf-8").splitlines()
    assert len(written) == lines == len(set(written))
    assert 50_000 <= file.stat().st_size < 50_200
    assert 60 < file.stat().st_size / lines < 110
    memory.write_corpus(tmp_path / "again.txt", 50_000, 80)
    assert (tmp_path / "again.txt").read_bytes() == file.read_bytes()


def test_the_memory_of_a_process_is_seen_by_phase(memory: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = (
        "import sys, time, pathlib\ntime.sleep(.3)\n"
        "big = bytearray(b'x') * (100 << 20)\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(.5)"
    )
    usage = memory.run_and_watch(
        [sys.executable, "-c", code, str(mark)], lambda: "after" if mark.exists() else "before"
    )
    after = usage["phases"]["after"]
    assert 100 < after["anonymous"] <= after["resident"] < 150
    assert sum(phase["seconds"] for phase in usage["phases"].values()) <= usage["seconds"]
    with pytest.raises(SystemExit, match="ended with 3"):
        memory.run_and_watch([sys.executable, "-c", "raise SystemExit(3)"], lambda: "all")


def test_the_large_corpus_is_held_against_the_weights_and_the_small_one(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(size: int, line: int, batch: int, folder: Path) -> dict[str, Any]:
        used = {"resident": 1000.0 + size, "anonymous": 900.0, "files": 90.0, "seconds": 5.0}
        phases = {"corpus": used, "training": {**used, "resident": 800.0}}
        return {"megabytes": size, "lines": 7, "tokens": 70, "seconds": 10.0, "phases": phases}

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "write_source", lambda folder: folder)
    monkeypatch.setattr(memory.paths, "resolve_local_path", lambda *_: tmp_path)
    into = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["adapt_memory.py", "--size", "50", "--into", str(into)])
    memory.main()
    results = json.loads(into.read_text(encoding="utf-8"))
    assert results["weights"] == 3
    assert results["beyond_weights"] == 1050 - 3
    assert results["beyond_small"] == 49
    assert len(results["table"]) == 1 + 2 * 2 + 2
