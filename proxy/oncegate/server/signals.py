"""What a process is told by signals, and what it says with its exit code."""

import asyncio
import signal

OK, NOT_ALL, CANNOT = 0, 1, 2  # exit codes: all in flight was stored or released; something was not; no start


def told_to_stop() -> tuple[asyncio.Event, asyncio.Event]:
    """Return what the first SIGTERM or SIGINT sets, and what the second sets."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return stop, hurry
