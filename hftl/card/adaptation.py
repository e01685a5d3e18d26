"""What the card says of adaptation, and the page of an encoder that was adapted alone."""

import json
from typing import Any

from huggingface_hub import ModelCardData

from hftl.card.metadata import adapter_tags, base_of, origin
from hftl.card.page import rendered
from hftl.card.plain import fenced, inert
from hftl.measure.verdict import interval_text

OBJECTIVES = {"mlm": "masked language modelling", "mae": "masked image modelling"}
METHODS = {
    "full": "every weight of the encoder",
    "lora": "LoRA adapters in every block",
    "lora+blocks": "LoRA adapters in every block and the top blocks whole",
}
GUARDS = {
    "probe": "a linear probe's score on validation",
    "general": "minus the loss on general data",
    "neighbours": "the share of nearest neighbours that stay the original's",
}
SOURCES = {"train": "train's own inputs, without labels", "unlabeled": "another corpus"}


def adaptation_sentence(record: dict[str, Any]) -> str:
    """Whether adaptation beat no adaptation, in one sentence with both scores."""
    adapt, gain = record["adapt"], record["adapt"]["gain"]
    if gain is None or all(stage["kept"] == "original" for stage in adapt["stages"]):
        return f"{adapt['outcome']}."
    test = {row["arm"]: row["test"] for row in record["ladder"]}
    sure = f"95 % interval, {gain['seeds']} seeds" if gain["ci95"] else "no interval"
    return (
        f"{adapt['outcome']}: {gain['metric']} {test[record['own_arm']]:.3f} against "
        f"{test['source']:.3f} without it, a gain of {interval_text(gain)} ({sure})."
    )


def adaptation_lines(record: dict[str, Any]) -> list[str]:
    """A line an adaptation and thing worth knowing: corpus, losses, guard, leakage."""
    lines = []
    for stage in record["adapt"]["stages"]:
        lines += [_how(stage), _loss(stage), *_guard(stage)]
        # Without a task there is neither validation nor test.
        lines += _leakage(stage) if record["recipe"]["data"]["task"] else []
    if record["adapt"]["gain"] is not None:
        lines.append(
            "Adaptation was made once; its gain counts the luck of the seeds of fine-tuning and of "
            "the test items, not that of adaptation itself"
        )
    return [f"{line}." for line in lines]


def render_adapted(record: dict[str, Any], place: str = ".") -> str:
    """README.md of an adapted encoder or adapter that has no task.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader loads it from.
    """
    adapter = record["adapt"]["base"] is None and _adapter(record)
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-feature-extraction" if _images(record) else "feature-extraction",
        tags=["hftl", "domain-adaptation", *adapter_tags(record | {"adapt": None}, bool(adapter))],
        **origin(record | {"adapt": None}, adapter),
    )
    page = {
        "name": inert(record["source"]["name"]),
        "sentence": adaptation_sentence(record),
        # Of a run with a task, it is the verdict on what is fine-tuned from this encoder.
        "alone": record["own_arm"] is None,
        "verdict": record["verdict"],
        "forced": record.get("forced"),
        "lines": adaptation_lines(record),
        "snippet": _snippet(record, place, adapter),
        "recipe": fenced(record["recipe"]),
        "version": record["environment"]["packages"]["hftl"],
    }
    return rendered("adapted.md", page, metadata)


def _adapter(record: dict[str, Any]) -> bool:
    """Whether what is published is an adapter on the source."""
    kept = _kept(record)
    return bool(kept) and all(stage["method"] == "lora" for stage in kept)


def _kept(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The adaptations that were not undone."""
    return [stage for stage in record["adapt"]["stages"] if stage["kept"] == "adapted"]


def _images(record: dict[str, Any]) -> bool:
    return record["data"].get("modality") == "image"


PLAIN = {"vit_mae": "ViTModel"}
"""Architectures whose `AutoModel` hides patches, and the class that shows all."""


def _snippet(record: dict[str, Any], place: str, adapter: bool) -> str:
    auto = PLAIN.get(record["source"]["architecture"], "AutoModel")
    public, revision = base_of(record | {"adapt": None})
    base = json.dumps(public or "the base model")
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    where = json.dumps(place)
    if adapter:
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f"base = {auto}.from_pretrained({base}{pinned})\n"
            f"model = PeftModel.from_pretrained(base, {where})"
        )
    if _kept(record):
        return f"from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained({where})"
    # Where every adaptation was undone the folder has no weights.
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({base}{pinned})"


def _how(stage: dict[str, Any]) -> str:
    corpus = stage["corpus"]
    images = stage["objective"] == "mae"
    size = f"{corpus['documents']:,} {'pictures' if images else 'texts'}"
    if "tokens" in corpus:
        size += f" ({corpus['tokens']:,} tokens)"
    return (
        f"Adapted by {OBJECTIVES[stage['objective']]} on {size} of {SOURCES[corpus['from']]}, "
        f"training {METHODS[stage['method']]}, learning rate {stage['learning_rate']:g}, "
        f"{stage['steps']:,} steps"
    )


def _loss(stage: dict[str, Any]) -> str:
    unit = "a hidden token" if stage["objective"] == "mlm" else "a pixel of a hidden patch"
    told = f"Loss {unit} on what was held out: {_moved(stage['loss'])}"
    if stage["general"] is not None:
        told += f"; on general data: {_moved(stage['general'])}"
    if stage["kept"] == "original":
        told += f". What it started from was kept: {stage['why']}"
    return told


def _guard(stage: dict[str, Any]) -> list[str]:
    guard = stage["guard"]
    if guard["kind"] == "off":
        return ["Nothing guarded what the encoder knew before"]
    return [
        f"The guard was {GUARDS[guard['kind']]}: {guard['before']:.3f} before, "
        f"{guard['after']:.3f} after, at most {guard['tolerance']:g} "
        f"{'of it ' if stage['relative'] else ''}to be lost"
    ]


def _leakage(stage: dict[str, Any]) -> list[str]:
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


def _moved(found: dict[str, Any]) -> str:
    told = f"{found['before']:.3f} before, {found['after']:.3f} after"
    perplexity = found.get("perplexity")
    if perplexity and None not in perplexity:
        told += f" (perplexity {perplexity[0]:.1f} and {perplexity[1]:.1f})"
    return told
