"""Draw the plots of the analyses."""

from pathlib import Path
from typing import Any

import numpy as np

from hftl.analysis.facts import (
    CurveAnalysis,
    DistanceAnalysis,
    Estimate,
    ProbeAnalysis,
    RankAnalysis,
    ShiftAnalysis,
)
from hftl.analysis.sweep_facts import SweepAnalysis
from hftl.card.plots import MEAN, OTHER, OTHER_MARKERS, OWN, escape_math, new_figure, save_figure

MOST_CLASSES = 12
"""Classes of a set whose shares are drawn, at most."""


def plot_rank(facts: RankAnalysis, path: Path) -> None:
    """Draw every source's probe with its interval, the first in blue, and its rank at the right."""
    rows = facts.sources[::-1]
    figure = new_figure(9, 0.5 * len(rows) + 1.2)
    axes = figure.subplots()
    for height, one in enumerate(rows):
        color = OWN if one.rank == 1 else OTHER
        axes.plot(one.probe_ci95, [height] * 2, color=color, linewidth=2)
        axes.plot([one.probe], [height], "o", color=color, markersize=8)
    better = "left" if facts.lower_is_better else "right"
    axes.set_xlabel(
        f"cross-validated {facts.metric} of the probe at the best layer, {better} is better; "
        "the bar is the 95 % interval over rows"
    )
    names = [f"{escape_math(one.source)}\n{one.best}" for one in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    ranks = axes.secondary_yaxis("right")
    labels = ["rank {}, may be {}-{}".format(one.rank, *one.rank_ci95) for one in rows]
    ranks.set_yticks(range(len(rows)), labels, fontsize=8)
    for side in (axes, ranks):
        side.tick_params(axis="y", length=0)
        side.spines[["left", "right"]].set_visible(False)
    axes.spines[["top"]].set_visible(False)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_probe(facts: ProbeAnalysis, path: Path) -> None:
    """Draw the probes by layer, a line a pooling, and the similarity of the layers beside it."""
    panels = 3 if facts.trained else 2
    figure = new_figure(10 if panels == 2 else 14, 4)
    axes, square, *more = figure.subplots(1, panels, width_ratios=[3, 2, 2][:panels])
    poolings = sorted({score.site.pooling for score in facts.sites})
    colors = [OWN, *(color for _, color in OTHER_MARKERS[1:])]
    for color, pooling in zip(colors, poolings, strict=False):
        scores = [score for score in facts.sites if score.site.pooling == pooling]
        layers = [score.site.layer for score in scores]
        bands = [score.probe.ci95 or (score.probe.value,) * 2 for score in scores]
        means = [score.probe.value for score in scores]
        axes.plot(layers, means, "o-", color=color, label=f"probe, {pooling}")
        if len(scores) > 1:
            axes.fill_between(layers, *zip(*bands, strict=True), color=color, alpha=0.15)
        else:
            axes.plot(layers * 2, bands[0], color=color)
        near = [score.neighbours.value for score in scores]
        axes.plot(layers, near, "x--", color=color, alpha=0.7, label=f"neighbours, {pooling}")
    axes.set_xlabel("layer, 0 are the embeddings")
    axes.set_ylabel(f"validation {facts.metric}, {'lower' if facts.lower_is_better else 'higher'} "
                    "is better")  # fmt: skip
    axes.set_xticks(range(max(score.site.layer for score in facts.sites) + 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend_above(axes)
    image = square.imshow(facts.similarity.cka, vmin=0, vmax=1, origin="lower", cmap="Blues")
    square.set_title(f"CKA between layers, {facts.similarity.pooling}", fontsize=10)
    square.set_xlabel("layer")
    square.locator_params(integer=True)
    figure.colorbar(image, ax=square, shrink=0.8)
    if facts.trained:
        _draw_trained(more[0], facts)
    save_figure(figure, path)


def _draw_trained(axes: Any, facts: ProbeAnalysis) -> None:
    """Draw how alike every layer is to itself before training, a line an arm."""
    colors = [OWN, *(color for _, color in OTHER_MARKERS[1:])]
    for color, one in zip(colors * 5, facts.trained, strict=False):
        axes.plot(range(len(one.cka)), one.cka, "o-", color=color, label=f"{one.arm} {one.seed}")
    axes.set_title(f"CKA of layers before with after, {facts.similarity.pooling}", fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylim(top=1.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def plot_curve(facts: CurveAnalysis, path: Path) -> None:
    """Draw every arm's scores over the labels with their band, and its power law to twice the
    largest size."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    colors = [OWN, *(color for _, color in OTHER_MARKERS)]
    for color, arm in zip(colors, facts.arms, strict=False):
        means = [point.score.value for point in arm.points]
        bands = [point.score.ci95 or (point.score.value,) * 2 for point in arm.points]
        axes.plot(facts.sizes, means, "o-", color=color, label=arm.arm)
        axes.fill_between(facts.sizes, *zip(*bands, strict=True), color=color, alpha=0.15)
        forecast = arm.forecast
        if forecast is None:
            continue
        labels = np.geomspace(facts.sizes[-1], forecast.labels, 20)
        errors = forecast.a * labels**-forecast.b + forecast.c
        sign = -1 if facts.lower_is_better else 1
        best = sign * forecast.predicted.value + errors[-1]
        axes.plot(labels, sign * (best - errors), ":", color=color)
        low, high = forecast.predicted.ci95 or (forecast.predicted.value,) * 2
        axes.plot([forecast.labels] * 2, [low, high], color=color, linewidth=2, alpha=0.6)
    axes.set_xscale("log")
    ahead = {arm.forecast.labels for arm in facts.arms if arm.forecast is not None}
    ticks = [*facts.sizes, *ahead]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    law = "; dotted: the power law, and its 95 % interval at twice the labels" if ahead else ""
    axes.set_xlabel(f"labels{' a class' if facts.per_class else ''}{law}")
    better = "lower" if facts.lower_is_better else "higher"
    axes.set_ylabel(f"test {facts.metric}, {better} is better")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend_above(axes)
    save_figure(figure, path)


def _add_legend_above(axes: Any) -> None:
    """Add a legend over the frame, where no line or band is."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)


def plot_distance(facts: DistanceAnalysis, path: Path) -> None:
    """Draw every pair's A-distance, MMD^2 and Frechet distance with their intervals."""
    pairs = facts.pairs[::-1]
    figure = new_figure(11, 0.45 * len(pairs) + 1.4)
    panels = figure.subplots(1, 3, sharey=True)
    columns: list[tuple[str, list[Estimate]]] = [
        ("proxy A-distance, at most 2", [pair.a_distance for pair in pairs]),
        ("MMD^2", [pair.mmd for pair in pairs]),
        ("Frechet distance, squared", [pair.frechet for pair in pairs]),
    ]
    for axes, (title, estimates) in zip(panels, columns, strict=True):
        for height, estimate in enumerate(estimates):
            color = OTHER if axes is panels[0] and pairs[height].saturated else OWN
            low_high = estimate.ci95 or (estimate.value, estimate.value)
            axes.plot(low_high, [height] * 2, color=color, linewidth=2)
            axes.plot([estimate.value], [height], "o", color=color)
        axes.axvline(0, color=OTHER, linewidth=1, linestyle=":")
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
    names = [escape_math(f"{pair.first} - {pair.second}") for pair in pairs]
    panels[0].set_yticks(range(len(pairs)), names, fontsize=8)
    panels[0].set_ylim(-0.5, len(pairs) - 0.5)
    save_figure(figure, path)


def plot_shift(facts: ShiftAnalysis, path: Path) -> None:
    """Draw the shares of the classes, train's grey, and how well a classifier tells sets apart."""
    shares = [(one.name, row) for one in facts.sets for row in one.shares[:MOST_CLASSES]][::-1]
    height = 0.35 * max(len(shares), len(facts.sets)) + 1.4
    figure = new_figure(10 if shares else 5, height)
    *left, right = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    for axes in left:
        for place, (_, row) in enumerate(shares):
            axes.plot([row.train], [place], "|", color=OTHER, markersize=14, markeredgewidth=3)
            if row.estimated is not None:
                axes.plot(row.estimated.ci95, [place] * 2, color=OWN, linewidth=2)
                axes.plot([row.estimated.value], [place], "o", color=OWN)
            if row.labelled is not None:
                axes.plot([row.labelled], [place], "x", color=MEAN)
        names = [escape_math(f"{name}: {row.label}") for name, row in shares]
        axes.set_yticks(range(len(shares)), names, fontsize=8)
        axes.set_ylim(-0.5, len(shares) - 0.5)
        axes.set_xlabel("share: train's |, estimated with its interval, by labels x")
    sets = facts.sets[::-1]
    for place, one in enumerate(sets):
        right.plot([one.auc], [place], "o", color=OTHER if one.outcome == "none" else OWN)
    right.axvline(0.5, color=OTHER, linewidth=1, linestyle=":")
    right.set_xlim(min(0.45, *(one.auc for one in sets)) - 0.02, 1.02)
    right.set_yticks(
        range(len(sets)), [escape_math(f"{s.name}\n{s.outcome}") for s in sets], fontsize=8
    )
    right.set_ylim(-0.5, len(sets) - 0.5)
    right.set_xlabel("AUC of a classifier of train and the set")
    for axes in (*left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    save_figure(figure, path)


def plot_sweep(facts: SweepAnalysis, path: Path) -> None:
    """Draw which parts want to move, and every pair of rate and decay at the first rung."""
    names = list(dict.fromkeys(effect.part for effect in facts.parts))
    factors = sorted({effect.factor for effect in facts.parts})
    figure = new_figure(3.5 + 1.1 * len(names), 2.4 + 0.45 * len(factors) + 2.2)
    upper, lower = figure.subplots(2, 1, height_ratios=[len(factors) + 0.5, 3.5])
    effects = {(effect.factor, effect.part): effect for effect in facts.parts}
    gains = [[effects[factor, name].gain for name in names] for factor in factors]
    marks = [["*" if effects[f, name].is_clear else "" for name in names] for f in factors]
    rows = ["frozen" if factor == 0 else f"rate x {factor:g}" for factor in factors]
    # Gains within their intervals are pale, however small all of them are.
    ends = [end for one in facts.parts for end in (one.gain, *(one.ci95 or ())) if end is not None]
    reach = max(map(abs, ends), default=0.0) or 1.0
    _draw_heat_map(figure, upper, gains, marks, rows, names, reach)
    upper.set_title(
        f"one part's rate changed: gain of {facts.metric} over {facts.single} at "
        f"{facts.part_share:.0%} of the epochs; * beyond noise", fontsize=9,
    )  # fmt: skip
    grid = {
        (trial.setting.learning_rate, trial.setting.layer_decay or 1.0): trial
        for trial in facts.trials
        if trial.setting.is_single or " decay " in trial.setting.name
    }
    rates = sorted({rate for rate, _ in grid})
    decays = sorted({decay for _, decay in grid}, reverse=True)
    scores = [[grid[rate, decay].rungs[0].score for decay in decays] for rate in rates]
    far = [["" if len(grid[r, d].rungs) < 3 else "o" for d in decays] for r in rates]
    _draw_heat_map(
        figure, lower, scores, far, [f"{rate:.3g}" for rate in rates],
        ["one rate" if decay == 1 else f"decay {decay:g}" for decay in decays],
        reverse=facts.lower_is_better,
    )  # fmt: skip
    lower.set_ylabel("learning rate", fontsize=9)
    lower.set_title(
        f"{facts.metric} at {facts.trials[0].rungs[0].share:.0%} of the epochs; o went on to the "
        "whole", fontsize=9,
    )  # fmt: skip
    save_figure(figure, path)


def _draw_heat_map(
    figure: Any, axes: Any, values: list[list[float | None]], marks: list[list[str]],
    rows: list[str], columns: list[str], reach: float | None = None, reverse: bool = False,
) -> None:  # fmt: skip
    """Draw numbers as colours, written into their cells with a mark; None is an empty cell.

    With a `reach` they are differences, white at 0 and darkest there.
    """
    table = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    colours: dict[str, Any] = {"cmap": "Blues_r" if reverse else "Blues"}
    if reach is not None:
        colours = {"cmap": "RdBu", "vmin": -reach, "vmax": reach}
    image = axes.imshow(table, aspect="auto", **colours)
    for i, j in np.ndindex(table.shape):
        text = "diverged" if np.isnan(table[i, j]) else f"{table[i, j]:{'+' if reach else ''}.3f}"
        red, green, blue, _ = image.cmap(image.norm(table[i, j]))
        dark = np.isfinite(table[i, j]) and 0.3 * red + 0.6 * green + 0.1 * blue < 0.45
        axes.text(
            j, i, f"{text} {marks[i][j]}".rstrip(), ha="center", va="center", fontsize=8,
            color="white" if dark else MEAN,
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.9)
