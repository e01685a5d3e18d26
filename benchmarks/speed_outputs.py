"""Compare what the contenders of the benchmark of speed wrote, where it may not differ."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from speed_hftl import find_run
from speed_jobs import Inputs

CLASSES = ("negative", "positive")


def compare_outputs(inputs: Inputs) -> float | None:
    """Return the largest difference of a prediction or a score; None where it differs by chance."""
    if inputs.job.kind == "predict":
        return compare_predictions(inputs)
    return compare_arms(inputs) if inputs.job.seeds > 1 else None


def compare_predictions(inputs: Inputs) -> float:
    """Return the largest difference of a class's probability between two tables."""
    ours, others = (pd.read_csv(inputs.folder / f"{name}.csv") for name in ("hftl", "peer"))
    shares = [table[list(CLASSES)].to_numpy() for table in (ours, others)]
    return float(np.abs(np.subtract(*shares)).max())


def compare_arms(inputs: Inputs) -> float:
    """Return the largest difference of a test score between two processes and one."""
    differences = []
    for folder in sorted((find_run(inputs, "hftl") / "arms").iterdir()):
        other = find_run(inputs, "one-process") / "arms" / folder.name
        scores = [
            json.loads((arm / "metrics.json").read_text("utf-8"))["metrics"]["test"]
            for arm in (folder, other)
        ]
        differences += [abs(value - scores[1][name]) for name, value in scores[0].items()]
    return max(differences)
