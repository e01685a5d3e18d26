"""Where a model or dataset lies: a folder or file, `package:<import name>/<path>`, or a Hub id."""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hftl import hub_errors
from hftl.errors import HubError, RecipeError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TABLE = re.compile(r".*\.(csv|tsv|jsonl?|ndjson|parquet|txt)", re.IGNORECASE)
PACKAGE = "package:"


def find(place: str, key: str) -> Path | None:
    """The local path of `place`; None where it reads as a Hub id.

    A package is found without being imported; a name that ends as tables do is no Hub id.

    Args:
        place: what the recipe says.
        key: the recipe key, for the message.

    Raises:
        RecipeError: if a package is not installed, or lacks the path.
    """
    if not place.startswith(PACKAGE):
        path = Path(os.path.expanduser(place))
        on_hub = HUB_ID.fullmatch(place) and not TABLE.fullmatch(place)
        return None if on_hub and not path.exists() else path
    name, _, inside = place.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"{key}: the package {name!r} is not installed",
            f"Install what ships it, for instance: pip install {name.replace('_', '-')}",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise RecipeError(f"{key}: the package {name!r} has no {inside!r}", "Check the path")
    return path


def at_hand(place: str) -> bool:
    """Whether it lies on this machine, from where we stand: here, or in an installed package."""
    try:
        found = find(place, "place")
    except RecipeError:
        return False
    return found is not None and found.exists()


def called(folder: Path) -> str:
    """What the user knows a folder as: the hub id where it is a copy in the Hub's cache."""
    kind, _, repo = folder.parent.parent.name.partition("--")
    if kind == "models" and repo and folder.parent.name == "snapshots":
        return repo.replace("--", "/")
    return str(folder)


@contextmanager
def fetching(place: str, kind: str, key: str = "") -> Iterator[None]:
    """Turn a hub client's errors into one of ours, see `not_given`.

    Raises:
        HubError: if the hub gives nothing.
    """
    try:
        yield
    except (OSError, ValueError, hub_errors.http().TransportError) as error:
        raise not_given(error, place, kind, key) from error


def not_given(error: Exception, place: str, kind: str, key: str = "") -> HubError:
    """Return the error that says why a hub gave nothing: it failed, was not reached, or refused.

    Args:
        error: what the hub's client raised.
        place: the id that was asked for.
        kind: what it should be of, such as `model`.
        key: how the message begins, such as `source.model: `.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    here = f"{key}no file or folder {place!r} here"
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{here} nor in the hub's cache, and HF_HUB_OFFLINE=1 keeps from the hub",
            "Check the path or id, or unset HF_HUB_OFFLINE",
        )
    said = hub_errors.hub_message(error)
    if hub_errors.is_xet_failure(error):
        return HubError(f"{key}{kind} {place!r} was not fetched: {said}", hub_errors.XET_ADVICE)
    status = hub_errors.first_status(error)
    if status is not None and hub_errors.is_away(error):
        return HubError(
            f"{key}the hub itself failed when it was asked for {place!r} ({said})",
            hub_errors.advise(status),
        )
    if hub_errors.is_away(error):
        return HubError(
            f"{here}, and the hub cannot be reached: {said}",
            "Check the path, the network and HF_ENDPOINT",
        )
    return HubError(
        f"{here}, and the hub gives no {kind} of that id: {said}",
        "Check the path or id, the network, and `hf auth login` for a gated one",
    )
