"""Forgetting: what the source model's features told, and what those of each arm tell no more.

Before is always the source model as it is, before any adaptation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    JackknifeEstimate,
    count_needed_neighbours,
    jackknife_neighbour_hits,
    jackknife_shared_neighbours,
    rank_neighbours,
)
from hftl.measure.statistics import (
    MAX_BLOCKS,
    assign_blocks,
    compute_pseudo_values,
    effective_count,
    estimate_mean_error,
    jackknife,
    rule_of_three_half_width,
)

GENERAL_FIGURES = ("neighbours", "cka", "cosine", "kl")
"""The figures on general data that need no labels."""
PRETRAINING_FIGURES = ("mlm_loss", "mae_loss", "backward")
"""The figures by the source's own heads, of general rows."""
NEIGHBOURS = 10
"""Nearest neighbours that are compared."""
PROBE_BLOCKS = 10
"""Blocks that probes are fitted without: each costs as many fits as there are folds."""
SEED_ERROR_FACTOR = 1.15
"""Of the seeds' standard error. How much a seed forgets is skewed: now and then one breaks. With 3
to 8 seeds whose effects have a skewness of 1.4 to 1.8 the plain interval covers .91 to .93, this
one .935 to .945, and .96 to .97 where they are normal."""
Features = Mapping[str, np.ndarray]
"""(rows, width) features of `general`, where there are general data, and of `new` rows; and of
`PRETRAINING_FIGURES` those that the source has: (rows, 2), a value and how many it is a mean of."""


@dataclass(frozen=True)
class ForgettingSpec:
    """What forgetting is looked at by.

    `controls` are labels (rows,) of the general rows by name, `classes` the names of those that a
    probe is fitted to, `units` (rows,) int64 ids of their documents, None without general data.
    `tau` is the temperature of similarities.
    """

    controls: Mapping[str, np.ndarray]
    classes: Sequence[str]
    units: np.ndarray | None
    tau: float


def measure_forgetting(
    before: Features, arms: Mapping[str, list[Features]], asked: ForgettingSpec
) -> dict[str, Any]:
    """By arm the figures of its forgetting, each {before, after, change, ci95, per_seed}.

    `neighbours`, `cka`, `cosine` and `kl` are of `shared`, `cka`, `cosines` and `relational_kl` on
    general rows, None without; `new_kl` the last on new rows, None where there is only one. By
    name of a control `controls` has `same`, the share of rows whose nearest neighbour has the same
    label, and of classes `probe_fixed` and `probe_refitted`, the accuracy of a cross-validated
    probe that is fitted on the original's features, or on the new ones. The fixed probe also fails
    where features are only turned, the refitted one hides that.

    Intervals are over seeds and documents as those of gains, see `SEED_ERROR_FACTOR`; the jackknife takes a
    document out of the rows that are asked and out of those that they are compared with or that a
    probe is fitted on. Where the encoder has changed and no row's answer has, the rule of three
    bounds what other documents may show. `cka` has `floor`, see `cka_floor`, of the first seed.

    `mlm_loss` and `mae_loss` are those of the source's own head at the same hidden tokens or
    patches, means over all of them. `backward` is the accuracy of its own classes, whose change is
    backward transfer, R_21 - R_11 of two tasks (Lopez-Paz & Ranzato 2017, arXiv:1706.08840,
    equation 3). They are None where the source has no such head.

    Args:
        before: features of the source model.
        arms: features of each arm, one entry a seed.
        asked: controls and documents.
    """
    known = None if asked.units is None else _SourceFigures.of(before["general"], asked)
    return {arm: _measure_arm(before, after, asked, known) for arm, after in arms.items()}


def build_forgetting_arms(
    found: Mapping[str, Any], asked: ForgettingSpec, plain: Mapping[str, str | None]
) -> Any:
    """What the record tells of the arms: figures, how much of the headline each has forgotten, and
    the share of another's forgetting that is gone.

    The headline is `same` of the first control, without controls `neighbours`, without general
    data there is none.

    Args:
        found: see `measure_forgetting`, the own arm first.
        asked: what they were found by.
        plain: for an arm the one that is the same without retention, None where there is none.
    """
    control = next(iter(asked.controls), None)
    forgot = {arm: _compute_forgotten(told, control) for arm, told in found.items()}
    arms = []
    for arm, told in found.items():
        other = plain.get(arm)
        against = None
        if other is not None and forgot[arm] is not None:
            against = {"arm": other, "gone": forgetting_reduction(forgot[arm], forgot[other])}
        arms.append({"arm": arm, "figures": told, "forgotten": forgot[arm], "against": against})
    figure = None if asked.units is None else "same" if control is not None else "neighbours"
    return {"headline": figure and {"figure": figure, "control": control}, "arms": arms}


def forgetting_reduction(own: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The share of the other's forgetting that is gone: 1 - own / other.

    None where the other forgot nothing, or nothing beyond noise: a share of noise says nothing.
    """
    low = other["value"] if other["ci95"] is None else other["ci95"][0]
    return 1 - own["value"] / other["value"] if min(low, other["value"]) > 0 else None


def _compute_forgotten(told: dict[str, Any], control: str | None) -> Any:
    """How far the headline fell; None without one."""
    figure = told["neighbours"] if control is None else told["controls"][control]["same"]
    if figure is None:
        return None
    low, high = figure["ci95"] or (None, None)
    return {
        "value": figure["before"] - figure["after"],
        "ci95": None if low is None or high is None else [0 - high, 0 - low],
        "per_seed": [figure["before"] - after for after in figure["per_seed"]],
    }


@dataclass(frozen=True)
class _SourceFigures:
    """Hold what the original says of general rows: computed once for all arms.

    `blocks` are those of the jackknife, `few` the fewer ones that probes are fitted without.
    """

    features: np.ndarray
    units: np.ndarray
    blocks: np.ndarray
    few: np.ndarray
    order: np.ndarray
    probes: dict[str, tuple[np.ndarray, float, JackknifeProbes]]

    @classmethod
    def of(cls, features: np.ndarray, asked: ForgettingSpec) -> "_SourceFigures":
        assert asked.units is not None
        blocks, few = (_assign_blocks(asked.units, most) for most in (MAX_BLOCKS, PROBE_BLOCKS))
        if len(np.unique(asked.units)) < 3:
            few = np.zeros_like(few)  # without one of two documents nothing is left to fit on
        probes = {}
        # With one document there are no rows to fit on that are apart from those to answer for.
        for name in asked.classes if len(np.unique(asked.units)) > 1 else ():
            labels = np.unique(asked.controls[name], return_inverse=True)[1].astype(np.int64)
            penalty = choose_penalty(features, labels, asked.units)
            fitted = JackknifeProbes.fit(features, labels, asked.units, penalty, few)
            probes[name] = (labels, penalty, fitted)
        return cls(features, asked.units, blocks, few, _order_neighbours(features, blocks), probes)


def _assign_blocks(units: np.ndarray, most: int) -> np.ndarray:
    """The jackknife's block of every row; one where there is one document."""
    alone = len(np.unique(units)) < 2
    return np.zeros(len(units), np.int64) if alone else assign_blocks(units, most)


def _order_neighbours(features: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    return rank_neighbours(features, count_needed_neighbours(blocks, NEIGHBOURS))


def _measure_arm(
    before: Features, after: list[Features], asked: ForgettingSpec, known: _SourceFigures | None
) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys((*GENERAL_FIGURES, *PRETRAINING_FIGURES, "new_kl")) | {
        "controls": {}
    }
    fresh = before["new"]
    if len(fresh) > 1:
        found["new_kl"] = _measure_new_kl(before, after, asked.tau)
    if known is None:
        return found
    old, now = before["general"], [told["general"] for told in after]
    moved = any(side is not old for side in now)
    orders = [known.order if side is old else _order_neighbours(side, known.blocks) for side in now]
    found["neighbours"] = _estimate_from_blocks(
        1.0,
        [
            jackknife_shared_neighbours(known.order, side, known.blocks, NEIGHBOURS)
            for side in orders
        ],
        known.units,
        known.blocks,
        moved,
    )
    found["cosine"] = _average_over_rows(
        np.ones(len(old)), [compute_cosines(old, side) for side in now], known
    )
    found["kl"] = _estimate_from_blocks(
        0.0, [jackknife_relational_kl(old, side, asked.tau, known.blocks) for side in now],
        known.units, known.blocks, moved=False,
    )  # fmt: skip
    alike = [jackknife_cka(old, side, known.blocks) for side in now]
    found["cka"] = _estimate_from_blocks(1.0, alike, known.units, known.blocks, moved=False)
    found["cka"]["floor"] = compute_cka_floor(old, now[0])
    for name in PRETRAINING_FIGURES:
        if all(name in side for side in (before, *after)):
            found[name] = _measure_pretraining_head(
                before[name], [side[name] for side in after], known, name
            )
    for name, labels in asked.controls.items():
        same = [
            jackknife_neighbour_hits(side, labels, known.blocks) for side in (known.order, *orders)
        ]
        told: dict[str, Any] = {
            "same": _estimate_from_blocks(same[0], same[1:], known.units, known.blocks, moved)
        }
        told |= _measure_probes(now, known, name, moved) if name in known.probes else NO_PROBE
        found["controls"][name] = told
    return found


NO_PROBE = {"probe_fixed": None, "probe_refitted": None}


def _measure_new_kl(before: Features, after: list[Features], tau: float) -> dict[str, Any]:
    units = np.arange(len(before["new"]))
    blocks = _assign_blocks(units, MAX_BLOCKS)
    values = [jackknife_relational_kl(before["new"], told["new"], tau, blocks) for told in after]
    return _estimate_from_blocks(0.0, values, units, blocks, moved=False)


def _measure_probes(
    now: list[np.ndarray], known: _SourceFigures, name: str, moved: bool
) -> dict[str, Any]:
    labels, penalty, probes = known.probes[name]
    before = probes.score(known.features, labels)
    fixed = [probes.score(side, labels) for side in now]
    refitted = [
        before
        if side is known.features
        else JackknifeProbes.fit(side, labels, known.units, penalty, known.few).score(side, labels)
        for side in now
    ]
    return {
        "probe_fixed": _estimate_from_blocks(before, fixed, known.units, known.few, moved),
        "probe_refitted": _estimate_from_blocks(before, refitted, known.units, known.few, moved),
    }


def _measure_pretraining_head(
    before: np.ndarray, after: list[np.ndarray], known: _SourceFigures, name: str
) -> Any:
    """A figure of `PRETRAINING_FIGURES`; None where nothing of any row was asked."""
    there = before[:, 1] > 0
    if not there.any():
        return None
    values = [side[there, 0].astype(np.float64) for side in (before, *after)]
    moved = name == "backward" and any(side is not before for side in after)
    weights = before[there, 1].astype(np.float64)
    return _average_over_rows(values[0], values[1:], known, there, weights, moved)


def _average_over_rows(
    before: np.ndarray, after: list[np.ndarray], known: _SourceFigures,
    there: np.ndarray | slice = slice(None), weights: np.ndarray | None = None,
    moved: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A figure that is a mean over rows, each for itself, weighted or not."""
    units = known.units[there]
    weights = np.ones(len(before)) if weights is None else weights

    def mean(side: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        return float(np.average(side[rows], weights=weights[rows]))

    interval = None
    if len(after) > 1 and len(np.unique(units)) > 1:
        values = [jackknife(lambda i, c=side - before: mean(c, i), units) for side in after]
        change = mean(np.mean(after, axis=0) - before)
        interval = _estimate_interval(np.stack(values), change, units, assign_blocks(units), moved)
    return _build_figure(mean(before), [mean(side) for side in after], interval)


def _estimate_from_blocks(
    before: JackknifeEstimate | float,
    after: list[JackknifeEstimate],
    units: np.ndarray,
    blocks: np.ndarray,
    moved: bool,
) -> dict[str, Any]:
    """A figure of rows that depend on each other, from its values without each block.

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
    sound = all(np.isfinite(figure.without).all() for figure in (before, *after))
    if len(after) > 1 and len(sizes) > 1 and sound:
        by_seed = np.array([figure.value - before.value for figure in after])
        values = np.stack(
            [
                compute_pseudo_values(change, figure.without - before.without, sizes)
                for change, figure in zip(by_seed, after, strict=True)
            ]
        )
        # Where a row's answer jumps, the mean of a seed's values is mostly noise: its figure is
        # known, and the seeds' luck is that of the figures.
        values += (by_seed - values.mean(1))[:, None]
        twice = _double_counted_variance(
            np.stack([figure.effects - before.effects for figure in after])
        )
        interval = _estimate_interval(values, float(by_seed.mean()), units, blocks, moved, twice)
    return _build_figure(before.value, [side.value for side in after], interval)


def _double_counted_variance(effects: np.ndarray) -> float:
    """The variance that a jackknife counts twice: what a pair of blocks have in common beyond what
    each of them has (Efron & Stein 1981, Annals of Statistics 9:586-596).

    A row's answer that hangs on another document is luck of the pair, and is seen when either is
    taken out. What differs from seed to seed is counted with the seeds, so it is left out here.

    Args:
        effects: (seeds, blocks, blocks), see `Figure`; (seeds,) where they were not computed.
    """
    seeds = len(effects)
    common = seeds * effects.mean(0) ** 2 - (effects**2).mean(0)
    return max(0.0, float(np.sum(common)) / (seeds - 1))


def _estimate_interval(
    values: np.ndarray,
    change: float,
    units: np.ndarray,
    blocks: np.ndarray,
    moved: bool,
    twice: float = 0.0,
) -> tuple[float, float] | None:
    """The interval around the change; by the rule of three where nothing changed, and `moved`."""
    error = estimate_mean_error(values, np.bincount(blocks), SEED_ERROR_FACTOR, twice)
    if error is None:
        return None
    if error.value == 0 and moved:
        half = rule_of_three_half_width(effective_count(np.unique(units, return_counts=True)[1]))
        return change - half, change + half
    return error.interval(change)


def _build_figure(
    before: float, after: list[float], interval: tuple[float, float] | None
) -> dict[str, Any]:
    mean = float(np.mean(after))
    return {
        "before": before, "after": mean, "change": mean - before,
        "ci95": None if interval is None else list(interval), "per_seed": after,
    }  # fmt: skip
