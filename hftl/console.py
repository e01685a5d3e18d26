"""What a run says on the terminal."""

from collections.abc import Sequence
from typing import Any

from hftl.card.result_sections import build_forgetting_rows, describe_headline
from hftl.measure.verdict import format_gain


def format_header(facts: dict[str, Any]) -> str:
    """Two columns, before anything trains."""
    width = max(map(len, facts))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def format_input_facts(found: dict[str, Any]) -> str:
    """What the preflight saw of texts or pictures."""
    if "median_side" in found:
        return (
            f"pictures: median side {found['median_side']:.0f} pixels, read at "
            f"{found['image_size']}; {found['enlarged']:.1%} enlarged, "
            f"{found['elongated']:.1%} longer than twice their width"
        )
    return (
        f"tokens: median {found['median_tokens']}, {found['truncated']:.1%} of texts cut, "
        f"{found['unknown_tokens']:.1%} unknown"
    )


def format_learning_rates(arm: str, rows: list[dict[str, Any]]) -> str:
    """The learning rate of every part of an arm's model."""
    cells = [(f"{arm} trains", "parameters", "which decay", "learning rate")]
    cells += [
        (row["part"], f"{row['parameters']:,}", f"{row['decayed']:,}", f"{row['rate']:.2e}")
        for row in rows
    ]
    return format_table(cells)


def format_adaptation(stage: dict[str, Any]) -> str:
    """One adaptation: its corpus, what the losses and the guard did, and what was kept."""
    words = stage["objective"] == "mlm"
    loss = stage["loss"]
    parts = [f"held-out loss {_format_change(loss)}"]
    if words and None not in loss["perplexity"]:
        before, after = loss["perplexity"]
        parts[0] += f" (perplexity {before:.0f} -> {after:.0f})"
    if stage["general"] is not None:
        parts.append(f"general loss {_format_change(stage['general'])}")
    if stage["guard"]["kind"] in ("probe", "neighbours"):
        parts.append(f"{stage['guard']['kind']} {_format_change(stage['guard'])}")
    kept = f"kept step {stage['step']} of {stage['steps']}"
    if stage["kept"] == "original":
        kept = f"kept what it started from: {stage['why']}"
    size = f"{stage['corpus']['documents']:,} {'texts' if words else 'pictures'}"
    return f"  adapt {stage['objective']} {stage['method']}, {size}: {', '.join(parts)}; {kept}"


def _format_change(found: dict[str, Any]) -> str:
    return f"{found['before']:.3f} -> {found['after']:.3f}"


def format_arm_line(told: dict[str, Any], metric: str, count: str) -> str:
    """One finished arm and seed; `count` says how many of how many."""
    test = told["metrics"]["test"].get(metric)
    score = "" if test is None else f"  test {metric} {test:.3f}"
    seconds = sum(took for name, took in told["timings"].items() if name.endswith("seconds"))
    name = f"{told['arm']} seed {told['seed']}"
    return f"  [{count}] {name:<22}{score}  {seconds:.0f} s"


def format_ladder(record: dict[str, Any]) -> str:
    """Every arm's mean on the test items, and what the own arm gains over it."""
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
    """What every arm has forgotten, under a line that says of what."""
    rows = record["forgetting"]["rows"]
    return f"  {describe_headline(record)}, {rows:,} rows\n{format_table(build_forgetting_rows(record))}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [map(str.ljust, row, widths) for row in rows]
    lines = ["  " + "  ".join(cells).rstrip() for cells in padded]
    return "\n".join([lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]])


def format_duration(seconds: float) -> str:
    """`40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
