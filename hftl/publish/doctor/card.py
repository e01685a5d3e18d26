"""The card of an adapter."""

from collections.abc import Iterator

import yaml

from hftl.card.valid import card_problems
from hftl.errors import message_line
from hftl.publish.doctor.base import named
from hftl.publish.doctor.finding import Finding, defect, warning
from hftl.publish.doctor.patient import ADAPTER, MOST_BYTES, Patient

CARD = "README.md"


def card(patient: Patient) -> Iterator[Finding]:
    """What is missing from the card or wrong in it; one that the hub cannot read is a defect."""
    from huggingface_hub import ModelCard

    if CARD not in patient.names:
        yield warning("card", "there is no card", CARD, "Write one: what it is, on what base")
        return
    path = patient.folder / CARD
    if path.stat().st_size > MOST_BYTES:
        yield defect("card", f"it is larger than {MOST_BYTES:,} bytes", CARD, "Write a shorter one")
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        bases = ModelCard(text).data.to_dict().get("base_model")
    except (ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        what = f"the hub cannot read it: {message_line(error)}"
        yield defect("card", what, CARD, "Correct the block between the two lines of ---")
        return
    name, _ = named(patient)
    bases = [bases] if isinstance(bases, str) else bases
    if isinstance(bases, list) and bases and name not in (None, *bases):
        yield warning(
            "base", f"the card names the base {bases[0]}, and {ADAPTER} {name}", CARD,
            "Name the same base in both: the one it was trained on",
        )  # fmt: skip
    for problem in card_problems(text):
        what, _, fix = problem.partition("; ")
        yield warning("card", what, CARD, fix[:1].upper() + fix[1:])
