"""`hftl doctor --fix`: what can be put right without guessing and without removing anything."""

import json
import shutil
from pathlib import Path
from typing import Any

from hftl.doctor.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from hftl.doctor.base import get_expected_hash, read_base_name
from hftl.doctor.checks import Examination
from hftl.doctor.companion_files import (
    CARD_FILE,
    EXTRA_TOKENIZER_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    read_base_labels,
    reads_images,
)
from hftl.doctor.shape_check import (
    PEFT_ERRORS,
    compare_shapes,
    count_outputs,
    find_named_keys,
    find_renamed_keys,
    list_expected_tensors,
    list_modules,
    list_targets,
    rename_patterns,
    shorten_targets,
)
from hftl.errors import RecipeError, format_error_line
from hftl.runtime import run_folder
from hftl.runtime.fingerprints import to_json


def fix_adapter(found: Examination, base: str | None) -> list[str]:
    """Mends the folder; a copy of every file that changes is kept beside it.

    Args:
        found: what the examination says.
        base: the `--base` of the command line.

    Returns:
        A line for each change; none where nothing can be mended.

    Raises:
        RecipeError: for a folder that is not the user's own to change.
    """
    patient = found.folder
    if patient.is_remote:
        raise RecipeError(
            f"--fix changes a folder, and {patient.place} is on a hub",
            f"Fetch it: hf download {patient.place} --local-dir FOLDER",
        )
    if patient.run is not None:
        raise RecipeError(
            f"--fix does not change {patient.folder}: its run writes it",
            "Correct the recipe and run again",
        )
    if not patient.is_adapter or not patient.adapter_config:
        return []
    kinds = {one.kind for one in found.findings}
    lines: list[str] = []
    if "stale-names" in kinds:
        lines += _rename_modules(found)
    if "names" in kinds:
        lines += _remove_adapter_name(found)
    if "base" in kinds and not kinds & {"base-shape", "base-weights"}:
        lines += _write_base_name(found, base)
    if "tokenizer" in kinds:
        lines += _copy_input_files(found)
    if "labels" in kinds:
        lines += _write_labels(found)
    return lines


def _rename_modules(found: Examination) -> list[str]:
    """New names for targets and tensors, if peft then expects exactly these tensors."""
    patient = found.folder
    names = find_renamed_keys(patient.shapes, list_modules(found.model_class, found.config))
    shapes = {names.get(key, key): shape for key, shape in patient.shapes.items()}
    settings = _find_renamed_settings(found, shapes)
    if settings is None:
        return []
    changed = _read_settings(found, ADAPTER_CONFIG) | settings
    lines = [f"target_modules: {', '.join(settings['target_modules'])}"]
    _write_settings(found, ADAPTER_CONFIG, changed)
    patient.json_files[ADAPTER_CONFIG] = changed
    if names:
        lines.append(_rename_tensors(found, names))
    return lines


def _remove_adapter_name(found: Examination) -> list[str]:
    """Rename tensors that hold the adapter's name as peft writes them, if they then all fit."""
    patient = found.folder
    try:
        expected = list_expected_tensors(found.model_class, found.config, patient.adapter_config)
    except PEFT_ERRORS:
        return []
    names = find_named_keys(patient.shapes, expected)
    shapes = {names.get(key, key): shape for key, shape in patient.shapes.items()}
    return [] if compare_shapes(shapes, expected) else [_rename_tensors(found, names)]


def _rename_tensors(found: Examination, names: dict[str, str]) -> str:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = found.folder.folder / ADAPTER_WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    _back_up_file(found, ADAPTER_WEIGHTS)
    aside = path.with_name(f".tmp-{path.name}")
    tensors = {names.get(key, key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, aside, metadata=metadata)
    aside.rename(path)
    return f"{len(names)} tensors renamed in {ADAPTER_WEIGHTS}"


def _find_renamed_settings(
    found: Examination, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """target_modules that wrap exactly the layers which the file has tensors for."""
    told = found.folder.adapter_config
    paths = list_targets(shapes)
    patterns = {
        name: rename_patterns(told[name], paths)
        for name in ("rank_pattern", "alpha_pattern")
        if isinstance(told.get(name), dict)
    }
    for targets in (shorten_targets(paths), paths):
        settings = {"target_modules": targets} | patterns
        try:
            expected = list_expected_tensors(found.model_class, found.config, told | settings)
        except PEFT_ERRORS:
            continue
        if not compare_shapes(shapes, expected):
            return settings
    return None


def _write_base_name(found: Examination, given: str | None) -> list[str]:
    """The hub id that the user gave; or the commit, where the weights are known to be the same."""
    source = found.source
    if source is None or source.is_local or source.revision is None:
        return []
    hub_id, revision = read_base_name(found.folder)
    proven = get_expected_hash(found.folder) is not None
    if not (given and hub_id is None) and not (revision is None and proven):
        return []
    pinned = {"base_model_name_or_path": source.name, "revision": source.revision}
    changed = _read_settings(found, ADAPTER_CONFIG) | pinned
    _write_settings(found, ADAPTER_CONFIG, changed)
    found.folder.json_files[ADAPTER_CONFIG] = changed
    lines = [f"base: {source.name} at {source.revision}"]
    if CARD_FILE in found.folder.files and given:
        lines += _write_base_on_card(found, source.name)
    return lines


def _write_base_on_card(found: Examination, base: str) -> list[str]:
    from huggingface_hub import ModelCard

    path = found.folder.folder / CARD_FILE
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, TypeError) as error:
        return [f"{CARD_FILE} was left alone: {format_error_line(error)}"]
    card.data.base_model = base  # pyright: ignore
    _back_up_file(found, CARD_FILE)
    run_folder.write_text(path, str(card))
    return [f"base_model: {base} in {CARD_FILE}"]


def _copy_input_files(found: Examination) -> list[str]:
    """The base's tokenizer or processor, file by file."""
    if found.source is None:
        return []
    images = reads_images(found.folder, found.source)
    wanted = PROCESSOR_FILES if images else (*TOKENIZER_FILES, *EXTRA_TOKENIZER_FILES)
    lines = []
    for name in wanted:
        path, target = found.source.folder / name, found.folder.folder / name
        if path.exists() and not target.exists():
            shutil.copyfile(path, target)
            lines.append(f"{name} taken from the base")
    return lines


def _write_labels(found: Examination) -> list[str]:
    """Names from the record, or from the base where it has as many as the head has outputs."""
    if found.source is None or found.model_class is None:
        return []
    count = count_outputs(found.folder, found.source, found.model_class)
    names = found.folder.labels or read_base_labels(found.source)
    if not names or len(names) != count:
        return []
    labels = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    known = found.source.config.to_dict() | {"architectures": [found.model_class.__name__]}
    old = (
        _read_settings(found, MODEL_CONFIG)
        if MODEL_CONFIG in found.folder.files
        else _drop_local_names(known)
    )
    _write_settings(found, MODEL_CONFIG, old | labels)
    return [f"labels written to {MODEL_CONFIG}: {', '.join(names)}"]


def _drop_local_names(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "name_or_path")}


def _read_settings(found: Examination, name: str) -> dict[str, Any]:
    return json.loads((found.folder.folder / name).read_text(encoding="utf-8"))


def _write_settings(found: Examination, name: str, told: dict[str, Any]) -> None:
    _back_up_file(found, name)
    run_folder.write_text(found.folder.folder / name, to_json(told))


def _back_up_file(found: Examination, name: str) -> None:
    """A copy of a file as it was before the first change."""
    path, kept = found.folder.folder / name, get_backup_folder(found.folder.folder) / name
    if path.exists() and not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)


def get_backup_folder(folder: Path) -> Path:
    """Where the files that were changed are kept, beside the folder."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.before-fix")
