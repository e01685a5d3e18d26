"""Compare train, test, unlabelled, general and other data on a source's frozen features."""

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hftl.analysis import distance, word_distance
from hftl.analysis.distance import Distance
from hftl.analysis.facts import DistanceAnalysis, DomainFacts, DomainPair, Estimate, SiteFacts
from hftl.analysis.feature_store import FeatureStore, describe_provenance
from hftl.analysis.out_of_fold import deal_groups
from hftl.analysis.transferability import CentredFeatures
from hftl.config.data import Table
from hftl.config.recipe import Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.load import load_images, read_documents
from hftl.data.rows import BadRows, InputSpec, Row
from hftl.data.splits import hash_row, hash_text
from hftl.errors import DataError, HftlError, RecipeError, rename_key
from hftl.finetune.context import ExperimentContext
from hftl.models.layer_features import LayerSite
from hftl.plurals import count_noun
from hftl.runtime.progress import track

MIN_ROWS = 40
"""Rows of a set: its halves are compared by cross-validation, too."""
MIN_GROUPS = 4
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
        DataError: if a table cannot be read, or only one set has enough rows.
        RecipeError: if the task has a label a word.
    """
    refuse_words(context, "distances compare")
    domains, left_out, site, is_own = collect_domains(recipe, context, root, tables, most_rows)
    refuse_too_few(left_out, len(domains))
    if site is None or len(domains) < 2:
        raise RecipeError(
            f"{domains[0].name if domains else 'the recipe'} is the only set of rows",
            "Give data.general, or another table by --to",
        )
    pairs = [_compare(a, b, context) for a, b in track(list(combinations(domains, 2)), "distances")]
    return DistanceAnalysis(
        source=context.source.name,
        site=SiteFacts(layer=site.layer, pooling=site.pooling),
        site_is_own=is_own,
        domains=[_describe(domain, context) for domain in domains],
        left_out=left_out,
        pairs=pairs,
        provenance=describe_provenance(context, recipe.finetune.pooling, []),
    )


def refuse_words(context: ExperimentContext, what: str) -> None:
    """Refuse a task with a label a word.

    Args:
        context: whose task it is.
        what: that compares rows, with its verb.

    Raises:
        RecipeError: naming the task.
    """
    if context.prepared.task == "token-classification":
        raise RecipeError(
            f"data.task=token-classification has a vector a word, and {what} rows",
            "Give the texts to a recipe with data.task=classification",
        )


def collect_domains(
    recipe: Recipe, context: ExperimentContext, root: Path, tables: Sequence[str], most_rows: int
) -> tuple[list[Domain], list[str], LayerSite | None, bool]:
    """Compute the features of every set with enough rows.

    Returns:
        These sets, a sentence on each other one, where the features are read (None without a set),
        and whether the recipe's head reads the same.
    """
    domains: list[Domain] = []
    left_out: list[str] = []
    site, own_site = None, None
    for name, rows, own in iterate_sets(recipe, context, tables, most_rows):
        fault = find_size_fault(rows)
        if fault:
            left_out.append(f"{name} has {fault}")
            continue
        store = FeatureStore(own, root)
        store.compute(rows)
        if site is None:
            own_site = store.find_site(recipe.finetune.pooling)
            site = own_site or LayerSite(store.layers, "mean")
        domains.append(Domain(name, rows, store.get(rows, site)))
    return domains, left_out, site, own_site is not None


def find_size_fault(rows: list[Row]) -> str | None:
    """Return how a set has too few rows, or groups, to be compared in halves; None where it has
    enough."""
    groups = len({number if row.group is None else row.group for number, row in enumerate(rows)})
    if len(rows) < MIN_ROWS:
        return f"{count_noun(len(rows), 'row')} to compare, fewer than {MIN_ROWS}"
    if groups < MIN_GROUPS:
        return f"{groups} values of data.group in {len(rows)} rows, fewer than {MIN_GROUPS}"
    return None


def refuse_too_few(left_out: list[str], compared: int) -> None:
    """Refuse a comparison for which sets with too few rows leave less than two.

    Raises:
        DataError: naming them.
    """
    if left_out and compared < 2:
        raise DataError("; ".join(left_out), "Give more rows, or another table to compare with")


def iterate_sets(
    recipe: Recipe, context: ExperimentContext, tables: Sequence[str], most: int
) -> Iterator[tuple[str, list[Row], ExperimentContext]]:
    """Yield the name of each set, its rows in the order of their hash, and how they are read."""
    for split in ("train", "test"):
        rows = context.prepared.rows.get(split)
        if rows:
            yield split, sorted(rows, key=hash_row)[:most], context
    if recipe.data.task is None:
        yield "train", read_part(recipe, context, "train", most), context
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
        try:
            rows = read_part(changed, own, "unlabeled", most)
        except HftlError as error:
            raise _name_table(error, path) from error
        yield path, rows, own


def _name_table(error: HftlError, path: str) -> HftlError:
    """Return an error of a table that was given by `--to`, and has no key of its own."""
    named = rename_key(error, "data.unlabeled.path:", "--to:")
    named = rename_key(named, "data.unlabeled:", f"--to {path}:")
    fix = "Give a table with the columns of data.train"
    return type(error)(named.what, fix if "data.unlabeled" in error.fix else error.fix)


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
    columns = len(getattr(recipe.data, part).text_columns)
    if columns != len(recipe.data.train.text_columns):
        kinds = {1: "single texts", 2: "pairs of texts"}
        raise RecipeError(
            f"data.{part} has {kinds[columns]}, and data.train {kinds[3 - columns]}: that alone "
            "sets their features apart",
            f"Name as many columns in data.{part}.text",
        )
    documents = read_documents(recipe.data, part, bad)
    contents = zip(*[documents] * columns, strict=True)
    # A text counts once: copies would be in train and test of the domain classifier.
    keyed = ((hash_text("\x1f".join(content)), content) for content in contents)
    smallest = heapq.nsmallest(2 * most, keyed)
    unique = list(dict.fromkeys(content for _, content in smallest))[:most]
    return [Row(content, "", None, i, f"{part} {i}", part) for i, content in enumerate(unique)]


def _describe(domain: Domain, context: ExperimentContext) -> DomainFacts:
    """Describe a set, and how far its halves are from each other: the null of every distance."""
    words, sides = not isinstance(context.inputs, ImageInputs), _halve(domain)
    groups = name_groups(*(side.rows for side in sides))
    features = sides[0].features, sides[1].features
    first, second = (_split_words(side.rows) for side in sides)
    return DomainFacts(
        name=domain.name,
        rows=len(domain.rows),
        pieces_per_word=_count_pieces(domain.rows, context),
        null_a_distance=distance.classify_domains(*features, groups).a_distance.value,
        null_frechet=_compute_frechet(*features, groups).value,
        null_word_divergence=word_distance.compute_word_divergence(first, second, groups).value
        if words
        else None,
    )


def _halve(domain: Domain) -> tuple[Domain, Domain]:
    """Return two halves of a set, of as many rows and without a group in both."""
    rows = domain.rows
    names = [str(number) if row.group is None else row.group for number, row in enumerate(rows)]
    _, units = np.unique(names, return_inverse=True)
    half = deal_groups(np.bincount(units), 2)[units]
    sides = [np.flatnonzero(half == number) for number in (0, 1)]
    count = min(map(len, sides))
    first, second = (
        Domain(domain.name, [rows[i] for i in side[:count]], domain.features[side[:count]])
        for side in sides
    )
    return first, second


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
    groups = name_groups(a.rows[:count], b.rows[:count])
    classified = distance.classify_domains(first, second, groups)
    discrepancy = distance.compute_mmd(first, second, groups=groups)
    overlap = divergence = None
    if not isinstance(context.inputs, ImageInputs):
        own, other = (_split_words(side.rows[:count]) for side in (a, b))
        overlap = _estimate(word_distance.compute_word_overlap(own, other, groups))
        divergence = _estimate(word_distance.compute_word_divergence(own, other, groups))
    return DomainPair(
        first=a.name,
        second=b.name,
        rows=count,
        a_distance=_estimate(classified.a_distance),
        saturated=classified.a_distance.value > SATURATED,
        h_divergence=_estimate(classified.h_divergence),
        mmd=_estimate(discrepancy.distance),
        mmd_p_value=discrepancy.p_value,
        frechet=_estimate(_compute_frechet(first, second, groups)),
        word_overlap=overlap,
        word_divergence=divergence,
    )


def _compute_frechet(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None) -> Distance:
    """Return the extrapolated Frechet distance in the principal components of both sets."""
    reduced = CentredFeatures.compute(np.concatenate([first, second])).reduce(FRECHET_WIDTH)
    return distance.extrapolate_frechet(reduced[: len(first)], reduced[len(first) :], groups)


def name_groups(first: list[Row], second: list[Row]) -> np.ndarray | None:
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
