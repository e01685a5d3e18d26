"""What transfer must beat: the same architecture from scratch, a classical model, the majority.

Scratch gets a learning rate of its own and a longer budget (He et al. 2019, arXiv:1811.08883),
so that the gain is not the straw man's.
"""

from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from hftl.analyse.probe import logistic, ridge
from hftl.errors import NumericError
from hftl.finetune.arm import Outcome, fit, predictions_of
from hftl.finetune.workbench import MEASURED, Workbench
from hftl.metrics import METRICS, compute
from hftl.sections import Finetune, Search

SEARCH_SHARE = 1 / 3
"""Each rate is tried at this share of scratch's own budget."""
WARMUP = 0.1
CS = np.logspace(-2, 4, 7)
ALPHAS = np.logspace(-3, 3, 7)


def search_rate(
    bench: Workbench, finetune: Finetune, search: Search, seed: int, progress: bool
) -> dict[str, Any]:
    """Tries each rate once and chooses by validation: accuracy, for a target rmse.

    Returns:
        `learning_rate`, the chosen one, `at_edge`, whether it is the lowest or highest given, and
        `tried`: each rate with its validation metrics, None where it diverged.

    Raises:
        NumericError: if every rate diverges.
    """
    tried = []
    for rate in search.learning_rates:
        training = _budget(finetune.training, rate, search.epochs_factor * SEARCH_SHARE)
        try:
            outcome = _train(bench, finetune, training, seed, progress)
        except NumericError as error:
            # A rate that diverges is not chosen; the others may still do.
            tried.append({"learning_rate": rate, "metrics": None, "diverged": error.what})
            continue
        predictions, _ = predictions_of(bench.prepared.task, outcome.logits["validation"])
        labels = bench.prepared.labels(bench.prepared.rows["validation"])
        metrics = compute(list(METRICS[bench.prepared.task].values()), labels, predictions)
        tried.append({"learning_rate": rate, "metrics": metrics})
    score = "rmse" if bench.prepared.task == "regression" else "accuracy"
    sign = METRICS[bench.prepared.task][score].sign
    sound = [row for row in tried if row["metrics"]]
    if not sound:
        raise NumericError("scratch diverged at every rate", "Lower measure.scratch.learning_rates")
    best = max(sound, key=lambda row: sign * row["metrics"][score])["learning_rate"]
    edge = len(tried) > 1 and best in (min(search.learning_rates), max(search.learning_rates))
    return {"learning_rate": best, "at_edge": edge, "tried": tried}


def train_scratch(
    bench: Workbench, finetune: Finetune, search: Search, rate: float, seed: int, progress: bool
) -> Outcome:
    """The source's architecture from its own initialisation, at the rate found."""
    training = _budget(finetune.training, rate, search.epochs_factor)
    return _train(bench, finetune, training, seed, progress)


def solve_classical(bench: Workbench, seed: int) -> Outcome:
    """TF-IDF of words and word pairs, and logistic or ridge regression."""
    rows = bench.train_rows(seed)
    texts = {"train": rows, **{split: bench.prepared.rows[split] for split in MEASURED}}
    joined = {split: [" ".join(row.texts) for row in found] for split, found in texts.items()}
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    features = vectorizer.fit_transform(joined["train"])
    labels = bench.prepared.labels(rows)
    groups = None if rows[0].group is None else np.array([row.group for row in rows])
    if bench.prepared.task == "regression":
        weight, bias, penalty = ridge(features, labels, groups, ALPHAS)
    else:
        weight, bias, penalty = logistic(features, labels, groups, CS)
    found = {s: np.asarray(vectorizer.transform(joined[s]) @ weight.T) + bias for s in MEASURED}
    terms = "\n".join(vectorizer.get_feature_names_out()).encode()
    tensors = {
        "weight": torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)),
        "bias": torch.from_numpy(bias.astype(np.float32)),
        "idf": torch.from_numpy(vectorizer.idf_.astype(np.float32)),
        "terms_utf8": torch.frombuffer(bytearray(terms), dtype=torch.uint8),
    }
    return Outcome(found, tensors, weight.size + bias.size, {"penalty": penalty})


def majority(bench: Workbench, seed: int) -> Outcome:
    """The most frequent class of train, or the mean of its targets, for every row."""
    labels = bench.prepared.labels(bench.train_rows(seed))
    if bench.prepared.task == "regression":
        constant = np.array([labels.mean()])
    else:
        constant = np.log(np.maximum(np.bincount(labels, minlength=bench.outputs), 1e-12))
    sizes = {split: len(bench.prepared.rows[split]) for split in MEASURED}
    found = {split: np.tile(constant, (size, 1)) for split, size in sizes.items()}
    return Outcome(found, {"constant": torch.from_numpy(constant)}, 0)


def _budget(training: dict[str, Any], rate: float, factor: float) -> dict[str, Any]:
    longer = {"warmup_steps": WARMUP} | training | {"learning_rate": rate}
    longer["num_train_epochs"] = float(training["num_train_epochs"]) * factor
    if training.get("max_steps", 0) > 0:
        longer["max_steps"] = max(1, round(training["max_steps"] * factor))
    return longer


def _train(
    bench: Workbench, finetune: Finetune, training: dict[str, Any], seed: int, progress: bool
) -> Outcome:
    built = bench.build(finetune.pooling, seed, scratch=True)
    built.model.requires_grad_(True)
    return fit(bench, built, training, None, seed, progress)
