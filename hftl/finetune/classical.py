"""Solve the classical baseline: what the inputs say, vectorised as is usual, with a linear model.

The solver is the probe's.
"""

from collections.abc import Sequence
from dataclasses import replace
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
PIXEL_BATCH = 256


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
    outputs = context.num_outputs
    (vectors,), _ = _vectorize(context, [rows])
    penalty = fit_linear(vectors, targets, outputs, groups, CS, ALPHAS)[2]
    folds = assign_folds(targets, groups)
    logits = np.zeros((len(rows), outputs))
    for fold in np.unique(folds):
        held = folds == fold
        parts = [
            [row for row, out in zip(rows, mask, strict=True) if out] for mask in (~held, held)
        ]
        (train, measured), _ = _vectorize(context, parts)
        known = None if groups is None else groups[~held]
        weight, bias, _ = fit_linear(
            train, targets[~held], outputs, known, np.array([penalty]), ALPHAS
        )
        logits[held] = np.asarray(measured @ weight.T) + bias
    return logits


def _vectorize(
    context: ExperimentContext, parts: Sequence[list[Row]]
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return a matrix for each part, the first of which sets the vocabulary, and the vocabulary."""
    if context.prepared.modality == "image":
        pixels = [_extract_pixels(context, rows) for rows in parts]
        if len(parts[0][0].content) == 1:
            return pixels, {}
        beside = [[_drop_picture(row) for row in rows] for rows in parts]
        texts, vocabulary = _vectorize_texts(beside)
        return [hstack(pair, format="csr") for pair in zip(pixels, texts, strict=True)], vocabulary
    if context.prepared.task == "token-classification":
        return _vectorize_words(parts)
    return _vectorize_texts(parts)


def _drop_picture(row: Row) -> Row:
    """Return the text of a row that is a picture and a text."""
    return replace(row, content=row.content[1:])


def _extract_pixels(context: ExperimentContext, rows: list[Row]) -> np.ndarray:
    """Return downsampled pixels, computed a few images at a time."""
    parts = [rows[start : start + PIXEL_BATCH] for start in range(0, len(rows), PIXEL_BATCH)]
    return np.concatenate(
        [
            compute_pixel_features(torch.from_numpy(context.stack_canvases(part))).numpy()
            for part in parts
        ]
    )


def _vectorize_texts(parts: Sequence[list[Row]]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return the TF-IDF of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    joined = [[" ".join(row.content) for row in rows] for rows in parts]
    vectorizer.fit(joined[0])
    idf = torch.from_numpy(vectorizer.idf_.astype(np.float32))
    terms = _encode_terms(vectorizer.get_feature_names_out())
    return [vectorizer.transform(texts) for texts in joined], {"idf": idf, "terms_utf8": terms}


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
