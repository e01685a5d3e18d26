"""Print an examination: the findings, what was not examined, one last line."""

from collections.abc import Callable

from hftl.doctor.adapter_folder import DEFECT, AdapterFolder, Finding
from hftl.doctor.checks import examine_adapter, examine_folder
from hftl.doctor.examination import Examination
from hftl.doctor.fix import fix_adapter, get_backup_folder
from hftl.doctor.load_process import LoadProcess

INDENT = 4
"""Columns by which what belongs to a finding is indented."""


def run_doctor(
    folder: AdapterFolder, base: str | None, fix: bool, say: Callable[[str], None],
    process: LoadProcess | None = None,
) -> int:  # fmt: skip
    """Examine a folder, fix it and examine it again where asked, and print the report.

    Args:
        folder: as it was opened.
        base: the adapter's base, where it is not the one it names.
        fix: whether to mend what is safe to mend.
        say: receives each line.
        process: a fresh one to load it in, where one was prepared.

    Returns:
        The exit code: 0 sound, 4 defects, 5 the hub did not give the base.

    Raises:
        RecipeError: see `examine_adapter` and `fix_adapter`.
        HubError: see `examine_adapter`.
    """
    examination = examine_folder(folder, base, process)
    if fix:
        lines = fix_adapter(examination, base)
        for line in lines:
            say(f"fixed: {strip_control_characters(line)}")
        if lines:
            backup = get_backup_folder(examination.folder.path)
            say(f"as it was before: {backup}" if backup.exists() else "nothing else was changed")
            examination = examine_adapter(folder.place, base, process)
        else:
            say("nothing here can be fixed without you")
    say(format_report(examination))
    return examination.exit_code


def format_report(examination: Examination, width: int | None = None) -> str:
    """Return the findings, what was not examined, and the summary.

    Args:
        examination: the examination.
        width: of the terminal, in characters; None measures it.
    """
    lines = [_format_findings(examination.findings, width)] if examination.findings else []
    lines += [f"not examined: {strip_control_characters(what)}" for what in examination.unexamined]
    return "\n".join([*lines, format_summary(examination)])


def format_summary(examination: Examination) -> str:
    """Return a line that says `sound`, or how many defects and warnings there are."""
    defects = len(examination.defects)
    warnings = len(examination.findings) - defects
    counts = [f"{n} {word}{'s' * (n > 1)}" for n, word in
              ((defects, "defect"), (warnings, "warning")) if n]  # fmt: skip
    part = " in what was examined" if examination.unexamined else ""
    place = strip_control_characters(examination.folder.place)
    if defects:
        return f"{place}: {' and '.join(counts)}"
    return f"{place}: sound{part}{f', with {counts[0]}' if counts else ''}"


def strip_control_characters(text: str) -> str:
    """Return a stranger's text without the characters that control a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _format_findings(findings: list[Finding], width: int | None) -> str:
    """Return each finding, defects first, with where it is and what to do beneath it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(width=width)
    with console.capture() as caught:
        for one in sorted(findings, key=lambda one: one.severity != DEFECT):
            style = "red" if one.severity == DEFECT else "yellow"
            head = f"{one.severity}, {one.kind}: "
            console.print(Text.assemble((head, style), strip_control_characters(one.what)))
            for name, text in (("where", one.where), ("fix", one.fix)):
                line = f"{name}: {strip_control_characters(text)}"
                console.print(Padding(Text(line), (0, 0, 0, INDENT)))
    return "\n".join(line.rstrip() for line in caught.get().splitlines())
