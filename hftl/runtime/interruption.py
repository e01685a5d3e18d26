"""Put signals off while a training takes steps, so that it can write a checkpoint first.

SIGTERM is what schedulers send before they take a machine away, or SIGUSR1 as a notice of it, which
counts as SIGTERM; Ctrl-C sends SIGINT.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 20.0
"""Seconds in which a training that was asked to end can finish its step and write a checkpoint;
launchers and schedulers kill after 30."""


NOTICES = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of a machine that will be taken away."""


def exit_on_notices() -> None:
    """Let this program end by a notice as by an exit, which releases files and locks on the way."""
    for number in NOTICES:
        signal.signal(number, _exit_on_signal)


def ignore_notices() -> None:
    """Let this program, which ends by itself now, end undisturbed."""
    for number in NOTICES:
        signal.signal(number, signal.SIG_IGN)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(128 + signal.SIGTERM)


class SignalFlag:
    """Hold the first signal that asked this process to end."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 where none came."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; a second Ctrl-C ends the process at once."""
        del frame
        if self.number and number == signal.SIGINT:
            raise_interruption(number)
        if not self.number:
            self.number = signal.SIGTERM if number in NOTICES else number
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def expire(self, number: int, frame: FrameType | None) -> None:
        """End the process where its grace is over, in an evaluation that takes minutes."""
        del number, frame
        raise_interruption(self.number)


@contextmanager
def defer_signals() -> Iterator[SignalFlag]:
    """Yield a flag that takes notices and SIGINT while the block runs, which then must end itself.

    Signals reach the main thread alone: in another one the flag stays 0. A handler of SIGUSR1 that
    is a program's own stays.
    """
    flag = SignalFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    handlers = {signal.SIGALRM: flag.expire}
    for number in (signal.SIGTERM, signal.SIGINT):
        # A worker ignores Ctrl-C, which its parent answers.
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = flag.receive
    if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, _exit_on_signal):
        handlers[signal.SIGUSR1] = flag.receive
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield flag
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def raise_interruption(number: int) -> NoReturn:
    """End as the signal ends a program: with KeyboardInterrupt, or an exit code of 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
