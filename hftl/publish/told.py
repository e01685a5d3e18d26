"""The record as it may leave this machine."""

import json
from pathlib import Path
from typing import Any

from hftl.places import PACKAGE
from hftl.record import to_json


def publishable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without places on this machine: a local path becomes its last name."""
    kept = json.loads(to_json(record))
    # What a bad row says is the user's data, and stays here; the count goes along.
    kept["data"].pop("bad_rows_listed")
    recipe = _without_paths(kept["recipe"])
    if kept["source"]["local"]:
        recipe["source"]["model"] = kept["source"]["model"] = kept["source"]["name"]
    for split in ("train", "validation", "test", "unlabeled", "general"):
        table = recipe["data"][split] or {}
        if "path" in table and split not in kept["data"]["hub_revisions"]:
            table["path"] = last_name(table["path"])
    return kept | {"recipe": recipe}


def place_of(record: dict[str, Any]) -> str:
    """What a reader loads the model from: the repository, once it was pushed."""
    return (record.get("published") or {}).get("repo_id", ".")


def last_name(place: str) -> str:
    """A package as it is, a path by its last name."""
    return place if place.startswith(PACKAGE) else Path(place).expanduser().resolve().name


def _without_paths(value: Any) -> Any:
    """Nested values in which every string that is a path has become its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return last_name(value) if path else value
