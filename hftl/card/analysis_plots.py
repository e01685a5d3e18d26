"""Draw the plots of the analyses."""

from pathlib import Path

from hftl.analysis.facts import RankAnalysis
from hftl.card.plots import OTHER, OWN, escape_math, new_figure, save_figure


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
