"""The card of an adapter."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hftl.card.validation import card_problems
from hftl.doctor.adapter_folder import (
    ADAPTER,
    CONFIG,
    MOST_BYTES,
    Finding,
    Patient,
    defect,
    several,
    warning,
)
from hftl.doctor.base import named
from hftl.errors import message_line
from hftl.models.source import SourceModel

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


# What should stand beside the weights: tokenizer or processor, the labels' names, the card.


TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "merges.txt")  # fmt: skip
VOCABULARY = "tokenizer.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
NUMBER = re.compile(r"[0-9]{1,18}")
"""Of a label; Python refuses to read a longer one."""
UNNAMED = re.compile(r"LABEL_\d+")
FOR_IMAGES = ("ForImageClassification", "ForPreTraining", "ForMaskedImageModeling")


def company(
    patient: Patient, source: SourceModel | None, kind: Any, outputs: int | None,
    embeddings: int | None,
) -> list[Finding]:  # fmt: skip
    """Looks for each of them.

    Args:
        patient: the adapter or model.
        source: its base, if it is at hand.
        kind: its class, if it is known.
        outputs: how many its head has, if it is known.
        embeddings: how many tokens the model has embeddings for, if that is known.
    """
    return [
        *_inputs(patient, source),
        *_vocabulary(patient, source, embeddings),
        *_labels(patient, source, kind, outputs),
    ]


def label_names(config: dict[str, Any]) -> list[str]:
    """The labels' names of a config in the order of their ids; empty where it has none."""
    told = config.get("id2label")
    if not isinstance(told, dict) or not all(NUMBER.fullmatch(str(key)) for key in told):
        return []
    return [str(told[key]) for key in sorted(told, key=lambda key: int(str(key)))]


def named_by(source: SourceModel) -> list[str]:
    """The labels that a base has names for; empty where they are only numbered."""
    names = label_names(source.config.to_dict())
    return [] if any(map(UNNAMED.fullmatch, names)) else names


def reads_images(patient: Patient, source: SourceModel | None) -> bool:
    """Whether the model reads pictures, by its base, or else by its class's name."""
    if source is not None:
        return source.anatomy.modality == "image"
    mapping = patient.settings.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    names = [name, *(patient.config.get("architectures") or [])]
    return any(str(name).endswith(FOR_IMAGES) for name in names)


def _inputs(patient: Patient, source: SourceModel | None) -> Iterator[Finding]:
    images = reads_images(patient, source)
    wanted = PROCESSOR if images else TOKENIZER
    if any(name in patient.names for name in wanted):
        return
    what = "image processor" if images else "tokenizer"
    if source is None:
        yield warning("tokenizer", f"there is no {what}", wanted[0], "Save the base's beside it")
    elif any((source.folder / name).exists() for name in wanted):
        yield warning("tokenizer", f"there is no {what}; the base has one", wanted[0],
                      "Take the base's: --fix")  # fmt: skip
    else:
        yield defect("tokenizer", f"there is no {what}, nor has the base one", wanted[0],
                     "Save the one it was trained with beside it")  # fmt: skip


def _vocabulary(
    patient: Patient, source: SourceModel | None, embeddings: int | None
) -> Iterator[Finding]:
    """Compare the largest token id of the tokenizer with the rows of the embedding."""
    if embeddings is None or reads_images(patient, source) or VOCABULARY not in patient.names:
        return
    token, number = largest_token(patient.folder / VOCABULARY)
    if number >= embeddings:
        yield defect(
            "tokenizer", f"it gives {token!r} the id {number}, and the model has {embeddings} "
            "embeddings", VOCABULARY, "Save the adapter with save_embedding_layers=True, or take "
            "the base's tokenizer",
        )  # fmt: skip


def largest_token(path: Path) -> tuple[str, int]:
    """Return the token of the largest id in a tokenizer.json; an id of -1 where it tells none."""
    largest = ("", -1)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return largest
    model = tree.get("model") if isinstance(tree, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    added = tree.get("added_tokens") if isinstance(tree, dict) else None
    for one in added if isinstance(added, list) else []:
        if isinstance(one, dict):
            pairs.append((one.get("content"), one.get("id")))
    for token, number in pairs:
        if isinstance(number, int) and number > largest[1]:
            largest = (str(token), number)
    return largest


def _labels(
    patient: Patient, source: SourceModel | None, kind: Any, outputs: int | None
) -> Iterator[Finding]:
    task = patient.settings.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") or patient.pooled
    if not task and not (kind is not None and kind.__name__.endswith("Classification")):
        return
    recorded = patient.labels
    names = label_names(patient.config)
    if not names and source is not None and len(named_by(source)) == outputs:
        names = named_by(source)
    if patient.config.get("problem_type") == "regression" or outputs == 1:
        return
    if outputs is not None and names and len(names) != outputs:
        yield defect("labels", f"{len(names)} labels are named, and the head has {outputs} outputs",
                     CONFIG, "Correct id2label")  # fmt: skip
    elif recorded and names and names != recorded:
        what = f"id2label says {several(names)}, and the record {several(recorded)}"
        yield defect("labels", what, CONFIG, "Write the order it was trained with")
    elif not names or any(map(UNNAMED.fullmatch, names)):
        told = f"they are {several(names)}" if names else "there is no label map"
        fix = "Write id2label and label2id into config.json"
        what = f"nobody can tell what the outputs mean: {told}"
        if recorded:
            yield defect("labels", what, CONFIG, f"{fix}: --fix")
        else:
            yield warning("labels", what, CONFIG, fix)
