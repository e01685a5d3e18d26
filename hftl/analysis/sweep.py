"""Search learning rates by layer, and measure what the best gains on rows that chose nothing.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all pairs of a rate and a decay
are trained for a quarter of the epochs, the better half for half of them, and so on. Then the best
one rate is changed for one part after the other. Every training has a schedule of its own length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hftl.analysis.estimates import (
    compute_item_values,
    compute_simultaneous_intervals,
    estimate_score,
)
from hftl.analysis.facts import Estimate, Interval
from hftl.analysis.feature_store import describe_provenance
from hftl.analysis.layer_rates import (
    PART_FACTORS,
    change_parts,
    compute_mean_rate,
    group_parts,
    list_settings,
    select_factors,
)
from hftl.analysis.sweep_facts import (
    HeldComparison,
    PartEffect,
    RateSetting,
    Rung,
    SweepAnalysis,
    SweepTrial,
)
from hftl.config.recipe import Recipe
from hftl.data.splits import take_stratified
from hftl.errors import DataError, NumericError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import MARGIN, SplitPredictions, assign_units, estimate_gain
from hftl.measure.metrics import Metric, find_metric
from hftl.measure.statistics import assign_blocks, classify_gain, estimate_item_error
from hftl.models.encoders import count_blocks
from hftl.runtime.progress import BarUpdate, open_bar
from hftl.train.optimizer import LayerLearningRates

SHARES = (0.25, 0.5, 1.0)
"""Of the recipe's epochs: the rungs."""
CHOOSING, HELD = "validation", "held"
"""The halves of validation; the first also chooses the epoch whose weights count."""
MIN_ROWS = 40
"""Validation rows, at least: each half scores settings."""
Train = Callable[[ExperimentContext, RateSetting, float, int], "dict[str, np.ndarray] | None"]
"""Return the logits of both halves under a setting, a share of the epochs and a seed; None where it
diverged."""


class SweepOptions(NamedTuple):
    """Hold what is searched."""

    rates: tuple[float, ...] = ()
    """None: around the recipe's."""
    decays: tuple[float, ...] = ()
    seeds: int = 3
    """Fresh seeds that the gain is measured on."""


class _Search:
    """Train settings, and score them on the half that chooses."""

    def __init__(
        self, metric: Metric, context: ExperimentContext, seed: int, train: Train,
        advance: BarUpdate,
    ) -> None:  # fmt: skip
        self.metric, self.context, self.seed = metric, context, seed
        self.rows = context.prepared.rows[CHOOSING]
        self.labels = context.prepared.encode_for_metrics(self.rows)
        self.trainings = 0
        self._train, self._advance = train, advance
        self._predicted: dict[tuple[str, float], np.ndarray | None] = {}

    def train(self, setting: RateSetting, share: float, seed: int) -> dict[str, np.ndarray] | None:
        """Return the logits of both halves; None where training diverged."""
        self._advance(self.trainings, f"sweep: {setting.name}, {share:g} of the epochs")
        self.trainings += 1
        return self._train(self.context, setting, share, seed)

    def predict(self, setting: RateSetting, share: float) -> np.ndarray | None:
        """Return the predictions of the rows that choose, of a setting that trains once."""
        key = setting.name, share
        if key not in self._predicted:
            logits = self.train(setting, share, self.seed)
            self._predicted[key] = (
                None
                if logits is None
                else self.context.prepared.decode_for_metrics(self.rows, logits[CHOOSING])
            )
        return self._predicted[key]

    def score(self, predictions: np.ndarray | None) -> float | None:
        """Return the metric on the rows that choose."""
        return None if predictions is None else self.metric.score(self.labels, predictions)

    def rank(self, score: float | None) -> float:
        """Return what settings are ordered by, more is better."""
        return -math.inf if score is None else self.metric.sign * score


def sweep_rates(
    recipe: Recipe, context: ExperimentContext, options: SweepOptions, train: Train
) -> SweepAnalysis:
    """Search the learning rates of the recipe's own strategy.

    Args:
        recipe: the strategy, its training and the metric.
        context: source and rows.
        options: what is searched.
        train: trains one setting.

    Raises:
        DataError: if validation has too few rows.
        NumericError: if every setting diverges.
        RecipeError: if the strategy trains no layer below the head.
    """
    metric = find_metric(recipe.measure.metric, context.prepared.task)
    context = halve_validation(context)
    names = [row.part for row in context.list_learning_rates(recipe.finetune, LayerLearningRates())]
    parts, blocks = group_parts(names), count_blocks(context.source.config)
    if not parts:
        raise RecipeError(
            f"finetune.strategy={recipe.finetune.strategy} trains no layer below the head",
            "Sweep a recipe with lora, partial, gradual or full",
        )
    settings = list_settings(recipe.finetune, options.rates, options.decays)
    seed = recipe.measure.seeds[0]
    total = _count_trainings(len(settings), len(parts), options.seeds)
    with open_bar("sweep", total) as advance:
        search = _Search(metric, context, seed, train, advance)
        rungs = _halve(search, settings)
        single = _find_best(search, rungs, [one for one in settings if one.is_single])
        effects = _try_parts(search, single, parts, blocks)
        changed = change_parts(single, select_factors(effects), parts, blocks, "by part")
        if select_factors(effects):
            rungs[changed.name] = [_make_rung(search, changed, 1.0)]
            settings.append(changed)
        layerwise = _find_best(search, rungs, [one for one in settings if not one.is_single])
        held = _compare_on_held(search, single, layerwise, options.seeds)
    return SweepAnalysis(
        source=context.source.name, strategy=recipe.finetune.strategy, metric=metric.name,
        lower_is_better=metric.lower_is_better, choosing_rows=len(search.rows), search_seed=seed,
        trainings=search.trainings, held=held,
        trials=[
            SweepTrial(
                setting=one,
                mean_rate=compute_mean_rate(one, [n for n in names if n != "head"], blocks),
                rungs=rungs[one.name],
            )
            for one in settings
        ],
        parts=effects, part_share=SHARES[0], single=single.name, layerwise=layerwise.name,
        winner=_choose_winner(search, rungs, single, layerwise, held).name,
        provenance=describe_provenance(context, recipe.finetune.pooling, recipe.measure.seeds),
    )  # fmt: skip


def halve_validation(context: ExperimentContext) -> ExperimentContext:
    """Return the context with validation in two halves, groups whole.

    Raises:
        DataError: if there are too few rows, or groups.
    """
    prepared = context.prepared
    rows = prepared.rows["validation"]
    first, second = take_stratified(rows, len(rows) // 2, prepared.task, 0, "sweep")
    if min(len(first), len(second)) < MIN_ROWS // 2:
        raise DataError(
            f"validation has {len(rows)} rows in halves of {len(first)} and {len(second)}, and the "
            f"one that chooses and the one that measures need {MIN_ROWS // 2} each",
            "Give more rows or groups, raise data.validation, or data.shots where that limits it",
        )
    halves = {**prepared.rows, CHOOSING: first, HELD: second}
    return replace(context, prepared=replace(prepared, rows=halves))


def _count_trainings(settings: int, parts: int, seeds: int) -> int:
    """Return how many trainings a sweep takes, at most."""
    total, alive = 0, settings
    for _ in SHARES:
        total += alive
        alive = min(alive, -(-alive // 2) + 1)
    return total + parts * len(PART_FACTORS) + 2 + 2 * seeds


def _halve(search: _Search, settings: Sequence[RateSetting]) -> dict[str, list[Rung]]:
    """Return the rungs of every setting: the better half goes on, and the best one rate."""
    rungs: dict[str, list[Rung]] = {setting.name: [] for setting in settings}
    alive = [*settings]
    for share in SHARES:
        for setting in alive:
            rungs[setting.name].append(_make_rung(search, setting, share))
        order = sorted(alive, key=lambda one: -search.rank(rungs[one.name][-1].score))
        alive = order[: -(-len(order) // 2)]
        for is_single in (True, False):
            kind = [one for one in order if one.is_single is is_single]
            if kind and kind[0] not in alive:
                alive.append(kind[0])
        alive = [one for one in alive if rungs[one.name][-1].score is not None]
    return rungs


def _make_rung(search: _Search, setting: RateSetting, share: float) -> Rung:
    return Rung(share=share, score=search.score(search.predict(setting, share)))


def _rank_last(
    search: _Search, rungs: dict[str, list[Rung]], setting: RateSetting
) -> tuple[float, float]:
    """Return what settings are ordered by: how far they came, then their score there."""
    last = rungs[setting.name][-1]
    return (-math.inf if last.score is None else last.share), search.rank(last.score)


def _find_best(
    search: _Search, rungs: dict[str, list[Rung]], settings: Sequence[RateSetting]
) -> RateSetting:
    """Return the setting that is best at the last rung; of equals the first.

    Raises:
        NumericError: if all diverged.
    """
    best = max(settings, key=lambda one: _rank_last(search, rungs, one))
    if rungs[best.name][-1].score is None:
        raise NumericError("training diverged at every rate", "Give lower --rates")
    return best


def _choose_winner(
    search: _Search, rungs: dict[str, list[Rung]], single: RateSetting, layerwise: RateSetting,
    held: HeldComparison,
) -> RateSetting:  # fmt: skip
    """Return the better one where they were chosen, but rates by layer not where they lose on the
    rows that chose nothing."""
    if held.outcome == "negative":
        return single
    return max((single, layerwise), key=lambda one: _rank_last(search, rungs, one))


def _try_parts(
    search: _Search, single: RateSetting, parts: dict[str, list[str]], blocks: int
) -> list[PartEffect]:
    """Change the rate of one part after the other, at the first rung's share."""
    base = search.predict(single, SHARES[0])
    pairs = [(part, factor) for part in parts for factor in PART_FACTORS]
    predictions = [
        search.predict(change_parts(single, {part: f}, parts, blocks, f"{part} x {f:g}"), SHARES[0])
        for part, f in pairs
    ]
    sign, reference = search.metric.sign, search.score(base)
    gains = [
        None if score is None or reference is None else sign * (score - reference)
        for score in map(search.score, predictions)
    ]
    errors = _estimate_errors(search, base, predictions, gains)
    return [
        PartEffect(part=part, factor=factor, gain=gain, error=error, ci95=interval)
        for (part, factor), gain, (error, interval) in zip(pairs, gains, errors, strict=True)
    ]


def _estimate_errors(
    search: _Search, base: np.ndarray | None, predictions: Sequence[np.ndarray | None],
    gains: Sequence[float | None],
) -> list[tuple[float | None, Interval | None]]:  # fmt: skip
    """Return the standard error over rows of every gain, and its simultaneous interval."""
    nothing: list[tuple[float | None, Interval | None]] = [(None, None)] * len(gains)
    units = assign_units(search.rows)
    present = [place for place, gain in enumerate(gains) if gain is not None]
    if base is None or not present or len(np.unique(units)) < 2:
        return nothing
    metric, labels = search.metric, search.labels
    sides = [base, *(predictions[place] for place in present)]
    values = compute_item_values(metric, labels, [one for one in sides if one is not None], units)
    assert values is not None
    differences = metric.sign * (values[1:] - values[0])
    points, sizes = np.array([gains[place] for place in present]), np.bincount(assign_blocks(units))
    intervals = compute_simultaneous_intervals(differences[:, None], points, sizes)
    for place, row, interval in zip(present, differences, intervals, strict=True):
        error = estimate_item_error(row, sizes)
        nothing[place] = (None if error is None else error.value, interval)
    return nothing


def _compare_on_held(
    search: _Search, single: RateSetting, layerwise: RateSetting, seeds: int
) -> HeldComparison:
    """Train both settings on fresh seeds, and compare them on the rows that chose nothing.

    Raises:
        NumericError: if one diverges there.
    """
    fresh = [seed for seed in range(seeds + 1) if seed != search.seed][:seeds]
    prepared, metric = search.context.prepared, search.metric
    rows = prepared.rows[HELD]
    labels, units = prepared.encode_for_metrics(rows), assign_units(rows)
    predictions: dict[str, np.ndarray] = {}
    for name, setting in (("layerwise", layerwise), ("single", single)):
        drawn = []
        for seed in fresh:
            logits = search.train(setting, 1.0, seed)
            if logits is None:
                raise NumericError(
                    f"training diverged at {setting.name} on seed {seed}", "Give lower --rates"
                )
            drawn.append(prepared.decode_for_metrics(rows, logits[HELD]))
        predictions[name] = np.stack(drawn)
    split = SplitPredictions(labels, units, predictions)
    gain, _ = estimate_gain(metric, split, "layerwise", "single")
    layered, plain = (
        estimate_score(metric, labels, list(predictions[name]), units)
        for name in ("layerwise", "single")
    )
    margin = MARGIN if metric.best else MARGIN * abs(plain.value)
    return HeldComparison(
        rows=len(rows), seeds=fresh, single=plain, layerwise=layered,
        gain=Estimate(value=gain.value, ci95=gain.ci95), outcome=classify_gain(gain.ci95, margin),
    )  # fmt: skip
