"""The arms' files side by side: what every figure of the record is computed from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hftl.data.load import Row
from hftl.data.prepare import Prepared
from hftl.finetune.store import Stored, read
from hftl.finetune.workbench import MEASURED
from hftl.measure.gain import Predicted
from hftl.metrics import METRICS, Metric, compute


def collect(
    folders: Mapping[str, list[Path]], prepared: Prepared, metric: Metric
) -> tuple[dict[str, Predicted], list[dict[str, Any]]]:
    """Predictions of all arms a split, and the record's `arms`.

    Args:
        folders: for each arm its folders, one a seed, seeds in one order for all.
        prepared: the rows that were predicted.
        metric: the metric of the recipe, which the arms need not have computed.
    """
    stored = {arm: [read(folder, prepared) for folder in found] for arm, found in folders.items()}
    told = {}
    for split in MEASURED:
        rows = prepared.rows[split]
        predictions = {arm: np.stack([s.predictions[split] for s in found])
                       for arm, found in stored.items()}  # fmt: skip
        told[split] = Predicted(prepared.measured(rows), units_of(rows), predictions)
    return told, [_entry(s, prepared, metric) for found in stored.values() for s in found]


def units_of(rows: list[Row]) -> np.ndarray:
    """An id for each row, (rows,) int64; rows of one group share theirs."""
    if rows[0].group is None:
        return np.arange(len(rows))
    _, ids = np.unique([str(row.group) for row in rows], return_inverse=True)
    return ids.astype(np.int64)


def _entry(stored: Stored, prepared: Prepared, metric: Metric) -> dict[str, Any]:
    built_in = list(METRICS[prepared.task].values())
    wanted = built_in if metric in built_in else [*built_in, metric]
    metrics = {s: compute(wanted, stored.labels[s], stored.predictions[s]) for s in MEASURED}
    kept = ("arm", "seed", "strategy", "trainable_parameters", "training")
    return {**{key: stored.told[key] for key in kept}, "metrics": metrics}
