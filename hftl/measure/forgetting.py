"""Measure forgetting: the features of the source model against those of each arm.

Before is always the source model as it is, before any adaptation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hftl.analysis.drift import (
    JackknifeProbes,
    choose_penalty,
    compute_cka_floor,
    compute_cosines,
    jackknife_cka,
    jackknife_relational_kl,
)
from hftl.analysis.neighbours import (
    NEIGHBOURS,
    JackknifeEstimate,
    compute_jackknife_interaction_variance,
    count_needed_neighbours,
    jackknife_neighbour_hits,
    jackknife_shared_neighbours,
    rank_neighbours,
)
from hftl.measure.forgetting_facts import (
    ControlFigures,
    Figure,
    ForgettingArm,
    ForgettingFigures,
    Forgotten,
    Headline,
    Reduction,
)
from hftl.measure.record import Interval
from hftl.measure.statistics import (
    MAX_BLOCKS,
    assign_blocks,
    compute_pseudo_values,
    effective_count,
    estimate_mean_error,
    jackknife,
    rule_of_three_half_width,
)

PRETRAINING_FIGURES = ("mlm_loss", "mae_loss", "backward")
"""The figures by the source's own heads, of general rows."""
PROBE_BLOCKS = 10
"""Blocks that probes are fitted without: each costs as many fits as there are folds."""
SEED_ERROR_FACTOR = 1.15
"""Factor of the seeds' standard error. How much a seed forgets is skewed: now and then one breaks.
With 3 to 8 seeds whose effects have a skewness of 1.4 to 1.8 the plain interval covers .91 to .93,
this one .935 to .945, and .96 to .97 where they are normal."""
Features = Mapping[str, np.ndarray]
"""(rows, width) features of `general`, where there are general data, and of `new` rows; and of
`PRETRAINING_FIGURES` those that the source has: (rows, 2), a value and how many it is a mean of."""


@dataclass(frozen=True)
class ForgettingSpec:
    """Describe the general rows that forgetting is measured on.

    `controls` are labels (rows,) of the general rows by name, `classes` the names of those that a
    probe is fitted to, `units` (rows,) int64 ids of their documents, None without general data.
    `tau` is the temperature of similarities.
    """

    controls: Mapping[str, np.ndarray]
    classes: Sequence[str]
    units: np.ndarray | None
    tau: float


def measure_forgetting(
    before: Features, arms: Mapping[str, list[Features]], spec: ForgettingSpec
) -> dict[str, ForgettingFigures]:
    """Return the figures of each arm's forgetting, by the arm's name.

    `neighbours`, `cka`, `cosine` and `kl` compare general rows, see `analysis.jackknife`, and are
    None without; `new_kl` is the last on new rows, None where there is only one. By name of a
    control, `controls` has `same`, the share of rows whose nearest neighbour has the same label,
    and of classes `probe_fixed` and `probe_refitted`, the accuracy of a cross-validated probe that
    is fitted on the original's features, or on the new ones. The fixed probe also fails where
    features are only turned, the refitted one hides that.

    Intervals are over seeds and documents as those of gains, see `SEED_ERROR_FACTOR`; the jackknife
    takes a document out of the queries and out of the rows that they are compared with or that a
    probe is fitted on. Where the encoder has changed and the answer of no row has, the rule of
    three bounds what other documents may show. `cka` has `floor`, see `compute_cka_floor`, of the
    first seed.

    `mlm_loss` and `mae_loss` are those of the source's own head at the same hidden tokens or
    patches, means over all of them. `backward` is the accuracy of its own classes, whose change is
    backward transfer, R_21 - R_11 of two tasks (Lopez-Paz & Ranzato 2017, arXiv:1706.08840,
    equation 3). They are None where the source has no such head.

    Args:
        before: features of the source model.
        arms: features of each arm, one entry a seed.
        spec: controls and documents.
    """
    source = None if spec.units is None else _SourceFigures.compute(before["general"], spec)
    return {arm: _measure_arm(before, after, spec, source) for arm, after in arms.items()}


def build_forgetting_arms(
    figures: Mapping[str, ForgettingFigures], spec: ForgettingSpec, plain: Mapping[str, str | None]
) -> tuple[Headline | None, list[ForgettingArm]]:
    """Return the headline, and of each arm its figures, how much of the headline it has forgotten,
    and the share of another's forgetting that is gone.

    The headline is `same` of the first control, without controls `neighbours`, without general
    data there is none.

    Args:
        figures: see `measure_forgetting`, the own arm first.
        spec: controls and documents.
        plain: for an arm the one that is the same without retention, None where there is none.
    """
    control = next(iter(spec.controls), None)
    forgotten = {arm: _compute_forgotten(of_arm, control) for arm, of_arm in figures.items()}
    arms = [
        ForgettingArm(
            arm=arm,
            figures=of_arm,
            forgotten=forgotten[arm],
            against=_compare_forgotten(forgotten, arm, plain.get(arm)),
        )
        for arm, of_arm in figures.items()
    ]
    if spec.units is None:
        return None, arms
    return Headline(figure="neighbours" if control is None else "same", control=control), arms


def _compare_forgotten(
    forgotten: Mapping[str, Forgotten | None], arm: str, other: str | None
) -> Reduction | None:
    if other is None:
        return None
    own, against = forgotten[arm], forgotten[other]
    if own is None or against is None:
        return None
    return Reduction(arm=other, gone=forgetting_reduction(own, against))


def forgetting_reduction(own: Forgotten, other: Forgotten) -> float | None:
    """Return the share of the other's forgetting that is gone: 1 - own / other.

    None where the other forgot nothing, or nothing beyond noise: a share of noise says nothing.
    """
    low = other.value if other.ci95 is None else other.ci95[0]
    return 1 - own.value / other.value if min(low, other.value) > 0 else None


def _compute_forgotten(figures: ForgettingFigures, control: str | None) -> Forgotten | None:
    """Return by how much the headline fell; None without one."""
    figure = figures.neighbours if control is None else figures.controls[control].same
    if figure is None:
        return None
    # 0 minus a number, as a minus alone would make 0 a -0.0.
    interval = None if figure.ci95 is None else (0 - figure.ci95[1], 0 - figure.ci95[0])
    return Forgotten(
        value=figure.before - figure.after,
        ci95=interval,
        per_seed=[figure.before - after for after in figure.per_seed],
    )


@dataclass(frozen=True)
class _SourceFigures:
    """Hold what the source model says of general rows: computed once for all arms.

    `blocks` are those of the jackknife, `probe_blocks` the fewer ones that probes are fitted
    without; `probes` hold labels, penalty and fitted probes of each control that has classes.
    """

    features: np.ndarray
    units: np.ndarray
    blocks: np.ndarray
    probe_blocks: np.ndarray
    order: np.ndarray
    probes: dict[str, tuple[np.ndarray, float, JackknifeProbes]]

    @classmethod
    def compute(cls, features: np.ndarray, spec: ForgettingSpec) -> "_SourceFigures":
        assert spec.units is not None
        documents = len(np.unique(spec.units))
        blocks, probe_blocks = (_assign_blocks(spec.units, n) for n in (MAX_BLOCKS, PROBE_BLOCKS))
        if documents < 3:
            # Without one of two documents nothing is left to fit on.
            probe_blocks = np.zeros_like(probe_blocks)
        probes = {}
        # With one document there are no rows to fit on that are apart from those to answer for.
        for name in spec.classes if documents > 1 else ():
            labels = np.unique(spec.controls[name], return_inverse=True)[1].astype(np.int64)
            penalty = choose_penalty(features, labels, spec.units)
            fitted = JackknifeProbes.fit(features, labels, spec.units, penalty, probe_blocks)
            probes[name] = (labels, penalty, fitted)
        order = _rank_neighbours(features, blocks)
        return cls(features, spec.units, blocks, probe_blocks, order, probes)


def _assign_blocks(units: np.ndarray, most: int) -> np.ndarray:
    """Return the jackknife's block of every row; one where there is one document."""
    single = len(np.unique(units)) < 2
    return np.zeros(len(units), np.int64) if single else assign_blocks(units, most)


def _rank_neighbours(features: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    return rank_neighbours(features, count_needed_neighbours(blocks, NEIGHBOURS))


def _measure_arm(
    before: Features, after: list[Features], spec: ForgettingSpec, source: _SourceFigures | None
) -> ForgettingFigures:
    names = [name for name in ForgettingFigures.model_fields if name != "controls"]
    figures: dict[str, Figure | None] = dict.fromkeys(names)
    if len(before["new"]) > 1:
        figures["new_kl"] = _measure_new_kl(before, after, spec.tau)
    if source is None:
        return ForgettingFigures.model_validate(figures | {"controls": {}})
    arrays = [features["general"] for features in after]
    moved = any(array is not before["general"] for array in arrays)
    orders = [
        source.order if array is source.features else _rank_neighbours(array, source.blocks)
        for array in arrays
    ]
    figures |= _measure_general(source, arrays, orders, spec.tau, moved)
    for name in PRETRAINING_FIGURES:
        if all(name in features for features in (before, *after)):
            values = [features[name] for features in after]
            figures[name] = _measure_pretraining_head(before[name], values, source, name)
    controls = {
        name: _measure_control(source, arrays, orders, name, labels, moved)
        for name, labels in spec.controls.items()
    }
    return ForgettingFigures.model_validate(figures | {"controls": controls})


def _measure_general(
    source: _SourceFigures, arrays: list[np.ndarray], orders: list[np.ndarray], tau: float,
    moved: bool,
) -> dict[str, Figure]:  # fmt: skip
    """Return the figures on general rows that need no labels.

    Args:
        source: the original.
        arrays: (rows, width) features, one a seed.
        orders: (rows, neighbours) of each, see `rank_neighbours`.
        tau: the temperature of similarities.
        moved: whether the encoder has changed.
    """
    before, units, blocks = source.features, source.units, source.blocks
    shared = [jackknife_shared_neighbours(source.order, o, blocks, NEIGHBOURS) for o in orders]
    kl = [jackknife_relational_kl(before, array, tau, blocks) for array in arrays]
    cka = [jackknife_cka(before, array, blocks) for array in arrays]
    cosines = [compute_cosines(before, array) for array in arrays]
    floor = compute_cka_floor(before, arrays[0])
    cka_figure = _estimate_from_blocks(1.0, cka, units, blocks, moved=False)
    return {
        "neighbours": _estimate_from_blocks(1.0, shared, units, blocks, moved),
        "cosine": _average_over_rows(np.ones(len(before)), cosines, source),
        "kl": _estimate_from_blocks(0.0, kl, units, blocks, moved=False),
        "cka": cka_figure.model_copy(update={"floor": floor}),
    }


def _measure_control(
    source: _SourceFigures, arrays: list[np.ndarray], orders: list[np.ndarray], name: str,
    labels: np.ndarray, moved: bool,
) -> ControlFigures:  # fmt: skip
    """Return the figures of one control; see `_measure_general`."""
    hits = [jackknife_neighbour_hits(o, labels, source.blocks) for o in (source.order, *orders)]
    same = _estimate_from_blocks(hits[0], hits[1:], source.units, source.blocks, moved)
    if name not in source.probes:
        return ControlFigures(same=same, probe_fixed=None, probe_refitted=None)
    ids, penalty, probes = source.probes[name]
    blocks = source.probe_blocks
    before = probes.score(source.features, ids)
    fixed = [probes.score(array, ids) for array in arrays]
    refitted = [
        before
        if array is source.features
        else JackknifeProbes.fit(array, ids, source.units, penalty, blocks).score(array, ids)
        for array in arrays
    ]
    return ControlFigures(
        same=same,
        probe_fixed=_estimate_from_blocks(before, fixed, source.units, blocks, moved),
        probe_refitted=_estimate_from_blocks(before, refitted, source.units, blocks, moved),
    )


def _measure_new_kl(before: Features, after: list[Features], tau: float) -> Figure:
    units = np.arange(len(before["new"]))
    blocks = _assign_blocks(units, MAX_BLOCKS)
    values = [jackknife_relational_kl(before["new"], a["new"], tau, blocks) for a in after]
    return _estimate_from_blocks(0.0, values, units, blocks, moved=False)


def _measure_pretraining_head(
    before: np.ndarray, after: list[np.ndarray], source: _SourceFigures, name: str
) -> Figure | None:
    """Return a figure of `PRETRAINING_FIGURES`; None where no row has a hidden part."""
    present = before[:, 1] > 0
    if not present.any():
        return None
    values = [array[present, 0].astype(np.float64) for array in (before, *after)]
    moved = name == "backward" and any(array is not before for array in after)
    weights = before[present, 1].astype(np.float64)
    return _average_over_rows(values[0], values[1:], source, present, weights, moved)


def _average_over_rows(
    before: np.ndarray, after: list[np.ndarray], source: _SourceFigures,
    rows: np.ndarray | slice = slice(None), weights: np.ndarray | None = None,
    moved: bool = False,
) -> Figure:  # fmt: skip
    """Return a figure that is a mean over independent rows, weighted or not."""
    units = source.units[rows]
    weights = np.ones(len(before)) if weights is None else weights

    def mean(values: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        return float(np.average(values[rows], weights=weights[rows]))

    interval = None
    if len(after) > 1 and len(np.unique(units)) > 1:
        values = [jackknife(lambda i, c=array - before: mean(c, i), units) for array in after]
        change = mean(np.mean(after, axis=0) - before)
        interval = _estimate_interval(np.stack(values), change, units, assign_blocks(units), moved)
    return _build_figure(mean(before), [mean(array) for array in after], interval)


def _estimate_from_blocks(
    before: JackknifeEstimate | float, after: list[JackknifeEstimate], units: np.ndarray,
    blocks: np.ndarray, moved: bool,
) -> Figure:  # fmt: skip
    """Return a figure of rows that depend on each other, from its values without each block.

    Args:
        before: the original's; a number where it is the same whichever rows there are.
        after: one a seed.
        units: (rows,) their documents.
        blocks: (rows,) what was taken out together.
        moved: whether to bound what has not changed by the rule of three.
    """
    if not isinstance(before, JackknifeEstimate):
        before = JackknifeEstimate(before, np.full(after[0].without.shape, before))
    interval = None
    sizes = np.bincount(blocks)
    finite = all(np.isfinite(estimate.without).all() for estimate in (before, *after))
    if len(after) > 1 and len(sizes) > 1 and finite:
        by_seed = np.array([estimate.value - before.value for estimate in after])
        values = np.stack(
            [
                compute_pseudo_values(change, estimate.without - before.without, sizes)
                for change, estimate in zip(by_seed, after, strict=True)
            ]
        )
        # Where a row's answer jumps, the mean of a seed's values is mostly noise: its figure is
        # known, and the seeds' luck is that of the figures.
        values += (by_seed - values.mean(1))[:, None]
        effects = np.stack([estimate.effects - before.effects for estimate in after])
        twice = compute_jackknife_interaction_variance(effects)
        interval = _estimate_interval(values, float(by_seed.mean()), units, blocks, moved, twice)
    return _build_figure(before.value, [estimate.value for estimate in after], interval)


def _estimate_interval(
    values: np.ndarray,
    change: float,
    units: np.ndarray,
    blocks: np.ndarray,
    moved: bool,
    twice: float = 0.0,
) -> Interval | None:
    """Return the interval around the change; by the rule of three where nothing changed, and
    `moved`."""
    error = estimate_mean_error(values, np.bincount(blocks), SEED_ERROR_FACTOR, twice)
    if error is None:
        return None
    if error.value == 0 and moved:
        half = rule_of_three_half_width(effective_count(np.unique(units, return_counts=True)[1]))
        return change - half, change + half
    return error.interval(change)


def _build_figure(before: float, after: list[float], interval: Interval | None) -> Figure:
    mean = float(np.mean(after))
    return Figure(before=before, after=mean, change=mean - before, ci95=interval, per_seed=after)
