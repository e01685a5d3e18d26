"""Resolve the base model that an adapter goes on."""

from dataclasses import dataclass
from pathlib import Path

from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.publish.settings_files import AdapterConfig
from hftl.runtime import paths


@dataclass(frozen=True)
class BaseReference:
    """Say where an adapter's base is.

    `on_hub` is True where the source is a hub id even if a folder here has that name.
    """

    source: Source
    on_hub: bool = False


def resolve_base(
    folder: Path, adapter: AdapterConfig, recorded: str, is_adapted: bool, base: str | None = None,
    follow_paths: bool = True,
) -> BaseReference | None:  # fmt: skip
    """Return where the base of an adapter is; None where nothing says it.

    The first of these that applies: what the user says, the base that the adapter's own run has
    adapted, the source in that run's recipe, an installed package, what the adapter names.

    Args:
        folder: the adapter's.
        adapter: its settings.
        recorded: the source model that hftl.json names, or an empty text.
        is_adapted: whether training changed the source before the adapter was put on it.
        base: what the user says it is.
        follow_paths: False ignores a path that the adapter names, as whoever wrote it may have
            meant any file of this machine.
    """
    if base is not None:
        return BaseReference(Source(model=base))
    if is_adapted:
        if (folder.parent / "publish-base").exists():
            return BaseReference(Source(model=str(folder.parent / "publish-base")))
    else:
        own = _read_recipe_source(folder)
        # A relative path holds only where the run was made, a pinned base everywhere.
        if own is not None and (paths.is_local(own.model) or adapter.revision is None):
            return BaseReference(own)
        if _is_installed_package(recorded):
            return BaseReference(Source(model=recorded))
    return _resolve_named_base(adapter, follow_paths)


def _resolve_named_base(adapter: AdapterConfig, follow_paths: bool) -> BaseReference | None:
    """Return the base that adapter_config.json names."""
    folder = adapter.find_local_base(follow_paths)
    if folder is not None:
        return BaseReference(Source(model=str(folder)))
    if adapter.base_hub_id is None:
        return None
    return BaseReference(Source(model=adapter.base_hub_id, revision=adapter.revision), on_hub=True)


def _is_installed_package(place: str) -> bool:
    """Return whether a place is inside an installed package, and not reached from it by `..`."""
    inside = place.removeprefix(paths.PACKAGE_PREFIX)
    return place != inside and not paths.leaves_folder(inside) and paths.is_local(place)


def _read_recipe_source(folder: Path) -> Source | None:
    """Read the source in the recipe of the run that the folder is the publish folder of."""
    file = folder.parent / "recipe.yaml"
    return Recipe.load(file).source if folder.name == "publish" and file.exists() else None
