"""What the card and the terminal say of forgetting. It formats and never computes."""

from typing import Any

from hftl.card.plain import code, inert
from hftl.measure.verdict import interval_text

FIGURES = {
    "neighbours": "same ten nearest neighbours",
    "cka": "linear CKA with the original, debiased",
    "cosine": "mean cosine with the original",
    "kl": "KL of similarities, in nats",
    "new_kl": "KL of similarities of test inputs, in nats",
    "mlm_loss": "loss of the original's masked-language head, in nats a hidden token",
    "mae_loss": "loss of the original's masked-image decoder, squared error a hidden value",
    "backward": "accuracy of the original's own classes (its change is backward transfer)",
}
"""In words, the figures that need no labels of the task."""
CONTROLS = {
    "same": "nearest neighbour of the same {}",
    "probe_fixed": "{} by a probe of the original",
    "probe_refitted": "{} by a probe fitted anew",
}


def was_measured(record: dict[str, Any]) -> bool:
    """Whether forgetting was measured on general data."""
    return bool(record["forgetting"] and record["forgetting"]["headline"])


def headline_words(record: dict[str, Any]) -> str:
    """What of, in a few words."""
    headline = record["forgetting"]["headline"]
    if headline["control"] is None:
        return FIGURES[headline["figure"]]
    return CONTROLS[headline["figure"]].format(inert(headline["control"]))


def forgetting_sentence(record: dict[str, Any]) -> str:
    """What the own arm has forgotten, in one sentence."""
    found = record["forgetting"]
    own = found["arms"][0]
    figure, forgotten = _headline(own, found["headline"]), own["forgotten"]
    seeds = len(forgotten["per_seed"])
    sure = f"95 % interval, {seeds} seeds" if forgotten["ci95"] else "no interval"
    words = headline_words(record)
    told = (
        f"{words[:1].upper()}{words[1:]}: a share of {figure['before']:.3f} under the original, "
        f"{figure['after']:.3f} under this model, {interval_text(forgotten)} forgotten ({sure})"
    )
    if own["against"] and own["against"]["gone"] is not None:
        told += f", {_gone(own['against'])}"
    return f"{told}."


def forgetting_rows(record: dict[str, Any]) -> list[list[str]]:
    """Every arm: a header, then the headline before and after, how much of it was forgotten, and
    how that compares with the same arm without retention, where there is one."""
    found = record["forgetting"]
    against = any(_gone(entry["against"]) for entry in found["arms"])
    rows = [["arm", "original", "after", "forgotten", *(["against"] if against else [])]]
    for entry in found["arms"]:
        figure = _headline(entry, found["headline"])
        told = interval_text(entry["forgotten"])
        row = [entry["arm"], f"{figure['before']:.3f}", f"{figure['after']:.3f}", told]
        rows.append([*row, _gone(entry["against"])] if against else row)
    return rows


def figure_rows(record: dict[str, Any]) -> list[list[str]]:
    """Every figure of the own arm: a header, then what, original, after, and change."""
    own = record["forgetting"]["arms"][0]["figures"]
    rows = [["this model on general data", "original", "after", "change"]]
    for control, told in own["controls"].items():
        words = {name: CONTROLS[name].format(inert(control)) for name in CONTROLS}
        rows += [_figure_row(words[name], told[name]) for name in CONTROLS if told[name]]
    found = [(words, own.get(name)) for name, words in FIGURES.items()]
    return rows + [_figure_row(words, figure) for words, figure in found if figure]


def forgetting_lines(record: dict[str, Any]) -> list[str]:
    """How it was measured."""
    found, recipe = record["forgetting"], record["recipe"]
    facts = found["general"]
    path = recipe["data"]["general"]["path"]
    name = path if "general" in record["data"]["hub_revisions"] else path.rsplit("/", 1)[-1]
    lines = [
        f"Measured on {found['rows']:,} rows of {code(name)} ({facts['rows_read']:,} were read), "
        "which no retention used",
        "The original is the source model as it was, before any adaptation",
    ]
    if facts["documents"]:
        lines.append(f"Rows of one {code(facts['documents'])} count as one unit")
    if facts["known"]:
        lines.append(f"{facts['known']:,} copies of the run's own inputs were left out")
    # Records of before they were looked for tell none.
    if facts.get("near"):
        lines.append(
            f"{facts['near']:,} rows that are nearly one of validation or test were not used"
        )
    return [f"{line}." for line in lines]


def _headline(entry: dict[str, Any], headline: dict[str, Any]) -> dict[str, Any]:
    figures = entry["figures"]
    if headline["control"] is None:
        return figures[headline["figure"]]
    return figures["controls"][headline["control"]][headline["figure"]]


def _gone(against: dict[str, Any] | None) -> str:
    if against is None or against["gone"] is None:
        return ""
    if against["gone"] < 0:
        return f"{-against['gone']:.0%} more than {against['arm']}"
    return f"{against['gone']:.0%} less than {against['arm']}"


def _figure_row(words: str, figure: dict[str, Any]) -> list[str]:
    change = {"value": figure["change"], "ci95": figure["ci95"]}
    # Records of before it was computed have no floor.
    floor = figure.get("floor")
    named = words if floor is None else f"{words} (rows paired by chance: up to {floor:.3f})"
    return [named, f"{figure['before']:.3f}", f"{figure['after']:.3f}", interval_text(change)]
