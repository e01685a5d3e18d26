"""Forgetting: what the source model's features told, and what those of each arm tell no more.

Before is always the source model as it is, before any adaptation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.analyse.drift import (
    chosen_penalty,
    cka,
    cosines,
    nearest_same,
    probe_hits,
    relational_kl,
)
from hftl.analyse.neighbours import shared
from hftl.statistics import jackknife, mean_interval

GENERAL = ("neighbours", "cka", "cosine", "kl")
"""The figures on general data that need no labels."""
OWN_HEADS = ("mlm_loss", "mae_loss", "backward")
"""The figures by the source's own heads, of general rows."""
Features = Mapping[str, np.ndarray]
"""(rows, width) features of `general`, where there are general data, and of `new` rows; and of
`OWN_HEADS` those that the source has: (rows, 2), a value and how many it is a mean of."""


@dataclass(frozen=True)
class Asked:
    """What forgetting is looked at by.

    `controls` are labels (rows,) of the general rows by name, `classes` the names of those that a
    probe is fitted to, `units` (rows,) int64 ids of their documents, None without general data.
    `tau` is the temperature of similarities.
    """

    controls: Mapping[str, np.ndarray]
    classes: Sequence[str]
    units: np.ndarray | None
    tau: float


def figures(before: Features, arms: Mapping[str, list[Features]], asked: Asked) -> dict[str, Any]:
    """By arm the figures of its forgetting, each {before, after, change, ci95, per_seed}.

    `neighbours`, `cka`, `cosine` and `kl` are of `shared`, `cka`, `cosines` and `relational_kl` on
    general rows, None without; `new_kl` the last on new rows, None where there is only one. By
    name of a control `controls` has `same`, the share of rows whose nearest neighbour has the same
    label, and of classes `probe_fixed` and `probe_refitted`, the accuracy of a cross-validated
    probe that is fitted on the original's features, or on the new ones. All are means over rows,
    but for `cka`, and their intervals are over seeds and documents as those of gains; `cka` has
    none. The fixed probe also fails where features are only turned, the refitted one hides that.

    `mlm_loss` and `mae_loss` are those of the source's own head at the same hidden tokens or
    patches, means over all of them. `backward` is the accuracy of its own classes, whose change is
    backward transfer, R_21 - R_11 of two tasks (Lopez-Paz & Ranzato 2017, arXiv:1706.08840,
    equation 3). They are None where the source has no such head.

    Args:
        before: features of the source model.
        arms: features of each arm, one entry a seed.
        asked: controls and documents.
    """
    known = {name: _Probe.of(before["general"], asked, name) for name in asked.classes}
    return {arm: _figures(before, after, asked, known) for arm, after in arms.items()}


def section(found: Mapping[str, Any], asked: Asked, plain: Mapping[str, str | None]) -> Any:
    """What the record tells of the arms: figures, how much of the headline each has forgotten, and
    the share of another's forgetting that is gone.

    The headline is `same` of the first control, without controls `neighbours`, without general
    data there is none.

    Args:
        found: see `figures`, the own arm first.
        asked: what they were found by.
        plain: for an arm the one that is the same without retention, None where there is none.
    """
    control = next(iter(asked.controls), None)
    forgot = {arm: _forgotten(told, control) for arm, told in found.items()}
    arms = []
    for arm, told in found.items():
        other = plain.get(arm)
        against = None
        if other is not None and forgot[arm] is not None:
            against = {"arm": other, "gone": gone(forgot[arm], forgot[other])}
        arms.append({"arm": arm, "figures": told, "forgotten": forgot[arm], "against": against})
    figure = None if asked.units is None else "same" if control is not None else "neighbours"
    return {"headline": figure and {"figure": figure, "control": control}, "arms": arms}


def gone(own: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The share of the other's forgetting that is gone: 1 - own / other.

    None where the other forgot nothing, or nothing beyond noise: a share of noise says nothing.
    """
    low = other["value"] if other["ci95"] is None else other["ci95"][0]
    return 1 - own["value"] / other["value"] if min(low, other["value"]) > 0 else None


def _forgotten(told: dict[str, Any], control: str | None) -> Any:
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
class _Probe:
    """Labels as class ids, the penalty chosen, and what a probe of the original gets right."""

    labels: np.ndarray
    penalty: float
    hits: np.ndarray

    @classmethod
    def of(cls, before: np.ndarray, asked: Asked, name: str) -> "_Probe":
        assert asked.units is not None
        labels = np.unique(asked.controls[name], return_inverse=True)[1].astype(np.int64)
        penalty = chosen_penalty(before, labels, asked.units)
        (hits,) = probe_hits(before, [before], labels, asked.units, penalty)
        return cls(labels, penalty, hits)


def _figures(
    before: Features, after: list[Features], asked: Asked, known: dict[str, _Probe]
) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys((*GENERAL, *OWN_HEADS, "new_kl")) | {"controls": {}}
    fresh = before["new"]
    if len(fresh) > 1:
        moved = [relational_kl(fresh, told["new"], asked.tau) for told in after]
        found["new_kl"] = _over_rows(np.zeros(len(fresh)), moved, None)
    if asked.units is None:
        return found
    old, now = before["general"], [told["general"] for told in after]
    zero, one = np.zeros(len(old)), np.ones(len(old))
    found["neighbours"] = _over_rows(one, [shared(old, side) for side in now], asked.units)
    found["cosine"] = _over_rows(one, [cosines(old, side) for side in now], asked.units)
    kl = [relational_kl(old, side, asked.tau) for side in now]
    found["kl"] = _over_rows(zero, kl, asked.units)
    found["cka"] = _told(1.0, [cka(old, side) for side in now], None)
    for name in OWN_HEADS:
        if all(name in side for side in (before, *after)):
            found[name] = _by_head(before[name], [side[name] for side in after], asked.units)
    for name, labels in asked.controls.items():
        same = [nearest_same(side, labels) for side in (old, *now)]
        told: dict[str, Any] = {"same": _over_rows(same[0], same[1:], asked.units)}
        told |= _probed(old, now, known[name], asked.units) if name in known else NO_PROBE
        found["controls"][name] = told
    return found


NO_PROBE = {"probe_fixed": None, "probe_refitted": None}


def _probed(
    old: np.ndarray, now: list[np.ndarray], probe: _Probe, units: np.ndarray
) -> dict[str, Any]:
    fixed = probe_hits(old, now, probe.labels, units, probe.penalty)
    refitted = [
        hits
        for side in now
        for hits in probe_hits(side, [side], probe.labels, units, probe.penalty)
    ]
    return {
        "probe_fixed": _over_rows(probe.hits, fixed, units),
        "probe_refitted": _over_rows(probe.hits, refitted, units),
    }


def _by_head(before: np.ndarray, after: list[np.ndarray], units: np.ndarray) -> Any:
    """A figure of `OWN_HEADS`; None where nothing of any row was asked."""
    there = before[:, 1] > 0
    if not there.any():
        return None
    values = [side[there, 0].astype(np.float64) for side in (before, *after)]
    return _over_rows(values[0], values[1:], units[there], before[there, 1].astype(np.float64))


def _over_rows(
    before: np.ndarray, after: list[np.ndarray], units: np.ndarray | None,
    weights: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A figure that is a mean over rows, weighted or not, with the interval of its change."""
    units = np.arange(len(before)) if units is None else units
    weights = np.ones(len(before)) if weights is None else weights

    def mean(side: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        return float(np.average(side[rows], weights=weights[rows]))

    interval = None
    if len(after) > 1 and len(np.unique(units)) > 1:
        values = [jackknife(lambda i, c=side - before: mean(c, i), units) for side in after]
        interval = mean_interval(np.stack(values))
    return _told(mean(before), [mean(side) for side in after], interval)


def _told(
    before: float, after: list[float], interval: tuple[float, float] | None
) -> dict[str, Any]:
    mean = float(np.mean(after))
    return {
        "before": before, "after": mean, "change": mean - before,
        "ci95": None if interval is None else list(interval), "per_seed": after,
    }  # fmt: skip
