"""Tell local paths from hub ids, and say why a hub gave nothing.

A model or dataset is a folder or file, `package:<import name>/<path>`, or a hub id.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hftl.config.section import is_hub_id
from hftl.errors import HubError, RecipeError, format_error_line, is_disk_full

TABLE_FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".txt": "txt",
}  # fmt: skip
"""The format that the suffix of a table's file implies."""
PACKAGE_PREFIX = "package:"
ADDRESS = re.compile(r"(https?|ftp|file|hf|s3|gs):/")
"""Begins an address; of two slashes a path keeps one."""
HUB_ADDRESS = re.compile(
    r"(?:hf:/+|https?:/+(?:huggingface\.co|hf\.co)/+)(?:(?:models|datasets|spaces)/)?"
    r"([^/@?#]+(?:/[^/@?#]+)?)"
)
"""An address of the hub, up to the id of a repository or, of one without an owner, a page in it."""
HUB_PAGES = ("tree", "blob", "resolve", "raw", "discussions", "commits")
"""What follows the id of a repository in addresses."""
ASSETS_FOLDER = "assets"
"""Where benchmarks/assets.py builds the data and models of the recipes, each in its own folder."""
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which another try may succeed."""
STATUS_ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN",
    402: "Look at the plan and the storage of the account",
    403: "Use a token that may do this: https://huggingface.co/settings/tokens",
    404: "Check the name, and that the token may see it",
    405: "This hub does not offer it: check HF_ENDPOINT",
    413: "It is more than this hub takes: look at its limits",
    501: "This hub does not offer it: check HF_ENDPOINT",
    507: "Look at the plan and the storage of the account",
}
XET_ADVICE = "The transfer by Xet failed: set HF_HUB_DISABLE_XET=1 to do without it"


def resolve_local_path(place: str, key: str) -> Path | None:
    """Return the local path of `place`; None where it reads as a hub id.

    A package is located without being imported; a name with a table's suffix is no hub id.

    Args:
        place: the path, package or hub id.
        key: the recipe key, for the message.

    Raises:
        RecipeError: if a package is not installed, or lacks the path.
    """
    _check_place(place, key)
    if not place.startswith(PACKAGE_PREFIX):
        path = Path(os.path.expanduser(place))
        on_hub = is_hub_id(place) and path.suffix.lower() not in TABLE_FORMATS
        return None if on_hub and not path.exists() else path
    name, _, inside = place.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name:
        raise RecipeError(f"{key}: {place} names no package", "Write package:NAME/FOLDER")
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


def _check_place(place: str, key: str) -> None:
    """Refuse what is neither a path nor a hub id."""
    if not place or "\0" in place:
        what = "holds a NUL" if place else "is empty"
        raise RecipeError(f"{key}: its name {what}", "Give a path or a hub id")
    if ADDRESS.match(place) and not Path(place).exists():
        name = _find_hub_id(place)
        fix = "Download it, and give its path" if name is None else f"Give the hub id alone: {name}"
        raise RecipeError(f"{key}: {place} is an address, not a path or a hub id", fix)


def _find_hub_id(address: str) -> str | None:
    """Return the hub id in the address of a repository, or of a page or file in it."""
    match = HUB_ADDRESS.match(address)
    if match is None:
        return None
    owner, _, name = match[1].partition("/")
    place = owner if name in HUB_PAGES else match[1]
    return place if is_hub_id(place) else None


def describe_no_folder(path: str | Path, kind: str = "folder") -> str:
    """Return the words for a path that is no folder, or none of a kind: nothing, or a file."""
    return f"{path} is no folder" if Path(path).exists() else f"there is no {kind} {path}"


def resolve_published_path(place: str, key: str) -> Path | None:
    """Return the local path of a run or published model; None where it reads as `owner/name`.

    A name alone is a folder's: every published model has an owner. See `resolve_local_path`.
    """
    path = resolve_local_path(place, key)
    return Path(place) if path is None and "/" not in place else path


def explain_missing_path(place: str) -> tuple[str, str]:
    """Return where a path was looked for, and what to do: a demo's data and models are built."""
    path = Path(os.path.expanduser(place))
    where = "does not exist" if path.is_absolute() else f"does not exist in {Path.cwd()}"
    if path.parts[:1] == (ASSETS_FOLDER,) and len(path.parts) > 1:
        name = path.parts[1].split("-")[0]
        return where, f"In the clone of hftl: python benchmarks/assets.py {name}"
    return where, "Check the path"


def is_local(place: str) -> bool:
    """Return whether a place is on this machine: a path, or in an installed package."""
    try:
        path = resolve_local_path(place, "place")
    except RecipeError:
        return False
    return path is not None and path.exists()


def is_written_as_path(place: str) -> bool:
    """Return whether a name can only be a local path, by how it begins."""
    return place.startswith(("/", "~", "./", "../"))


def leaves_folder(place: str) -> bool:
    """Return whether a path, on any system, may point outside the folder that names it."""
    path = PurePosixPath(place.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or place[:1] == "~" or place[1:2] == ":"


def get_display_name(folder: Path) -> str:
    """Return a folder's path, or the hub id where it is a copy in the hub's cache."""
    kind, _, repo = folder.parent.parent.name.partition("--")
    if kind == "models" and repo and folder.parent.name == "snapshots":
        return repo.replace("--", "/")
    return str(folder)


def advise_on_status(status: int) -> str:
    """Return what to do after a hub's answer; only what may pass by itself is to be tried again."""
    if status in STATUS_ADVICE:
        return STATUS_ADVICE[status]
    if status in TRANSIENT_STATUSES or status > 504:
        return "Try again later"
    return "The same again is refused again: correct what the hub names"


def format_hub_message(error: BaseException) -> str:
    """Return a hub's answer, `HTTP 404: Repository not found`; without one, the error."""
    for cause in iterate_causes(error):
        status = get_http_status(cause)
        if status is not None:
            message = " ".join((getattr(cause, "server_message", None) or "").split())
            return f"HTTP {status}: {message}" if message else f"HTTP {status}"
    return format_error_line(error).removeprefix("Got: ")


def get_http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries; None where there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def find_http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of the first behind it that carries one."""
    return next(filter(None, map(get_http_status, iterate_causes(error))), None)


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: clients raise their own errors from a server's."""
    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


def is_unreachable(error: BaseException) -> bool:
    """Return whether no answer came at all."""
    return any(
        isinstance(cause, get_http_library().TransportError) for cause in iterate_causes(error)
    )


def is_hub_failure(error: BaseException) -> bool:
    """Return whether the hub itself failed, and not the request."""
    status = find_http_status(error)
    return (
        is_unreachable(error) if status is None else status >= 500 or status in TRANSIENT_STATUSES
    )


def is_xet_failure(error: BaseException) -> bool:
    """Return whether a transfer by Xet failed, which HF_HUB_DISABLE_XET=1 avoids.

    hf_xet raises plain RuntimeErrors, so it is recognised by the functions that were running.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return False
    return any("xet" in name for cause in iterate_causes(error) for name in _hub_functions(cause))


def _hub_functions(error: BaseException) -> Iterator[str]:
    """Yield the names of the hub client's functions that an error passed through."""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith(("huggingface_hub", "hf_xet")):
            yield f"{module}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next


def get_http_library() -> Any:
    """Return the library that `huggingface_hub` makes its requests with: httpx, or httpx2."""
    from huggingface_hub.utils import get_session

    # The client may be a subclass, see publish/http_retry.py.
    client = next(kind for kind in type(get_session()).__mro__ if kind.__name__ == "Client")
    return sys.modules[client.__module__.partition(".")[0]]


@contextmanager
def translate_hub_errors(place: str, kind: str, key: str = "") -> Iterator[None]:
    """Turn the hub client's errors in the block into a HubError, see `make_hub_load_error`.

    Raises:
        HubError: if the hub gives nothing.
    """
    try:
        yield
    except (OSError, ValueError, get_http_library().TransportError) as error:
        # OSError: a refusal, no copy in the cache, or a download that is cut short. ValueError:
        # what cannot be an id, or a response that is no JSON.
        if is_disk_full(error):
            raise
        raise make_hub_load_error(error, place, kind, key) from error


def make_hub_load_error(error: Exception, place: str, kind: str, key: str = "") -> HubError:
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
    answer = format_hub_message(error)
    if is_xet_failure(error):
        return HubError(f"{key}{kind} {place!r} was not fetched: {answer}", XET_ADVICE)
    status = find_http_status(error)
    if status is not None and is_hub_failure(error):
        return HubError(
            f"{key}the hub itself failed when it was asked for {place!r} ({answer})",
            advise_on_status(status),
        )
    if is_hub_failure(error):
        return HubError(
            f"{here}; it may be a hub id, but the hub cannot be reached: {answer}",
            "Check the path; for a hub id the network and HF_ENDPOINT",
        )
    return HubError(
        f"{here}, and the hub gives no {kind} of that id: {answer}",
        "Check the path or id, the network, and `hf auth login` for a gated one",
    )
