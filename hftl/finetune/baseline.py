"""What transfer must beat: the same architecture from scratch, and the majority.

Scratch gets a learning rate of its own and a longer budget (He et al. 2019, arXiv:1811.08883),
so that the gain is not the straw man's.
"""

from typing import Any

import numpy as np
import torch

from hftl.errors import NumericError
from hftl.finetune.arm import fit
from hftl.finetune.outcome import Outcome
from hftl.finetune.strategy import prepare
from hftl.finetune.workbench import MEASURED, Workbench
from hftl.metrics import METRICS, SELECTION, score_all
from hftl.progress import working
from hftl.sections.finetune import Finetune
from hftl.sections.measure import Search

SEARCH_SHARE = 1 / 3
"""Each rate is tried at this share of scratch's own budget."""
WARMUP = 0.1


def search_rate(
    bench: Workbench, finetune: Finetune, search: Search, seed: int
) -> dict[str, Any]:
    """Tries each rate once and chooses by validation, as epochs are chosen.

    Returns:
        `learning_rate`, the chosen one, `at_edge`, whether it is the lowest or highest given, and
        `tried`: each rate with its validation metrics, None where it diverged.

    Raises:
        NumericError: if every rate diverges.
    """
    tried = []
    task, rows = bench.prepared.task, bench.prepared.rows["validation"]
    for number, rate in enumerate(search.learning_rates, 1):
        training = _budget(finetune.training, rate, search.epochs_factor * SEARCH_SHARE)
        title = f"scratch: rate {rate:g} ({number} of {len(search.learning_rates)})"
        try:
            with working(title):
                outcome = _train(bench, finetune, training, seed)
        except NumericError as error:
            # A rate that diverges is not chosen; the others may still do.
            tried.append({"learning_rate": rate, "metrics": None, "diverged": error.what})
            continue
        found = bench.told(rows, outcome.logits["validation"])
        metrics = score_all(task, bench.prepared.measured(rows), found)
        tried.append({"learning_rate": rate, "metrics": metrics})
    score = SELECTION[task]
    sign = METRICS[task][score].sign
    sound = [row for row in tried if row["metrics"]]
    if not sound:
        raise NumericError("scratch diverged at every rate", "Lower measure.scratch.learning_rates")
    best = max(sound, key=lambda row: sign * row["metrics"][score])["learning_rate"]
    edge = len(tried) > 1 and best in (min(search.learning_rates), max(search.learning_rates))
    return {"learning_rate": best, "at_edge": edge, "tried": tried}


def train_scratch(
    bench: Workbench, finetune: Finetune, search: Search, rate: float, seed: int
) -> Outcome:
    """The source's architecture from its own initialisation, at the rate found."""
    training = _budget(finetune.training, rate, search.epochs_factor)
    return _train(bench, finetune, training, seed)


def majority(bench: Workbench, seed: int) -> Outcome:
    """The most frequent answer of train, or the mean of its targets, for every row or word."""
    targets = bench.prepared.targets(bench.train_rows(seed))
    if bench.prepared.task == "regression":
        constant = np.array([targets.mean()])
    elif bench.prepared.task == "multi-label":
        share = np.clip(targets.mean(0), 1e-6, 1 - 1e-6)
        constant = np.log(share / (1 - share))
    else:
        constant = np.log(np.maximum(np.bincount(targets, minlength=bench.outputs), 1e-12))
    sizes = {split: sum(bench.prepared.words(bench.prepared.rows[split])) for split in MEASURED}
    found = {split: np.tile(constant, (size, 1)) for split, size in sizes.items()}
    return Outcome(found, {"constant": torch.from_numpy(constant)}, 0)


def _budget(training: dict[str, Any], rate: float, factor: float) -> dict[str, Any]:
    longer = {"warmup_steps": WARMUP} | training | {"learning_rate": rate}
    longer["num_train_epochs"] = float(training["num_train_epochs"]) * factor
    if training.get("max_steps", 0) > 0:
        longer["max_steps"] = max(1, round(training["max_steps"] * factor))
    return longer


def _train(
    bench: Workbench, finetune: Finetune, training: dict[str, Any], seed: int
) -> Outcome:
    built = bench.build(finetune.pooling, seed, scratch=True)
    prepare(built.model, "full")
    return fit(bench, built, training, None, seed, compared=False)
