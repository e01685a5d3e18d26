"""The classical model beside every transfer: a linear one on TF-IDF, pixels, or words' spelling.

What the inputs say is vectorised in the way that is usual for them; the solver is the probe's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer

from hftl.analysis.probe import solve
from hftl.config.finetune import Finetune
from hftl.config.measure import Search
from hftl.data.image_processing import pixel_features
from hftl.data.load import Row
from hftl.errors import NumericError
from hftl.finetune.arm import fit
from hftl.finetune.context import MEASURED, Outcome, Workbench
from hftl.finetune.strategies import prepare
from hftl.measure.metrics import METRICS, SELECTION, score_all
from hftl.runtime.progress import working

CS = np.logspace(-2, 4, 7)
ALPHAS = np.logspace(-3, 3, 7)
AT_ONCE = 256


def solve_classical(bench: Workbench, seed: int) -> Outcome:
    """The classical model of this seed's training rows."""
    rows = bench.train_rows(seed)
    parts = [rows, *(bench.prepared.rows[split] for split in MEASURED)]
    (train, *measured), vocabulary = _vectorised(bench, parts)
    weight, bias, penalty = solve(
        train, bench.prepared.targets(rows), bench.outputs, bench.groups(rows), CS, ALPHAS
    )
    found = {s: np.asarray(x @ weight.T) + bias for s, x in zip(MEASURED, measured, strict=True)}
    tensors = {
        "weight": torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)),
        "bias": torch.from_numpy(bias.astype(np.float32)),
        **vocabulary,
    }
    return Outcome(found, tensors, weight.size + bias.size, {"penalty": penalty})


def _vectorised(
    bench: Workbench, parts: Sequence[list[Row]]
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """A matrix a part, the first of which decides the vocabulary, and that vocabulary."""
    if bench.prepared.modality == "image":
        return [_pixels(bench, rows) for rows in parts], {}
    if bench.prepared.task == "token-classification":
        return _spelling(parts)
    return _tfidf(parts)


def _pixels(bench: Workbench, rows: list[Row]) -> np.ndarray:
    """Downsampled pixels, a few pictures at a time."""
    parts = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
    return np.concatenate(
        [pixel_features(torch.from_numpy(bench.canvases(part))).numpy() for part in parts]
    )


def _tfidf(parts: Sequence[list[Row]]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """TF-IDF of words and word pairs."""
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    joined = [[" ".join(row.content) for row in rows] for rows in parts]
    vectorizer.fit(joined[0])
    idf = torch.from_numpy(vectorizer.idf_.astype(np.float32))
    terms = _as_bytes(vectorizer.get_feature_names_out())
    return [vectorizer.transform(texts) for texts in joined], {"idf": idf, "terms_utf8": terms}


def _spelling(parts: Sequence[list[Row]]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The word, its ends, its shape, and the words beside it, for every word."""
    vectorizer = DictVectorizer()
    told = [[word for row in rows for word in _spelt(row.content)] for rows in parts]
    vectorizer.fit(told[0])
    terms = _as_bytes(vectorizer.get_feature_names_out())
    return [vectorizer.transform(words) for words in told], {"terms_utf8": terms}


def _spelt(words: tuple[str, ...]) -> list[dict[str, Any]]:
    lower = ["<s>", *(word.lower() for word in words), "</s>"]
    return [
        {
            "word": lower[i + 1], "before": lower[i], "after": lower[i + 2],
            "start": lower[i + 1][:3], "end": lower[i + 1][-3:], "shape": _shape(word),
            "first": i == 0,
        }
        for i, word in enumerate(words)
    ]  # fmt: skip


def _shape(word: str) -> str:
    """`Main-42` as `Xx-9`: runs of one kind of character are one letter."""
    kinds = ["9" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c
             for c in word]  # fmt: skip
    return "".join(c for i, c in enumerate(kinds) if i == 0 or kinds[i - 1] != c)


def _as_bytes(terms: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray("\n".join(terms).encode()), dtype=torch.uint8)


# What transfer must beat: the same architecture from scratch, and the majority.
#
# Scratch gets a learning rate of its own and a longer budget (He et al. 2019, arXiv:1811.08883),
# so that the gain is not the straw man's.


SEARCH_SHARE = 1 / 3
"""Each rate is tried at this share of scratch's own budget."""
MORE_RATES = 2
"""Rates that are tried at most beyond those given."""
WARMUP = 0.1


def search_rate(
    bench: Workbench, finetune: Finetune, search: Search, seed: int
) -> dict[str, Any]:
    """Try each rate once and choose by validation, as epochs are chosen.

    Where the best is the lowest or highest, the best may lie beyond: the search goes on by the
    grid's own ratio, at most `MORE_RATES` times, each at the cost of one more rate.

    Returns:
        `learning_rate`, the chosen one, `at_edge`, whether it is still the lowest or highest tried,
        `beyond`, the rates tried past those given, and `tried`: each rate with its validation
        metrics, None where it diverged.

    Raises:
        NumericError: if every rate diverges.
    """
    tried: list[dict[str, Any]] = []
    beyond: list[float] = []
    count = len(search.learning_rates)
    for number, rate in enumerate(search.learning_rates, 1):
        title = f"scratch: rate {rate:g} ({number} of {count})"
        tried.append(_try_rate(bench, finetune, search, rate, seed, title))
    best = _best_rate(bench.prepared.task, tried)
    while len(beyond) < MORE_RATES and (rate := next_rate(tried, best)) is not None:
        title = f"scratch: rate {rate:g} (beyond those given: {best:g} was the best, at their edge)"
        tried.append(_try_rate(bench, finetune, search, rate, seed, title))
        beyond.append(rate)
        best = _best_rate(bench.prepared.task, tried)
    edge = next_rate(tried, best) is not None
    return {"learning_rate": best, "at_edge": edge, "beyond": beyond, "tried": tried}


def next_rate(tried: list[dict[str, Any]], best: float) -> float | None:
    """Return the rate one step beyond the best where that is the lowest or highest tried; else
    None, as with one rate."""
    rates = sorted({row["learning_rate"] for row in tried})
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    edge, inner = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
    return float(f"{edge * edge / inner:.6g}")


def _try_rate(
    bench: Workbench, finetune: Finetune, search: Search, rate: float, seed: int, title: str
) -> dict[str, Any]:
    """One rate's metrics on validation; None where it diverged: the others may still do."""
    task, rows = bench.prepared.task, bench.prepared.rows["validation"]
    training = _budget(finetune.training, rate, search.epochs_factor * SEARCH_SHARE)
    try:
        with working(title):
            outcome = _train(bench, finetune, training, seed)
    except NumericError as error:
        return {"learning_rate": rate, "metrics": None, "diverged": error.what}
    predictions = bench.told(rows, outcome.logits["validation"])
    metrics = score_all(task, bench.prepared.measured(rows), predictions)
    return {"learning_rate": rate, "metrics": metrics}


def _best_rate(task: str, tried: list[dict[str, Any]]) -> float:
    """The rate that is best on validation; of equals the first tried."""
    score = SELECTION[task]
    sign = METRICS[task][score].sign
    sound = [row for row in tried if row["metrics"]]
    if not sound:
        raise NumericError("scratch diverged at every rate", "Lower measure.scratch.learning_rates")
    return max(sound, key=lambda row: sign * row["metrics"][score])["learning_rate"]


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
