"""Plots for the card: static PNGs, the same bytes for the same record."""

from pathlib import Path
from typing import Any

from hftl.measure.verdict import interval_text
from hftl.metrics import less_is_better

OWN, OTHER, MEAN = "#1f6feb", "#8b949e", "#24292f"


def plot_ladder(record: dict[str, Any], path: Path) -> None:
    """Draws every arm's test score: a dot a seed, a bar at the mean; the own arm in blue.

    At the right stands what the own arm gains over each other, with its interval.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = record["metric"]
    rows = list(reversed(record["ladder"]))
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, row in enumerate(rows):
        scores = [
            arm["metrics"]["test"][metric] for arm in record["arms"] if arm["arm"] == row["arm"]
        ]
        color = OWN if row["arm"] == record["own_arm"] else OTHER
        axes.plot(scores, [height] * len(scores), "o", color=color, alpha=0.65, markersize=7)
        axes.plot([row["test"]] * 2, [height - 0.2, height + 0.2], color=MEAN, linewidth=2)
        axes.text(row["test"], height + 0.24, f"{row['test']:.3f}", ha="center", va="bottom")
    better = "left" if less_is_better(metric) else "right"
    axes.set_xlabel(f"test {metric}, {better} is better: a dot a seed, a bar at the mean")
    names = [row["arm"] for row in rows]
    own = names.index(record["own_arm"])
    names[own] += " (this model)"
    axes.set_yticks(range(len(rows)), names)
    axes.get_yticklabels()[own].set_color(OWN)
    gains = axes.secondary_yaxis("right")
    gains.set_yticks([*range(len(rows)), len(rows) - 0.4], [*map(_gain, rows), "this model gains"])
    for side in (axes, gains):
        side.tick_params(axis="y", length=0)
    axes.set_ylim(-0.5, len(rows) - 0.2)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    gains.spines["right"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _gain(row: dict[str, Any]) -> str:
    return "" if row["gain_of_own"] is None else interval_text(row["gain_of_own"])
