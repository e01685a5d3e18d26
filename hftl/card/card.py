"""The card: the record as a page. It formats and never computes; same record, same bytes."""

import json
from typing import Any

from hftl.card.metadata import build_metadata, find_public_base, format_title
from hftl.card.result_sections import (
    build_figure_rows,
    build_forgetting_rows,
    describe_headline,
    format_adaptation_lines,
    format_adaptation_sentence,
    format_forgetting_lines,
    format_forgetting_sentence,
    has_forgetting,
)
from hftl.card.snippets import render_pipeline_snippet, render_plain_snippet
from hftl.card.training_sections import (
    build_example_rows,
    format_base_sentence,
    format_data_lines,
    format_data_sentence,
    format_environment,
    format_limits,
    format_training_sentence,
    list_stages,
)
from hftl.card.validation import is_hub_id
from hftl.card.wording import (
    TASK_PHRASES,
    describe_arm,
    escape_markup,
    example_input,
    format_code,
    format_yaml_block,
    input_kind,
    is_pooled,
    render_page,
)
from hftl.measure.metrics import is_lower_better
from hftl.measure.verdict import format_gain, is_better, is_worse

OUTCOME_PHRASES = {
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
    return render_page("template.md", _build_page(record, place), build_metadata(record))


def format_gain_sentence(record: dict[str, Any]) -> str:
    """The transfer gain in one sentence: the outcome, both scores, the gain and how sure it is.

    Before it comes the comparison with `head`, where this model is not better.
    """
    gain = record["transfer_gain"]
    head = _format_head_sentence(record)
    if gain is None:
        return f"{head}No baseline was run, so the transfer gain is not known."
    test = {row["arm"]: row["test"] for row in record["ladder"]}
    own = f"{gain['metric']} {test[record['own_arm']]:.3f}"
    return (
        f"{head}{OUTCOME_PHRASES[gain['outcome']]}: {own} against "
        f"{test[gain['baseline']]:.3f} for {describe_arm(gain['baseline'], record)}, a gain of "
        f"{format_gain(gain)} ({_format_certainty(gain)})."
    )


def _format_head_sentence(record: dict[str, Any]) -> str:
    """Say that the model is not better than `head`; nothing where it is, or `head` did not run."""
    row = next((row for row in record["ladder"] if row["arm"] == "head"), None)
    over = row and row["gain_of_own"]
    if row is None or over is None or is_better(over):
        return ""
    words = "Worse than" if is_worse(over) else "Not better than"
    own = next(row["test"] for row in record["ladder"] if row["arm"] == record["own_arm"])
    return (
        f"{words} {describe_arm('head', record)}: {record['metric']} {own:.3f} against "
        f"{row['test']:.3f}, a difference of {format_gain(over)} ({_format_certainty(over)}). "
    )


def _format_certainty(gain: dict[str, Any]) -> str:
    seeds = f"{gain['seeds']} seeds" if gain["seeds"] > 1 else "one seed"
    return f"95 % interval, {seeds}" if gain["ci95"] else f"{seeds}, no interval"


def _build_page(record: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        "title": format_title(record),
        "purpose": _format_purpose(record),
        "gain_sentence": format_gain_sentence(record),
        "verdict": record["verdict"],
        "forced": record.get("forced"),
        "adaptation": record["adapt"] and format_adaptation_sentence(record),
        "adaptation_lines": format_adaptation_lines(record) if record["adapt"] else [],
        "forgetting": _build_forgetting_section(record) if has_forgetting(record) else None,
        "metric": record["metric"],
        "metric_words": _describe_metric(record["metric"]),
        "rows": [_build_ladder_row(row, record) for row in record["ladder"]],
        "other_metrics": _format_other_metrics(record),
        "place": place,
        "hftl_place": json.dumps(place),
        "example": example_input(record),
        "plain_snippet": _build_plain_snippet(record, place),
        "pipeline_snippet": _build_pipeline_snippet(record, place),
        "pooling": record["recipe"]["finetune"]["pooling"] if is_pooled(record) else None,
        "data_sentence": format_data_sentence(record),
        "data_lines": format_data_lines(record),
        "warnings": [w[:1].upper() + w[1:] + "." for w in record["check"]["warnings"]],
        "limits": format_limits(record),
        "training_sentence": format_training_sentence(record),
        "base_sentence": format_base_sentence(record),
        "recipe": format_yaml_block(record["recipe"]),
        "environment": format_environment(record["environment"]),
        "version": record["environment"]["packages"]["hftl"],
        "examples": build_example_rows(record),
    }


def _build_plain_snippet(record: dict[str, Any], place: str) -> str:
    finetune, labels = record["recipe"]["finetune"], record["data"]["labels"]
    base, revision = find_public_base(record)
    if _has_adapted_base(record) and base is None:
        base = "../publish-base"
    return render_plain_snippet(
        place, base, revision, finetune["pooling"], max(1, len(labels)),
        record["own_arm"] == "lora", input_kind(record), example_input(record).strip("()"),
        _interpolates_positions(record), record["source"]["architecture"],
    )  # fmt: skip


def _build_pipeline_snippet(record: dict[str, Any], place: str) -> str | None:
    base, _ = find_public_base(record)
    return render_pipeline_snippet(
        place, base, record["recipe"]["finetune"]["pooling"], record["own_arm"] == "lora",
        input_kind(record), example_input(record).strip("()"),
    )  # fmt: skip


def _format_other_metrics(record: dict[str, Any]) -> str:
    """The own arm's other scores on test, means over seeds."""
    scores = record.get("test_metrics") or {}
    told = [f"{name} {value:.3f}" for name, value in scores.items() if name != record["metric"]]
    return ", ".join(told)


def _build_forgetting_section(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "sentence": format_forgetting_sentence(record),
        "words": describe_headline(record),
        "tables": [build_forgetting_rows(record), build_figure_rows(record)],
        "lines": format_forgetting_lines(record),
    }


def _describe_metric(metric: str) -> str:
    return f"{metric}, less is better" if is_lower_better(metric) else metric


def _format_purpose(record: dict[str, Any]) -> str:
    kinds = {
        "lora": "A LoRA adapter of", "head": "A linear head on the frozen",
        "partial": "The top blocks fine-tuned of", "full": "A full fine-tuning of",
        "gradual": "A gradual fine-tuning of",
    }  # fmt: skip
    source = record["source"]
    name = source["name"]
    link = f"[{name}](https://huggingface.co/{name})"
    if source["published_as"] != name or not is_hub_id(name):
        link = escape_markup(name)
    labels = record["data"]["labels"]
    kind = input_kind(record)
    if not labels:
        what = {"image": "pictures"}.get(kind, "text")
        return f"{kinds[record['own_arm']]} {link} that predicts a number from {what}."
    shown = ", ".join(format_code(label) for label in labels[:12])
    more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
    several = ", several at once" if record["data"]["task"] == "multi-label" else ""
    if any(stage["kept"] == "adapted" for stage in list_stages(record)):
        several += ", after adaptation to its domain"
    return f"{kinds[record['own_arm']]} {link} that {TASK_PHRASES[kind]} {shown}{more}{several}."


def _has_adapted_base(record: dict[str, Any]) -> bool:
    """Whether the adapter goes on a base that the run itself has adapted."""
    return bool(record["adapt"] and record["adapt"]["base"])


def _interpolates_positions(record: dict[str, Any]) -> bool:
    """Whether the model must be told that the pictures are of another size."""
    return bool((record.get("forward") or {}).get("interpolate_pos_encoding"))


def _build_ladder_row(row: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    gain = row["gain_of_own"]
    own = row["arm"] == record["own_arm"]
    parameters = next(a["trainable_parameters"] for a in record["arms"] if a["arm"] == row["arm"])
    return {
        "name": f"**{row['arm']}** (this model)" if own else describe_arm(row["arm"], record),
        "test": f"**{row['test']:.3f}**" if own else f"{row['test']:.3f}",
        "sd": "" if row["sd"] is None else f"{row['sd']:.3f}",
        "gain": "" if gain is None else format_gain(gain),
        "parameters": f"{parameters:,}",
    }
