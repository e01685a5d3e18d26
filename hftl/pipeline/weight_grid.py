"""Name the weights of KL that are tried where a recipe says `auto`, and the rows that choose."""

from hftl.config.retain import Retain
from hftl.data.rows import Row
from hftl.finetune.context import ExperimentContext

WEIGHT_GRID = (0.03, 0.1, 0.3, 1.0)
MAX_SELECTION_ROWS = 1000
"""Rows whose neighbours measure forgetting, at most."""


def set_kl_weight(retain: Retain, weight: float) -> Retain:
    """Return the section with a number for every weight that was to be chosen."""
    terms = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl
        for kl in retain.kl_terms
    ]
    return retain.model_copy(update={"kl": terms})


def list_selection_rows(context: ExperimentContext) -> list[Row]:
    """Return the rows by which a weight is chosen.

    These are general rows that training may read, or else the validation rows: the general rows
    that measure forgetting must choose nothing.
    """
    general = context.general
    rows = context.prepared.rows["validation"] if general is None else general.train_rows
    return rows[:MAX_SELECTION_ROWS]
