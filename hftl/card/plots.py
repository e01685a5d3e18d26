"""Plots for the card: static PNGs, the same bytes for the same record."""

from pathlib import Path
from typing import Any

OWN, OTHER, MEAN = "#1f6feb", "#8b949e", "#24292f"


def plot_ladder(record: dict[str, Any], path: Path) -> None:
    """Draws every arm's test score: a dot a seed, a bar at the mean; the own arm in blue."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = record["metric"]
    rows = list(reversed(record["ladder"]))
    figure = Figure(figsize=(7, 0.55 * len(rows) + 1.1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, row in enumerate(rows):
        scores = [
            arm["metrics"]["test"][metric] for arm in record["arms"] if arm["arm"] == row["arm"]
        ]
        color = OWN if row["gain_of_own"] is None else OTHER
        axes.plot(scores, [height] * len(scores), "o", color=color, alpha=0.65, markersize=7)
        axes.plot([row["test"]] * 2, [height - 0.28, height + 0.28], color=MEAN, linewidth=2)
        axes.annotate(f" {row['test']:.3f}", (row["test"], height + 0.3), fontsize=8, ha="center")
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.25)
    axes.set_xlabel(f"test {metric}, a dot a seed, a bar at the mean")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
