"""How long a run will take, from a timed forward pass."""

import time

from hftl.finetune.embed import compared
from hftl.finetune.workbench import MEASURED, Workbench
from hftl.model.anatomy import count_blocks
from hftl.model.cache import frozen_features
from hftl.recipe import Arm, Recipe

SAMPLE = 128
STEP = 4.0
"""A training step costs about four forward passes: its own, the backward one and the optimizer."""
SEARCHED = 1 / 3


def estimate_seconds(bench: Workbench, jobs: list[Arm], recipe: Recipe) -> float:
    """Seconds for the arms given, one entry an arm and seed; rough, within a factor of two."""
    train = bench.train_rows(recipe.measure.seeds[0])
    measured = sum(len(bench.prepared.rows[split]) for split in MEASURED)
    embedded = sum(map(len, compared(bench).values()))
    per_row = _seconds_a_row(bench, recipe.finetune.pooling)
    total = 0.0
    searched = False
    for arm in jobs:
        if arm.strategy not in ("lora", "partial", "gradual", "full", "scratch"):
            continue
        epochs = float(arm.finetune.training["num_train_epochs"])
        if arm.strategy == "gradual":
            phased = arm.finetune.gradual
            epochs = phased.epochs * (count_blocks(bench.source.config) + 1) + phased.final_epochs
        if arm.strategy == "scratch":
            search = recipe.measure.scratch
            epochs *= search.epochs_factor
            if not searched:
                tried = len(search.learning_rates) * epochs * SEARCHED
                total += tried * len(train) * STEP * per_row
                searched = True
        validation = len(bench.prepared.rows["validation"])
        total += epochs * (len(train) * STEP + validation) * per_row + measured * per_row
        total += embedded * per_row if arm.strategy != "scratch" else 0.0
    return total + (len(train) + measured) * per_row


def _seconds_a_row(bench: Workbench, pooling: str) -> float:
    rows = bench.prepared.rows["test"][:SAMPLE]
    built = bench.build(pooling, 0)
    built.model.to(bench.device)
    encoded = bench.encoded(rows)
    frozen_features(built.model, built.last_linear, encoded[:8], bench.inputs, bench.device)
    started = time.perf_counter()
    frozen_features(built.model, built.last_linear, encoded, bench.inputs, bench.device)
    return (time.perf_counter() - started) / len(rows)
