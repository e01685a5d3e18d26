"""Compare train, test, unlabelled, general and other data on a source's frozen features."""

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hftl.analysis import distance
from hftl.analysis.distance import Distance
from hftl.analysis.facts import DistanceAnalysis, DomainFacts, DomainPair, Estimate, SiteFacts
from hftl.analysis.feature_store import FeatureStore, describe_provenance
from hftl.analysis.transferability import reduce_width
from hftl.config.data import Table
from hftl.config.recipe import Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.load import load_images, read_documents
from hftl.data.rows import BadRows, InputSpec, Row
from hftl.data.splits import hash_row, hash_text
from hftl.errors import DataError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.models.layer_features import LayerSite
from hftl.runtime.progress import track

MIN_ROWS = 40
"""Rows of a set: its halves are compared by cross-validation, too."""
SATURATED = 1.9
FRECHET_WIDTH = 16
"""Principal components that the Frechet distance is taken in. Its bias falls as 1 / rows only where
rows are many times the width: in 384 columns 300 rows of one domain stay 1.4 away from 300 others.
"""
WORD = re.compile(r"\w+")


class Domain(NamedTuple):
    """Hold one set of rows and their features."""

    name: str
    rows: list[Row]
    features: np.ndarray


def compare_domains(
    recipe: Recipe, context: ExperimentContext, root: Path, tables: Sequence[str], most_rows: int
) -> DistanceAnalysis:
    """Compare all pairs of sets on the features that the recipe's head reads.

    Args:
        recipe: its data and pooling.
        context: source and rows.
        root: where features are stored.
        tables: other tables, with train's columns.
        most_rows: of each set, at most.

    Raises:
        DataError: if a table cannot be read, or has too few rows.
        RecipeError: if the task has a label a word.
    """
    if context.prepared.task == "token-classification":
        raise RecipeError(
            "data.task=token-classification has a vector a word, and distances compare rows",
            "Give the texts to a recipe with data.task=classification",
        )
    store = FeatureStore(context, root)
    domains, site = [], None
    for name, rows, own in _iterate_sets(recipe, context, tables, most_rows):
        if len(rows) < MIN_ROWS:
            raise DataError(
                f"{name} has {len(rows)} rows to compare, fewer than {MIN_ROWS}", "Give more rows"
            )
        store = FeatureStore(own, root)
        store.compute(rows)
        site = site or store.find_site(recipe.finetune.pooling) or LayerSite(store.layers, "mean")
        domains.append(Domain(name, rows, store.get(rows, site)))
    assert site is not None
    pairs = [_compare(a, b, context) for a, b in track(list(combinations(domains, 2)), "distances")]
    return DistanceAnalysis(
        source=context.source.name,
        site=SiteFacts(layer=site.layer, pooling=site.pooling),
        domains=[_describe(domain, context) for domain in domains],
        pairs=pairs,
        provenance=describe_provenance(context, recipe.finetune.pooling, []),
    )


def _iterate_sets(
    recipe: Recipe, context: ExperimentContext, tables: Sequence[str], most: int
) -> Iterator[tuple[str, list[Row], ExperimentContext]]:
    """Yield the name of each set, its rows in the order of their hash, and how they are read."""
    for split in ("train", "test"):
        rows = context.prepared.rows[split]
        if rows:
            yield split, sorted(rows, key=hash_row)[:most], context
    for part in ("unlabeled", "general"):
        if getattr(recipe.data, part) is not None:
            yield part, read_part(recipe, context, part, most), context
    for path in dict.fromkeys(tables):
        table = recipe.data.train.model_copy(
            update={"path": path, "format": None, "split": None, "name": None, "revision": None}
        )
        changed = _replace_unlabeled(recipe, table)
        own = context
        if isinstance(context.inputs, ImageInputs):
            own = replace(context, inputs=context.inputs.with_data(changed.data), _encoded={})
        yield path, read_part(changed, own, "unlabeled", most), own


def _replace_unlabeled(recipe: Recipe, table: Table) -> Recipe:
    data = recipe.data.model_copy(update={"unlabeled": table})
    return recipe.model_copy(update={"data": data})


def read_part(recipe: Recipe, context: ExperimentContext, part: str, most: int) -> list[Row]:
    """Return rows without labels: of a stream of texts those with the smallest hash."""
    bad = BadRows(skip=recipe.data.bad_rows == "skip")
    if isinstance(context.inputs, ImageInputs):
        spec = InputSpec("image", context.inputs.patch_size)
        images = {row.content: row for row in load_images(recipe.data, part, bad, spec)}
        return sorted(images.values(), key=hash_row)[:most]
    # A text counts once: copies would be in train and test of the domain classifier.
    keyed = ((hash_text(text), text) for text in read_documents(recipe.data, part, bad))
    smallest = heapq.nsmallest(2 * most, keyed)
    texts = list(dict.fromkeys(text for _, text in smallest))[:most]
    return [Row((text,), "", None, i, f"{part} {i}", part) for i, text in enumerate(texts)]


def _describe(domain: Domain, context: ExperimentContext) -> DomainFacts:
    half, words = len(domain.rows) // 2, not isinstance(context.inputs, ImageInputs)
    sides = domain.features[:half], domain.features[half : 2 * half]
    groups = _name_groups(domain.rows[:half], domain.rows[half : 2 * half])
    return DomainFacts(
        name=domain.name,
        rows=len(domain.rows),
        pieces_per_word=_count_pieces(domain.rows, context),
        null_a_distance=distance.classify_domains(*sides, groups).a_distance.value,
        null_frechet=_compute_frechet(*sides).value,
        null_word_divergence=_compute_word_null(domain.rows) if words else None,
    )


def _count_pieces(rows: list[Row], context: ExperimentContext) -> float | None:
    """Return the tokens of a word of texts, special tokens apart; None for images."""
    if isinstance(context.inputs, ImageInputs):
        return None
    texts = [" ".join(row.content) for row in rows]
    encoded = context.inputs.tokenizer(texts, add_special_tokens=False, verbose=False)
    words = sum(len(text.split()) for text in texts)
    return sum(map(len, encoded["input_ids"])) / max(1, words)


def _compare(a: Domain, b: Domain, context: ExperimentContext) -> DomainPair:
    """Compare two sets at as many rows of each."""
    count = min(len(a.rows), len(b.rows))
    first, second = a.features[:count], b.features[:count]
    groups = _name_groups(a.rows[:count], b.rows[:count])
    classified = distance.classify_domains(first, second, groups)
    discrepancy = distance.compute_mmd(first, second)
    overlap = divergence = None
    if not isinstance(context.inputs, ImageInputs):
        words = [_split_words(side.rows[:count]) for side in (a, b)]
        overlap = _estimate(distance.compute_word_overlap(*words))
        divergence = _estimate(distance.compute_word_divergence(*words))
    return DomainPair(
        first=a.name,
        second=b.name,
        rows=count,
        a_distance=_estimate(classified.a_distance),
        saturated=classified.a_distance.value > SATURATED,
        h_divergence=_estimate(classified.h_divergence),
        mmd=_estimate(discrepancy.distance),
        mmd_p_value=discrepancy.p_value,
        frechet=_estimate(_compute_frechet(first, second)),
        word_overlap=overlap,
        word_divergence=divergence,
    )


def _compute_frechet(first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the extrapolated Frechet distance in the principal components of both sets."""
    reduced = reduce_width(np.concatenate([first, second]), FRECHET_WIDTH)
    return distance.extrapolate_frechet(reduced[: len(first)], reduced[len(first) :])


def _compute_word_null(rows: list[Row]) -> float:
    """Return the word divergence of two halves: few texts of one domain have words of their own."""
    half = len(rows) // 2
    sides = _split_words(rows[:half]), _split_words(rows[half : 2 * half])
    return distance.compute_word_divergence(*sides).value


def _name_groups(first: list[Row], second: list[Row]) -> np.ndarray | None:
    """Return the group of every row; None where every row is one for itself.

    A document's rows, or copies of a text in both sets, would be in train and test of the domain
    classifier: it would know the one, and say the opposite of the other.
    """
    names = [
        "\x1f".join(row.content) if row.group is None else f"group {row.group}"
        for row in (*first, *second)
    ]
    return None if len(set(names)) == len(names) else np.array(names)


def _split_words(rows: list[Row]) -> list[list[str]]:
    return [WORD.findall(" ".join(row.content).lower()) for row in rows]


def _estimate(value: Distance) -> Estimate:
    return Estimate(value=value.value, ci95=(value.low, value.high))
