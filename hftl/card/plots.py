"""Draw the card's plots: static PNGs, the same bytes for the same record."""

import io
from pathlib import Path
from typing import Any

from hftl.card.markdown import to_one_line
from hftl.card.wording import describe_headline
from hftl.measure.metrics import MetricSpec, describe_metric
from hftl.measure.record import LadderRow, Record
from hftl.measure.scores import ComparedModel
from hftl.measure.verdict import format_gain
from hftl.runtime.run_folder import write_bytes

OWN, OTHER, MEAN = "#1f6feb", "#8b949e", "#24292f"
OWN_MARKER = "*"
OTHER_MARKERS = tuple(
    zip("osD^v" * 4, ("#8b949e", "#bc4c00", "#1a7f37", "#8250df") * 5, strict=True)
)
"""Of the other arms; no two of twenty are alike."""
WORSE = "#cf222e"
MAX_TICK_CHARACTERS = 40


def plot_ladder(record: Record, path: Path) -> None:
    """Draw every arm's test score: a dot a seed, a bar at the mean; the own arm in blue.

    At the right is what the own arm gains over each other, with its interval.
    """
    metric = describe_metric(str(record.metric))
    rows = list(reversed(record.ladder))
    figure = new_figure(8, 0.6 * len(rows) + 1)
    axes = figure.subplots()
    for height, row in enumerate(rows):
        scores = _collect_scores(record, row.arm)
        color = OWN if row.arm == record.own_arm else OTHER
        axes.plot(scores, [height] * len(scores), "o", color=color, alpha=0.65, markersize=7)
        axes.plot([row.test] * 2, [height - 0.2, height + 0.2], color=MEAN, linewidth=2)
        axes.text(row.test, height + 0.24, f"{row.test:.3f}", ha="center", va="bottom")
    better = "left" if metric.lower_is_better else "right"
    axes.set_xlabel(f"test {metric.name}, {better} is better: a dot a seed, a bar at the mean")
    _hide_impossible_ticks(axes, metric)
    names = [row.arm for row in rows]
    own = names.index(str(record.own_arm))
    names[own] += " (this model)"
    axes.set_yticks(range(len(rows)), names)
    axes.get_yticklabels()[own].set_color(OWN)
    gains = axes.secondary_yaxis("right")
    ticks, labels = [*range(len(rows)), len(rows) - 0.4], [*map(_format_row_gain, rows)]
    gains.set_yticks(ticks, [*labels, "this model gains"])
    _strip_axes(axes, gains, len(rows))
    save_figure(figure, path)


def plot_frontier(record: Record, path: Path) -> None:
    """Draw what each arm has forgotten against its test score: a mark at the means, a small one a
    seed; the own arm a blue star."""
    assert record.forgetting is not None
    metric = describe_metric(str(record.metric))
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for number, entry in enumerate(record.forgetting.arms):
        name, forgotten = entry.arm, entry.forgotten
        assert forgotten is not None
        own = name == record.own_arm
        mark, color = (OWN_MARKER, OWN) if own else OTHER_MARKERS[number % len(OTHER_MARKERS)]
        score = next(row.test for row in record.ladder if row.arm == name)
        axes.plot(
            forgotten.per_seed, _collect_scores(record, name), mark, color=color, alpha=0.4,
            markersize=4,
        )  # fmt: skip
        axes.plot(
            [forgotten.value], [score], mark, color=color, markersize=13 if own else 9,
            zorder=3 if own else 2, label=f"{name} (this model)" if own else name,
        )  # fmt: skip
    figure.legend(loc="outside right upper", frameon=False)
    axes.axvline(0, color=OTHER, linewidth=1, linestyle=":")
    better = "lower" if metric.lower_is_better else "higher"
    axes.set_xlabel(f"forgotten: fall of {escape_math(describe_headline(record))}, left is better")
    axes.set_ylabel(f"test {metric.name}, {better} is better")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_comparison(models: list[ComparedModel], path: Path) -> None:
    """Draw every model's score with its interval over items; the first in blue.

    At the right is the paired difference against the first.
    """
    figure = new_figure(8, 0.6 * len(models) + 1)
    axes = figure.subplots()
    metric = describe_metric(models[0].metric)
    upwards = models[::-1]
    for height, model in enumerate(upwards):
        color = OWN if model is models[0] else OTHER
        value = model.score.value
        low, high = model.score.ci95 or (value, value)
        axes.plot([low, high], [height] * 2, color=color, linewidth=2)
        axes.plot([value], [height], "o", color=color, markersize=8)
        axes.text(value, height + 0.18, f"{value:.3f}", ha="center", va="bottom")
    better = "left" if metric.lower_is_better else "right"
    axes.set_xlabel(f"{metric.name}, {better} is better: the bar is the 95 % interval over items")
    axes.set_yticks(range(len(models)), [escape_math(model.model) for model in upwards])
    differences = axes.secondary_yaxis("right")
    differences.set_yticks(range(len(models)), [*map(_format_difference, upwards)])
    _strip_axes(axes, differences, len(models))
    save_figure(figure, path)


def plot_slices(record: Record, path: Path) -> None:
    """Draw the gain in every slice with its interval: red where the model is worse beyond noise,
    blue where it is better. At the right is the number of rows; dotted is the gain on all."""
    section, gain = record.slices, record.transfer_gain
    assert section is not None and gain is not None
    upwards = section.slices[::-1]
    figure = new_figure(8, 0.32 * len(upwards) + 1.2)
    axes = figure.subplots()
    for height, part in enumerate(upwards):
        color = {"worse": WORSE, "better": OWN}.get(str(part.outcome), OTHER)
        low, high = part.gain_ci95 or (part.gain, part.gain)
        axes.plot([low, high], [height] * 2, color=color, linewidth=2)
        axes.plot([part.gain], [height], "o", color=color, markersize=6)
    axes.axvline(0, color=MEAN, linewidth=1)
    axes.axvline(gain.value, color=OTHER, linewidth=1, linestyle=":")
    axes.set_xlabel(
        f"gain in {gain.metric} over {section.baseline}, right is better; dotted: all test rows"
    )
    names = [escape_math(to_one_line(part.phrase, MAX_TICK_CHARACTERS)) for part in upwards]
    axes.set_yticks(range(len(upwards)), names)
    counts = axes.secondary_yaxis("right")
    counts.set_yticks(range(len(upwards)), [f"{part.rows:,} rows" for part in upwards])
    _strip_axes(axes, counts, len(upwards))
    save_figure(figure, path)


def plot_abstention(record: Record, path: Path) -> None:
    """Draw the accuracy of the surest test rows against their share, with its interval; dashed is
    what scores would give that put every mistake last, dotted the accuracy of all rows."""
    section = record.abstention
    assert section is not None
    points, whole = section.points, section.points[-1].accuracy.value
    shares = [point.share for point in points]
    figure = new_figure(8, 4)
    axes = figure.subplots()
    bounds = [point.accuracy.ci95 or (point.accuracy.value,) * 2 for point in points]
    axes.fill_between(shares, *zip(*bounds, strict=True), color=OWN, alpha=0.15, linewidth=0)
    values = [point.accuracy.value for point in points]
    axes.plot(shares, values, "o-", color=OWN, markersize=4, label="this model, 95 % interval")
    best = [min(1.0, whole / share) for share in shares]
    axes.plot(shares, best, color=OTHER, linestyle="--", linewidth=1, label="every mistake last")
    axes.axhline(whole, color=OTHER, linestyle=":", linewidth=1, label="answered at random")
    axes.set_xlabel("share of test rows answered, the surest first")
    axes.set_ylabel("accuracy among them")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(top=1.005)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _format_difference(model: ComparedModel) -> str:
    return "the first" if model.against_first is None else format_gain(model.against_first)


def escape_math(text: str) -> str:
    """Escape dollars: matplotlib takes what is between two for a formula."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _strip_axes(axes: Any, right: Any, rows: int) -> None:
    """Leave of the frame what rows need: their two names and a grid to read values by."""
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
    axes.set_ylim(-0.5, rows - 0.2)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    right.spines["right"].set_visible(False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, without the date and the version of the library."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, image.getvalue())


def _hide_impossible_ticks(axes: Any, metric: MetricSpec) -> None:
    """Leave out the ticks that are better than a perfect prediction."""
    low, high = axes.get_xlim()
    first, last = (metric.best, high) if metric.lower_is_better else (low, metric.best + 1e-9)
    axes.set_xticks([tick for tick in axes.get_xticks() if first <= tick <= last])


def _collect_scores(record: Record, arm: str) -> list[float]:
    """Return an arm's test scores, one a seed."""
    metric = str(record.metric)
    return [entry.get_score("test", metric) for entry in record.arms if entry.arm == arm]


def _format_row_gain(row: LadderRow) -> str:
    return "" if row.gain_of_own is None else format_gain(row.gain_of_own)
