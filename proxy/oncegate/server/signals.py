"""Stop signals, and the exit codes that show an init system how the process ended."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from oncegate.server import early_signals

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitCode(IntEnum):
    """The exit code of `oncegate serve`, and of each of its workers."""

    # Every request in flight was stored or released.
    OK = 0
    # At least one was not: its key may be unknown.
    CUT_OFF = 1
    CANNOT_START = 2


@dataclass(frozen=True, slots=True)
class StopEvents:
    """`requested`: drain, then exit. `immediate`: end the drain now, and cut off what is still in flight."""

    requested: asyncio.Event = field(default_factory=asyncio.Event)
    immediate: asyncio.Event = field(default_factory=asyncio.Event)


def stop_events() -> StopEvents:
    """Handle SIGTERM and SIGINT: the first sets `requested`, the second sets `immediate`. Needs a running loop.

    Those that came before count.
    """
    stop = StopEvents()

    def on_signal() -> None:
        (stop.immediate if stop.requested.is_set() else stop.requested).set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    for _ in early_signals.received:
        on_signal()
    return stop


@contextlib.contextmanager
def stops_blocked() -> Iterator[None]:
    """Block the stop signals in this context. A child that is started in it has them blocked from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_stops() -> None:
    """Take the stop signals that came while they were blocked, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def block_signals(*others: int) -> None:
    """Block the signals that a loop handled, at the end of its work. `others` are those beside the usual ones.

    A closed loop has no signal handlers. A signal between there and the exit would kill the process, as if requests had
    been cut off.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR2, *others))
