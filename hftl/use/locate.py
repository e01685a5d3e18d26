"""Where a published model is found, and what to say where it does not load."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from hftl import places, rundir
from hftl.errors import HftlError, RecipeError, RunFolderError
from hftl.model.source import loading_fault
from hftl.publish import reload

DAMAGE = (
    SafetensorError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)
"""What transformers, peft and safetensors raise on files that are cut short or fit no model."""


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """What a folder's own files are to blame for, in one line.

    Raises:
        RunFolderError: if it does not load.
    """
    try:
        yield
    except HftlError:
        raise
    except DAMAGE as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        name = places.called(folder)
        raise RunFolderError(
            f"{name} does not load: {loading_fault(error)}", f"Look closer: hftl doctor {name}"
        ) from error


def published_folder(path: str | Path) -> Path:
    """The folder of a published model: of a run, the folder itself, or the copy of a hub's.

    Raises:
        RecipeError: if nothing is there to load.
        RunFolderError: if a run is not finished, or was changed since.
        HubError: if a hub id cannot be had.
    """
    folder = places.find(str(path), "the model to load")
    if folder is None:
        return _download(str(path))
    folder = folder.resolve()
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {path}", "Give a run or a published folder")
    if (folder / "recipe.yaml").exists():
        if not (folder / "publish" / "hftl.json").exists():
            raise RunFolderError(f"{path} is not finished", "Run the same command again")
        rundir.check_finished(folder)
        return folder / "publish"
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(f"{path} holds no run and no model", "Give a run or a published folder")
    return folder


def need_head(folder: Path, name: str | Path) -> None:
    """Refuses a bare encoder, or an adapter of one: its head would be drawn at random.

    Args:
        folder: what was found.
        name: what the user called it.
    """
    adapter = folder / "adapter_config.json"
    kinds = read_json(folder / "config.json").get("architectures") or []
    if adapter.exists():
        settings = read_json(adapter)
        mapping = settings.get("auto_mapping") or {}
        made_of = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        # Without a head of its own it may go on the trained one of its base.
        trained = bool(settings.get("modules_to_save")) or str(made_of).endswith(tuple(reload.AUTO))
    else:
        trained = any(kind.endswith(tuple(reload.AUTO)) for kind in kinds)
    if not trained and not (folder / "head.safetensors").exists():
        raise RecipeError(
            f"{name} has no trained head to predict with",
            "Give a run with a task, or a published folder of one",
        )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with places.fetching(repo_id, "model"):
        return Path(snapshot_download(repo_id))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; an empty one where there is no file.

    Raises:
        RunFolderError: if the file holds none.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunFolderError(
            f"{places.called(path.parent)}: {path.name} is no mapping in JSON",
            f"Look closer: hftl doctor {places.called(path.parent)}",
        ) from error
