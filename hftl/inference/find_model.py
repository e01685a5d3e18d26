"""Where a published model is found, and what to say where it does not load."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from hftl.config.data import Data, Task
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.labels import TagScheme
from hftl.errors import HftlError, RecipeError, RunFolderError
from hftl.models.source import describe_load_error, find_source, hash_source_weights
from hftl.publish import reload_check
from hftl.runtime import paths, run_folder

LOADING_ERRORS = (
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
def wrap_loading_errors(folder: Path) -> Iterator[None]:
    """What a folder's own files are to blame for, in one line.

    Raises:
        RunFolderError: if it does not load.
    """
    try:
        yield
    except HftlError:
        raise
    except LOADING_ERRORS as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        name = paths.get_display_name(folder)
        raise RunFolderError(
            f"{name} does not load: {describe_load_error(error)}",
            f"Look closer: hftl doctor {name}",
        ) from error


def find_published_folder(path: str | Path) -> Path:
    """The folder of a published model: of a run, the folder itself, or the copy of a hub's.

    Raises:
        RecipeError: if nothing is there to load.
        RunFolderError: if a run is not finished, or was changed since.
        HubError: if a hub id cannot be had.
    """
    folder = paths.resolve_local_path(str(path), "the model to load")
    if folder is None:
        return _download_model(str(path))
    folder = folder.resolve()
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {path}", "Give a run or a published folder")
    if (folder / "recipe.yaml").exists():
        if not (folder / "publish" / "hftl.json").exists():
            raise RunFolderError(f"{path} is not finished", "Run the same command again")
        run_folder.check_finished_files(folder)
        return folder / "publish"
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(f"{path} holds no run and no model", "Give a run or a published folder")
    return folder


def check_trained_head(folder: Path, name: str | Path) -> None:
    """Refuses a bare encoder, or an adapter of one: its head would be drawn at random.

    Args:
        folder: what was found.
        name: what the user called it.
    """
    adapter = folder / "adapter_config.json"
    kinds = read_json_mapping(folder / "config.json").get("architectures") or []
    if adapter.exists():
        settings = read_json_mapping(adapter)
        mapping = settings.get("auto_mapping") or {}
        made_of = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        # Without a head of its own it may go on the trained one of its base.
        trained = bool(settings.get("modules_to_save")) or str(made_of).endswith(
            tuple(reload_check.AUTO_CLASSES)
        )
    else:
        trained = any(kind.endswith(tuple(reload_check.AUTO_CLASSES)) for kind in kinds)
    if not trained and not (folder / "head.safetensors").exists():
        raise RecipeError(
            f"{name} has no trained head to predict with",
            "Give a run with a task, or a published folder of one",
        )


def _download_model(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with paths.translate_hub_errors(repo_id, "model"):
        return Path(snapshot_download(repo_id))


def read_json_mapping(path: Path) -> dict[str, Any]:
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
            f"{paths.get_display_name(path.parent)}: {path.name} is no mapping in JSON",
            f"Look closer: hftl doctor {paths.get_display_name(path.parent)}",
        ) from error


# What a published folder notes of its use, in hftl.json: checked once, as it is read.


RECORD_FILE = "hftl.json"
TextColumns = str | Annotated[list[str], Field(min_length=1, max_length=2)]
LabelColumns = str | Annotated[list[str], Field(min_length=2)]


class PublishedPart(BaseModel):
    """A part of the file: what is not of use here is passed over."""

    model_config = ConfigDict(frozen=True, strict=True)


class PublishedColumns(PublishedPart):
    """The columns of a table."""

    text: TextColumns = "text"
    image: str = "image"
    label: LabelColumns = "label"


class PublishedInputs(PublishedPart):
    """How inputs are taken."""

    train: PublishedColumns = PublishedColumns()
    max_length: int = Field(default=Data.model_fields["max_length"].default, ge=2)
    max_pixels: int = Field(default=Data.model_fields["max_pixels"].default, ge=1)


class PublishedRecipe(PublishedPart):
    """The recipe."""

    data: PublishedInputs = PublishedInputs()


class PublishedTags(PublishedPart):
    """Say how tags mark entities, see `TagScheme`."""

    name: str
    outside: str | None
    standard: dict[str, str]


class PublishedData(PublishedPart):
    """What the outputs mean."""

    task: Task
    labels: list[str] | None = None
    tag_scheme: PublishedTags | None = None
    label_type: Literal["text", "integer", "boolean"] = "text"


class PublishedBase(PublishedPart):
    """The model that an adapter goes on."""

    model: str = ""
    weights_sha256: str | None = None


class PublishedAdaptation(PublishedPart):
    """An adaptation; `base` where it changed the base itself."""

    base: PublishedBase | None = None


class PublishedMetadata(PublishedPart):
    """Everything; a folder without the file has the defaults."""

    data: PublishedData | None = None
    recipe: PublishedRecipe = PublishedRecipe()
    source: PublishedBase = PublishedBase()
    adapt: PublishedAdaptation | None = None
    metric: str | None = None

    @property
    def tag_scheme(self) -> TagScheme | None:
        """The scheme of the tags; None where there is none, or a folder does not say it."""
        tags = self.data and self.data.tag_scheme
        names = set(self.data.labels or []) if self.data else set()
        # One that lacks a tag of the model's, or knows others, is not the model's.
        if tags is None or set(tags.standard) != names:
            return None
        return TagScheme(tags.name, tags.outside, tags.standard)

    @property
    def adapted_base(self) -> PublishedBase | None:
        """The adapted base, where there is one."""
        return self.adapt.base if self.adapt is not None else None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Those of a published folder.

        Raises:
            RunFolderError: naming the key that makes no sense.
        """
        tree = read_json_mapping(folder / RECORD_FILE)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            name, (key, value) = paths.get_display_name(folder), _find_faulty_key(tree, error)
            raise RunFolderError(
                f"{name} does not load: {RECORD_FILE} says {repr(value)[:40]} for {key}",
                f"Look closer: hftl doctor {name}",
            ) from error


def _find_faulty_key(tree: Any, error: ValidationError) -> tuple[str, Any]:
    """The dotted key of the first finding, as deep as it stands in the file, and its value."""
    keys: list[str] = []
    for key in map(str, error.errors()[0]["loc"]):
        if not isinstance(tree, dict) or key not in tree:
            break
        tree = tree[key]
        keys.append(key)
    return ".".join(keys), tree


# The base that a published adapter goes on.


def find_base_folder(folder: Path, notes: PublishedMetadata, base: str | Path | None) -> Path:
    """The folder of an adapter's base, checked to have the weights it was trained on.

    Args:
        folder: the adapter.
        notes: what stands in it.
        base: what the user says it is, before all that the adapter names.

    Raises:
        RecipeError: if no base is named, or there is none.
        RunFolderError: if it has other weights.
        HubError: if a hub id cannot be had.
    """
    adapter = read_json_mapping(folder / "adapter_config.json")
    spec, adapted = notes.source.model, notes.adapted_base
    own = _read_recipe_source(folder) if adapted is None else None
    on_hub = False
    if base is not None:
        source = Source(model=str(base))
    elif adapted is not None and (folder.parent / "publish-base").exists():
        source = Source(model=str(folder.parent / "publish-base"))
    elif own is not None and (paths.is_local(own.model) or not adapter.get("revision")):
        source = own
    elif adapted is None and spec.startswith(paths.PACKAGE_PREFIX) and paths.is_local(spec):
        source = Source(model=spec)
    elif adapter.get("base_model_name_or_path"):
        source = Source(model=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
        # Only the hub has commits: a folder here of that name is not what was meant.
        on_hub = bool(source.revision) and paths.is_hub_id(source.model)
    else:
        raise RecipeError(
            f"{paths.get_display_name(folder)} does not say its base model", "Give it: --base MODEL"
        )
    found = find_source(source, on_hub)
    expected = (adapted or notes.source).weights_sha256
    if expected and hash_source_weights(found) != expected:
        raise RunFolderError(
            f"the base {source.model} has other weights than this adapter was trained on",
            "Give the right base with --base MODEL",
        )
    return found.folder


def _read_recipe_source(folder: Path) -> Source | None:
    """The source of the run that the folder is part of; its path may hold only where it ran."""
    file = folder.parent / "recipe.yaml"
    return Recipe.load(file).source if folder.name == "publish" and file.exists() else None
