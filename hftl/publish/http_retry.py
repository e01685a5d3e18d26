"""Repeat requests to a hub that fails at times, within a limit and only where that is safe.

A failure that may pass by itself (no response, a broken one, 408, 429, 5xx) is retried after the
`Retry-After` of the hub, else after twice the last wait. A commit whose outcome is unknown is not
sent again: its sender must first look whether it landed.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hftl.errors import HubError, format_error_line, is_disk_full
from hftl.runtime.paths import (
    TRANSIENT_STATUSES,
    XET_ADVICE,
    advise_on_status,
    get_http_library,
    is_xet_failure,
)

RETRY_SECONDS = 120.0
"""Seconds that one push may lose to failed requests and to waiting."""
TIMEOUT_SECONDS = 30.0
"""Seconds without a byte until a request has failed."""
FIRST_WAIT = 1.0
MAX_WAIT = 16.0
MAX_CONNECTION_ATTEMPTS = 3
REFUSAL_STATUSES = (408, 429)
"""Transient statuses which say for sure that the hub did nothing."""


class UnknownOutcomeError(HubError):
    """A commit was sent, and it is unknown whether it landed."""


class UnreachableError(HubError):
    """There is no way to the hub."""


class HubResponseError(HubError):
    """The hub refused with this status."""

    def __init__(self, what: str, fix: str, status: int) -> None:
        super().__init__(what, fix)
        self.status = status


@contextmanager
def retry_requests(seconds: float | None = None) -> Iterator[None]:
    """Make every request of `huggingface_hub` within the block a retried one.

    Afterwards the library makes plain clients again; the transport of a client factory that the
    caller has set is lost, as the library has no public way to read a factory back.

    Args:
        seconds: the time that may be lost; None takes `RETRY_SECONDS`.

    Raises:
        HubError: from within, when the time is over or a response forbids another attempt.
    """
    from huggingface_hub.utils import (
        disable_progress_bars,
        get_session,
        logging,
        set_client_factory,
    )

    # The library's warnings of each retry would stand beside our own single line.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    left = RETRY_SECONDS if seconds is None else seconds
    # Xet makes its own requests and would go on for minutes.
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", f"{max(1, round(left / 2))}s")
    library: Any = get_http_library()
    plain: Any = get_session()
    # The hooks carry the library's offline mode and request ids.
    options = {"event_hooks": plain.event_hooks, "follow_redirects": plain.follow_redirects}
    retry = Retry(library, left)

    class RetryingClient(library.Client):
        """Hold the connection pool; every request goes through `retry`."""

        def send(self, request: Any, **how: Any) -> Any:
            return retry.send(super().send, request, **how)

    set_client_factory(lambda: RetryingClient(timeout=TIMEOUT_SECONDS, **options))
    try:
        yield
    finally:
        set_client_factory(lambda: library.Client(timeout=plain.timeout, **options))


class Retry:
    """Send requests until one succeeds or the time for failures is spent.

    Args:
        library: httpx or httpx2, whichever `huggingface_hub` uses.
        left: seconds that may be lost to failures, over all requests.
    """

    def __init__(self, library: Any, left: float) -> None:
        self.library = library
        self.left = left

    def send(self, send_once: Callable[..., Any], request: Any, **how: Any) -> Any:
        """Return the response to a request, which is repeated where that is safe.

        Raises:
            UnknownOutcomeError: for a commit that may have landed.
            HubError: when the time is spent.
        """
        is_commit = request.method == "POST" and "/commit/" in request.url.path
        wait = FIRST_WAIT
        for attempt in itertools.count(1):
            began = time.monotonic()
            response, trouble, error = self._try_once(lambda: send_once(request, **how), request)
            if not trouble:
                return response
            refused = response is not None and response.status_code in REFUSAL_STATUSES
            if is_commit and not refused:
                self.left -= time.monotonic() - began
                raise UnknownOutcomeError(trouble) from error
            if not self._is_repeatable(request):
                # The body was a file. `huggingface_hub` can rewind it, and asks again.
                self._spend(time.monotonic() - began, trouble, error, attempt)
                if error is None:
                    return response
                raise self.library.ReadError(trouble) from error
            retry_after = _read_retry_after(response)
            pause = wait if retry_after is None else retry_after
            self._spend(time.monotonic() - began + pause, trouble, error, attempt)
            time.sleep(pause)
            wait = min(2 * wait, MAX_WAIT)

    def _try_once(
        self, send_once: Callable[[], Any], request: Any
    ) -> tuple[Any, str, Exception | None]:
        """Return the response, what is wrong with it, and the error that came in its place."""
        try:
            response = send_once()
        except self.library.TransportError as error:
            trouble = f"the hub gave no answer to {_describe_request(request)}"
            return None, f"{trouble}: {type(error).__name__}", error
        if response.status_code in TRANSIENT_STATUSES:
            trouble = f"the hub answered {response.status_code} to {_describe_request(request)}"
            return response, trouble, None
        content_type = response.headers.get("Content-Type", "")
        is_json = content_type.startswith("application/json") and request.method != "HEAD"
        if response.is_success and is_json:
            try:
                response.json()
            except ValueError as error:
                trouble = f"the hub's answer to {_describe_request(request)} is broken"
                return response, trouble, error
        return response, "", None

    def _spend(self, seconds: float, trouble: str, error: Exception | None, attempt: int) -> None:
        """Subtract from the time left; an unreachable hub gets three attempts at most."""
        self.left -= seconds
        no_connection = isinstance(error, self.library.ConnectError)
        if no_connection and attempt >= MAX_CONNECTION_ATTEMPTS:
            raise UnreachableError(
                "the hub cannot be reached", "Check the network and HF_ENDPOINT"
            ) from error
        if self.left <= 0:
            raise HubError(f"{trouble}, and did so for too long", "Try again later") from error

    def _is_repeatable(self, request: Any) -> bool:
        """Return whether the body can be sent once more; a file that was read cannot."""
        try:
            request.content  # noqa: B018 (raises where it was not read)
        except self.library.RequestNotRead:
            return False
        return True


def _read_retry_after(response: Any) -> float | None:
    header = response.headers.get("Retry-After", "") if response is not None else ""
    return float(header) if header.isascii() and header.isdigit() else None


def _describe_request(request: Any) -> str:
    return f"{request.method} {request.url.path}"


@contextmanager
def wrap_hub_errors(action: str) -> Iterator[None]:
    """Turn the errors of `huggingface_hub` into one line of ours.

    Args:
        action: what is being done, for instance "reading org/name".

    Raises:
        HubError: with the hub's own words, where it gave any.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{action}: HF_HUB_OFFLINE=1 keeps from the hub", "Unset it"
        ) from error
    except HfHubHTTPError as error:
        raise _build_response_error(action, error) from error
    except get_http_library().TransportError as error:
        fix = _choose_fix(error, "Check the network and HF_ENDPOINT")
        raise HubError(f"{action}: no answer from the hub", fix) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if is_disk_full(error):
            raise
        # Uploads raise RuntimeError from the cause, downloads OSError where one is cut short; a
        # response of another shape raises KeyError, TypeError or ValueError.
        cause = error.__cause__
        if isinstance(cause, HubError):
            raise cause from error
        if isinstance(cause, HfHubHTTPError):
            raise _build_response_error(action, cause) from error
        fix = _choose_fix(error, "Try again, or look at the hub's status")
        raise HubError(f"{action}: {format_error_line(cause or error)}", fix) from error


def _build_response_error(action: str, error: Any) -> HubResponseError:
    status = error.response.status_code
    message = " ".join((error.server_message or "").split())
    return HubResponseError(
        f"{action}: the hub answered {status}{': ' + message if message else ''}",
        _choose_fix(error, advise_on_status(status)),
        status,
    )


def _choose_fix(error: BaseException, otherwise: str) -> str:
    return XET_ADVICE if is_xet_failure(error) else otherwise
