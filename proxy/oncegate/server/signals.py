"""Stop signals, and the exit codes that show an init system how the process ended."""

import asyncio
import signal
from dataclasses import dataclass, field
from enum import IntEnum


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
    """Handle SIGTERM and SIGINT: the first sets `requested`, the second sets `immediate`. Needs a running loop."""
    stop = StopEvents()

    def on_signal() -> None:
        (stop.immediate if stop.requested.is_set() else stop.requested).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop
