"""Find a published model and the base of its adapter, and say why one does not load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hftl.errors import HftlError, RecipeError, RunFolderError, is_out_of_memory, rename_key
from hftl.measure.record import PUBLISHED_FILE
from hftl.models.foreign_code import find_foreign_setting
from hftl.models.source import describe_load_error, find_source, hash_source_weights
from hftl.publish import reload_check
from hftl.publish.base_reference import resolve_base
from hftl.publish.published_metadata import PublishedMetadata, find_changed_weights
from hftl.publish.settings_files import (
    ADAPTER_CONFIG,
    HEAD_WEIGHTS,
    MODEL_CONFIG,
    AdapterConfig,
    ModelConfig,
)
from hftl.runtime import finished_files, paths


@contextmanager
def wrap_loading_errors(folder: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn the errors of a call that reads a folder's own files into one line.

    Args:
        folder: that is read.
        kinds: of exception that the call raises on files of anybody's. Nothing but the call belongs
            into the body: an error in code of ours is a bug, and no fault of the folder.

    Raises:
        RunFolderError: if it does not load.
    """
    try:
        yield
    except HftlError:
        raise
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise build_loading_error(folder, describe_load_error(error)) from error


def build_loading_error(folder: Path, why: str) -> RunFolderError:
    """Build the error for a published folder whose files make no sense."""
    name = paths.get_display_name(folder)
    return RunFolderError(f"{name} does not load: {why}", f"Look closer: hftl doctor {name}")


def find_published_folder(path: str | Path) -> Path:
    """Return the folder of a published model: a run's, the folder itself, or a hub's copy.

    Raises:
        RecipeError: if nothing is there to load.
        RunFolderError: if a run is not finished, either was changed since, or its settings name
            foreign code.
        HubError: if a hub id cannot be had.
    """
    folder = paths.resolve_published_path(str(path), "the model to load")
    if folder is None:
        folder = _download_model(str(path))
        _refuse_foreign_settings(folder)
        _check_published_weights(folder)
        return folder
    folder = folder.resolve()
    if not folder.is_dir():
        raise RecipeError(
            paths.describe_no_folder(path), "Give a run, a published folder, or a hub id owner/name"
        )
    if (folder / "recipe.yaml").exists():
        if not (folder / "publish" / PUBLISHED_FILE).exists():
            raise RunFolderError(f"{path} is not finished", "Run the same command again")
        finished_files.check_finished_files(folder)
        _refuse_foreign_settings(folder / "publish")
        return folder / "publish"
    if not any((folder / name).exists() for name in (MODEL_CONFIG, ADAPTER_CONFIG)):
        raise RecipeError(f"{path} holds no run and no model", "Give a run or a published folder")
    _refuse_foreign_settings(folder)
    _check_published_weights(folder)
    return folder


def _refuse_foreign_settings(folder: Path) -> None:
    """Refuse settings by which a library would run foreign code, or read a file elsewhere.

    Raises:
        RunFolderError: naming the file and the key.
    """
    why = find_foreign_setting(folder)
    if why is not None:
        raise build_loading_error(folder, why)


def _check_published_weights(folder: Path) -> None:
    """Compare the tensors of a folder that no run vouches for with those that were published.

    Raises:
        RunFolderError: naming the file, its hash as published and as it is.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    changed = find_changed_weights(folder, names, PublishedMetadata.read(folder).weight_files or {})
    if changed is not None:
        file, how = changed
        raise RunFolderError(
            f"{paths.get_display_name(folder)}: {file} {how}",
            f"Fetch or copy the folder again; if the change is meant, remove {PUBLISHED_FILE}, "
            "which describes other weights",
        )


def check_trained_head(folder: Path, name: str | Path) -> None:
    """Refuse a bare encoder or an adapter of one, whose head would be drawn at random.

    Args:
        folder: the published folder.
        name: what the user called it.

    Raises:
        RecipeError: if the folder has no trained head.
    """
    suffixes = tuple(reload_check.AUTO_CLASSES)
    if (folder / ADAPTER_CONFIG).exists():
        adapter = AdapterConfig.read(folder)
        # An adapter that saves no head may go on the trained one of its base.
        trained = bool(adapter.modules_to_save) or str(adapter.model_class).endswith(suffixes)
    else:
        trained = any(name.endswith(suffixes) for name in ModelConfig.read(folder).class_names)
    if not trained and not (folder / HEAD_WEIGHTS).exists():
        raise RecipeError(
            f"{name} has no trained head to predict with",
            "Give a run with a task, or a published folder of one",
        )


def _download_model(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with paths.translate_hub_errors(repo_id, "model"):
        return Path(snapshot_download(repo_id))


def find_base_folder(folder: Path, metadata: PublishedMetadata, base: str | Path | None) -> Path:
    """Return the folder of an adapter's base, which has the weights that it was trained on.

    Args:
        folder: the adapter's.
        metadata: what its hftl.json says.
        base: what the user says it is, which comes before all that the adapter names.

    Raises:
        RecipeError: if no base is named, or there is none.
        RunFolderError: if it has other weights.
        HubError: if the hub does not give it.
    """
    adapted = metadata.adapted_base
    adapter = AdapterConfig.read(folder)
    reference = resolve_base(
        folder, adapter, metadata.source.model, adapted is not None,
        None if base is None else str(base),
    )  # fmt: skip
    if reference is None:
        called, name = paths.get_display_name(folder), adapter.base_name
        why = f"names the base {name}, which is not here" if name else "does not say its base model"
        raise RecipeError(f"{called} {why}", "Give it: --base MODEL")
    try:
        source = find_source(reference.source, reference.on_hub)
    except HftlError as error:
        if base is None:
            raise
        raise rename_key(error, "source.model:", "--base:") from error
    expected = (adapted or metadata.source).weights_sha256
    if expected and hash_source_weights(source) != expected:
        raise RunFolderError(
            f"the base {reference.source.model} has other weights than this adapter was trained on",
            "Give the right base with --base MODEL",
        )
    return source.folder


def find_adapter_base(folder: Path, base: str | Path | None) -> Path | None:
    """Return the folder of an adapter's base; None for a whole model."""
    if not (folder / ADAPTER_CONFIG).exists():
        return None
    return find_base_folder(folder, PublishedMetadata.read(folder), base).resolve()
