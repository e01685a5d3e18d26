"""Where a model or dataset lies: a folder or file, `package:<import name>/<path>`, or a Hub id."""

import importlib.util
import os
import re
from pathlib import Path

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


def not_given(error: Exception, place: str, kind: str, key: str = "") -> HubError:
    """What to tell where a hub gave nothing: its own failure, our being offline, or its answer.

    Args:
        error: what the hub's client raised.
        place: the id that was asked for.
        kind: what it should be of, such as `model`.
        key: how the message begins, such as `source.model: `.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _failed_with(error)
    if status is not None:
        return HubError(
            f"{key}the hub itself failed when it was asked for {place!r} (HTTP {status})",
            "Try again later",
        )
    here = f"{key}no file or folder {place!r} here"
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{here} nor in the hub's cache, and HF_HUB_OFFLINE=1 keeps from the hub",
            "Check the path or id, or unset HF_HUB_OFFLINE",
        )
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return HubError(
        f"{here}, and the hub gives no {kind} of that id: {said.removeprefix('Got: ')}",
        "Check the path or id, the network, and `hf auth login` for a gated one",
    )


def _failed_with(error: BaseException) -> int | None:
    """The status of a server's failure behind the error, which clients tell as another."""
    behind: BaseException | None = error
    seen: list[BaseException] = []
    while behind is not None and behind not in seen:
        status = getattr(getattr(behind, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 500:
            return status
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__
    return None
