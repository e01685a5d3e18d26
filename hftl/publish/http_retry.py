"""Requests to a hub that fails at times: repeated, but not for ever, and never where it may harm.

What may pass by itself (no answer, a broken one, 408, 429, 5xx) is asked again, after
`Retry-After` where the hub gives it, else after twice the last wait. A commit whose fate is not
known is not sent again: whoever sent it must first look whether it landed.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hftl.errors import HubError, format_error_line
from hftl.runtime.paths import (
    TRANSIENT_STATUSES,
    XET_ADVICE,
    advise_on_status,
    get_http_library,
    is_xet_failure,
)

RETRY_SECONDS = 120.0
"""Seconds that may be lost to failed requests and to waiting, in one push."""
TIMEOUT_SECONDS = 30.0
"""Seconds without a byte until a request has failed."""
FIRST_WAIT = 1.0
MAX_WAIT = 16.0
REFUSAL_STATUSES = (408, 429)
"""Those of them that say for sure that nothing was done."""


class UnknownOutcomeError(HubError):
    """A commit was sent, and it is not known whether it landed."""


class UnreachableError(HubError):
    """There is no way to the hub."""


class HubResponseError(HubError):
    """The hub has refused, with this status."""

    def __init__(self, what: str, fix: str, status: int) -> None:
        super().__init__(what, fix)
        self.status = status


@contextmanager
def retry_requests(seconds: float | None = None) -> Iterator[None]:
    """Within it every request of `huggingface_hub` is made with patience.

    Args:
        seconds: how much time may be lost; `RETRY_SECONDS` where it is not given.

    Raises:
        HubError: from within, when that time is over or an answer allows no other try.
    """
    from huggingface_hub.utils import (
        close_session,
        disable_progress_bars,
        get_session,
        logging,
    )

    # Its warnings of each retry would stand beside the one line of ours.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    close_session()
    client: Any = get_session()
    client.timeout = TIMEOUT_SECONDS
    left = RETRY_SECONDS if seconds is None else seconds
    client.send = _RetryingSender(client.send, left).send
    # Xet makes its requests by itself, and would go on for minutes.
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", f"{max(1, round(left / 2))}s")
    try:
        yield
    finally:
        close_session()


class _RetryingSender:
    """Sends requests in the place of a client's own `send`."""

    def __init__(self, send: Callable[..., Any], left: float) -> None:
        self.really = send
        self.left = left

    def send(self, request: Any, **how: Any) -> Any:
        """The answer to a request, asked again where that may help."""
        commits = request.method == "POST" and "/commit/" in request.url.path
        repeatable = _is_repeatable(request)
        wait = FIRST_WAIT
        for attempt in itertools.count(1):
            began = time.monotonic()
            answer, trouble, error = self._once(request, how)
            if not trouble:
                return answer
            refused = answer is not None and answer.status_code in REFUSAL_STATUSES
            if commits and not refused:
                self.left -= time.monotonic() - began
                raise UnknownOutcomeError(trouble) from error
            if not repeatable:
                # The library, which can rewind the file, asks again.
                self._spend(time.monotonic() - began, trouble, error, attempt)
                if error is None:
                    return answer
                # A ConnectError would make it throw this client away.
                raise get_http_library().ReadError(trouble) from error
            asked = _read_retry_after(answer)
            pause = wait if asked is None else asked
            self._spend(time.monotonic() - began + pause, trouble, error, attempt)
            time.sleep(pause)
            wait = min(2 * wait, MAX_WAIT)

    def _once(self, request: Any, how: dict[str, Any]) -> tuple[Any, str, Exception | None]:
        """One try: the answer, and what is wrong with it or came in its place."""
        try:
            answer = self.really(request, **how)
        except get_http_library().TransportError as error:
            trouble = (
                f"the hub gave no answer to {_describe_request(request)}: {type(error).__name__}"
            )
            return None, trouble, error
        if answer.status_code in TRANSIENT_STATUSES:
            return (
                answer,
                f"the hub answered {answer.status_code} to {_describe_request(request)}",
                None,
            )
        told = answer.headers.get("Content-Type", "")
        if answer.is_success and told.startswith("application/json") and request.method != "HEAD":
            try:
                answer.json()
            except ValueError as error:
                return answer, f"the hub's answer to {_describe_request(request)} is broken", error
        return answer, "", None

    def _spend(self, seconds: float, trouble: str, error: Exception | None, attempt: int) -> None:
        """Takes from the time there is; a hub that cannot be reached at all gets three tries."""
        self.left -= seconds
        if isinstance(error, get_http_library().ConnectError) and attempt >= 3:
            raise UnreachableError(
                "the hub cannot be reached", "Check the network and HF_ENDPOINT"
            ) from error
        if self.left <= 0:
            raise HubError(f"{trouble}, and did so for too long", "Try again later") from error


def _is_repeatable(request: Any) -> bool:
    """Whether the body is at hand to be sent once more; a file that was read is not."""
    try:
        request.content  # noqa: B018 (raises where it was not read)
    except get_http_library().RequestNotRead:
        return False
    return True


def _read_retry_after(answer: Any) -> float | None:
    told = answer.headers.get("Retry-After", "") if answer is not None else ""
    return float(told) if told.isascii() and told.isdigit() else None


def _describe_request(request: Any) -> str:
    return f"{request.method} {request.url.path}"


@contextmanager
def wrap_hub_errors(what: str) -> Iterator[None]:
    """Turns what the library raises into one line of ours.

    Args:
        what: what is being done, for instance "reading org/name".

    Raises:
        HubError: with the hub's own words, where it has said any.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{what}: HF_HUB_OFFLINE=1 keeps from the hub", "Unset it"
        ) from error
    except HfHubHTTPError as error:
        raise _build_response_error(what, error) from error
    except get_http_library().TransportError as error:
        raise HubError(
            f"{what}: no answer from the hub",
            _choose_fix(error, "Check the network and HF_ENDPOINT"),
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        # What uploads files wraps the cause; what reads an answer trips over its shape.
        cause = error.__cause__
        if isinstance(cause, HubError):
            raise cause from error
        if isinstance(cause, HfHubHTTPError):
            raise _build_response_error(what, cause) from error
        fix = _choose_fix(error, "Try again, or look at the hub's status")
        raise HubError(f"{what}: {format_error_line(cause or error)}", fix) from error


def _build_response_error(what: str, error: Any) -> HubResponseError:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    return HubResponseError(
        f"{what}: the hub answered {status}{': ' + said if said else ''}",
        _choose_fix(error, advise_on_status(status)),
        status,
    )


def _choose_fix(error: BaseException, otherwise: str) -> str:
    return XET_ADVICE if is_xet_failure(error) else otherwise
