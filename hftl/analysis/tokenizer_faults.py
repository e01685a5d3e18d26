"""Find a tokenizer that is not the model's: its ids mean nothing to the encoder.

The embeddings of `film` and `films` are alike in any model that was trained with these ids, and by
chance in others. A vocabulary with too few such pairs is compared with random ones by a probe.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hftl.analysis.source_faults import (
    ExaminedRows,
    compute_losses,
    compute_p_above_zero,
    predict_rows,
)
from hftl.data.image_inputs import ImageInputs
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.train.facts import Finding

MIN_PAIRS, MAX_PAIRS = 200, 3000
"""Pairs of tokens from which on their embeddings say whether the vocabulary is the model's."""
MIN_STEM = 4
PAIR_LEVEL = 1e-4
SHUFFLES, MAX_READ = 2, 400
"""Random exchanges of tokens that texts are read under, and rows, at most."""
MAX_BENEFIT = 0.1
"""Loss that a tokenizer saves at most, at 95 %, where it means nothing to the encoder; of few rows
nothing can be said."""
FIX = (
    "take the tokenizer that belongs to the model; or the source does not know this language, or "
    "is not pretrained"
)


def check_tokenizer(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a tokenizer whose ids mean nothing to the encoder: any other would do as well."""
    inputs = examined.context.inputs
    if isinstance(inputs, ImageInputs):
        return
    pairs = list_stems(inputs.tokenizer.get_vocab())
    if len(pairs) < MIN_PAIRS:
        yield from _check_by_shuffling(examined, inputs)
        return
    model = examined.context.build_model(examined.pooling, 0)
    encoder: Any = model.encoder
    weights = encoder.get_input_embeddings().weight.detach().float().cpu().numpy()
    alike = compare_embeddings(weights, pairs)
    p_value = compute_p_above_zero(alike)
    if p_value >= PAIR_LEVEL:
        yield Finding(
            kind="tokenizer",
            what="the source embeds words that differ by an ending, such as plurals, no more alike "
            "than any two tokens",
            confidence="likely",
            evidence=f"{len(alike)} pairs of the vocabulary, p {p_value:.2g}",
            fix=FIX,
        )


def list_stems(vocabulary: dict[str, int]) -> np.ndarray:
    """Return the ids of tokens and of the same with one letter more, (pairs, 2)."""
    pairs = [
        (vocabulary[token[:-1]], number)
        for token, number in sorted(vocabulary.items())
        if len(token) > MIN_STEM and token[-MIN_STEM - 1 :].isalpha() and token[:-1] in vocabulary
    ]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:MAX_PAIRS]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)[np.sort(chosen)]


def compare_embeddings(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return by how much the cosine of each pair is above that of its first with another's second.

    Args:
        weights: (tokens, width).
        pairs: (pairs, 2) ids; those beyond the weights are left out.
    """
    pairs = pairs[(pairs < len(weights)).all(1)]
    centred = weights - weights.mean(0)
    centred = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    first, second = centred[pairs[:, 0]], centred[pairs[:, 1]]
    other = np.roll(np.random.default_rng(0).permutation(len(pairs)), 1)
    return (first * second).sum(1) - (first * second[other]).sum(1)


def _check_by_shuffling(examined: ExaminedRows, inputs: TextInputs) -> Iterator[Finding]:
    """Compare the tokenizer with random ones by probes of the rows."""
    count = min(MAX_READ, examined.read_rows)
    targets = examined.targets[:count]
    own = _predict_part(examined, examined.features[:count])
    encoded, gains = inputs.encode(examined.rows[:count]), []
    for seed in range(SHUFFLES):
        features = examined.compute_features(shuffle_ids(encoded, inputs, seed), inputs)
        other = _predict_part(examined, features)
        gains.append(compute_losses(other, targets) - compute_losses(own, targets))
    benefit = np.mean(gains, axis=0)
    p_value = compute_p_above_zero(benefit)
    highest = float(benefit.mean() + 1.645 * benefit.std() / np.sqrt(count))
    if p_value > 0.05 and highest < MAX_BENEFIT and _beats_constant(own, targets):
        yield Finding(
            kind="tokenizer",
            what="the source reads these texts no better than with its tokens exchanged at random",
            confidence="likely" if float(benefit.mean()) <= 0 else "possible",
            evidence=f"probes of {count} rows, p {p_value:.2g} that it is better",
            fix=FIX,
        )


def _predict_part(examined: ExaminedRows, features: np.ndarray) -> np.ndarray:
    count = len(features)
    groups = examined.context.group_outputs(examined.rows[:count])
    return predict_rows(features, examined.targets[:count], examined.context.num_outputs, groups)


def _beats_constant(logits: np.ndarray, targets: np.ndarray) -> bool:
    """Return whether a probe predicts better, beyond noise, than the same output for every row."""
    constant = logits.mean(0, keepdims=True).repeat(len(logits), 0)
    gains = compute_losses(constant, targets) - compute_losses(logits, targets)
    return compute_p_above_zero(gains) < 0.05


def shuffle_ids(encoded: list[EncodedRow], inputs: TextInputs, seed: int) -> list[EncodedRow]:
    """Return rows in which every token id but special ones is replaced by another, one to one."""
    special = np.array(sorted(set(inputs.tokenizer.all_special_ids)))
    used = np.unique(np.concatenate([np.asarray(row["input_ids"]) for row in encoded]))
    # Among the tokens of these rows: rare tokens of the vocabulary are hardly trained.
    ids = used[~np.isin(used, special)]
    mapping = np.arange(int(used.max()) + 1)
    mapping[ids] = np.random.default_rng(seed).permutation(ids)
    return [row | {"input_ids": mapping[np.asarray(row["input_ids"])].tolist()} for row in encoded]
