"""Datasets of the hub, pinned to a commit."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from hftl.data.files import Raw
from hftl.errors import HubError
from hftl.sections import Table


def load_hub(table: Table, part: str) -> Iterator[Raw]:
    """Rows of a hub dataset; class ids become their names.

    Args:
        table: `path` is the dataset's id, `name` its configuration.
        part: the split where the recipe names none.

    Raises:
        HubError: if the dataset is unknown, gated, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = table.split or part
    commit = revision(table.path, table.revision)
    try:
        dataset: Any = datasets.load_dataset(table.path, table.name, split=split, revision=commit)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise HubError(
            f"data.{part}: no file or folder {table.path!r} here, and the hub gives no dataset of "
            f"that id: {str(error).splitlines()[0]}",
            "Check the path or id, the network, and `hf auth login` for a gated one",
        ) from error
    except ValueError as error:
        raise HubError(f"data.{part}: {table.path}: {error}", "Check name and split") from error
    names = getattr(dataset.features.get(table.label), "names", None)
    for index, values in enumerate(dataset):
        if names and isinstance(values.get(table.label), int) and values[table.label] >= 0:
            values[table.label] = names[values[table.label]]
        yield Raw(values, index, f"{table.path} {split} row {index + 1}")


@cache
def revision(path: str, wanted: str | None) -> str | None:
    """The commit that a hub dataset is read at; offline, where only the cache is read, as asked.

    Raises:
        HubError: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return wanted
    try:
        return HfApi().dataset_info(path, revision=wanted).sha
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"no file or folder {path!r} here, and the hub gives no dataset of that id: "
            f"{str(error).splitlines()[0]}",
            "Check the path or id, the network, and `hf auth login` for a gated one",
        ) from error
