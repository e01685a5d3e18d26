"""Examine files for what could run code, for values that cannot be, and for what is missing.

Only the checks of tokenizer, processor and labels look at the base, where it is at hand.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from hftl.card.validation import validate_card
from hftl.doctor.adapter_folder import (
    MAX_FILE_BYTES,
    PICKLE_SUFFIXES,
    AdapterFolder,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.adapter_tensors import count_outputs
from hftl.doctor.examination import Examination
from hftl.doctor.renamed_modules import get_module_path
from hftl.errors import format_error_line
from hftl.measure.record import PUBLISHED_FILE
from hftl.models.foreign_code import (
    brings_code,
    find_outside_shard,
    find_outside_template,
    list_imports,
    list_timm_loads,
    names_outside_file,
    walk_items,
)
from hftl.models.source import SourceModel
from hftl.models.timm_architecture import TIMM_WRAPPER
from hftl.publish.settings_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_FILE,
    MODEL_CONFIG,
    ModelConfig,
    SettingsFile,
)
from hftl.runtime.paths import leaves_folder
from hftl.runtime.run_folder import UnreadableJsonError, read_json

CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".ipynb")


def find_foreign_code_key(settings: dict[str, object]) -> str | None:
    """Return the first key of a model's config that brings code along; None if there is none."""
    return next((key for key, value in walk_items(settings) if brings_code(key, value)), None)


def check_file_types(examination: Examination) -> Iterator[Finding]:
    """Report pickles and program code."""
    names = examination.folder.files
    pickles = [n for n in names if n.lower().endswith(PICKLE_SUFFIXES)]
    code = [n for n in names if n.lower().endswith(CODE_SUFFIXES)]
    if pickles:
        secret = any(n.endswith("training_args.bin") for n in pickles)
        more = "; training_args.bin may hold the hub's token in clear" if secret else ""
        what = f"a pickle runs code when it is loaded{more}"
        fix = "Remove it; weights belong into safetensors"
        yield defect("unsafe", what, format_names(pickles), fix)
    if code:
        yield defect("unsafe", "program code beside the weights", format_names(code), "Remove it")


def check_settings(examination: Examination) -> Iterator[Finding]:
    """Report settings that make a loader run code, or read or write outside the folder."""
    for name, settings in examination.folder.json_files.items():
        if name == PUBLISHED_FILE or name.endswith(".index.json"):
            continue
        for key, value in walk_items(settings):
            if brings_code(key, value):
                what = f"{key} makes the loader run code that is not transformers' own"
                yield defect("unsafe", what, name, f"Remove {key}")
            elif names_outside_file(key, value):
                what = f"{key} names a file outside the folder: {value}"
                yield defect("unsafe", what, name, f"Remove {key}")
        template = find_outside_template(settings)
        if template is not None:
            what = f"chat_template would be written to {template}"
            yield defect("unsafe", what, name, "Rename it")


def check_adapter_settings(examination: Examination) -> Iterator[Finding]:
    """Report settings that make peft import a module, or peft or timm read a file."""
    settings = examination.folder.adapter_config.settings
    for key, what in list_imports(settings):
        fix = f"Remove {key}"
        if key == "auto_mapping":
            fix = "Set auto_mapping to null, or to a class of transformers"
        yield defect("unsafe", what, ADAPTER_CONFIG, fix)
    for key, what in list_timm_loads(examination.folder.model_config.settings):
        yield defect("unsafe", what, MODEL_CONFIG, f"Remove {key}")
    tokenizer = settings.get("tokenizer_name_or_path")
    if isinstance(tokenizer, str) and leaves_folder(tokenizer):
        what = f"tokenizer_name_or_path is {tokenizer}"
        yield defect("unsafe", what, ADAPTER_CONFIG, "Name a hub id")


def check_shard_index(examination: Examination) -> Iterator[Finding]:
    """Report an index of weights that names a file outside the folder."""
    for name, index in examination.folder.json_files.items():
        outside = find_outside_shard(index) if name.endswith(".index.json") else None
        if outside is not None:
            what = f"it names a file outside the folder: {outside}"
            yield defect("unsafe", what, name, "Save the weights again")


def check_scaling(examination: Examination) -> Iterator[Finding]:
    """Report a rank or alpha of LoRA that cannot be, or that fits no tensor of the file."""
    settings = examination.folder.adapter_config.settings
    if settings.get("peft_type") != "LORA":
        return
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        yield _build_rank_defect(f"r is {r!r}, expected a whole number above 0")
    if not _is_finite_number(alpha) or alpha == 0:
        yield _build_rank_defect(f"lora_alpha is {alpha!r}, expected a number that is not 0")
    modules = {get_module_path(key) for key in examination.folder.shapes}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(_is_finite_number, pattern.values())):
            yield _build_rank_defect(f"{name} is {pattern!r}, expected a number for each name")
            continue
        for key in pattern:
            # peft reads the name as a regular expression; its plain end is enough to look for.
            end = key.rsplit(".", 1)[-1].strip("^$()\\")
            if modules and not any(end in module for module in modules):
                what = f"{name} names {key}, which the adapter does not have"
                yield warning("rank", what, ADAPTER_CONFIG, "Remove it")


def _build_rank_defect(what: str) -> Finding:
    return defect("rank", what, ADAPTER_CONFIG, "Write what it was trained with")


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value)


def check_finite_weights(examination: Examination) -> Iterator[Finding]:
    """Report files with NaN or infinity; one tensor is in memory at a time."""
    from safetensors import SafetensorError, safe_open

    for name in examination.folder.weight_files:
        try:
            with safe_open(examination.folder.path / name, "pt") as file:
                keys = sorted(file.keys())
                bad = [key for key in keys if not bool(file.get_tensor(key).isfinite().all())]
        except (SafetensorError, OSError):
            continue  # reported when the header was read
        if bad:
            what = f"NaN or infinity in {format_names(bad)}"
            yield defect("nan", what, name, "Train again with a lower learning rate")


def check_trained(examination: Examination) -> Iterator[Finding]:
    """Report an adapter whose `lora_B` are all zero, as before training: it changes nothing."""
    from safetensors import SafetensorError, safe_open

    folder = examination.folder
    keys = [key for key in folder.shapes if ".lora_B" in key or ".lora_embedding_B" in key]
    if not folder.is_adapter or not keys:
        return
    try:
        with safe_open(folder.path / ADAPTER_WEIGHTS, "pt") as file:
            if any(bool(file.get_tensor(key).any()) for key in keys):
                return
    except (SafetensorError, OSError):
        return  # reported when the header was read
    what = f"all {len(keys)} lora_B are zero: the adapter changes nothing"
    fix = "Save it after training, with its parameters in the optimizer"
    yield defect("untrained", what, ADAPTER_WEIGHTS, fix)


# What should lie beside the weights.


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
NUMBERED_LABEL = re.compile(r"LABEL_\d+")
"""The name that transformers gives to a class without one."""
IMAGE_CLASS_SUFFIXES = ("ForImageClassification", "ForPreTraining", "ForMaskedImageModeling")


def read_base_labels(source: SourceModel) -> list[str]:
    """Return the label names of a base; empty where they are only numbered."""
    names = ModelConfig(source.config.to_dict()).label_names
    return [] if any(map(NUMBERED_LABEL.fullmatch, names)) else names


def reads_images(folder: AdapterFolder, source: SourceModel | None) -> bool:
    """Return whether the model reads images, by its base, or else by its class's name."""
    if source is not None:
        return source.architecture_spec.modality == "image"
    names = [folder.adapter_config.model_class, *folder.model_config.class_names]
    return any(str(name).endswith(IMAGE_CLASS_SUFFIXES) for name in names)


def check_input_files(examination: Examination) -> Iterator[Finding]:
    """Report a missing tokenizer or image processor."""
    folder, source = examination.folder, examination.source
    images = reads_images(folder, source)
    names = PROCESSOR_FILES if images else TOKENIZER_FILES
    if any(name in folder.files for name in names):
        return
    if folder.model_config.settings.get("model_type") == TIMM_WRAPPER:
        return  # its preprocessing is in config.json
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
        content = read_json(path)
    except (OSError, UnreadableJsonError):
        return largest
    tree = SettingsFile(content if isinstance(content, dict) else {})
    pairs: list[tuple[object, object]] = []
    pairs += SettingsFile(tree.get_mapping("model")).get_mapping("vocab").items()
    added = tree.settings.get("added_tokens")
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
    names = folder.model_config.label_names
    if not names and source is not None and len(read_base_labels(source)) == outputs:
        names = read_base_labels(source)
    if folder.model_config.get_text("problem_type") == "regression" or outputs == 1:
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
        # ModelCard checks no types: a front matter of another shape breaks inside it with TypeError
        # or AttributeError. ValueError is its own; yaml raises the others, see `validate_card`.
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
