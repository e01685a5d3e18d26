"""Word counts: `1 row is`, `2 rows are`."""

VERBS = {"is": "are", "was": "were", "has": "have"}


def count_noun(count: int, noun: str) -> str:
    """Return `1 bad row` or `1,200 bad rows`, of a noun whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def choose_verb(count: int, verb: str) -> str:
    """Return the verb as it follows a count: `is` after 1, `are` after any other."""
    return verb if count == 1 else VERBS[verb]
