"""What the doctor finds."""

from dataclasses import dataclass

DEFECT, WARNING = "defect", "warning"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    `kind` is one of: fresh, base, base-shape, base-weights, stale-names, names, unsafe, corrupt,
    config, rank, nan, untrained, tokenizer, labels, reload, card, record. A `defect` makes the
    adapter wrong, unsafe or useless to others; a `warning` does not.
    """

    kind: str
    severity: str
    what: str
    where: str
    fix: str


def defect(kind: str, what: str, where: str, fix: str) -> Finding:
    """A finding that an adapter must not have."""
    return Finding(kind, DEFECT, what, where, fix)


def warning(kind: str, what: str, where: str, fix: str) -> Finding:
    """A finding that an adapter is better without."""
    return Finding(kind, WARNING, what, where, fix)


def several(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
