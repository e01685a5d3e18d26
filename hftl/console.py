"""Format the lines and tables that a command prints."""

from collections.abc import Sequence
from typing import Any

from hftl.card.result_sections import build_forgetting_rows, describe_headline
from hftl.measure.verdict import format_gain


def format_check(header: dict[str, Any], facts: dict[str, Any], has_task: bool) -> str:
    """Return what `hftl check` prints: the header, the inputs, learning rates and warnings."""
    lines = [format_header(header)]
    if has_task:
        lines.append(f"  {format_input_facts(facts)}")
    lines += [format_learning_rates(*arm) for arm in facts.get("learning_rates", {}).items()]
    lines += [f"  warning: {warning}" for warning in facts["warnings"]]
    return "\n".join([*lines, "ready, with the warnings above" if facts["warnings"] else "ready"])


def format_header(facts: dict[str, Any]) -> str:
    """Return names and values in two columns."""
    width = max(map(len, facts))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def format_input_facts(facts: dict[str, Any]) -> str:
    """Return one line about the lengths of texts, or the sizes of images."""
    if "median_side" in facts:
        return (
            f"pictures: median side {facts['median_side']:.0f} pixels, read at "
            f"{facts['image_size']}; {facts['enlarged']:.1%} enlarged, "
            f"{facts['elongated']:.1%} longer than twice their width"
        )
    return (
        f"tokens: median {facts['median_tokens']}, {facts['truncated']:.1%} of texts cut, "
        f"{facts['unknown_tokens']:.1%} unknown"
    )


def format_learning_rates(arm: str, rows: list[dict[str, Any]]) -> str:
    """Return a table of the learning rate of every part of an arm's model."""
    cells = [(f"{arm} trains", "parameters", "which decay", "learning rate")]
    cells += [
        (row["part"], f"{row['parameters']:,}", f"{row['decayed']:,}", f"{row['rate']:.2e}")
        for row in rows
    ]
    return format_table(cells)


def format_adaptation(stage: dict[str, Any]) -> str:
    """Return one line about an adaptation: corpus, losses, guard, and the weights it ends with."""
    is_text = stage["objective"] == "mlm"
    loss = stage["loss"]
    parts = [f"held-out loss {_format_change(loss)}"]
    if is_text and None not in loss["perplexity"]:
        before, after = loss["perplexity"]
        parts[0] += f" (perplexity {before:.0f} -> {after:.0f})"
    if stage["general"] is not None:
        parts.append(f"general loss {_format_change(stage['general'])}")
    if stage["guard"]["kind"] in ("probe", "neighbours"):
        parts.append(f"{stage['guard']['kind']} {_format_change(stage['guard'])}")
    ending = f"kept step {stage['step']} of {stage['steps']}"
    if stage["kept"] == "original":
        ending = f"kept what it started from: {stage['why']}"
    size = f"{stage['corpus']['documents']:,} {'texts' if is_text else 'pictures'}"
    return f"  adapt {stage['objective']} {stage['method']}, {size}: {', '.join(parts)}; {ending}"


def _format_change(measured: dict[str, Any]) -> str:
    """Return a measure before and after adaptation."""
    return f"{measured['before']:.3f} -> {measured['after']:.3f}"


def format_arm_line(arm: dict[str, Any], metric: str, count: str) -> str:
    """Return one line about a finished arm and seed; `count` is its number, as `2/9`."""
    test = arm["metrics"]["test"].get(metric)
    score = "" if test is None else f"  test {metric} {test:.3f}"
    seconds = sum(spent for name, spent in arm["timings"].items() if name.endswith("seconds"))
    name = f"{arm['arm']} seed {arm['seed']}"
    return f"  [{count}] {name:<22}{score}  {seconds:.0f} s"


def format_ladder(record: dict[str, Any]) -> str:
    """Return a table of every arm's mean on test, and the own arm's gain over it."""
    metric = record["metric"]
    rows = [("arm", f"test {metric}", "sd", f"{record['own_arm']} gains")]
    for row in record["ladder"]:
        gain = row["gain_of_own"]
        rows.append(
            (
                row["arm"],
                f"{row['test']:.3f}",
                "-" if row["sd"] is None else f"{row['sd']:.3f}",
                "" if gain is None else format_gain(gain),
            )
        )
    return format_table(rows)


def format_forgetting(record: dict[str, Any]) -> str:
    """Return a table of what every arm has forgotten, under a line that names the measure."""
    rows = record["forgetting"]["rows"]
    table = format_table(build_forgetting_rows(record))
    return f"  {describe_headline(record)}, {rows:,} rows\n{table}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, with a rule under the first row.

    Rich would wrap or cut cells at the width of the terminal; these lines are also read by scripts.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [map(str.ljust, row, widths) for row in rows]
    lines = ["  " + "  ".join(cells).rstrip() for cells in padded]
    return "\n".join([lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]])


def format_duration(seconds: float) -> str:
    """Return seconds as `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
