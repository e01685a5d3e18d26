"""Rank source models for a task by their frozen features, one pass each."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from hftl.analysis import transferability as transfer
from hftl.analysis.facts import (
    FailedSource,
    Interval,
    RankAnalysis,
    RankedSource,
    SiteFacts,
    SourceGap,
    TransferScores,
)
from hftl.analysis.feature_store import FeatureStore, describe_provenance
from hftl.analysis.out_of_fold import encode_columns, predict_by_others, predict_out_of_fold
from hftl.analysis.rank_intervals import (
    bootstrap_scores,
    compute_gap_interval,
    compute_rank_intervals,
)
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.prepare import PreparedData, prepare_data
from hftl.data.rows import InputSpec, Row
from hftl.data.splits import hash_row, limit_rows
from hftl.errors import HftlError, HubError, NumericError, RecipeError
from hftl.finetune.build_context import build_context, infer_input_spec
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import assign_units
from hftl.measure.metrics import Metric, find_metric
from hftl.models.heads import has_head_bias
from hftl.models.layer_features import LayerSite
from hftl.models.source import find_source
from hftl.models.weight_files import read_tensor
from hftl.runtime.progress import track

MAX_SCORED = 2000
"""Outputs that LogME and its like are computed on, at most: words are many."""


@dataclass(frozen=True)
class ScoredSource:
    """Hold what is known of one source before it is ranked, and its predictions of the rows."""

    name: str
    context: ExperimentContext
    rows: list[Row]
    store: FeatureStore
    site: LayerSite
    predictions: np.ndarray
    scores: TransferScores
    pass_seconds: float
    score_seconds: float


def rank_sources(recipe: Recipe, names: Sequence[str], root: Path, most_rows: int) -> RankAnalysis:
    """Rank sources by the cross-validated metric of their probes on training rows.

    Args:
        recipe: the task and its rows.
        names: folders, `package:` or hub ids.
        root: where features are stored.
        most_rows: training rows that are read, at most.

    Raises:
        DataError: if the rows cannot be used.
        HftlError: if no source can be read, why the first one cannot.
    """
    prepared: dict[InputSpec, PreparedData] = {}
    scored: list[ScoredSource] = []
    failed: list[FailedSource] = []
    errors: list[HftlError] = []
    metric = find_metric(recipe.measure.metric, str(recipe.data.task))
    for name in track(list(dict.fromkeys(names)), "sources"):
        try:
            context = _open_source(recipe, name, prepared)
            rows = _select_rows(name, context, recipe.measure.seeds[0], most_rows, scored)
            scored.append(_score_source(name, context, rows, root, metric))
        except (RecipeError, HubError, NumericError) as error:
            errors.append(error)
            failed.append(FailedSource(source=name, why=str(error)))
    if not scored:
        raise errors[0]
    return _rank(metric, scored, failed, recipe.measure.seeds[:1])


def _open_source(
    recipe: Recipe, name: str, prepared: dict[InputSpec, PreparedData]
) -> ExperimentContext:
    """Return the context of the recipe's rows under another source.

    Raises:
        RecipeError: if it is not there, hftl does not load it, or it reads other inputs than the
            sources before it.
        HubError: if the hub does not give it.
    """
    # How the recipe trains is nothing that a source can lack here.
    unread = {"finetune": Finetune(pooling=recipe.finetune.pooling)}
    own = {} if name == recipe.source.model else {"source": Source(model=name)}
    changed = recipe.model_copy(update=unread | own)
    source = find_source(changed.source)
    spec = infer_input_spec(source, str(recipe.data.task))
    others = {known.modality for known in prepared}
    if others - {spec.modality}:
        raise RecipeError(
            f"{name} reads {spec.modality}s, and the sources before it do not",
            "Rank it with sources that do",
        )
    if spec not in prepared:
        prepared[spec] = prepare_data(recipe.data, spec)
    return build_context(changed, source, prepared[spec])


def _select_rows(
    name: str, context: ExperimentContext, seed: int, most: int, scored: list[ScoredSource]
) -> list[Row]:
    """Return the training rows of a seed, or so many of them, every class in its proportion.

    Raises:
        RecipeError: if the source's size of patches drops other images than those of the sources
            before it: scores are of the same rows.
    """
    for known in scored:
        if known.context.prepared is context.prepared:
            return known.rows
    rows = limit_rows(context.select_train_rows(seed), most, context.prepared.task, 0, "rank")
    if scored and [*map(hash_row, rows)] != [*map(hash_row, scored[0].rows)]:
        raise RecipeError(
            f"{name} reads other rows of the data than {scored[0].name}",
            "Rank it by itself, or remove the rows that only one of them can read",
        )
    return rows


def _score_source(
    name: str, context: ExperimentContext, rows: list[Row], root: Path, metric: Metric
) -> ScoredSource:
    """Make the pass of one source, and score its features."""
    started = time.perf_counter()
    store = FeatureStore(context, root)
    passed = store.compute(rows)
    pass_seconds = time.perf_counter() - started if passed else 0.0
    # Two threads decompose matrices of a few hundred columns in more time than one.
    with threadpool_limits(1):
        return _score_features(name, context, rows, store, metric, pass_seconds)


def _score_features(
    name: str, context: ExperimentContext, rows: list[Row], store: FeatureStore, metric: Metric,
    pass_seconds: float,
) -> ScoredSource:  # fmt: skip
    """Find the best site of stored features by LogME, and score them there."""
    started = time.perf_counter()
    targets, groups = context.prepared.encode_targets(rows), context.group_outputs(rows)
    columns = encode_columns(targets, context.num_outputs)
    evidence = {
        site: _compute_evidence(features, columns) for site, features in store.iterate_sites(rows)
    }
    best = max(evidence, key=lambda site: evidence[site])
    features = store.get(rows, best)
    intercept = has_head_bias(context.source, context.prepared.task, best.pooling)
    logits = predict_out_of_fold(features, targets, context.num_outputs, groups, intercept)
    near = predict_by_others(features, targets, context.num_outputs, groups)
    labels = context.prepared.encode_for_metrics(rows)
    scores = TransferScores(
        logme=evidence[best],
        knn=metric.score(labels, context.prepared.decode_for_metrics(rows, near)),
    )
    if targets.ndim == 1 and targets.dtype == np.int64:
        scores = scores.model_copy(update=_score_classes(context, store, rows, features, targets))
    predictions = context.prepared.decode_for_metrics(rows, logits)
    seconds = time.perf_counter() - started
    return ScoredSource(
        name, context, rows, store, best, predictions, scores, pass_seconds, seconds
    )


def _compute_evidence(features: np.ndarray, columns: np.ndarray) -> float:
    known = np.flatnonzero(np.isfinite(features).all(1))[:MAX_SCORED]
    return transfer.compute_logme(features[known], columns[known])


def _score_classes(
    context: ExperimentContext, store: FeatureStore, rows: list[Row], features: np.ndarray,
    targets: np.ndarray,
) -> dict[str, float]:  # fmt: skip
    """Return the scores that are defined for classes, by name."""
    from sklearn.exceptions import ConvergenceWarning

    known = np.flatnonzero(np.isfinite(features).all(1))[:MAX_SCORED]
    centred = transfer.CentredFeatures.compute(features[known])
    _, labels = np.unique(targets[known], return_inverse=True)
    with warnings.catch_warnings():
        # A mixture that still moves a little is as good a source classifier.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = transfer.compute_cluster_probabilities(centred, int(labels.max()) + 1)
    transrate = transfer.compute_transrate(centred, labels)
    scores = {
        "h_score": transfer.compute_h_score(centred, labels),
        "nleep": transfer.compute_leep(clusters, labels),
        "nce": transfer.compute_nce(clusters.argmax(1), labels),
        "transrate": transrate.by_rows,
        "transrate_by_class": transrate.by_class,
        "gbc": transfer.compute_gbc(centred, labels),
    }
    own = _predict_source_classes(context, store, rows)
    if own is not None:
        scores["leep"] = transfer.compute_leep(own[known], labels)
        scores["nce"] = transfer.compute_nce(own[known].argmax(1), labels)
    return scores


def _predict_source_classes(
    context: ExperimentContext, store: FeatureStore, rows: list[Row]
) -> np.ndarray | None:
    """Return the probabilities of the source's own classes; None where it has no whole head."""
    site = store.find_site("native")
    if site is None or context.prepared.task == "token-classification":
        return None
    name = context.source.architecture_spec.head.last_linear
    weight, bias = (
        read_tensor(context.source.folder, f"{name}.{part}") for part in ("weight", "bias")
    )
    if weight is None or bias is None or len(weight) < 2:
        return None
    # A classifier of timm may be a convolution of the pooled image.
    return transfer.apply_head(store.get(rows, site), weight.flatten(1).numpy(), bias.numpy())


def _rank(
    metric: Metric, scored: list[ScoredSource], failed: list[FailedSource], seeds: Sequence[int]
) -> RankAnalysis:
    """Return the sources in the order of their probes, with intervals over the same rows."""
    rows = scored[0].rows
    labels = scored[0].context.prepared.encode_for_metrics(rows)

    def score(number: int, picked: np.ndarray) -> float:
        return metric.sign * metric.score(labels[picked], scored[number].predictions[picked])

    every = np.arange(len(rows))
    points = np.array([score(number, every) for number in range(len(scored))])
    draws = bootstrap_scores(score, len(scored), assign_units(rows))
    ranks = compute_rank_intervals(points, draws)
    order = sorted(range(len(scored)), key=lambda number: -points[number])
    sources = [
        _describe_source(scored[number], place, ranks[number], metric.sign * points[number],
                         metric.sign * draws[:, number], seeds)
        for place, number in enumerate(order, 1)
    ]  # fmt: skip
    gap = None
    if len(order) > 1:
        first, second = order[:2]
        gap = SourceGap(
            value=float(points[first] - points[second]),
            ci95=compute_gap_interval(first, second, points, draws),
        )
    return RankAnalysis(
        metric=metric.name, lower_is_better=metric.lower_is_better, rows=len(rows),
        constant=score_constant(metric, scored[0].context.prepared.task, labels),
        sources=sources, failed=failed, first_two=gap,
    )  # fmt: skip


def score_constant(metric: Metric, task: str, labels: np.ndarray) -> float | None:
    """Return the score of one prediction for all rows: what a source has to surpass.

    None for other tasks than classes and targets, and where the metric has no value for predictions
    that do not vary, as scipy's correlations.
    """
    if task == "classification":
        constants = [np.bincount(labels).argmax()]
    elif task == "regression":
        constants = [labels.mean(), np.median(labels)]
    else:
        return None
    try:
        scores = [metric.score(labels, np.full_like(labels, value)) for value in constants]
    except NumericError:
        return None
    return metric.sign * max(metric.sign * score for score in scores)


def _describe_source(
    source: ScoredSource, rank: int, rank_ci95: tuple[int, int], point: float, draws: np.ndarray,
    seeds: Sequence[int],
) -> RankedSource:  # fmt: skip
    low, high = np.quantile(draws, (0.025, 0.975))
    interval: Interval = (float(low), float(high))
    return RankedSource(
        source=source.name,
        architecture=source.context.source.architecture,
        parameters=source.store.count_parameters(),
        layers=source.store.layers,
        best=SiteFacts(layer=source.site.layer, pooling=source.site.pooling),
        probe=float(point),
        probe_ci95=interval,
        rank=rank,
        rank_ci95=rank_ci95,
        scores=source.scores,
        pass_seconds=source.pass_seconds,
        score_seconds=source.score_seconds,
        provenance=describe_provenance(source.context, source.site.pooling, seeds),
    )
