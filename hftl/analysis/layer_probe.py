"""Probe every layer and pooling of a source model, linearly and by neighbours."""

from collections.abc import Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from hftl.analysis.drift import compute_cka
from hftl.analysis.estimates import (
    compute_item_values,
    compute_simultaneous_intervals,
    estimate_score,
)
from hftl.analysis.facts import LayerSimilarity, ProbeAnalysis, SiteFacts, SiteGap, SiteScore
from hftl.analysis.feature_store import FeatureStore, describe_provenance
from hftl.analysis.nearest import predict_by_neighbours
from hftl.analysis.out_of_fold import MIN_ROWS, encode_columns, to_logits
from hftl.config.finetune import ClassWeight
from hftl.config.recipe import Recipe
from hftl.data.rows import Row
from hftl.data.splits import limit_rows
from hftl.errors import DataError
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import assign_units
from hftl.measure.metrics import Metric, find_metric
from hftl.measure.statistics import assign_blocks
from hftl.models.layer_features import LayerSite
from hftl.plurals import count_noun
from hftl.runtime.progress import track

CKA_ROWS = 500
PURPOSE = "analysis"
"""Of the draw of rows, see `take_stratified`."""


def probe_layers(
    recipe: Recipe, context: ExperimentContext, store: FeatureStore, most_rows: int
) -> ProbeAnalysis:
    """Probe every site on validation, for every seed whose training rows differ.

    Args:
        recipe: metric, seeds and pooling.
        context: source and rows.
        store: the features.
        most_rows: training rows, at most; those of validation are as many.

    Raises:
        DataError: if a probe would be fitted or scored on hardly any row.
    """
    metric = find_metric(recipe.measure.metric, context.prepared.task)
    draws = _draw_train_rows(recipe, context, most_rows)
    held = limit_rows(
        context.prepared.rows["validation"], most_rows, context.prepared.task, 0, PURPOSE
    )
    for split, count in (("train", min(map(len, draws))), ("validation", len(held))):
        if count < MIN_ROWS:
            raise DataError(
                f"probe: {split} has {count_noun(count, 'row')}, fewer than {MIN_ROWS}",
                "Give more rows, raise data.shots, or change the fractions",
            )
    store.compute([row for rows in [*draws, held] for row in rows])
    labels, units = context.prepared.encode_for_metrics(held), assign_units(held)
    # Two threads solve a few hundred columns in more time than one.
    with threadpool_limits(1, user_api="blas"):
        predictions = {
            site: [
                _predict_site(context, store, site, rows, held, recipe.finetune.class_weight)
                for rows in draws
            ]
            for site in track(store.sites, "probes")
        }
    scores = [
        SiteScore(
            site=_describe(site),
            width=store.get(held[:1], site).shape[1],
            probe=estimate_score(metric, labels, [linear for linear, _ in pairs], units),
            neighbours=estimate_score(metric, labels, [near for _, near in pairs], units),
        )
        for site, pairs in predictions.items()
    ]
    best = max(scores, key=lambda score: metric.sign * score.probe.value).site
    own = store.find_site(recipe.finetune.pooling)
    linear = {_describe(site): [a for a, _ in pairs] for site, pairs in predictions.items()}
    return ProbeAnalysis(
        source=context.source.name,
        metric=metric.name,
        lower_is_better=metric.lower_is_better,
        train_rows=len(draws[0]),
        validation_rows=len(held),
        seeds=len(draws),
        sites=scores,
        best=best,
        own=own and _describe(own),
        over_own=own and _compare(metric, labels, units, linear, best, _describe(own)),
        similarity=_compare_layers(store, best.pooling, [*held, *draws[0]]),
        provenance=describe_provenance(context, recipe.finetune.pooling, recipe.measure.seeds),
    )


def _draw_train_rows(recipe: Recipe, context: ExperimentContext, most: int) -> list[list[Row]]:
    """Return the training rows of each seed; once, where all seeds train on the same."""
    draws = [
        limit_rows(context.select_train_rows(seed), most, context.prepared.task, seed, PURPOSE)
        for seed in recipe.measure.seeds
    ]
    return draws[:1] if all(rows == draws[0] for rows in draws) else draws


def _predict_site(
    context: ExperimentContext, store: FeatureStore, site: LayerSite, train: list[Row],
    held: list[Row], class_weight: ClassWeight,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return what the probe and the neighbours at a site predict of the held rows."""
    features, queries = store.get(train, site), store.get(held, site)
    targets = context.prepared.encode_targets(train)
    probe = context.fit_probe_on(features, train, site.pooling, class_weight)
    known, present = np.isfinite(queries).all(1), np.isfinite(features).all(1)
    near = np.full((len(queries), context.num_outputs), np.nan)
    columns = encode_columns(targets, context.num_outputs)[present]
    near[known] = predict_by_neighbours(features[present], columns, queries[known])
    return (
        context.prepared.decode_for_metrics(held, probe.logits(queries)),
        context.prepared.decode_for_metrics(held, to_logits(near, targets)),
    )


def _compare(
    metric: Metric, labels: np.ndarray, units: np.ndarray,
    predictions: Mapping[SiteFacts, Sequence[np.ndarray]], best: SiteFacts, own: SiteFacts,
) -> SiteGap:  # fmt: skip
    """Return by how much the best site is better than the own one, on the same items.

    The interval is one of those that hold for all sites at once, as the best was chosen by these
    very scores.
    """
    sites = list(predictions)
    means = np.array([
        np.mean([metric.score(labels, one) for one in predictions[site]]) for site in sites
    ])  # fmt: skip
    gaps = metric.sign * (means - means[sites.index(own)])
    value = float(gaps[sites.index(best)])
    if len(np.unique(units)) < 2:
        return SiteGap(value=value, ci95=None)
    values = np.stack([
        np.asarray(compute_item_values(metric, labels, predictions[site], units)) for site in sites
    ])  # fmt: skip
    differences = metric.sign * (values - values[sites.index(own)])
    sizes = np.bincount(assign_blocks(units))
    intervals = compute_simultaneous_intervals(differences, gaps, sizes)
    return SiteGap(value=value, ci95=intervals[sites.index(best)])


def _compare_layers(store: FeatureStore, pooling: str, rows: list[Row]) -> LayerSimilarity:
    """Return the CKA between all layers in a pooling; `native` exists at the last one alone."""
    poolings = [site.pooling for site in store.sites if site.layer == 0]
    pooling = pooling if pooling in poolings else poolings[0]
    rows = rows[:CKA_ROWS]
    layers = [store.get(rows, LayerSite(n, pooling)) for n in range(store.layers + 1)]
    known = np.isfinite(layers[0]).all(1)
    cka = np.eye(len(layers))
    for i, first in enumerate(layers):
        for j in range(i):
            cka[i, j] = cka[j, i] = compute_cka(first[known], layers[j][known])
    return LayerSimilarity(pooling=pooling, rows=len(rows), cka=cka.tolist())


def _describe(site: LayerSite) -> SiteFacts:
    return SiteFacts(layer=site.layer, pooling=site.pooling)
