"""Plots for the card: static PNGs, the same bytes for the same record."""

from pathlib import Path
from typing import Any

from hftl.card.result_sections import describe_headline
from hftl.measure.metrics import is_lower_better
from hftl.measure.verdict import format_gain

OWN, OTHER, MEAN = "#1f6feb", "#8b949e", "#24292f"
OWN_MARKER = "*"
OTHER_MARKERS = tuple(
    zip("osD^v" * 4, ("#8b949e", "#bc4c00", "#1a7f37", "#8250df") * 5, strict=True)
)
"""Of the other arms; no two of twenty are alike."""


def plot_ladder(record: dict[str, Any], path: Path) -> None:
    """Draws every arm's test score: a dot a seed, a bar at the mean; the own arm in blue.

    At the right stands what the own arm gains over each other, with its interval.
    """
    metric = record["metric"]
    rows = list(reversed(record["ladder"]))
    figure = _new_figure(8, 0.6 * len(rows) + 1)
    axes = figure.subplots()
    for height, row in enumerate(rows):
        scores = _collect_scores(record, row["arm"])
        color = OWN if row["arm"] == record["own_arm"] else OTHER
        axes.plot(scores, [height] * len(scores), "o", color=color, alpha=0.65, markersize=7)
        axes.plot([row["test"]] * 2, [height - 0.2, height + 0.2], color=MEAN, linewidth=2)
        axes.text(row["test"], height + 0.24, f"{row['test']:.3f}", ha="center", va="bottom")
    better = "left" if is_lower_better(metric) else "right"
    axes.set_xlabel(f"test {metric}, {better} is better: a dot a seed, a bar at the mean")
    _hide_impossible_ticks(axes, metric)
    names = [row["arm"] for row in rows]
    own = names.index(record["own_arm"])
    names[own] += " (this model)"
    axes.set_yticks(range(len(rows)), names)
    axes.get_yticklabels()[own].set_color(OWN)
    gains = axes.secondary_yaxis("right")
    gains.set_yticks(
        [*range(len(rows)), len(rows) - 0.4], [*map(_format_row_gain, rows), "this model gains"]
    )
    _strip_axes(axes, gains, len(rows))
    _save_figure(figure, path)


def plot_frontier(record: dict[str, Any], path: Path) -> None:
    """Draws what each arm has forgotten against its test score: a mark at the means, a small one a
    seed; the own arm a blue star."""
    metric = record["metric"]
    figure = _new_figure(8, 4.5)
    axes = figure.subplots()
    for number, entry in enumerate(record["forgetting"]["arms"]):
        name, forgotten = entry["arm"], entry["forgotten"]
        own = name == record["own_arm"]
        mark, color = (OWN_MARKER, OWN) if own else OTHER_MARKERS[number % len(OTHER_MARKERS)]
        score = next(row["test"] for row in record["ladder"] if row["arm"] == name)
        axes.plot(
            forgotten["per_seed"],
            _collect_scores(record, name),
            mark,
            color=color,
            alpha=0.4,
            markersize=4,
        )
        axes.plot(
            [forgotten["value"]], [score], mark, color=color, markersize=13 if own else 9,
            zorder=3 if own else 2, label=f"{name} (this model)" if own else name,
        )  # fmt: skip
    figure.legend(loc="outside right upper", frameon=False)
    axes.axvline(0, color=OTHER, linewidth=1, linestyle=":")
    better = "lower" if is_lower_better(metric) else "higher"
    # What stands between dollars would be read as a formula.
    words = describe_headline(record).replace("$", r"\$")
    axes.set_xlabel(f"forgotten: fall of {words}, left is better")
    axes.set_ylabel(f"test {metric}, {better} is better")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save_figure(figure, path)


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws every model's score with its interval over items; the first in blue.

    At the right stands the paired difference against the first.
    """
    figure = _new_figure(8, 0.6 * len(rows) + 1)
    axes = figure.subplots()
    metric = rows[0]["metric"]
    for height, row in enumerate(reversed(rows)):
        color = OWN if row is rows[0] else OTHER
        low, high = row["ci95"] or (row["value"], row["value"])
        axes.plot([low, high], [height] * 2, color=color, linewidth=2)
        axes.plot([row["value"]], [height], "o", color=color, markersize=8)
        axes.text(row["value"], height + 0.18, f"{row['value']:.3f}", ha="center", va="bottom")
    better = "left" if is_lower_better(metric) else "right"
    axes.set_xlabel(f"{metric}, {better} is better: the bar is the 95 % interval over items")
    # What stands between dollars would be read as a formula.
    names = [row["model"].replace("$", r"\$") for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    differences = axes.secondary_yaxis("right")
    told = [_format_difference(row) for row in reversed(rows)]
    differences.set_yticks(range(len(rows)), told)
    _strip_axes(axes, differences, len(rows))
    _save_figure(figure, path)


def _format_difference(row: dict[str, Any]) -> str:
    return "the first" if row["against_first"] is None else format_gain(row["against_first"])


def _new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _strip_axes(axes: Any, right: Any, rows: int) -> None:
    """Leaves of the frame what a row each needs: its two names and a grid to read values by."""
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
    axes.set_ylim(-0.5, rows - 0.2)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    right.spines["right"].set_visible(False)


def _save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _hide_impossible_ticks(axes: Any, metric: str) -> None:
    """Leaves out the ticks that are better than a perfect prediction."""
    if metric.startswith("evaluate:"):
        return
    low, high = axes.get_xlim()
    first, last = (max(low, 0), high) if is_lower_better(metric) else (low, min(high, 1 + 1e-9))
    axes.set_xticks([tick for tick in axes.get_xticks() if first <= tick <= last])


def _collect_scores(record: dict[str, Any], arm: str) -> list[float]:
    """An arm's test scores, one a seed."""
    metric = record["metric"]
    return [found["metrics"]["test"][metric] for found in record["arms"] if found["arm"] == arm]


def _format_row_gain(row: dict[str, Any]) -> str:
    return "" if row["gain_of_own"] is None else format_gain(row["gain_of_own"])
