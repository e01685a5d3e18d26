"""The card: the record as a page. It formats and never computes; same record, same bytes."""

import re
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hftl.card.adaptation import adaptation_lines, adaptation_sentence
from hftl.card.forgetting import (
    figure_rows,
    forgetting_lines,
    forgetting_rows,
    forgetting_sentence,
    headline_words,
    was_measured,
)
from hftl.card.kinds import CLASSICAL, DOES, example_of, kind_of, pipeline_tag
from hftl.card.plain import cell
from hftl.card.retention import retention_words
from hftl.card.snippets import plain_snippet
from hftl.data.split import IN_ALL
from hftl.measure.verdict import interval_text
from hftl.metrics import less_is_better

OUTCOMES = {
    "positive": "Transfer helped",
    "equivalent": "Transfer made practically no difference",
    "negative": "Negative transfer, this model is worse than its baseline",
    "undetermined": "Whether transfer helped is not settled",
}
WHAT = {
    "scratch": "the same architecture trained from scratch",
    "head": "the frozen encoder with a linear head",
    "majority": "always the most frequent answer",
    "source": "the same without adaptation",
}
TABLE_SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|ndjson|parquet|txt)$")


def render_card(record: dict[str, Any], place: str = ".") -> str:
    """README.md of a record.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader passes to `load`: a hub id, or the folder's path.
    """
    engine = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    engine.filters["first_upper"] = lambda text: text[:1].upper() + text[1:]
    template = engine.from_string(files("hftl.card").joinpath("template.md").read_text("utf-8"))
    body = template.render(**_page(record, place))
    return f"---\n{_metadata(record).to_yaml().strip()}\n---\n\n{body}"


def gain_sentence(record: dict[str, Any]) -> str:
    """The transfer gain in one sentence: the outcome, both scores, the gain and how sure it is."""
    gain = record["transfer_gain"]
    if gain is None:
        return "No baseline was run, so the transfer gain is not known."
    test = {row["arm"]: row["test"] for row in record["ladder"]}
    seeds = f"{gain['seeds']} seeds" if gain["seeds"] > 1 else "one seed"
    sure = f"95 % interval, {seeds}" if gain["ci95"] else f"{seeds}, no interval"
    return (
        f"{OUTCOMES[gain['outcome']]}: {gain['metric']} {test[record['own_arm']]:.3f} against "
        f"{test[gain['baseline']]:.3f} for {_called(gain['baseline'], record)}, a gain of "
        f"{interval_text(gain)} ({sure})."
    )


def _page(record: dict[str, Any], place: str) -> dict[str, Any]:
    recipe, source, data = record["recipe"], record["source"], record["data"]
    own = record["own_arm"]
    example = example_of(record)
    return {
        "title": _title(record),
        "purpose": _purpose(record),
        "gain_sentence": gain_sentence(record),
        "verdict": record["verdict"],
        "adaptation": record["adapt"] and adaptation_sentence(record),
        "adaptation_lines": adaptation_lines(record) if record["adapt"] else [],
        "forgetting": _forgetting(record) if was_measured(record) else None,
        "metric": record["metric"],
        "metric_words": _metric_words(record["metric"]),
        "rows": [_row(row, record) for row in record["ladder"]],
        "place": place,
        "example": example,
        "plain_snippet": plain_snippet(
            place, "../publish-base" if _on_adapted(record) else source["published_as"],
            None if _on_adapted(record) else source["revision"],
            recipe["finetune"]["pooling"], max(1, len(data["labels"])), own == "lora",
            kind_of(record), example.strip("()"), _interpolates(record), source["architecture"],
        ),
        "data_sentence": _data_sentence(record),
        "data_lines": _data_lines(record),
        "warnings": [w[:1].upper() + w[1:] + "." for w in record["check"]["warnings"]],
        "limits": _limits(record),
        "training_sentence": _training_sentence(record),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
        "environment": _environment(record["environment"]),
    }  # fmt: skip


def _forgetting(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "sentence": forgetting_sentence(record),
        "words": headline_words(record),
        "tables": [forgetting_rows(record), figure_rows(record)],
        "lines": forgetting_lines(record),
    }


def _metadata(record: dict[str, Any]) -> ModelCardData:
    source, own = record["source"], record["own_arm"]
    known: dict[str, Any] = {}
    if source["published_as"] and not _on_adapted(record):
        known["base_model"] = source["published_as"]
        known["base_model_relation"] = "adapter" if own == "lora" else "finetune"
    return ModelCardData(
        model_name=_title(record),
        library_name="peft" if own == "lora" else "transformers",
        pipeline_tag=pipeline_tag(record),
        tags=["hftl", "transfer-learning", own],
        eval_results=_eval_results(record),
        **known,
    )


def _eval_results(record: dict[str, Any]) -> list[EvalResult]:
    dataset = record["data"]["name"]
    own = next(row for row in record["ladder"] if row["arm"] == record["own_arm"])
    common = {"task_type": pipeline_tag(record), "dataset_type": dataset, "dataset_name": dataset,
              "dataset_split": "test"}  # fmt: skip
    results = [
        EvalResult(metric_type=record["metric"], metric_value=round(own["test"], 4),
                   metric_name=f"test {record['metric']}, mean over seeds", **common)
    ]  # fmt: skip
    gain = record["transfer_gain"]
    if gain is not None:
        told = {k: gain[k] for k in ("metric", "baseline", "seeds", "ci95", "outcome")}
        results.append(
            EvalResult(metric_type="transfer_gain", metric_value=round(gain["value"], 4),
                       metric_name="Transfer gain", metric_args=told, **common)
        )  # fmt: skip
    return results


def _title(record: dict[str, Any]) -> str:
    base, data = (cell(record[k]["name"]).rsplit("/", 1)[-1] for k in ("source", "data"))
    return f"{base}-{TABLE_SUFFIX.sub('', data)}-{record['own_arm']}"


def _metric_words(metric: str) -> str:
    return f"{metric}, less is better" if less_is_better(metric) else metric


def _purpose(record: dict[str, Any]) -> str:
    kinds = {
        "lora": "A LoRA adapter of", "head": "A linear head on the frozen",
        "partial": "The top blocks fine-tuned of", "full": "A full fine-tuning of",
        "gradual": "A gradual fine-tuning of",
    }  # fmt: skip
    base = record["source"]["name"]
    link = f"[{base}](https://huggingface.co/{base})" if record["source"]["published_as"] else base
    labels = record["data"]["labels"]
    kind = kind_of(record)
    if not labels:
        what = {"image": "pictures"}.get(kind, "text")
        return f"{kinds[record['own_arm']]} {link} that predicts a number from {what}."
    shown = ", ".join(f"`{cell(label)}`" for label in labels[:12])
    more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
    several = ", several at once" if record["data"]["task"] == "multi-label" else ""
    if any(stage["kept"] == "adapted" for stage in _stages(record)):
        several += ", after adaptation to its domain"
    return f"{kinds[record['own_arm']]} {link} that {DOES[kind]} {shown}{more}{several}."


def _stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record["adapt"]["stages"] if record["adapt"] else []


def _on_adapted(record: dict[str, Any]) -> bool:
    """Whether the adapter goes on a base that the run itself has adapted."""
    return bool(record["adapt"] and record["adapt"]["base"])


def _interpolates(record: dict[str, Any]) -> bool:
    """Whether the model must be told that the pictures are of another size."""
    return bool((record.get("forward") or {}).get("interpolate_pos_encoding"))


def _called(arm: str, record: dict[str, Any]) -> str:
    known = WHAT | {"classical": CLASSICAL[kind_of(record)]}
    return f"{arm} ({known[arm]})" if arm in known else arm


def _row(row: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    gain = row["gain_of_own"]
    own = row["arm"] == record["own_arm"]
    parameters = next(a["trainable_parameters"] for a in record["arms"] if a["arm"] == row["arm"])
    return {
        "name": f"**{row['arm']}** (this model)" if own else _called(row["arm"], record),
        "test": f"**{row['test']:.3f}**" if own else f"{row['test']:.3f}",
        "sd": "" if row["sd"] is None else f"{row['sd']:.3f}",
        "gain": "" if gain is None else interval_text(gain),
        "parameters": f"{parameters:,}",
    }


def _data_sentence(record: dict[str, Any]) -> str:
    data = record["data"]
    splits = data["splits"]
    shots = record["recipe"]["data"]["shots"]
    noun = "words" if kind_of(record) == "words" else "rows"
    learnt = f"{record['data']['labels_read']['train_per_seed']:,} labelled {noun} a seed"
    if shots:
        unit = "in all" if data["task"] in IN_ALL else "a class"
        rows = "rows " if noun == "words" else ""
        learnt += f" ({shots} {rows}{unit}, drawn by the seed)"
    epoch = "" if record["recipe"]["finetune"]["strategy"] == "head" else "the best epoch, "
    if any(stage["guard"]["kind"] == "probe" for stage in _stages(record)):
        epoch += "the adaptation's weights, "
    chosen = f"{epoch}the published seed and the baseline"
    return (
        f"`{cell(data['name'])}`: trained on {learnt}; {chosen} were chosen on "
        f"{splits['validation']:,} validation rows, and every figure above is on "
        f"{splits['test']:,} test rows that nothing was chosen by. "
        f"{data['labels_read']['total']:,} labels were read in all."
    )


def _data_lines(record: dict[str, Any]) -> list[str]:
    data = record["data"]
    lines = [f"{data['rows_read']:,} rows were read"]
    for key, told in (
        ("duplicates", "exact duplicates were dropped"),
        ("conflicting", "rows were dropped because the same input had two labels"),
        ("leaked", "of these stood in train and in another table"),
        ("bad_rows", "bad rows were skipped"),
    ):
        if data[key]:
            lines.append(f"{data[key]:,} {told}")
    if kind_of(record) == "image":
        lines.append("transparent pictures were laid on white, and turned as their EXIF data say")
    if record["recipe"]["data"]["group"]:
        lines.append("rows of one group never stand in two splits, and count as one unit")
    return lines


def _limits(record: dict[str, Any]) -> list[str]:
    lines = []
    for row in record["ladder"]:
        gain = row["gain_of_own"]
        if gain is not None and gain["value"] < 0:
            lines.append(f"It is behind {_called(row['arm'], record)}: {interval_text(gain)}.")
    lines.append(
        "Measured on rows of the same origin as its training rows; other domains were not measured."
    )
    lines.append(
        f"The weights are those of seed {record['published_seed']}, the best on validation; the "
        "figures are over all seeds."
    )
    if not was_measured(record):
        lines.append("Forgetting of what the source model knew was not measured.")
    return lines


def _training_sentence(record: dict[str, Any]) -> str:
    finetune = record["recipe"]["finetune"]
    seeds = len(record["recipe"]["measure"]["seeds"])
    words = [f"Strategy `{finetune['strategy']}`, pooling `{finetune['pooling']}`"]
    if finetune["strategy"] == "head":
        words.append("solved on features of the frozen encoder, its penalty by cross-validation")
    else:
        started = "the linear probe" if finetune["head_init"] == "probe" else "random weights"
        words.append(f"the head started from {started}")
        rate, epochs = (finetune["training"][k] for k in ("learning_rate", "num_train_epochs"))
        last = f"{epochs:g} epochs"
        if finetune["strategy"] == "gradual":
            last = f"{finetune['gradual']['epochs']:g} epochs a phase"
        words.append(f"learning rate {rate:g}, {last}, the best on validation kept")
        if finetune["layer_decay"]:
            words.append(f"each block's rate {finetune['layer_decay']:g} of that of the one above")
        words += retention_words(record)
    return f"{'; '.join(words)}; {seeds} seed{'s' if seeds > 1 else ''}."


def _environment(found: dict[str, Any]) -> list[tuple[str, str]]:
    plain = [(k, str(v)) for k, v in found.items() if k != "packages"]
    return plain + [(name, version) for name, version in found["packages"].items()]
