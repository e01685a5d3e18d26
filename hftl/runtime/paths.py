"""Failures of a hub, and of other libraries, as one line and the advice that fits them."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftl.errors import HubError, RecipeError, format_error_line

TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that another try may better."""
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


def advise_on_status(status: int) -> str:
    """Return what to do after a hub's answer; only what may pass by itself is to be tried again."""
    if status in STATUS_ADVICE:
        return STATUS_ADVICE[status]
    if status in TRANSIENT_STATUSES or status > 504:
        return "Try again later"
    return "The same again is refused again: correct what the hub names"


def format_hub_message(error: BaseException) -> str:
    """Return what a hub said, `HTTP 404: Repository not found`; without an answer its error."""
    for cause in iterate_causes(error):
        status = get_http_status(cause)
        if status is not None:
            said = " ".join((getattr(cause, "server_message", None) or "").split())
            return f"HTTP {status}: {said}" if said else f"HTTP {status}"
    return format_error_line(error).removeprefix("Got: ")


def get_http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries; None where there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def find_http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of the first behind it that carries one."""
    return next(filter(None, map(get_http_status, iterate_causes(error))), None)


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what stands behind it: clients raise other errors of a server's."""
    behind: BaseException | None = error
    seen: list[BaseException] = []
    while behind is not None and behind not in seen:
        yield behind
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__


def is_unreachable(error: BaseException) -> bool:
    """Tell whether no answer came at all."""
    return any(
        isinstance(cause, get_http_library().TransportError) for cause in iterate_causes(error)
    )


def is_hub_failure(error: BaseException) -> bool:
    """Tell whether the hub is the reason, and not what it was asked for."""
    status = find_http_status(error)
    return (
        is_unreachable(error) if status is None else status >= 500 or status in TRANSIENT_STATUSES
    )


def is_xet_failure(error: BaseException) -> bool:
    """Tell whether a transfer by Xet failed, which HF_HUB_DISABLE_XET=1 would do without.

    hf_xet raises plain RuntimeErrors, so the functions that were running have to tell.
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

    return sys.modules[type(get_session()).__module__.partition(".")[0]]


# Where a model or dataset lies: a folder or file, `package:<import name>/<path>`, or a Hub id.


HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TABLE_PATTERN = re.compile(r".*\.(csv|tsv|jsonl?|ndjson|parquet|txt)", re.IGNORECASE)
PACKAGE_PREFIX = "package:"


def resolve_local_path(place: str, key: str) -> Path | None:
    """The local path of `place`; None where it reads as a Hub id.

    A package is found without being imported; a name that ends as tables do is no Hub id.

    Args:
        place: what the recipe says.
        key: the recipe key, for the message.

    Raises:
        RecipeError: if a package is not installed, or lacks the path.
    """
    if not place.startswith(PACKAGE_PREFIX):
        path = Path(os.path.expanduser(place))
        on_hub = HUB_ID_PATTERN.fullmatch(place) and not TABLE_PATTERN.fullmatch(place)
        return None if on_hub and not path.exists() else path
    name, _, inside = place.removeprefix(PACKAGE_PREFIX).partition("/")
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


def is_local(place: str) -> bool:
    """Whether it lies on this machine, from where we stand: here, or in an installed package."""
    try:
        found = resolve_local_path(place, "place")
    except RecipeError:
        return False
    return found is not None and found.exists()


def get_display_name(folder: Path) -> str:
    """What the user knows a folder as: the hub id where it is a copy in the Hub's cache."""
    kind, _, repo = folder.parent.parent.name.partition("--")
    if kind == "models" and repo and folder.parent.name == "snapshots":
        return repo.replace("--", "/")
    return str(folder)


@contextmanager
def translate_hub_errors(place: str, kind: str, key: str = "") -> Iterator[None]:
    """Turn a hub client's errors into one of ours, see `make_hub_load_error`.

    Raises:
        HubError: if the hub gives nothing.
    """
    try:
        yield
    except (OSError, ValueError, get_http_library().TransportError) as error:
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
    said = format_hub_message(error)
    if is_xet_failure(error):
        return HubError(f"{key}{kind} {place!r} was not fetched: {said}", XET_ADVICE)
    status = find_http_status(error)
    if status is not None and is_hub_failure(error):
        return HubError(
            f"{key}the hub itself failed when it was asked for {place!r} ({said})",
            advise_on_status(status),
        )
    if is_hub_failure(error):
        return HubError(
            f"{here}, and the hub cannot be reached: {said}",
            "Check the path, the network and HF_ENDPOINT",
        )
    return HubError(
        f"{here}, and the hub gives no {kind} of that id: {said}",
        "Check the path or id, the network, and `hf auth login` for a gated one",
    )
