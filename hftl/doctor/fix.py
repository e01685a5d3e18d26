"""Fix an adapter's folder where that needs no guess and removes nothing (`hftl doctor --fix`)."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hftl.doctor.adapter_tensors import (
    ModelBuildError,
    compare_shapes,
    count_outputs,
    list_expected_tensors,
    list_modules,
    map_adapter_keys,
)
from hftl.doctor.examination import Examination
from hftl.doctor.file_checks import (
    EXTRA_TOKENIZER_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    read_base_labels,
    reads_images,
)
from hftl.doctor.renamed_modules import (
    find_renamed_keys,
    list_targets,
    rename_patterns,
    shorten_targets,
)
from hftl.errors import RecipeError, format_error_line
from hftl.measure.record import PUBLISHED_FILE
from hftl.publish.settings_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_FILE,
    MODEL_CONFIG,
    drop_local_names,
)
from hftl.runtime import run_folder
from hftl.runtime.run_folder import to_json


def fix_adapter(examination: Examination, base: str | None) -> list[str]:
    """Fix the folder; a copy of every file that changes is saved beside it.

    Args:
        examination: of the folder as it is.
        base: the `--base` of the command line.

    Returns:
        A line for each change; none where nothing can be fixed.

    Raises:
        RecipeError: for a folder that is not the user's own to change.
    """
    folder = examination.folder
    if folder.is_remote:
        raise RecipeError(
            f"--fix changes a folder, and {folder.place} is on a hub",
            f"Fetch it: hf download {folder.place} --local-dir FOLDER",
        )
    if folder.run is not None:
        raise RecipeError(
            f"--fix does not change {folder.path}: its run writes it",
            "Correct the recipe and run again",
        )
    if not folder.is_adapter or not folder.adapter_config.settings:
        return []
    kinds = {one.kind for one in examination.findings}
    lines: list[str] = []
    if "stale-names" in kinds:
        lines += _rename_modules(examination)
    if "names" in kinds:
        lines += _remove_adapter_name(examination)
    if "base" in kinds and not kinds & {"base-shape", "base-weights"}:
        lines += _write_base_name(examination, base)
    if "tokenizer" in kinds:
        lines += _copy_input_files(examination)
    if "labels" in kinds:
        lines += _write_labels(examination)
    return lines


def _rename_modules(examination: Examination) -> list[str]:
    """Rename targets and tensors, if peft then expects exactly these tensors."""
    folder = examination.folder
    names = find_renamed_keys(
        folder.shapes, list_modules(examination.model_class, examination.config)
    )
    shapes = {names.get(key, key): shape for key, shape in folder.shapes.items()}
    targets = _find_renamed_targets(examination, shapes)
    if targets is None:
        return []
    changed = _read_settings(examination, ADAPTER_CONFIG) | targets.to_settings()
    lines = [f"target_modules: {', '.join(targets.modules)}"]
    _write_settings(examination, ADAPTER_CONFIG, changed)
    folder.json_files[ADAPTER_CONFIG] = changed
    if names:
        lines.append(_rename_tensors(examination, names))
    return lines


def _remove_adapter_name(examination: Examination) -> list[str]:
    """Rename tensors that hold the adapter's name as peft writes them, if they then all fit."""
    folder = examination.folder
    try:
        expected = list_expected_tensors(
            examination.model_class, examination.config, folder.adapter_config.settings
        )
    except ModelBuildError:
        return []
    names = map_adapter_keys(folder.shapes, expected)
    shapes = {names.get(key, key): shape for key, shape in folder.shapes.items()}
    return [] if compare_shapes(shapes, expected) else [_rename_tensors(examination, names)]


def _rename_tensors(examination: Examination, names: dict[str, str]) -> str:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    # The record of the same values comes first. A fix that is killed before the rename leaves the
    # file whose hash is recorded; the next one then writes the record of its own.
    path = examination.folder.path / ADAPTER_WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    _back_up_file(examination, ADAPTER_WEIGHTS)
    aside = path.with_name(f"{run_folder.TEMPORARY}{path.name}")
    described = [run_folder.hash_file(file) for file in (path, aside) if file.exists()]
    tensors = {names.get(key, key): tensor for key, tensor in load_file(path).items()}
    with ExitStack() as stack:
        stack.callback(aside.unlink, missing_ok=True)
        save_file(tensors, aside, metadata=metadata)
        stack.pop_all()
    published = examination.folder.published_weights
    if published.get(ADAPTER_WEIGHTS) in described:
        changed = {**published, ADAPTER_WEIGHTS: run_folder.hash_file(aside)}
        record = _read_settings(examination, PUBLISHED_FILE) | {"weight_files": changed}
        _write_settings(examination, PUBLISHED_FILE, record)
    aside.rename(path)
    return f"{len(names)} tensors renamed in {ADAPTER_WEIGHTS}"


@dataclass(frozen=True)
class _RenamedTargets:
    """Hold the target modules under their new names, and the patterns by name of the setting."""

    modules: list[str]
    patterns: dict[str, dict[str, object]]

    def to_settings(self) -> dict[str, object]:
        return {"target_modules": self.modules, **self.patterns}


def _find_renamed_targets(
    examination: Examination, shapes: dict[str, tuple[int, ...]]
) -> _RenamedTargets | None:
    """Return targets that wrap exactly the layers that the file has tensors for."""
    old = examination.folder.adapter_config
    paths = list_targets(shapes)
    patterns = {
        name: rename_patterns(old.get_mapping(name), paths)
        for name in ("rank_pattern", "alpha_pattern")
        if isinstance(old.settings.get(name), dict)
    }
    for modules in (shorten_targets(paths), paths):
        targets = _RenamedTargets(modules, patterns)
        settings = old.settings | targets.to_settings()
        try:
            expected = list_expected_tensors(examination.model_class, examination.config, settings)
        except ModelBuildError:
            continue
        if not compare_shapes(shapes, expected):
            return targets
    return None


def _write_base_name(examination: Examination, given: str | None) -> list[str]:
    """Write the hub id that the user gave; or the commit, where the weights are recorded."""
    source = examination.source
    if source is None or source.is_local or source.revision is None:
        return []
    adapter = examination.folder.adapter_config
    # A recorded hash was compared with this base by the examination.
    is_proven = examination.folder.base_sha256 is not None
    if not (given and adapter.base_hub_id is None) and not (adapter.revision is None and is_proven):
        return []
    pinned: dict[str, object] = {
        "base_model_name_or_path": source.name, "revision": source.revision
    }  # fmt: skip
    changed = _read_settings(examination, ADAPTER_CONFIG) | pinned
    _write_settings(examination, ADAPTER_CONFIG, changed)
    examination.folder.json_files[ADAPTER_CONFIG] = changed
    lines = [f"base: {source.name} at {source.revision}"]
    if CARD_FILE in examination.folder.files and given:
        lines += _write_base_on_card(examination, source.name)
    return lines


def _write_base_on_card(examination: Examination, base: str) -> list[str]:
    from huggingface_hub import ModelCard

    path = examination.folder.path / CARD_FILE
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, TypeError) as error:
        return [f"{CARD_FILE} was left alone: {format_error_line(error)}"]
    card.data.base_model = base  # pyright: ignore
    _back_up_file(examination, CARD_FILE)
    run_folder.write_text(path, str(card))
    return [f"base_model: {base} in {CARD_FILE}"]


def _copy_input_files(examination: Examination) -> list[str]:
    """Copy the files of the base's tokenizer or processor that are missing."""
    if examination.source is None:
        return []
    images = reads_images(examination.folder, examination.source)
    names = PROCESSOR_FILES if images else (*TOKENIZER_FILES, *EXTRA_TOKENIZER_FILES)
    lines = []
    for name in names:
        path, target = examination.source.folder / name, examination.folder.path / name
        if path.exists() and not target.exists():
            run_folder.write_bytes(target, path.read_bytes())
            lines.append(f"{name} taken from the base")
    return lines


def _write_labels(examination: Examination) -> list[str]:
    """Write the recorded label names, or those of a base with as many as the head has outputs."""
    if examination.source is None or examination.model_class is None:
        return []
    count = count_outputs(examination.folder, examination.source, examination.model_class)
    names = examination.folder.labels or read_base_labels(examination.source)
    if not names or len(names) != count:
        return []
    labels: dict[str, object] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    known = examination.source.config.to_dict() | {
        "architectures": [examination.model_class.__name__]
    }
    is_there = MODEL_CONFIG in examination.folder.files
    old = _read_settings(examination, MODEL_CONFIG) if is_there else drop_local_names(known)
    _write_settings(examination, MODEL_CONFIG, old | labels)
    return [f"labels written to {MODEL_CONFIG}: {', '.join(names)}"]


def _read_settings(examination: Examination, name: str) -> dict[str, object]:
    return json.loads((examination.folder.path / name).read_text(encoding="utf-8"))


def _write_settings(examination: Examination, name: str, settings: dict[str, object]) -> None:
    _back_up_file(examination, name)
    run_folder.write_text(examination.folder.path / name, to_json(settings))


def _back_up_file(examination: Examination, name: str) -> None:
    """Copy a file as it is before its first change."""
    path = examination.folder.path / name
    copy = get_backup_folder(examination.folder.path) / name
    if path.exists() and not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        run_folder.write_bytes(copy, path.read_bytes())


def get_backup_folder(folder: Path) -> Path:
    """Return the folder, beside the fixed one, that holds the files as they were before."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.before-fix")
