"""The base that a published adapter goes on."""

from pathlib import Path

from hftl import places
from hftl.errors import RecipeError, RunFolderError
from hftl.model.source import find_source, weights_sha256
from hftl.recipe import Recipe
from hftl.sections.source import Source
from hftl.use.locate import read_json
from hftl.use.notes import Notes


def base_folder(folder: Path, notes: Notes, base: str | Path | None) -> Path:
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
    adapter = read_json(folder / "adapter_config.json")
    spec, adapted = notes.source.model, notes.adapted
    own = _recipe_source(folder) if adapted is None else None
    on_hub = False
    if base is not None:
        source = Source(model=str(base))
    elif adapted is not None and (folder.parent / "publish-base").exists():
        source = Source(model=str(folder.parent / "publish-base"))
    elif own is not None and (places.at_hand(own.model) or not adapter.get("revision")):
        source = own
    elif adapted is None and spec.startswith(places.PACKAGE) and places.at_hand(spec):
        source = Source(model=spec)
    elif adapter.get("base_model_name_or_path"):
        source = Source(model=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
        # Only the hub has commits: a folder here of that name is not what was meant.
        on_hub = bool(source.revision and places.HUB_ID.fullmatch(source.model))
    else:
        raise RecipeError(
            f"{places.called(folder)} does not say its base model", "Give it: --base MODEL"
        )
    found = find_source(source, on_hub)
    expected = (adapted or notes.source).weights_sha256
    if expected and weights_sha256(found) != expected:
        raise RunFolderError(
            f"the base {source.model} has other weights than this adapter was trained on",
            "Give the right base with --base MODEL",
        )
    return found.folder


def _recipe_source(folder: Path) -> Source | None:
    """The source of the run that the folder is part of; its path may hold only where it ran."""
    file = folder.parent / "recipe.yaml"
    return Recipe.load(file).source if folder.name == "publish" and file.exists() else None
