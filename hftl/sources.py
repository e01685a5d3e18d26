"""Show the known source models as a table or as JSON: `hftl sources`."""

from collections.abc import Sequence

from hftl.console import format_table
from hftl.models.known_sources import KnownSource, list_known_sources
from hftl.runtime.run_folder import to_json

COLUMNS = ("source", "size", "license", "loads")
FOOTNOTE = (
    "loads: by its architecture, nothing was downloaded; a license left out is on the model's page"
)


def select_sources(field: str | None, modality: str | None) -> list[KnownSource]:
    """Return the known sources of a field and modality; None takes all."""
    return [
        source
        for source in list_known_sources()
        if field in (None, source.field) and modality in (None, source.modality)
    ]


def format_sources(sources: Sequence[KnownSource]) -> str:
    """Return a table with a row for each source, under field and modality, and why hftl does not
    load some. No line of the table is wider than 100 columns."""
    if not sources:
        return "  none"
    head, rule, *rows = format_table([COLUMNS, *map(_build_row, sources)]).splitlines()
    lines, group = [head, rule], None
    for source, row in zip(sources, rows, strict=True):
        if group != (source.field, source.modality):
            group = source.field, source.modality
            lines.append(f"{source.field}, {source.modality}")
        lines.append(row)
    obstacles = [f"  no: {one.id}: {one.obstacle}" for one in sources if one.obstacle]
    return "\n".join([*lines, f"  {FOOTNOTE}", *obstacles])


def dump_sources(sources: Sequence[KnownSource]) -> str:
    """Return the sources as a JSON list; `obstacle` is null where hftl loads one."""
    fields = [(source, source.model_dump(exclude={"own_format"})) for source in sources]
    return to_json([tree | {"obstacle": source.obstacle} for source, tree in fields])


def _build_row(source: KnownSource) -> tuple[str, ...]:
    return (
        source.id, _format_millions(source.millions), source.license or "-",
        "yes" if source.obstacle is None else "no",
    )  # fmt: skip


def _format_millions(millions: float | None) -> str:
    """Return 22.7M, 110M or 1.2B; a dash where it is not known."""
    if millions is None:
        return "-"
    return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:g}M"
