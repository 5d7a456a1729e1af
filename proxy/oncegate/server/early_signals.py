"""Signals that come before a loop handles them: while modules are imported, and while the embedded store loads.

By default they would kill the process, SIGINT with a traceback, and the first process of a container would not get
them at all. This module imports as little as possible, because it runs before everything else.
"""

import signal

# The numbers of the stop signals so far, in their order.
received: list[int] = []


class StoppedEarly(Exception):
    """The process was asked to stop before it served anything."""


def catch_signals() -> None:
    """Note stop signals from now on, and let those for a reload or a replacement do nothing. Main thread only."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGHUP, signal.SIGUSR2):
        # Not SIG_IGN, which child processes would inherit.
        signal.signal(number, lambda *_: None)


def raise_if_stopped() -> None:
    """Raise StoppedEarly if the process was asked to stop."""
    if received:
        raise StoppedEarly
