"""The weight of KL, chosen: of a short grid the one that forgets least at an equal score."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hftl import processes
from hftl.analyse.neighbours import agreement
from hftl.finetune.embed import embed_rows
from hftl.finetune.workbench import Workbench
from hftl.metrics import METRICS, SELECTION
from hftl.model.head import Built
from hftl.sections.retain import Retain
from hftl.statistics import jackknife, one_standard_error

GRID = (0.03, 0.1, 0.3, 1.0)
LOOKED = 1000
"""Rows whose neighbours tell what was forgotten, at most."""


def with_weight(retain: Retain, weight: float) -> Retain:
    """The section with a number for every weight that was to be chosen."""
    kls = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl for kl in retain.kls
    ]
    return retain.model_copy(update={"kl": kls})


def is_open(retain: Retain | None) -> bool:
    """Whether a weight is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kls)


def choose_weight(tried: Callable[[float], tuple[float, float, float]]) -> dict[str, Any]:
    """Tries the grid; the least forgetting within one standard error of the best score wins.

    Args:
        tried: of a weight the score on validation, more is better, its standard error, and how
            much was forgotten.

    Returns:
        `weight`, and what was `tried`: {weight, score, error, forgotten} each.
    """
    seen = [tried(weight) for weight in GRID]
    chosen = one_standard_error(*(list(column) for column in zip(*seen, strict=True)))
    return {
        "weight": GRID[chosen],
        "tried": [
            {"weight": weight, "score": score, "error": error, "forgotten": forgotten}
            for weight, (score, error, forgotten) in zip(GRID, seen, strict=True)
        ],
    }


def validation_score(bench: Workbench, logits: np.ndarray) -> tuple[float, float]:
    """The score on validation that arms are chosen by, more is better, and its standard error.

    Args:
        bench: the rows.
        logits: of the validation rows.
    """
    rows = bench.prepared.rows["validation"]
    metric = METRICS[bench.prepared.task][SELECTION[bench.prepared.task]]
    labels, told = bench.prepared.measured(rows), bench.told(rows, logits)
    groups = [str(i) if row.group is None else row.group for i, row in enumerate(rows)]
    units = np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def score(kept: np.ndarray) -> float:
        return metric.sign * metric.score(labels[kept], told[kept])

    if len(np.unique(units)) < 2:
        return score(np.arange(len(rows))), 0.0
    values = jackknife(score, units)
    return score(np.arange(len(rows))), float(values.std(ddof=1) / len(values) ** 0.5)


def forgotten(bench: Workbench, before: np.ndarray, built: Built) -> float:
    """The share of nearest neighbours that the model has lost; every process must come here.

    Args:
        bench: whose general rows that may be used are looked at, or else its validation rows.
        before: their embeddings under the original, see `looked_at`.
        built: the trained model.
    """
    after = looked_at(bench, built)
    return processes.share(lambda: 1 - agreement(before, after))


def looked_at(bench: Workbench, built: Built) -> np.ndarray:
    """(rows, width) embeddings of the rows that the choice of a weight looks at; the half of
    general data that is only measured is none of them."""
    general = bench.general
    rows = bench.prepared.rows["validation"] if general is None else general.used
    return embed_rows(bench, built, rows[:LOOKED])
