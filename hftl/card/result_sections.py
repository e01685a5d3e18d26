"""What the card says of adaptation, and the page of an encoder that was adapted alone."""

import json
from typing import Any

from huggingface_hub import ModelCardData

from hftl.card.metadata import build_adapter_tags, build_origin, find_public_base
from hftl.card.wording import escape_markup, format_code, format_yaml_block, render_page
from hftl.config.retain import Retain
from hftl.measure.verdict import format_gain

OBJECTIVE_PHRASES = {"mlm": "masked language modelling", "mae": "masked image modelling"}
METHOD_PHRASES = {
    "full": "every weight of the encoder",
    "lora": "LoRA adapters in every block",
    "lora+blocks": "LoRA adapters in every block and the top blocks whole",
}
GUARD_PHRASES = {
    "probe": "a linear probe's score on validation",
    "general": "minus the loss on general data",
    "neighbours": "the share of nearest neighbours that stay the original's",
}
CORPUS_PHRASES = {"train": "train's own inputs, without labels", "unlabeled": "another corpus"}


def format_adaptation_sentence(record: dict[str, Any]) -> str:
    """Whether adaptation beat no adaptation, in one sentence with both scores."""
    adapt, gain = record["adapt"], record["adapt"]["gain"]
    if gain is None or all(stage["kept"] == "original" for stage in adapt["stages"]):
        return f"{adapt['outcome']}."
    test = {row["arm"]: row["test"] for row in record["ladder"]}
    sure = f"95 % interval, {gain['seeds']} seeds" if gain["ci95"] else "no interval"
    return (
        f"{adapt['outcome']}: {gain['metric']} {test[record['own_arm']]:.3f} against "
        f"{test['source']:.3f} without it, a gain of {format_gain(gain)} ({sure})."
    )


def format_adaptation_lines(record: dict[str, Any]) -> list[str]:
    """A line an adaptation and thing worth knowing: corpus, losses, guard, leakage."""
    lines = []
    for stage in record["adapt"]["stages"]:
        lines += [_format_stage(stage), _format_stage_losses(stage), *_format_guard(stage)]
        # Without a task there is neither validation nor test.
        lines += _format_leakage(stage) if record["recipe"]["data"]["task"] else []
    if record["adapt"]["gain"] is not None:
        lines.append(
            "Adaptation was made once; its gain counts the luck of the seeds of fine-tuning and of "
            "the test items, not that of adaptation itself"
        )
    return [f"{line}." for line in lines]


def render_adaptation_card(record: dict[str, Any], place: str = ".") -> str:
    """README.md of an adapted encoder or adapter that has no task.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader loads it from.
    """
    adapter = record["adapt"]["base"] is None and _publishes_adapter(record)
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-feature-extraction"
        if _is_image_model(record)
        else "feature-extraction",
        tags=[
            "hftl",
            "domain-adaptation",
            *build_adapter_tags(record | {"adapt": None}, bool(adapter)),
        ],
        **build_origin(record | {"adapt": None}, adapter),
    )
    page = {
        "name": escape_markup(record["source"]["name"]),
        "sentence": format_adaptation_sentence(record),
        # Of a run with a task, it is the verdict on what is fine-tuned from this encoder.
        "alone": record["own_arm"] is None,
        "verdict": record["verdict"],
        "forced": record.get("forced"),
        "lines": format_adaptation_lines(record),
        "snippet": _build_encoder_snippet(record, place, adapter),
        "recipe": format_yaml_block(record["recipe"]),
        "version": record["environment"]["packages"]["hftl"],
    }
    return render_page("adapted.md", page, metadata)


def _publishes_adapter(record: dict[str, Any]) -> bool:
    """Whether what is published is an adapter on the source."""
    kept = _list_accepted_stages(record)
    return bool(kept) and all(stage["method"] == "lora" for stage in kept)


def _list_accepted_stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The adaptations that were not undone."""
    return [stage for stage in record["adapt"]["stages"] if stage["kept"] == "adapted"]


def _is_image_model(record: dict[str, Any]) -> bool:
    return record["data"].get("modality") == "image"


PLAIN_CLASSES = {"vit_mae": "ViTModel"}
"""Architectures whose `AutoModel` hides patches, and the class that shows all."""


def _build_encoder_snippet(record: dict[str, Any], place: str, adapter: bool) -> str:
    auto = PLAIN_CLASSES.get(record["source"]["architecture"], "AutoModel")
    public, revision = find_public_base(record | {"adapt": None})
    base = json.dumps(public or "the base model")
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    where = json.dumps(place)
    if adapter:
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f"base = {auto}.from_pretrained({base}{pinned})\n"
            f"model = PeftModel.from_pretrained(base, {where})"
        )
    if _list_accepted_stages(record):
        return f"from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained({where})"
    # Where every adaptation was undone the folder has no weights.
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({base}{pinned})"


def _format_stage(stage: dict[str, Any]) -> str:
    corpus = stage["corpus"]
    images = stage["objective"] == "mae"
    size = f"{corpus['documents']:,} {'pictures' if images else 'texts'}"
    if "tokens" in corpus:
        size += f" ({corpus['tokens']:,} tokens)"
    return (
        f"Adapted by {OBJECTIVE_PHRASES[stage['objective']]} on {size} of {CORPUS_PHRASES[corpus['from']]}, "
        f"training {METHOD_PHRASES[stage['method']]}, learning rate {stage['learning_rate']:g}, "
        f"{stage['steps']:,} steps"
    )


def _format_stage_losses(stage: dict[str, Any]) -> str:
    unit = "a hidden token" if stage["objective"] == "mlm" else "a pixel of a hidden patch"
    told = f"Loss {unit} on what was held out: {_format_before_after(stage['loss'])}"
    if stage["general"] is not None:
        told += f"; on general data: {_format_before_after(stage['general'])}"
    if stage["kept"] == "original":
        told += f". What it started from was kept: {stage['why']}"
    return told


def _format_guard(stage: dict[str, Any]) -> list[str]:
    guard = stage["guard"]
    if guard["kind"] == "off":
        return ["Nothing guarded what the encoder knew before"]
    return [
        f"The guard was {GUARD_PHRASES[guard['kind']]}: {guard['before']:.3f} before, "
        f"{guard['after']:.3f} after, at most {guard['tolerance']:g} "
        f"{'of it ' if stage['relative'] else ''}to be lost"
    ]


def _format_leakage(stage: dict[str, Any]) -> list[str]:
    if stage["transductive"]:
        return [
            "Transductive: inputs of validation and test, without their labels, were in the corpus"
        ]
    leaked = stage["corpus"]["leaked"]
    if leaked:
        return [
            f"{leaked:,} copies or near copies of validation and test were taken out of the corpus"
        ]
    return ["The corpus holds no copy or near copy of validation and test"]


def _format_before_after(found: dict[str, Any]) -> str:
    told = f"{found['before']:.3f} before, {found['after']:.3f} after"
    perplexity = found.get("perplexity")
    if perplexity and None not in perplexity:
        told += f" (perplexity {perplexity[0]:.1f} and {perplexity[1]:.1f})"
    return told


# What the card and the terminal say of forgetting. It formats and never computes.


FIGURE_PHRASES = {
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
CONTROL_PHRASES = {
    "same": "nearest neighbour of the same {}",
    "probe_fixed": "{} by a probe of the original",
    "probe_refitted": "{} by a probe fitted anew",
}


def has_forgetting(record: dict[str, Any]) -> bool:
    """Whether forgetting was measured on general data."""
    return bool(record["forgetting"] and record["forgetting"]["headline"])


def describe_headline(record: dict[str, Any]) -> str:
    """What of, in a few words."""
    headline = record["forgetting"]["headline"]
    if headline["control"] is None:
        return FIGURE_PHRASES[headline["figure"]]
    return CONTROL_PHRASES[headline["figure"]].format(escape_markup(headline["control"]))


def format_forgetting_sentence(record: dict[str, Any]) -> str:
    """What the own arm has forgotten, in one sentence."""
    found = record["forgetting"]
    own = found["arms"][0]
    figure, forgotten = _find_headline_figure(own, found["headline"]), own["forgotten"]
    seeds = len(forgotten["per_seed"])
    sure = f"95 % interval, {seeds} seeds" if forgotten["ci95"] else "no interval"
    words = describe_headline(record)
    told = (
        f"{words[:1].upper()}{words[1:]}: a share of {figure['before']:.3f} under the original, "
        f"{figure['after']:.3f} under this model, {format_gain(forgotten)} forgotten ({sure})"
    )
    if own["against"] and own["against"]["gone"] is not None:
        told += f", {_format_reduction(own['against'])}"
    return f"{told}."


def build_forgetting_rows(record: dict[str, Any]) -> list[list[str]]:
    """Every arm: a header, then the headline before and after, how much of it was forgotten, and
    how that compares with the same arm without retention, where there is one."""
    found = record["forgetting"]
    against = any(_format_reduction(entry["against"]) for entry in found["arms"])
    rows = [["arm", "original", "after", "forgotten", *(["against"] if against else [])]]
    for entry in found["arms"]:
        figure = _find_headline_figure(entry, found["headline"])
        told = format_gain(entry["forgotten"])
        row = [entry["arm"], f"{figure['before']:.3f}", f"{figure['after']:.3f}", told]
        rows.append([*row, _format_reduction(entry["against"])] if against else row)
    return rows


def build_figure_rows(record: dict[str, Any]) -> list[list[str]]:
    """Every figure of the own arm: a header, then what, original, after, and change."""
    own = record["forgetting"]["arms"][0]["figures"]
    rows = [["this model on general data", "original", "after", "change"]]
    for control, told in own["controls"].items():
        words = {
            name: CONTROL_PHRASES[name].format(escape_markup(control)) for name in CONTROL_PHRASES
        }
        rows += [
            _build_figure_row(words[name], told[name]) for name in CONTROL_PHRASES if told[name]
        ]
    found = [(words, own.get(name)) for name, words in FIGURE_PHRASES.items()]
    return rows + [_build_figure_row(words, figure) for words, figure in found if figure]


def format_forgetting_lines(record: dict[str, Any]) -> list[str]:
    """How it was measured."""
    found, recipe = record["forgetting"], record["recipe"]
    facts = found["general"]
    path = recipe["data"]["general"]["path"]
    name = path if "general" in record["data"]["hub_revisions"] else path.rsplit("/", 1)[-1]
    lines = [
        f"Measured on {found['rows']:,} rows of {format_code(name)} ({facts['rows_read']:,} were read), "
        "which no retention used",
        "The original is the source model as it was, before any adaptation",
    ]
    if facts["documents"]:
        lines.append(f"Rows of one {format_code(facts['documents'])} count as one unit")
    if facts["known"]:
        lines.append(f"{facts['known']:,} copies of the run's own inputs were left out")
    # Records of before they were looked for tell none.
    if facts.get("near"):
        lines.append(
            f"{facts['near']:,} rows that are nearly one of validation or test were not used"
        )
    return [f"{line}." for line in lines]


def _find_headline_figure(entry: dict[str, Any], headline: dict[str, Any]) -> dict[str, Any]:
    figures = entry["figures"]
    if headline["control"] is None:
        return figures[headline["figure"]]
    return figures["controls"][headline["control"]][headline["figure"]]


def _format_reduction(against: dict[str, Any] | None) -> str:
    if against is None or against["gone"] is None:
        return ""
    if against["gone"] < 0:
        return f"{-against['gone']:.0%} more than {against['arm']}"
    return f"{against['gone']:.0%} less than {against['arm']}"


def _build_figure_row(words: str, figure: dict[str, Any]) -> list[str]:
    change = {"value": figure["change"], "ci95": figure["ci95"]}
    # Records of before it was computed have no floor.
    floor = figure.get("floor")
    named = words if floor is None else f"{words} (rows paired by chance: up to {floor:.3f})"
    return [named, f"{figure['before']:.3f}", f"{figure['after']:.3f}", format_gain(change)]


# What kept the model near the original, in words.


def describe_retention(record: dict[str, Any]) -> list[str]:
    """Return a clause for each regularizer of the own arm; none without `retain`."""
    if record["recipe"]["retain"] is None:
        return []
    return Retain.model_validate(record["recipe"]["retain"]).describe(_own_training(record))


def _own_training(record: dict[str, Any]) -> list[dict[str, Any]]:
    """How each seed of the own arm was trained."""
    return [arm["training"] for arm in record["arms"] if arm["arm"] == record["own_arm"]]
