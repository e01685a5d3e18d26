"""What the doctor finds."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl.errors import HubError, RecipeError, format_error_line
from hftl.runtime import paths

DEFECT, WARNING = "defect", "warning"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    `kind` is one of: fresh, base, base-shape, base-weights, stale-names, names, unsafe, corrupt,
    config, rank, nan, untrained, tokenizer, labels, reload, card, record. A `defect` makes the
    adapter wrong, unsafe or useless to others; a `warning` does not.
    """

    kind: str
    severity: str
    what: str
    where: str
    fix: str


def defect(kind: str, what: str, where: str, fix: str) -> Finding:
    """A finding that an adapter must not have."""
    return Finding(kind, DEFECT, what, where, fix)


def warning(kind: str, what: str, where: str, fix: str) -> Finding:
    """A finding that an adapter is better without."""
    return Finding(kind, WARNING, what, where, fix)


def format_names(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# The folder under examination: its files by name, its JSON, the headers of its weights.
#
# Nothing of it is run or unpickled, and no file outside it is opened.


ADAPTER_CONFIG, MODEL_CONFIG, RECORD_FILE = "adapter_config.json", "config.json", "hftl.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Vocabularies, which say nothing of what is examined here."""
MAX_FILE_BYTES = 20_000_000
"""Of a settings file; what is larger is none."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
"""Files that run code when they are loaded; numpy's may hold a pickle."""
FETCHED_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]
"""What is fetched of a hub's folder."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter or a whole model.

    `names` are all of its files, by their paths in it, those of a hub that were not fetched
    included; `jsons` its settings files by name; `shapes` the shape of every tensor.
    """

    place: str
    folder: Path
    run: Path | None
    is_remote: bool
    files: list[str]
    json_files: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    unlisted_reason: str | None = None
    """The files that the hub did not list, and why."""

    @property
    def is_adapter(self) -> bool:
        """Whether it goes on a base."""
        return ADAPTER_CONFIG in self.files

    @property
    def adapter_config(self) -> dict[str, Any]:
        """Of adapter_config.json; empty where it is not readable."""
        return self.json_files.get(ADAPTER_CONFIG, {})

    @property
    def model_config(self) -> dict[str, Any]:
        """Of config.json."""
        return self.json_files.get(MODEL_CONFIG, {})

    @property
    def record(self) -> dict[str, Any]:
        """What hftl has recorded."""
        return self.json_files.get(RECORD_FILE, {})

    def get_record_section(self, section: str) -> dict[str, Any]:
        """A section of what hftl has recorded; empty where there is none, or it is none."""
        told = self.record.get(section)
        return told if isinstance(told, dict) else {}

    @property
    def labels(self) -> list[str]:
        """The labels' names that hftl has recorded, in their order."""
        told = self.get_record_section("data").get("labels")
        return list(map(str, told)) if isinstance(told, list) else []

    @property
    def has_own_head(self) -> bool:
        """Whether a head of hftl's stands beside the encoder."""
        return "head.safetensors" in self.files

    @property
    def weight_files(self) -> list[str]:
        """The safetensors that its model is loaded from."""
        known = (ADAPTER_WEIGHTS,) if self.is_adapter else ("model",)
        heads = ("head.safetensors",) if self.has_own_head else ()
        return [n for n in self.files if n.startswith(known + heads) and _is_weights(n)]


def open_adapter_folder(place: str | Path) -> tuple[AdapterFolder, list[Finding]]:
    """Finds the folder, and reads what may be read of it.

    Args:
        place: a folder, a run folder, or a hub id.

    Raises:
        RecipeError: if it holds neither an adapter nor a model.
        HubError: if a hub id cannot be had.
    """
    path = paths.resolve_local_path(str(place), "the adapter to examine")
    run = unlisted = None
    if path is None:
        folder, names, unlisted = _fetch_repo(str(place))
        outside: list[Finding] = []
    else:
        folder = path
        if (folder / "recipe.yaml").exists() and (folder / "publish").is_dir():
            run, folder = folder, folder / "publish"
        elif folder.name == "publish" and (folder.parent / "recipe.yaml").exists():
            run = folder.parent
        names, outside = _list_files(folder)
    if ADAPTER_CONFIG not in names and MODEL_CONFIG not in names:
        inside = sorted(n for n in names if n.endswith(f"/{ADAPTER_CONFIG}"))
        raise RecipeError(
            f"{place} holds no adapter_config.json and no config.json",
            f"Give {folder / inside[0].rsplit('/', 1)[0]}" if inside else "Give an adapter",
        )
    jsons, broken = _read_jsons(folder, names)
    patient = AdapterFolder(str(place), folder, run, path is None, names, jsons, {}, unlisted)
    shapes, damaged = _read_shapes(patient)
    patient.shapes.update(shapes)
    return patient, [*outside, *broken, *damaged]


def _list_files(folder: Path) -> tuple[list[str], list[Finding]]:
    """All files; a link that leads out of the folder is left out and told."""
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}", "Give an adapter's folder or hub id")
    names: list[str] = []
    outside: list[Finding] = []
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*files, *folders]:
            path = Path(parent, name)
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                outside.append(defect(
                    "unsafe", "is a link that leads out of the folder", inside, "Remove it"
                ))  # fmt: skip
            elif name in files and path.is_file():
                names.append(inside)
    return sorted(names), outside


def _fetch_repo(repo_id: str) -> tuple[Path, list[str], str | None]:
    """The hub's snapshot without its pickles, the names of all its files, and why they are not all.

    A copy in the cache is examined where the hub is away, which then lists nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = _fetch_snapshot(repo_id)
    away = (HfHubHTTPError, OfflineModeIsEnabled, paths.get_http_library().TransportError)
    try:
        return folder, sorted(HfApi().list_repo_files(repo_id, revision=folder.name)), None
    except away as error:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE=1" if offline else paths.format_hub_message(error)
        return folder, sorted(names), f"files that are not in the cache, pickles among them: {why}"


def _fetch_snapshot(repo_id: str) -> Path:
    """Fetch what is examined of a hub's folder, or find the copy of a hub that is away.

    Raises:
        HubError: if there is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with paths.translate_hub_errors(repo_id, "adapter"):
            return Path(snapshot_download(repo_id, allow_patterns=FETCHED_PATTERNS))
    except HubError as error:
        if not paths.is_hub_failure(error):
            raise
        try:
            return Path(
                snapshot_download(repo_id, allow_patterns=FETCHED_PATTERNS, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            raise error from error.__cause__


def _read_jsons(folder: Path, names: list[str]) -> tuple[dict[str, Any], list[Finding]]:
    found: dict[str, Any] = {}
    broken: list[Finding] = []
    for name in names:
        if "/" in name or not name.endswith(".json") or name in VOCABULARY_FILES:
            continue
        why = _read_json(folder / name, found)
        if why:
            kind = "config" if name in (ADAPTER_CONFIG, MODEL_CONFIG) else "corrupt"
            broken.append(defect(kind, why, name, "Save it again, or fetch it again"))
    return found, broken


def _read_json(path: Path, found: dict[str, Any]) -> str | None:
    """Puts a file's mapping into `found`; returns why not, if so."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES:,} bytes"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {format_error_line(error)}"
    if not isinstance(told, dict):
        return f"is a {type(told).__name__}, expected a mapping"
    found[path.name] = told
    return None


def _read_shapes(patient: AdapterFolder) -> tuple[dict[str, tuple[int, ...]], list[Finding]]:
    """Shapes by tensor name, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    damaged: list[Finding] = []
    files = patient.weight_files
    if not any(name != "head.safetensors" for name in files):
        wanted = ADAPTER_WEIGHTS if patient.is_adapter else "model.safetensors"
        damaged.append(defect(
            "corrupt", "there are no weights in safetensors", wanted, "Save them as safetensors"
        ))  # fmt: skip
    for name in files:
        try:
            with safe_open(patient.folder / name, "pt") as file:
                if name != "head.safetensors":
                    shapes |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            damaged.append(defect(
                "corrupt", f"does not open: {format_error_line(error)}", name,
                "Save or fetch it again; it is cut short or damaged",
            ))  # fmt: skip
    return shapes, damaged


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name
