"""The card of an adapter."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hftl.card.validation import validate_card
from hftl.doctor.adapter_folder import (
    ADAPTER_CONFIG,
    MAX_FILE_BYTES,
    MODEL_CONFIG,
    AdapterFolder,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.base import read_base_name
from hftl.errors import format_error_line
from hftl.models.source import SourceModel

CARD_FILE = "README.md"


def check_card(patient: AdapterFolder) -> Iterator[Finding]:
    """What is missing from the card or wrong in it; one that the hub cannot read is a defect."""
    from huggingface_hub import ModelCard

    if CARD_FILE not in patient.files:
        yield warning("card", "there is no card", CARD_FILE, "Write one: what it is, on what base")
        return
    path = patient.folder / CARD_FILE
    if path.stat().st_size > MAX_FILE_BYTES:
        yield defect(
            "card", f"it is larger than {MAX_FILE_BYTES:,} bytes", CARD_FILE, "Write a shorter one"
        )
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        bases = ModelCard(text).data.to_dict().get("base_model")
    except (ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        what = f"the hub cannot read it: {format_error_line(error)}"
        yield defect("card", what, CARD_FILE, "Correct the block between the two lines of ---")
        return
    name, _ = read_base_name(patient)
    bases = [bases] if isinstance(bases, str) else bases
    if isinstance(bases, list) and bases and name not in (None, *bases):
        yield warning(
            "base", f"the card names the base {bases[0]}, and {ADAPTER_CONFIG} {name}", CARD_FILE,
            "Name the same base in both: the one it was trained on",
        )  # fmt: skip
    for problem in validate_card(text):
        what, _, fix = problem.partition("; ")
        yield warning("card", what, CARD_FILE, fix[:1].upper() + fix[1:])


# What should stand beside the weights: tokenizer or processor, the labels' names, the card.


TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
)
EXTRA_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "merges.txt")  # fmt: skip
FAST_TOKENIZER_FILE = "tokenizer.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
LABEL_ID = re.compile(r"[0-9]{1,18}")
"""Of a label; Python refuses to read a longer one."""
NUMBERED_LABEL = re.compile(r"LABEL_\d+")
IMAGE_CLASS_SUFFIXES = ("ForImageClassification", "ForPreTraining", "ForMaskedImageModeling")


def check_companion_files(
    patient: AdapterFolder, source: SourceModel | None, kind: Any, outputs: int | None,
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
        *_check_input_files(patient, source),
        *_check_vocabulary(patient, source, embeddings),
        *_check_labels(patient, source, kind, outputs),
    ]


def read_label_names(config: dict[str, Any]) -> list[str]:
    """The labels' names of a config in the order of their ids; empty where it has none."""
    told = config.get("id2label")
    if not isinstance(told, dict) or not all(LABEL_ID.fullmatch(str(key)) for key in told):
        return []
    return [str(told[key]) for key in sorted(told, key=lambda key: int(str(key)))]


def read_base_labels(source: SourceModel) -> list[str]:
    """The labels that a base has names for; empty where they are only numbered."""
    names = read_label_names(source.config.to_dict())
    return [] if any(map(NUMBERED_LABEL.fullmatch, names)) else names


def reads_images(patient: AdapterFolder, source: SourceModel | None) -> bool:
    """Whether the model reads pictures, by its base, or else by its class's name."""
    if source is not None:
        return source.architecture_spec.modality == "image"
    mapping = patient.adapter_config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    names = [name, *(patient.model_config.get("architectures") or [])]
    return any(str(name).endswith(IMAGE_CLASS_SUFFIXES) for name in names)


def _check_input_files(patient: AdapterFolder, source: SourceModel | None) -> Iterator[Finding]:
    images = reads_images(patient, source)
    wanted = PROCESSOR_FILES if images else TOKENIZER_FILES
    if any(name in patient.files for name in wanted):
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


def _check_vocabulary(
    patient: AdapterFolder, source: SourceModel | None, embeddings: int | None
) -> Iterator[Finding]:
    """Compare the largest token id of the tokenizer with the rows of the embedding."""
    if (
        embeddings is None
        or reads_images(patient, source)
        or FAST_TOKENIZER_FILE not in patient.files
    ):
        return
    token, number = find_largest_token(patient.folder / FAST_TOKENIZER_FILE)
    if number >= embeddings:
        yield defect(
            "tokenizer",
            f"it gives {token!r} the id {number}, and the model has {embeddings} embeddings",
            FAST_TOKENIZER_FILE,
            "Save the adapter with save_embedding_layers=True, or take the base's tokenizer",
        )


def find_largest_token(path: Path) -> tuple[str, int]:
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


def _check_labels(
    patient: AdapterFolder, source: SourceModel | None, kind: Any, outputs: int | None
) -> Iterator[Finding]:
    task = (
        patient.adapter_config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") or patient.has_own_head
    )
    if not task and not (kind is not None and kind.__name__.endswith("Classification")):
        return
    recorded = patient.labels
    names = read_label_names(patient.model_config)
    if not names and source is not None and len(read_base_labels(source)) == outputs:
        names = read_base_labels(source)
    if patient.model_config.get("problem_type") == "regression" or outputs == 1:
        return
    if outputs is not None and names and len(names) != outputs:
        yield defect("labels", f"{len(names)} labels are named, and the head has {outputs} outputs",
                     MODEL_CONFIG, "Correct id2label")  # fmt: skip
    elif recorded and names and names != recorded:
        what = f"id2label says {format_names(names)}, and the record {format_names(recorded)}"
        yield defect("labels", what, MODEL_CONFIG, "Write the order it was trained with")
    elif not names or any(map(NUMBERED_LABEL.fullmatch, names)):
        told = f"they are {format_names(names)}" if names else "there is no label map"
        fix = "Write id2label and label2id into config.json"
        what = f"nobody can tell what the outputs mean: {told}"
        if recorded:
            yield defect("labels", what, MODEL_CONFIG, f"{fix}: --fix")
        else:
            yield warning("labels", what, MODEL_CONFIG, fix)
