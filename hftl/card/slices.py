"""Word the card's part on slices: where the model is better or worse than its baseline."""

from dataclasses import dataclass

from hftl.card.markdown import format_code
from hftl.card.wording import describe_arm
from hftl.data.slices import MAX_VALUES, MIN_VALUE_ROWS
from hftl.measure.facts import MIN_JUDGED_ROWS, SliceColumn, SliceScore, SliceSection
from hftl.measure.metrics import describe_metric
from hftl.measure.record import Record
from hftl.measure.verdict import format_slice_gain


@dataclass(frozen=True)
class SlicesPart:
    """Hold the card's part on slices; the table's first row is its header."""

    sentence: str
    table: list[list[str]]
    lines: list[str]
    has_plot: bool


def build_slices_part(record: Record) -> SlicesPart | None:
    """Return the part; None where the recipe names no slices."""
    section = record.slices
    if section is None:
        return None
    lines = [line for column in section.columns for line in _format_cut(column)]
    if any(part.rows < MIN_JUDGED_ROWS for part in section.slices):
        lines.append(f"Slices of fewer than {MIN_JUDGED_ROWS} rows do not decide the verdict.")
    if any(part.p_value is not None for part in section.slices) and _count_seeds(record) < 6:
        lines.append(
            f"With {_count_seeds(record)} seeds few losses are seen: in a simulation with 3 seeds "
            "5 of 25 losses of .15 were."
        )
    return SlicesPart(
        _format_sentence(record, section), _build_rows(record, section), lines, has_gains(record)
    )


def _count_seeds(record: Record) -> int:
    return len(record.recipe.measure.seeds)


def has_gains(record: Record) -> bool:
    """Return whether slices were measured against a baseline."""
    return record.slices is not None and record.slices.baseline is not None


def _format_sentence(record: Record, section: SliceSection) -> str:
    names = ", ".join(format_code(column.name) for column in section.columns)
    start = f"The test rows are cut into {len(section.slices)} slices by {names}."
    if section.baseline is None:
        return f"{start} No baseline that learns the task was run, so no gain is known."
    baseline = describe_arm(section.baseline, record)
    if all(part.p_value is None for part in section.slices):
        return f"{start} Without an interval none can be judged."
    losers = section.losers
    result = f"In none of them is this model worse than {baseline} beyond noise"
    if losers:
        named = ", ".join(format_code(part.phrase) for part in losers)
        result = f"**This model is worse than {baseline} beyond noise in {named}**"
    return (
        f"{start} {result}. Intervals are each slice's own; p is that of no gain, corrected for "
        "the number of slices (Holm)."
    )


def _build_rows(record: Record, section: SliceSection) -> list[list[str]]:
    """Return a header and a row a slice, those that lose in bold."""
    words = describe_metric(str(record.metric)).label
    header = ["slice", "rows", f"test {words}"]
    if section.baseline is not None:
        header += [f"gain over {section.baseline}", "p"]
    return [header, *(_build_row(part, section) for part in section.slices)]


def _build_row(part: SliceScore, section: SliceSection) -> list[str]:
    name, score = format_code(part.phrase), f"{part.score:.3f}"
    if part.score_ci95 is not None:
        score += " [{:.3f}, {:.3f}]".format(*part.score_ci95)
    row = [name, f"{part.rows:,}", score]
    if section.baseline is not None:
        p_value = "-" if part.p_value is None else f"{part.p_value:.2g}"
        row += [format_slice_gain(part), p_value]
    return [f"**{cell}**" for cell in row] if part.outcome == "worse" else row


def _format_cut(column: SliceColumn) -> list[str]:
    name, lines = format_code(column.name), []
    if column.cuts:
        cuts = ", ".join(f"{cut:.6g}" for cut in column.cuts)
        lines.append(f"{name} has many numbers, and is cut at quantiles of the test rows: {cuts}.")
    if column.pooled_values:
        lines.append(
            f"{column.pooled_values:,} values of {name} are one slice together, as each is in "
            f"fewer than {MIN_VALUE_ROWS} rows or not among the {MAX_VALUES} most frequent."
        )
    return lines
