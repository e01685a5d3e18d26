"""`hftl doctor --fix`: what can be put right without guessing and without removing anything."""

import json
import shutil
from pathlib import Path
from typing import Any

from hftl.doctor.adapter_folder import ADAPTER, CONFIG, WEIGHTS
from hftl.doctor.base import expected_hash, named
from hftl.doctor.checks import Examination
from hftl.doctor.companion_files import (
    BESIDE_TOKENIZER,
    CARD,
    PROCESSOR,
    TOKENIZER,
    named_by,
    reads_images,
)
from hftl.doctor.shape_check import (
    CANNOT,
    compare_shapes,
    expected_tensors,
    keys_with_adapter_name,
    modules_in,
    outputs_of,
    renamed_keys,
    renamed_patterns,
    short_targets,
    targets_of,
)
from hftl.errors import RecipeError, message_line
from hftl.runtime import run_folder
from hftl.runtime.fingerprints import to_json


def mend(found: Examination, base: str | None) -> list[str]:
    """Mends the folder; a copy of every file that changes is kept beside it.

    Args:
        found: what the examination says.
        base: the `--base` of the command line.

    Returns:
        A line for each change; none where nothing can be mended.

    Raises:
        RecipeError: for a folder that is not the user's own to change.
    """
    patient = found.patient
    if patient.remote:
        raise RecipeError(
            f"--fix changes a folder, and {patient.place} is on a hub",
            f"Fetch it: hf download {patient.place} --local-dir FOLDER",
        )
    if patient.run is not None:
        raise RecipeError(
            f"--fix does not change {patient.folder}: its run writes it",
            "Correct the recipe and run again",
        )
    if not patient.is_adapter or not patient.settings:
        return []
    kinds = {one.kind for one in found.findings}
    lines: list[str] = []
    if "stale-names" in kinds:
        lines += _rename(found)
    if "names" in kinds:
        lines += _remove_adapter_name(found)
    if "base" in kinds and not kinds & {"base-shape", "base-weights"}:
        lines += _name_base(found, base)
    if "tokenizer" in kinds:
        lines += _take_inputs(found)
    if "labels" in kinds:
        lines += _write_labels(found)
    return lines


def _rename(found: Examination) -> list[str]:
    """New names for targets and tensors, if peft then expects exactly these tensors."""
    patient = found.patient
    names = renamed_keys(patient.shapes, modules_in(found.kind, found.config))
    shapes = {names.get(key, key): shape for key, shape in patient.shapes.items()}
    settings = _renamed_settings(found, shapes)
    if settings is None:
        return []
    changed = _read(found, ADAPTER) | settings
    lines = [f"target_modules: {', '.join(settings['target_modules'])}"]
    _write(found, ADAPTER, changed)
    patient.jsons[ADAPTER] = changed
    if names:
        lines.append(_rename_tensors(found, names))
    return lines


def _remove_adapter_name(found: Examination) -> list[str]:
    """Rename tensors that hold the adapter's name as peft writes them, if they then all fit."""
    patient = found.patient
    try:
        expected = expected_tensors(found.kind, found.config, patient.settings)
    except CANNOT:
        return []
    names = keys_with_adapter_name(patient.shapes, expected)
    shapes = {names.get(key, key): shape for key, shape in patient.shapes.items()}
    return [] if compare_shapes(shapes, expected) else [_rename_tensors(found, names)]


def _rename_tensors(found: Examination, names: dict[str, str]) -> str:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = found.patient.folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    _keep(found, WEIGHTS)
    aside = path.with_name(f".tmp-{path.name}")
    tensors = {names.get(key, key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, aside, metadata=metadata)
    aside.rename(path)
    return f"{len(names)} tensors renamed in {WEIGHTS}"


def _renamed_settings(
    found: Examination, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """target_modules that wrap exactly the layers which the file has tensors for."""
    told = found.patient.settings
    paths = targets_of(shapes)
    patterns = {
        name: renamed_patterns(told[name], paths)
        for name in ("rank_pattern", "alpha_pattern")
        if isinstance(told.get(name), dict)
    }
    for targets in (short_targets(paths), paths):
        settings = {"target_modules": targets} | patterns
        try:
            expected = expected_tensors(found.kind, found.config, told | settings)
        except CANNOT:
            continue
        if not compare_shapes(shapes, expected):
            return settings
    return None


def _name_base(found: Examination, given: str | None) -> list[str]:
    """The hub id that the user gave; or the commit, where the weights are known to be the same."""
    source = found.source
    if source is None or source.local or source.revision is None:
        return []
    hub_id, revision = named(found.patient)
    proven = expected_hash(found.patient) is not None
    if not (given and hub_id is None) and not (revision is None and proven):
        return []
    pinned = {"base_model_name_or_path": source.spec, "revision": source.revision}
    changed = _read(found, ADAPTER) | pinned
    _write(found, ADAPTER, changed)
    found.patient.jsons[ADAPTER] = changed
    lines = [f"base: {source.spec} at {source.revision}"]
    if CARD in found.patient.names and given:
        lines += _name_base_on_card(found, source.spec)
    return lines


def _name_base_on_card(found: Examination, base: str) -> list[str]:
    from huggingface_hub import ModelCard

    path = found.patient.folder / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, TypeError) as error:
        return [f"{CARD} was left alone: {message_line(error)}"]
    card.data.base_model = base  # pyright: ignore
    _keep(found, CARD)
    run_folder.write_text(path, str(card))
    return [f"base_model: {base} in {CARD}"]


def _take_inputs(found: Examination) -> list[str]:
    """The base's tokenizer or processor, file by file."""
    if found.source is None:
        return []
    images = reads_images(found.patient, found.source)
    wanted = PROCESSOR if images else (*TOKENIZER, *BESIDE_TOKENIZER)
    lines = []
    for name in wanted:
        path, target = found.source.folder / name, found.patient.folder / name
        if path.exists() and not target.exists():
            shutil.copyfile(path, target)
            lines.append(f"{name} taken from the base")
    return lines


def _write_labels(found: Examination) -> list[str]:
    """Names from the record, or from the base where it has as many as the head has outputs."""
    if found.source is None or found.kind is None:
        return []
    count = outputs_of(found.patient, found.source, found.kind)
    names = found.patient.labels or named_by(found.source)
    if not names or len(names) != count:
        return []
    labels = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    known = found.source.config.to_dict() | {"architectures": [found.kind.__name__]}
    old = _read(found, CONFIG) if CONFIG in found.patient.names else _without_place(known)
    _write(found, CONFIG, old | labels)
    return [f"labels written to {CONFIG}: {', '.join(names)}"]


def _without_place(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "name_or_path")}


def _read(found: Examination, name: str) -> dict[str, Any]:
    return json.loads((found.patient.folder / name).read_text(encoding="utf-8"))


def _write(found: Examination, name: str, told: dict[str, Any]) -> None:
    _keep(found, name)
    run_folder.write_text(found.patient.folder / name, to_json(told))


def _keep(found: Examination, name: str) -> None:
    """A copy of a file as it was before the first change."""
    path, kept = found.patient.folder / name, backup(found.patient.folder) / name
    if path.exists() and not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)


def backup(folder: Path) -> Path:
    """Where the files that were changed are kept, beside the folder."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.before-fix")
