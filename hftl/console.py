"""Format the lines and tables that a command prints."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hftl.adapt.facts import AdaptStage, GuardFigures, LossChange
from hftl.analysis.advice_facts import AdviceSection, Interval, name_conflict
from hftl.card.wording import build_forgetting_rows, describe_headline
from hftl.measure.advice_outcome import AdviceHistory
from hftl.measure.facts import MIN_JUDGED_ROWS, Estimate, SliceSection
from hftl.measure.metrics import describe_metric
from hftl.measure.record import LadderRow, Record
from hftl.measure.verdict import format_gain, format_slice_gain, is_better, is_worse
from hftl.train.facts import ArmFile, BaselineCheck, CheckFacts, LearningRate

UNPRETRAINED = ("scratch", "classical", "majority")
"""Arms over which a loss is negative transfer."""


def format_check(header: dict[str, str], facts: CheckFacts, has_task: bool) -> str:
    """Return what `hftl check` prints: the header, the inputs, learning rates and warnings."""
    lines = [format_header(header)]
    if has_task:
        lines.append(f"  {format_input_facts(facts)}")
    lines += [format_learning_rates(*arm) for arm in (facts.learning_rates or {}).items()]
    lines += [format_baselines(facts.baseline)] if facts.baseline else []
    lines += [f"  {facts.examined}"] if facts.examined else []
    places = {finding.sentence: finding.where for finding in facts.findings}
    for warning in facts.warnings:
        lines.append(f"  warning: {warning}")
        lines += [f"    {place}" for place in places.get(warning, [])]
    return "\n".join([*lines, "ready, with the warnings above" if facts.warnings else "ready"])


def format_baselines(check: BaselineCheck) -> str:
    """Return what the baselines score, and whether the source has anything to transfer."""
    score = f"{check.metric} on {check.validation_rows:,} validation rows"
    cells = [(f"learnt from {check.train_rows:,} rows of train", score, "95 %")]
    for row in check.scores:
        interval = "-" if row.ci95 is None else f"[{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]"
        cells.append((row.arm, f"{row.score:.3f}", interval))
    gain = Estimate(check.gain, check.gain_ci95)
    answer = "the source has something to transfer" if is_better(gain) else (
        "the source is worse than no pretraining" if is_worse(gain) else
        "nothing says that the source has anything to transfer"
    )  # fmt: skip
    line = f"  head over {check.over}: {format_gain(gain)}: {answer}"
    return f"{format_table(cells)}\n{line}"


def summarize_advice(section: AdviceSection) -> dict[str, str]:
    """Return the advice for the header of `hftl check`, and where rules and recipe differ."""
    reason = next(rule for rule in reversed(section.rules) if rule.strategy == section.strategy)
    shown = {"advice": f"{section.strategy} ({reason.text}); more: hftl advise"}
    return shown | {name_conflict(conflict): conflict for conflict in section.conflicts}


def format_advice(section: AdviceSection, seconds: dict[str, float]) -> str:
    """Return the forecast of every strategy, the rules with their sources, and the advice.

    Args:
        section: the advice.
        seconds: that one seed of a strategy trains, by its name.
    """
    lines: list[str] = []
    if section.forecast is not None:
        cells = [("forecast", "test accuracy", "90 %", "gain", "90 %", "a seed")]
        cells += [
            (
                row.strategy,
                f"{row.score:.3f}",
                _format_interval(row.score_pi90),
                f"{row.gain:+.3f}",
                _format_interval(row.gain_pi90, "+"),
                format_duration(seconds[row.strategy]) if seconds.get(row.strategy) else "-",
            )
            for row in section.forecast.strategies
        ]
        lines += [format_table(cells), "  gain is over the better of scratch and classical"]
        lines += [
            "  scores are of these rates and epochs, as items of measure.arms (of the recipe's own "
            "strategy: as keys of the recipe):"
        ]
        lines += [f"    - {row.format_arm()}" for row in section.forecast.strategies]
    else:
        lines.append(f"  no forecast: {section.no_forecast}")
    for rule in section.rules:
        verdict = f" -> {rule.strategy}" if rule.strategy else ""
        lines += [f"  {rule.name}: {rule.text}{verdict}", f"    [{rule.source}]"]
    lines += [f"  {name_conflict(conflict)}: {conflict}" for conflict in section.conflicts]
    return "\n".join([*lines, f"advice: {section.strategy}"])


def _format_interval(interval: Interval, sign: str = "") -> str:
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def format_history(history: AdviceHistory) -> str:
    """Return how often advice and forecasts were right, over runs."""
    noun = "run" if history.runs == 1 else "runs"
    lines = [f"{history.runs} {noun}, {history.without} without an outcome of advice"]
    for (count, right), words in (
        (history.scores, "scores were within the forecast's 90 % interval"),
        (history.gains, "gains were within theirs"),
        (history.advised, "times the advised strategy was within a point of the best that ran"),
    ):
        share = f" ({right / count:.0%})" if count else ""
        lines.append(f"  {right} of {count} {words}{share}")
    count, right = history.otherwise
    if count:
        lines.append(
            f"  {count} of the scores are of arms that trained at other rates or epochs than the "
            f"forecast's: {right} of these within its interval"
        )
    errors = ", ".join(f"{name} {error:+.3f}" for name, error in history.errors.items())
    return "\n".join([*lines, *([f"  measured minus forecast: {errors}"] if errors else [])])


def format_header(facts: dict[str, str]) -> str:
    """Return two columns of facts, for the start of a run."""
    width = max(map(len, facts))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def format_input_facts(check: CheckFacts) -> str:
    """Return the facts that the preflight saw of texts or images."""
    if check.median_side is not None:
        return (
            f"pictures: median side {check.median_side:.0f} pixels, read at "
            f"{check.image_size}; {check.enlarged:.1%} enlarged, "
            f"{check.elongated:.1%} longer than twice their width"
        )
    return (
        f"tokens: median {check.median_tokens}, {check.truncated:.1%} of texts cut, "
        f"{check.unknown_tokens:.1%} unknown"
    )


def format_learning_rates(arm: str, rows: list[LearningRate]) -> str:
    """Return a table of the learning rate of every part of an arm's model."""
    cells = [(f"{arm} trains", "parameters", "which decay", "learning rate")]
    cells += [
        (row.part, f"{row.parameters:,}", f"{row.decayed:,}", f"{row.rate:.2e}") for row in rows
    ]
    return format_table(cells)


def format_adaptation(stage: AdaptStage) -> str:
    """Return a line of one adaptation: its corpus, losses and guard, and which weights it left."""
    words = stage.objective != "mae"
    parts = [f"held-out loss {_format_change(stage.loss)}"]
    if stage.loss.perplexity and None not in stage.loss.perplexity:
        before, after = stage.loss.perplexity
        parts[0] += f" (perplexity {before:.0f} -> {after:.0f})"
    if stage.general is not None:
        parts.append(f"general loss {_format_change(stage.general)}")
    if stage.guard.kind in ("probe", "neighbours"):
        parts.append(f"{stage.guard.kind} {_format_change(stage.guard)}")
    result = f"kept step {stage.step} of {stage.steps}"
    if stage.kept == "original":
        result = f"kept what it started from: {stage.why}"
    size = f"{stage.corpus.documents:,} {'texts' if words else 'pictures'}"
    return f"  adapt {stage.objective} {stage.method}, {size}: {', '.join(parts)}; {result}"


def _format_change(figures: LossChange | GuardFigures) -> str:
    return f"{figures.before:.3f} -> {figures.after:.3f}"


def format_arm_line(arm: ArmFile, metric: str, count: str, seconds: float) -> str:
    """Return one line about a finished arm and seed.

    Args:
        arm: its metrics and timings.
        metric: whose score is shown.
        count: its number, as `2/9`.
        seconds: from its start to its end, with all that it was the first to need.
    """
    test = arm.metrics.test.get(metric)
    score = "" if test is None else f"  test {metric} {test:.3f}"
    features = arm.timings.get("features_seconds", 0.0)
    shared = f", {features:.0f} s of it for features" if features >= 1 else ""
    return f"  [{count}] {f'{arm.arm} seed {arm.seed}':<22}{score}  {seconds:.0f} s{shared}"


def format_ladder(record: Record) -> str:
    """Return a table of every arm's mean on the test items, and what the own arm gains over it."""
    rows = [("arm", f"test {record.metric}", "sd", f"{record.own_arm} gains")]
    rows += [
        (
            row.arm,
            f"{row.test:.3f}",
            "-" if row.sd is None else f"{row.sd:.3f}",
            _format_ladder_gain(row),
        )
        for row in record.ladder
    ]
    lines = [format_table(rows)]
    own, best = record.own_row, describe_metric(str(record.metric)).best
    if own.test == best and any(row.test == best and row.gain_of_own for row in record.ladder):
        lines.append(
            "  (no errors to compare: how far a gain is from 0 is open on so few test rows)"
        )
    return "\n".join(lines)


def _format_ladder_gain(row: LadderRow) -> str:
    """Return what the own arm gains over another; negative transfer is named as such."""
    gain = row.gain_of_own
    if gain is None:
        return ""
    negative = row.arm in UNPRETRAINED and gain.ci95 is not None and gain.ci95[1] < 0
    return f"{format_gain(gain)}{' negative transfer' if negative else ''}"


def format_slices(section: SliceSection) -> str:
    """Return the slices that lose, a line each, under a line that counts all."""
    losers, count = section.losers, len(section.slices)
    names = ", ".join(column.name for column in section.columns)
    if section.baseline is None:
        why = "no baseline that learns the task was run, so no gain is known"
        return f"slices: {count} by {names}; {why}"
    if all(part.p_value is None for part in section.slices):
        return f"slices: {count} by {names}; without an interval none can be judged"
    verb = "loses" if len(losers) < 2 else "lose"
    number = f"{len(losers) or 'none'} of {count} by {names}"
    lines = [f"slices: {number} {verb} beyond noise to {section.baseline}"]
    lines += [
        f"  {part.phrase}: {format_slice_gain(part)} on {part.rows:,} rows, p {part.p_value:.2g} "
        f"after Holm{'' if part.rows >= MIN_JUDGED_ROWS else ', too few to hold the verdict'}"
        for part in losers
    ]
    return "\n".join(lines)


def format_forgetting(record: Record) -> str:
    """Return a table of what every arm has forgotten, under a line that names the figure."""
    assert record.forgetting is not None
    head = f"  {describe_headline(record)}, {record.forgetting.rows:,} rows"
    return f"{head}\n{format_table(build_forgetting_rows(record))}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, with a rule under the first row.

    Rich would wrap or cut cells at the width of the terminal; these lines are also read by scripts.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [map(str.ljust, row, widths) for row in rows]
    lines = ["  " + "  ".join(cells).rstrip() for cells in padded]
    return "\n".join([lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]])


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table drawn by rich, as wide as its cells: lines are also read by scripts.

    Args:
        header: of each column.
        rows: the cells; all but the first of a row are aligned to the right.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    screen = Console(width=1000, no_color=True, file=io.StringIO())
    with screen.capture() as captured:
        screen.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(line for line in lines if line)


def format_duration(seconds: float) -> str:
    """Return `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
