"""What would hold up a process in the midst of its work, done before its work begins."""

import contextlib
import fcntl
import gc
import os
import resource
from typing import Any

from oncegate.settings.settings import Settings

LAST_STANDARD = 2  # stderr
SPARE_FILES = 128  # for the store, listeners, logs and spools


def occupy() -> None:
    """Open what is closed of stdin, stdout and stderr: sockets would get these numbers, at whose end libuv aborts."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= LAST_STANDARD:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def open_up(settings: Settings, logger: Any) -> None:
    """Take all the open files there are for the asking: many systems start a process with 1024, for old select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS grants less than it names
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < _files(settings):
        logger.warning("fewer open files than connections are allowed for", limit=most, wanted=_files(settings))


def settle_down(settings: Settings) -> None:
    """Have the table of open files grow, and the garbage collected, while nobody waits.

    Linux doubles that table whenever it is full; a process with threads then stands still until every core has passed
    through its scheduler: 5 to 16 ms (measured; `expand_fdtable` in its fs/file.c). A collection of everything takes
    some 50 ms for what the program itself consists of, which later ones leave out, and as much again for 1,000 live
    streams. So that comes seldom, and the one before it in smaller steps; what a request leaves behind is let go of
    without either.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _files(settings) if most == resource.RLIM_INFINITY else min(most, _files(settings))
    with contextlib.suppress(OSError), open(os.devnull) as any_file:  # a table that does not grow now will later
        os.close(fcntl.fcntl(any_file, fcntl.F_DUPFD_CLOEXEC, wanted - 1))
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 3, 100)


def _files(settings: Settings) -> int:
    return settings.max_connections + settings.max_upstream_connections + SPARE_FILES
