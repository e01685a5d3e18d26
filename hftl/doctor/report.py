"""What the doctor says on the terminal."""

from collections.abc import Callable
from typing import Any

from hftl.doctor.adapter_folder import DEFECT, Finding
from hftl.doctor.checks import Examination, examine_adapter
from hftl.doctor.fix import fix_adapter, get_backup_folder


def run_doctor(place: str, base: str | None, fix: bool, say: Callable[[str], None]) -> int:
    """Examines, mends where asked, examines again, and says it all.

    Returns:
        The exit code: 0 sound, 4 defects, 5 the hub did not give the base.

    Raises:
        RecipeError: see `examine` and `mend`.
        HubError: see `examine`.
    """
    found = examine_adapter(place, base)
    if fix:
        lines = fix_adapter(found, base)
        for line in lines:
            say(f"fixed: {strip_control_characters(line)}")
        if lines:
            kept = get_backup_folder(found.folder.folder)
            say(f"as it was before: {kept}" if kept.exists() else "nothing else was changed")
            found = examine_adapter(place, base)
        else:
            say("nothing here can be fixed without you")
    say(format_report(found))
    return found.exit_code


def format_report(found: Examination, width: int | None = None) -> str:
    """A table of the findings, what was not examined, and one line at the end.

    Args:
        found: the examination.
        width: of the terminal, in characters; None takes what it is.
    """
    lines = [_format_table(found.findings, width)] if found.findings else []
    lines += [f"not examined: {strip_control_characters(what)}" for what in found.unexamined]
    return "\n".join([*lines, format_summary(found)])


def format_summary(found: Examination) -> str:
    """`sound`, or how many defects and warnings there are."""
    defects = len(found.defects)
    warnings = len(found.findings) - defects
    counts = [f"{n} {word}{'s' * (n > 1)}" for n, word in
              ((defects, "defect"), (warnings, "warning")) if n]  # fmt: skip
    part = " in what was examined" if found.unexamined else ""
    place = strip_control_characters(found.folder.place)
    if defects:
        return f"{place}: {' and '.join(counts)}"
    return f"{place}: sound{part}{f', with {counts[0]}' if counts else ''}"


def strip_control_characters(text: str) -> str:
    """Text of a stranger without the characters that steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _format_table(findings: list[Finding], width: int | None) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_lines=True)
    for title in ("finding", "where", "fix"):
        table.add_column(title, overflow="fold")  # an id or a file's name is never cut
    for one in sorted(findings, key=lambda one: one.severity != DEFECT):
        style = "red" if one.severity == DEFECT else "yellow"
        head = f"{one.severity}, {one.kind}: "
        cells: list[Any] = [Text.assemble((head, style), strip_control_characters(one.what))]
        cells += [Text(strip_control_characters(text)) for text in (one.where, one.fix)]
        table.add_row(*cells)
    console = Console(width=width)
    with console.capture() as caught:
        console.print(table)
    return caught.get().rstrip()
