"""Failures of a hub, and of other libraries, as one line and the advice that fits them."""

import sys
from collections.abc import Iterator
from typing import Any

from hftl.errors import message_line

PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that another try may better."""
ADVICE = {
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


def advise(status: int) -> str:
    """Return what to do after a hub's answer; only what may pass by itself is to be tried again."""
    if status in ADVICE:
        return ADVICE[status]
    if status in PASSING or status > 504:
        return "Try again later"
    return "The same again is refused again: correct what the hub names"


def hub_message(error: BaseException) -> str:
    """Return what a hub said, `HTTP 404: Repository not found`; without an answer its error."""
    for cause in causes(error):
        status = status_of(cause)
        if status is not None:
            said = " ".join((getattr(cause, "server_message", None) or "").split())
            return f"HTTP {status}: {said}" if said else f"HTTP {status}"
    return message_line(error).removeprefix("Got: ")


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries; None where there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def first_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of the first behind it that carries one."""
    return next(filter(None, map(status_of, causes(error))), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what stands behind it: clients raise other errors of a server's."""
    behind: BaseException | None = error
    seen: list[BaseException] = []
    while behind is not None and behind not in seen:
        yield behind
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__


def is_unreachable(error: BaseException) -> bool:
    """Tell whether no answer came at all."""
    return any(isinstance(cause, http().TransportError) for cause in causes(error))


def is_away(error: BaseException) -> bool:
    """Tell whether the hub is the reason, and not what it was asked for."""
    status = first_status(error)
    return is_unreachable(error) if status is None else status >= 500 or status in PASSING


def is_xet_failure(error: BaseException) -> bool:
    """Tell whether a transfer by Xet failed, which HF_HUB_DISABLE_XET=1 would do without.

    hf_xet raises plain RuntimeErrors, so the functions that were running have to tell.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return False
    return any("xet" in name for cause in causes(error) for name in _hub_functions(cause))


def _hub_functions(error: BaseException) -> Iterator[str]:
    """Yield the names of the hub client's functions that an error passed through."""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith(("huggingface_hub", "hf_xet")):
            yield f"{module}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next


def http() -> Any:
    """Return the library that `huggingface_hub` makes its requests with: httpx, or httpx2."""
    from huggingface_hub.utils import get_session

    return sys.modules[type(get_session()).__module__.partition(".")[0]]
