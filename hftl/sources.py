"""Show the known source models as a table or as JSON: `hftl sources`."""

from collections.abc import Sequence

from hftl.console import format_table
from hftl.models.known_sources import KnownSource, list_known_sources
from hftl.runtime.run_folder import to_json

COLUMNS = ("source", "field", "reads", "family", "parameters", "license", "hftl loads it")
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
    """Return a table with a row for each source."""
    rows = [COLUMNS, *map(_build_row, sources)]
    return f"{format_table(rows)}\n  {FOOTNOTE}" if sources else "  none"


def dump_sources(sources: Sequence[KnownSource]) -> str:
    """Return the sources as a JSON list; `obstacle` is null where hftl loads one."""
    fields = [(source, source.model_dump(exclude={"own_format"})) for source in sources]
    return to_json([tree | {"obstacle": source.obstacle} for source, tree in fields])


def _build_row(source: KnownSource) -> tuple[str, ...]:
    loads = "yes" if source.obstacle is None else f"no: {source.obstacle}"
    return (
        source.id, source.field, source.modality, source.family, _format_millions(source.millions),
        source.license or "-", loads,
    )  # fmt: skip


def _format_millions(millions: float | None) -> str:
    """Return 22.7M, 110M or 1.2B; a dash where it is not known."""
    if millions is None:
        return "-"
    return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:g}M"
