"""Read the folder that is examined: its files by name, its JSON, the headers of its weights.

Nothing of it is run or unpickled, and no file outside it is opened. This module imports no torch:
whether the folder may be loaded is known in a tenth of the time that the checks take to import.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from hftl.errors import HubError, RecipeError, format_error_line
from hftl.measure.record import PUBLISHED_FILE
from hftl.models.weight_files import read_file_shapes
from hftl.publish.settings_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HEAD_WEIGHTS,
    MODEL_CONFIG,
    AdapterConfig,
    ModelConfig,
    SettingsFile,
)
from hftl.runtime import paths
from hftl.runtime.run_folder import UnreadableJsonError, read_json

DEFECT, WARNING = "defect", "warning"


@dataclass(frozen=True)
class Finding:
    """Describe one thing that is wrong.

    `kind` is a word for the reader of the table, such as fresh, base or nan. A `defect` makes the
    adapter wrong, unsafe or useless to others; a `warning` does not.
    """

    kind: str
    severity: str
    what: str
    where: str
    fix: str


def defect(kind: str, what: str, where: str, fix: str) -> Finding:
    """Build a finding that an adapter must not have."""
    return Finding(kind, DEFECT, what, where, fix)


def warning(kind: str, what: str, where: str, fix: str) -> Finding:
    """Build a finding that an adapter is better without."""
    return Finding(kind, WARNING, what, where, fix)


def format_names(names: list[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


BLOCKING_KINDS = ("corrupt", "config", "rank", "nan")
"""After a finding of one of these a load would tell nothing more."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Large JSON files that are not settings."""
MAX_FILE_BYTES = 20_000_000
"""A larger settings file or card is not read."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
"""Files that run code when they are loaded; numpy's may hold a pickle."""
FETCHED_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]
"""Files of a hub's repository that are fetched."""


@dataclass(frozen=True)
class AdapterFolder:
    """Hold what was read of an adapter or a whole model."""

    place: str
    """As the user called it."""
    path: Path
    run: Path | None
    """The run folder whose publish folder it is."""
    is_remote: bool
    files: list[str]
    """All files by their paths in the folder, with those of a hub that were not fetched."""
    json_files: dict[str, dict[str, object]]
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by its name."""
    unlisted_reason: str | None = None
    """Why files of the hub are not listed."""
    faults: list[Finding] = field(default_factory=list)
    """Findings on single files."""

    @property
    def is_adapter(self) -> bool:
        """Return whether it goes on a base."""
        return ADAPTER_CONFIG in self.files

    @property
    def may_load(self) -> bool:
        """Return whether no fault of a file forbids a load."""
        return not any(one.kind in BLOCKING_KINDS for one in self.faults)

    @property
    def adapter_config(self) -> AdapterConfig:
        """Return the settings of adapter_config.json; none where it is not readable."""
        return AdapterConfig(self.json_files.get(ADAPTER_CONFIG, {}))

    @property
    def model_config(self) -> ModelConfig:
        """Return the settings of config.json; none where it is not readable."""
        return ModelConfig(self.json_files.get(MODEL_CONFIG, {}))

    @property
    def labels(self) -> list[str]:
        """Return the names of the labels that hftl has recorded, in their order."""
        return self._get_record_section("data").get_names("labels")

    @property
    def recorded_source(self) -> str:
        """Return the source model that hftl has recorded, or an empty text."""
        return str(self._get_record_section("source").settings.get("model", ""))

    @property
    def has_adapted_base(self) -> bool:
        """Return whether hftl has recorded that adaptation changed the base."""
        return bool(self._get_record_section("adapt").settings.get("base"))

    @property
    def base_sha256(self) -> str | None:
        """Return the hash of the weights that it was trained on, where hftl has recorded it."""
        adapted = self._get_record_section("adapt").settings.get("base")
        source = self._get_record_section("source").settings
        digest = (adapted if isinstance(adapted, dict) else source).get("weights_sha256")
        return None if digest is None else str(digest)

    @property
    def published_weights(self) -> dict[str, object]:
        """Return the sha256 of each file of tensors, where hftl has recorded it."""
        return SettingsFile(self.json_files.get(PUBLISHED_FILE, {})).get_mapping("weight_files")

    @property
    def has_own_head(self) -> bool:
        """Return whether a head of hftl's lies beside the encoder."""
        return HEAD_WEIGHTS in self.files

    @property
    def weight_files(self) -> list[str]:
        """Return the safetensors that its model is loaded from."""
        starts = (ADAPTER_WEIGHTS,) if self.is_adapter else ("model",)
        starts += (HEAD_WEIGHTS,) if self.has_own_head else ()
        return [n for n in self.files if n.startswith(starts) and _is_weights(n)]

    def _get_record_section(self, name: str) -> SettingsFile:
        """Return a section of hftl.json, which may be damaged."""
        record = SettingsFile(self.json_files.get(PUBLISHED_FILE, {}))
        return SettingsFile(record.get_mapping(name))


def open_adapter_folder(place: str | Path) -> AdapterFolder:
    """Find the folder, and read what may be read of it.

    Args:
        place: a folder, a run folder, or a hub id.

    Raises:
        RecipeError: if it holds neither an adapter nor a model.
        HubError: if a hub id cannot be had.
    """
    path = paths.resolve_published_path(str(place), "the adapter to examine")
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
    json_files, broken = _read_json_files(folder, names)
    opened = AdapterFolder(str(place), folder, run, path is None, names, json_files, {}, unlisted)
    shapes, damaged = _read_shapes(opened)
    opened.shapes.update(shapes)
    opened.faults.extend([*outside, *broken, *damaged])
    return opened


def _list_files(folder: Path) -> tuple[list[str], list[Finding]]:
    """Return all files, and a finding for each link that leads out of the folder."""
    if not folder.is_dir():
        raise RecipeError(
            paths.describe_no_folder(folder), "Give an adapter's folder, or a hub id owner/name"
        )
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
    """Return the hub's snapshot without its pickles, all file names, and why some are missing.

    Where the hub is away, a copy in the cache is examined, and no other file is listed.
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


def _read_json_files(
    folder: Path, names: list[str]
) -> tuple[dict[str, dict[str, object]], list[Finding]]:
    """Return the mappings of the settings files by name, and findings on unreadable ones."""
    json_files: dict[str, dict[str, object]] = {}
    broken: list[Finding] = []
    for name in names:
        if "/" in name or not name.endswith(".json") or name in VOCABULARY_FILES:
            continue
        content = _read_mapping(folder / name)
        if isinstance(content, dict):
            json_files[name] = content
            continue
        kind = "config" if name in (ADAPTER_CONFIG, MODEL_CONFIG) else "corrupt"
        broken.append(defect(kind, content, name, "Save it again, or fetch it again"))
    return json_files, broken


def _read_mapping(path: Path) -> dict[str, object] | str:
    """Return a file's mapping, or why there is none."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES:,} bytes"
    try:
        content = read_json(path)
    except UnreadableJsonError as error:
        return f"is no JSON: {format_error_line(error)}"
    if not isinstance(content, dict):
        return f"is a {type(content).__name__}, expected a mapping"
    return content


def _read_shapes(opened: AdapterFolder) -> tuple[dict[str, tuple[int, ...]], list[Finding]]:
    """Return the shapes of all tensors, from the headers alone, and findings on damaged files."""
    from safetensors import SafetensorError

    shapes: dict[str, tuple[int, ...]] = {}
    damaged: list[Finding] = []
    if not any(name != HEAD_WEIGHTS for name in opened.weight_files):
        name = ADAPTER_WEIGHTS if opened.is_adapter else "model.safetensors"
        what = "there are no weights in safetensors"
        damaged.append(defect("corrupt", what, name, "Save them as safetensors"))
    for name in opened.weight_files:
        try:
            read = read_file_shapes(opened.path / name)
        except (SafetensorError, OSError) as error:
            what = f"does not open: {format_error_line(error)}"
            fix = "Save or fetch it again; it is cut short or damaged"
            damaged.append(defect("corrupt", what, name, fix))
            continue
        shapes |= read if name != HEAD_WEIGHTS else {}
    return shapes, damaged


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name
