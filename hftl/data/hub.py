"""Datasets of the hub, pinned to a commit."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from hftl import hub_errors, places
from hftl.data.files import Raw
from hftl.errors import HubError
from hftl.sections.data import Data, Table

PARTS = ("train", "validation", "test", "unlabeled", "general")
"""The tables of a recipe."""


def load_hub(table: Table, part: str) -> Iterator[Raw]:
    """Rows of a hub dataset; class ids become their names, pictures stay encoded.

    Args:
        table: `path` is the dataset's id, `name` its configuration.
        part: the split where the recipe names none; of tables without labels it is train.

    Raises:
        HubError: if the dataset is unknown, gated, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = table.split or (part if part in ("train", "validation", "test") else "train")
    commit = revision(table.path, table.revision)
    key = f"data.{part}: "
    try:
        dataset: Any = datasets.load_dataset(table.path, table.name, split=split, revision=commit)
    except (DatasetNotFoundError, OSError, hub_errors.http().TransportError) as error:
        raise places.not_given(error, table.path, "dataset", key) from error
    except ValueError as error:
        why = hub_errors.message_line(error)
        raise HubError(f"{key}{table.path}: {why}", "Check name and split") from error
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    named = {c: n for c in table.labels if (n := _class_names(dataset.features.get(c)))}
    for index, values in enumerate(dataset):
        for column, names in named.items():
            values[column] = _named(values[column], names)
        yield Raw(values, index, f"{table.path} {split} row {index + 1}")


def _class_names(feature: Any) -> list[str] | None:
    """The class names of a column of ids, or of lists of ids."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _named(value: Any, names: list[str]) -> Any:
    """Ids as their names; an id of no class, as -1 for a missing label, becomes none."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


@cache
def revision(path: str, wanted: str | None) -> str | None:
    """The commit that a hub dataset is read at; offline, where only the cache is read, as asked.

    Raises:
        HubError: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return wanted
    with places.fetching(path, "dataset"):
        return HfApi().dataset_info(path, revision=wanted).sha


def revisions(data: Data) -> dict[str, str | None]:
    """The commit of every table of the hub."""
    tables = {part: getattr(data, part) for part in PARTS}
    return {
        part: revision(table.path, table.revision)
        for part, table in tables.items()
        if isinstance(table, Table) and _on_hub(table, part)
    }


def _on_hub(table: Table, split: str) -> bool:
    return table.format == "hub" or places.find(table.path, f"data.{split}.path") is None
