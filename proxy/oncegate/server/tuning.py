"""Process set-up that prevents late errors and pauses. All of it happens before the first request."""

import contextlib
import fcntl
import gc
import os
import resource
from typing import Any

from oncegate.settings.settings import Settings

# The last of the three standard descriptors.
STDERR = 2
# For the store, listeners, logs and spools, beside the connections.
SPARE_FILES = 128
# The garbage collector's thresholds for its three generations. Full collections are rare, because one takes 50 ms for
# 1,000 live streams; collections of the middle generation come in smaller steps instead.
GC_THRESHOLDS = (700, 3, 100)


def open_standard_files() -> None:
    """Open `/dev/null` for each of stdin, stdout and stderr that is closed."""
    # Without this a socket would get one of these numbers, and libuv aborts the process when it closes that socket.
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= STDERR:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def raise_open_file_limit(settings: Settings, logger: Any) -> None:
    """Raise the soft limit of open files to the hard limit; log a warning where that is too low for the settings."""
    # Many systems start a process with a soft limit of 1024, for programs that still use select().
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses the very limit that it reports.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    if hard_limit != resource.RLIM_INFINITY and hard_limit < _wanted_files(settings):
        logger.warning("open file limit below connection limit", limit=hard_limit, wanted=_wanted_files(settings))


def grow_descriptor_table(settings: Settings) -> None:
    """Make the kernel's table of open files as large as the settings may need."""
    # Linux doubles the table whenever it is full. A process with threads then waits until every core has passed
    # through the scheduler: 5 to 16 ms (measured; `expand_fdtable` in fs/file.c).
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _wanted_files(settings) if limit == resource.RLIM_INFINITY else min(limit, _wanted_files(settings))
    # A table that cannot grow now grows later, with the pause.
    with contextlib.suppress(OSError), open(os.devnull) as file:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, wanted - 1))


def freeze_garbage_collection() -> None:
    """Exempt all present objects from garbage collection, and make full collections rare."""
    # The program's own objects cost 50 ms in each full collection (measured). Requests leave no reference cycles,
    # so that rare collections do not let memory grow.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _wanted_files(settings: Settings) -> int:
    # A duplicate that waits has its body in a spool file.
    return settings.max_connections + settings.max_upstream_connections + settings.max_waiters + SPARE_FILES
