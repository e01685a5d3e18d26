"""The card: the record as a page. It formats and never computes; same record, same bytes."""

import json
from typing import Any

from hftl.card.metadata import base_of, metadata, title
from hftl.card.result_sections import (
    adaptation_lines,
    adaptation_sentence,
    figure_rows,
    forgetting_lines,
    forgetting_rows,
    forgetting_sentence,
    headline_words,
    was_measured,
)
from hftl.card.snippets import pipeline_snippet, plain_snippet
from hftl.card.training_sections import (
    base_sentence,
    data_lines,
    data_sentence,
    environment,
    example_rows,
    limits,
    stages_of,
    training_sentence,
)
from hftl.card.validation import is_hub_id
from hftl.card.wording import (
    DOES,
    called,
    code,
    example_of,
    fenced,
    inert,
    is_pooled,
    kind_of,
    rendered,
)
from hftl.measure.metrics import less_is_better
from hftl.measure.verdict import interval_text, is_better, is_worse

OUTCOMES = {
    "positive": "Transfer helped",
    "equivalent": "Transfer made practically no difference",
    "negative": "Negative transfer, this model is worse than its baseline",
    "undetermined": "Whether transfer helped is not settled",
}


def render_card(record: dict[str, Any], place: str = ".") -> str:
    """README.md of a record.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader passes to `load`: a hub id, or the folder's path.
    """
    return rendered("template.md", _page(record, place), metadata(record))


def gain_sentence(record: dict[str, Any]) -> str:
    """The transfer gain in one sentence: the outcome, both scores, the gain and how sure it is.

    Before it comes the comparison with `head`, where this model is not better.
    """
    gain = record["transfer_gain"]
    head = _head_sentence(record)
    if gain is None:
        return f"{head}No baseline was run, so the transfer gain is not known."
    test = {row["arm"]: row["test"] for row in record["ladder"]}
    own = f"{gain['metric']} {test[record['own_arm']]:.3f}"
    return (
        f"{head}{OUTCOMES[gain['outcome']]}: {own} against "
        f"{test[gain['baseline']]:.3f} for {called(gain['baseline'], record)}, a gain of "
        f"{interval_text(gain)} ({_certainty(gain)})."
    )


def _head_sentence(record: dict[str, Any]) -> str:
    """Say that the model is not better than `head`; nothing where it is, or `head` did not run."""
    row = next((row for row in record["ladder"] if row["arm"] == "head"), None)
    over = row and row["gain_of_own"]
    if row is None or over is None or is_better(over):
        return ""
    words = "Worse than" if is_worse(over) else "Not better than"
    own = next(row["test"] for row in record["ladder"] if row["arm"] == record["own_arm"])
    return (
        f"{words} {called('head', record)}: {record['metric']} {own:.3f} against "
        f"{row['test']:.3f}, a difference of {interval_text(over)} ({_certainty(over)}). "
    )


def _certainty(gain: dict[str, Any]) -> str:
    seeds = f"{gain['seeds']} seeds" if gain["seeds"] > 1 else "one seed"
    return f"95 % interval, {seeds}" if gain["ci95"] else f"{seeds}, no interval"


def _page(record: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        "title": title(record),
        "purpose": _purpose(record),
        "gain_sentence": gain_sentence(record),
        "verdict": record["verdict"],
        "forced": record.get("forced"),
        "adaptation": record["adapt"] and adaptation_sentence(record),
        "adaptation_lines": adaptation_lines(record) if record["adapt"] else [],
        "forgetting": _forgetting(record) if was_measured(record) else None,
        "metric": record["metric"],
        "metric_words": _metric_words(record["metric"]),
        "rows": [_row(row, record) for row in record["ladder"]],
        "other_metrics": _other_metrics(record),
        "place": place,
        "hftl_place": json.dumps(place),
        "example": example_of(record),
        "plain_snippet": _plain_snippet(record, place),
        "pipeline_snippet": _pipeline_snippet(record, place),
        "pooling": record["recipe"]["finetune"]["pooling"] if is_pooled(record) else None,
        "data_sentence": data_sentence(record),
        "data_lines": data_lines(record),
        "warnings": [w[:1].upper() + w[1:] + "." for w in record["check"]["warnings"]],
        "limits": limits(record),
        "training_sentence": training_sentence(record),
        "base_sentence": base_sentence(record),
        "recipe": fenced(record["recipe"]),
        "environment": environment(record["environment"]),
        "version": record["environment"]["packages"]["hftl"],
        "examples": example_rows(record),
    }


def _plain_snippet(record: dict[str, Any], place: str) -> str:
    finetune, labels = record["recipe"]["finetune"], record["data"]["labels"]
    base, revision = base_of(record)
    if _on_adapted(record) and base is None:
        base = "../publish-base"
    return plain_snippet(
        place, base, revision, finetune["pooling"], max(1, len(labels)),
        record["own_arm"] == "lora", kind_of(record), example_of(record).strip("()"),
        _interpolates(record), record["source"]["architecture"],
    )  # fmt: skip


def _pipeline_snippet(record: dict[str, Any], place: str) -> str | None:
    base, _ = base_of(record)
    return pipeline_snippet(
        place, base, record["recipe"]["finetune"]["pooling"], record["own_arm"] == "lora",
        kind_of(record), example_of(record).strip("()"),
    )  # fmt: skip


def _other_metrics(record: dict[str, Any]) -> str:
    """The own arm's other scores on test, means over seeds."""
    scores = record.get("test_metrics") or {}
    told = [f"{name} {value:.3f}" for name, value in scores.items() if name != record["metric"]]
    return ", ".join(told)


def _forgetting(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "sentence": forgetting_sentence(record),
        "words": headline_words(record),
        "tables": [forgetting_rows(record), figure_rows(record)],
        "lines": forgetting_lines(record),
    }


def _metric_words(metric: str) -> str:
    return f"{metric}, less is better" if less_is_better(metric) else metric


def _purpose(record: dict[str, Any]) -> str:
    kinds = {
        "lora": "A LoRA adapter of", "head": "A linear head on the frozen",
        "partial": "The top blocks fine-tuned of", "full": "A full fine-tuning of",
        "gradual": "A gradual fine-tuning of",
    }  # fmt: skip
    source = record["source"]
    name = source["name"]
    link = f"[{name}](https://huggingface.co/{name})"
    if source["published_as"] != name or not is_hub_id(name):
        link = inert(name)
    labels = record["data"]["labels"]
    kind = kind_of(record)
    if not labels:
        what = {"image": "pictures"}.get(kind, "text")
        return f"{kinds[record['own_arm']]} {link} that predicts a number from {what}."
    shown = ", ".join(code(label) for label in labels[:12])
    more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
    several = ", several at once" if record["data"]["task"] == "multi-label" else ""
    if any(stage["kept"] == "adapted" for stage in stages_of(record)):
        several += ", after adaptation to its domain"
    return f"{kinds[record['own_arm']]} {link} that {DOES[kind]} {shown}{more}{several}."


def _on_adapted(record: dict[str, Any]) -> bool:
    """Whether the adapter goes on a base that the run itself has adapted."""
    return bool(record["adapt"] and record["adapt"]["base"])


def _interpolates(record: dict[str, Any]) -> bool:
    """Whether the model must be told that the pictures are of another size."""
    return bool((record.get("forward") or {}).get("interpolate_pos_encoding"))


def _row(row: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    gain = row["gain_of_own"]
    own = row["arm"] == record["own_arm"]
    parameters = next(a["trainable_parameters"] for a in record["arms"] if a["arm"] == row["arm"])
    return {
        "name": f"**{row['arm']}** (this model)" if own else called(row["arm"], record),
        "test": f"**{row['test']:.3f}**" if own else f"{row['test']:.3f}",
        "sd": "" if row["sd"] is None else f"{row['sd']:.3f}",
        "gain": "" if gain is None else interval_text(gain),
        "parameters": f"{parameters:,}",
    }
