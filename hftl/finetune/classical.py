"""The classical model beside every transfer: a linear one on TF-IDF, pixels, or words' spelling.

What the inputs say is vectorised in the way that is usual for them; the solver is the probe's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer

from hftl.analyse.probe import solve
from hftl.data.image import pixel_features
from hftl.data.load import Row
from hftl.finetune.outcome import Outcome
from hftl.finetune.workbench import MEASURED, Workbench

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
