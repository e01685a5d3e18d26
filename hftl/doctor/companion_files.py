"""Examine what should lie beside the weights: tokenizer or processor, label names, the card."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hftl.card.validation import validate_card
from hftl.doctor.adapter_folder import (
    MAX_FILE_BYTES,
    AdapterFolder,
    Examination,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.adapter_tensors import count_outputs
from hftl.errors import format_error_line
from hftl.models.source import SourceModel
from hftl.publish.published_metadata import ADAPTER_CONFIG, MODEL_CONFIG

CARD_FILE = "README.md"
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
"""Python refuses to read a longer number."""
NUMBERED_LABEL = re.compile(r"LABEL_\d+")
"""The name that transformers gives to a class without one."""
IMAGE_CLASS_SUFFIXES = ("ForImageClassification", "ForPreTraining", "ForMaskedImageModeling")


def read_label_names(config: dict[str, Any]) -> list[str]:
    """Return the label names of a config in the order of their ids; empty where it has none."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(LABEL_ID.fullmatch(str(key)) for key in names):
        return []
    return [str(names[key]) for key in sorted(names, key=lambda key: int(str(key)))]


def read_base_labels(source: SourceModel) -> list[str]:
    """Return the label names of a base; empty where they are only numbered."""
    names = read_label_names(source.config.to_dict())
    return [] if any(map(NUMBERED_LABEL.fullmatch, names)) else names


def reads_images(folder: AdapterFolder, source: SourceModel | None) -> bool:
    """Return whether the model reads images, by its base, or else by its class's name."""
    if source is not None:
        return source.architecture_spec.modality == "image"
    names = [folder.adapter_config.model_class, *(folder.model_config.get("architectures") or [])]
    return any(str(name).endswith(IMAGE_CLASS_SUFFIXES) for name in names)


def check_input_files(examination: Examination) -> Iterator[Finding]:
    """Report a missing tokenizer or image processor."""
    folder, source = examination.folder, examination.source
    images = reads_images(folder, source)
    names = PROCESSOR_FILES if images else TOKENIZER_FILES
    if any(name in folder.files for name in names):
        return
    what = f"there is no {'image processor' if images else 'tokenizer'}"
    if source is None:
        yield warning("tokenizer", what, names[0], "Save the base's beside it")
    elif any((source.folder / name).exists() for name in names):
        yield warning("tokenizer", f"{what}; the base has one", names[0], "Take the base's: --fix")
    else:
        fix = "Save the one it was trained with beside it"
        yield defect("tokenizer", f"{what}, nor has the base one", names[0], fix)


def check_vocabulary(examination: Examination) -> Iterator[Finding]:
    """Compare the largest token id of the tokenizer with the rows of the embedding."""
    folder = examination.folder
    embeddings = getattr(examination.config, "vocab_size", None)
    if embeddings is None or FAST_TOKENIZER_FILE not in folder.files:
        return
    if reads_images(folder, examination.source):
        return
    token, number = find_largest_token(folder.path / FAST_TOKENIZER_FILE)
    if number >= embeddings:
        what = f"it gives {token!r} the id {number}, and the model has {embeddings} embeddings"
        fix = "Save the adapter with save_embedding_layers=True, or take the base's tokenizer"
        yield defect("tokenizer", what, FAST_TOKENIZER_FILE, fix)


def find_largest_token(path: Path) -> tuple[str, int]:
    """Return the token of the largest id in a tokenizer.json; an id of -1 without any."""
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


def check_labels(examination: Examination) -> Iterator[Finding]:
    """Report label names that are missing, too many or few, or in another order than recorded."""
    folder, source = examination.folder, examination.source
    model_class = examination.model_class
    has_task = folder.adapter_config.task_type in ("SEQ_CLS", "TOKEN_CLS") or folder.has_own_head
    if not has_task and not (
        model_class is not None and model_class.__name__.endswith("Classification")
    ):
        return
    outputs = None if source is None else count_outputs(folder, source, model_class)
    names = read_label_names(folder.model_config)
    if not names and source is not None and len(read_base_labels(source)) == outputs:
        names = read_base_labels(source)
    if folder.model_config.get("problem_type") == "regression" or outputs == 1:
        return
    recorded = folder.labels
    if outputs is not None and names and len(names) != outputs:
        what = f"{len(names)} labels are named, and the head has {outputs} outputs"
        yield defect("labels", what, MODEL_CONFIG, "Correct id2label")
    elif recorded and names and names != recorded:
        what = f"id2label says {format_names(names)}, and the record {format_names(recorded)}"
        yield defect("labels", what, MODEL_CONFIG, "Write the order it was trained with")
    elif not names or any(map(NUMBERED_LABEL.fullmatch, names)):
        why = f"they are {format_names(names)}" if names else "there is no label map"
        what = f"nobody can tell what the outputs mean: {why}"
        fix = "Write id2label and label2id into config.json"
        if recorded:
            yield defect("labels", what, MODEL_CONFIG, f"{fix}: --fix")
        else:
            yield warning("labels", what, MODEL_CONFIG, fix)


def check_card(examination: Examination) -> Iterator[Finding]:
    """Report what the card lacks or has wrong; one that the hub cannot read is a defect."""
    from huggingface_hub import ModelCard

    folder = examination.folder
    if CARD_FILE not in folder.files:
        fix = "Write one: what it is, on what base"
        yield warning("card", "there is no card", CARD_FILE, fix)
        return
    path = folder.path / CARD_FILE
    if path.stat().st_size > MAX_FILE_BYTES:
        what = f"it is larger than {MAX_FILE_BYTES:,} bytes"
        yield defect("card", what, CARD_FILE, "Write a shorter one")
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        bases = ModelCard(text).data.to_dict().get("base_model")
    except (ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        # ModelCard checks no types: a front matter of another shape breaks inside it.
        what = f"the hub cannot read it: {format_error_line(error)}"
        yield defect("card", what, CARD_FILE, "Correct the block between the two lines of ---")
        return
    name = folder.adapter_config.base_hub_id
    bases = [bases] if isinstance(bases, str) else bases
    if isinstance(bases, list) and bases and name not in (None, *bases):
        what = f"the card names the base {bases[0]}, and {ADAPTER_CONFIG} {name}"
        fix = "Name the same base in both: the one it was trained on"
        yield warning("base", what, CARD_FILE, fix)
    for problem in validate_card(text):
        what, _, fix = problem.partition("; ")
        yield warning("card", what, CARD_FILE, fix[:1].upper() + fix[1:])
