"""Solve the classical baseline: what the inputs say, vectorised as is usual, with a linear model.

The solver is the probe's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import hstack

from hftl.analysis.out_of_fold import assign_folds
from hftl.analysis.probe import fit_linear
from hftl.config.finetune import ClassWeight
from hftl.data.image_inputs import compute_pixel_features
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.context import ExperimentContext
from hftl.train.facts import TrainingFacts

CS = np.logspace(-2, 4, 7)
ALPHAS = np.logspace(-3, 3, 7)


def solve_classical(
    context: ExperimentContext, seed: int, class_weight: ClassWeight = None
) -> ArmOutput:
    """Solve the classical model on this seed's training rows, weighted as the other arms are."""
    rows = context.select_train_rows(seed)
    parts = [rows, *(context.prepared.rows[split] for split in MEASURED_SPLITS)]
    (train, *measured), vocabulary = _vectorize(context, parts)
    targets = context.prepared.encode_targets(rows)
    weights = context.compute_class_weights(class_weight, seed)
    weight, bias, penalty = fit_linear(
        train,
        targets,
        context.num_outputs,
        context.group_outputs(rows),
        CS,
        ALPHAS,
        weights=None if weights is None else weights.weigh(targets),
    )
    logits = {
        s: np.asarray(x @ weight.T) + bias for s, x in zip(MEASURED_SPLITS, measured, strict=True)
    }
    tensors = {
        "weight": torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)),
        "bias": torch.from_numpy(bias.astype(np.float32)),
        **vocabulary,
    }
    facts = context.describe_class_weights(class_weight, seed)
    facts = facts.merge(TrainingFacts(penalty=penalty))
    return ArmOutput(logits, tensors, weight.size + bias.size, facts)


def predict_classical_out_of_fold(context: ExperimentContext, rows: list[Row]) -> np.ndarray:
    """Return the logits of every row, (rows, outputs), by a model fitted on the other folds.

    The penalty of classes is chosen once, on all rows, as for the probe.
    """
    targets, groups = context.prepared.encode_targets(rows), context.group_outputs(rows)
    outputs, read = context.num_outputs, _ReadRows.read(context, rows)
    (vectors,) = read.vectorize(np.ones(len(rows), dtype=bool))
    penalty = fit_linear(vectors, targets, outputs, groups, CS, ALPHAS)[2]
    folds = assign_folds(targets, groups)
    logits = np.zeros((len(rows), outputs))
    for fold in np.unique(folds):
        held = folds == fold
        train, measured = read.vectorize(~held, held)
        known = None if groups is None else groups[~held]
        weight, bias, _ = fit_linear(
            train, targets[~held], outputs, known, np.array([penalty]), ALPHAS
        )
        logits[held] = np.asarray(measured @ weight.T) + bias
    return logits


@dataclass(frozen=True)
class _ReadRows:
    """Hold what vectors of rows are made from: pixels (rows, numbers), counts of terms (rows,
    terms) in the order of the terms, or both."""

    pixels: np.ndarray | None
    counts: Any

    @classmethod
    def read(cls, context: ExperimentContext, rows: list[Row]) -> "_ReadRows":
        """Read every row once."""
        is_image = context.prepared.modality == "image"
        pixels = _extract_pixels(context, rows) if is_image else None
        if is_image and len(rows[0].content) == 1:
            return cls(pixels, None)
        beside = list(map(_drop_picture, rows)) if is_image else rows
        return cls(pixels, _count_terms([beside])[0][0])

    def vectorize(self, *parts: np.ndarray) -> list[Any]:
        """Return a matrix for each mask of rows, the first of which sets the vocabulary."""
        pixels = None if self.pixels is None else [self.pixels[part] for part in parts]
        if self.counts is None:
            return pixels or []
        counts = [self.counts[part] for part in parts]
        known = np.unique(counts[0].indices)
        texts = _weigh_terms([count[:, known] for count in counts])[0]
        return texts if pixels is None else _join_columns(pixels, texts)


def _vectorize(
    context: ExperimentContext, parts: Sequence[list[Row]]
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return a matrix for each part, the first of which sets the vocabulary, and the vocabulary."""
    if context.prepared.modality == "image":
        pixels = [_extract_pixels(context, rows) for rows in parts]
        if len(parts[0][0].content) == 1:
            return pixels, {}
        texts, vocabulary = _vectorize_texts([list(map(_drop_picture, rows)) for rows in parts])
        return _join_columns(pixels, texts), vocabulary
    if context.prepared.task == "token-classification":
        return _vectorize_words(parts)
    return _vectorize_texts(parts)


def _join_columns(left: list[Any], right: list[Any]) -> list[Any]:
    """Return the matrices of each part side by side."""
    return [hstack(pair, format="csr") for pair in zip(left, right, strict=True)]


def _drop_picture(row: Row) -> Row:
    """Return the text of a row that is a picture and a text."""
    return replace(row, content=row.content[1:])


def _extract_pixels(context: ExperimentContext, rows: list[Row]) -> np.ndarray:
    """Return downsampled pixels."""
    return compute_pixel_features(context.get_canvases(rows))


def _vectorize_texts(parts: Sequence[list[Row]]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return the TF-IDF of words and word pairs."""
    counts, terms = _count_terms(parts)
    vectors, idf = _weigh_terms(counts)
    return vectors, {"idf": idf, "terms_utf8": _encode_terms(terms)}


def _count_terms(parts: Sequence[list[Row]]) -> tuple[list[Any], np.ndarray]:
    """Return how often each part holds the words and word pairs of the first, (rows, terms), and
    these terms in order."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(
        ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]",
        dtype=np.float64,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    first, *others = ([" ".join(row.content) for row in rows] for rows in parts)
    counts = [counter.fit_transform(first), *map(counter.transform, others)]
    counts[0].sort_indices()
    return counts, counter.get_feature_names_out()


def _weigh_terms(counts: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """Return the TF-IDF of counts (rows, terms), and the first part's weights of the terms."""
    from sklearn.feature_extraction.text import TfidfTransformer

    weigher: Any = TfidfTransformer(sublinear_tf=True).fit(counts[0])
    return list(map(weigher.transform, counts)), torch.from_numpy(weigher.idf_.astype(np.float32))


def _vectorize_words(parts: Sequence[list[Row]]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return for every word its spelling, its ends, its shape, and the words beside it."""
    from sklearn.feature_extraction import DictVectorizer

    vectorizer = DictVectorizer()
    described = [[word for row in rows for word in _describe_words(row.content)] for rows in parts]
    vectorizer.fit(described[0])
    terms = _encode_terms(vectorizer.get_feature_names_out())
    return [vectorizer.transform(words) for words in described], {"terms_utf8": terms}


def _describe_words(words: tuple[str, ...]) -> list[dict[str, str | bool]]:
    lower = ["<s>", *(word.lower() for word in words), "</s>"]
    return [
        {
            "word": lower[i + 1], "before": lower[i], "after": lower[i + 2],
            "start": lower[i + 1][:3], "end": lower[i + 1][-3:], "shape": _word_shape(word),
            "first": i == 0,
        }
        for i, word in enumerate(words)
    ]  # fmt: skip


def _word_shape(word: str) -> str:
    """Return `Main-42` as `Xx-9`: a run of one kind of character is one letter."""
    kinds = ["9" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c
             for c in word]  # fmt: skip
    return "".join(c for i, c in enumerate(kinds) if i == 0 or kinds[i - 1] != c)


def _encode_terms(terms: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray("\n".join(terms).encode()), dtype=torch.uint8)
