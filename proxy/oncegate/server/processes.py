"""Child processes: hearing of their end, and ending with their parent."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def dies_with(parent_pid: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return what a child runs to get signal `number` when the parent's thread that forked it ends.

    It may run between fork and exec, so it loads nothing: another thread may hold the locks. Raises OSError here
    where the system has no such signal, there where it is refused.
    """
    if sys.platform != "linux":
        raise OSError("this needs Linux: no other system ends a process with its parent")
    prctl = ctypes.CDLL(None).prctl

    def set_signal() -> None:
        if prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            raise OSError("PR_SET_PDEATHSIG was refused")
        if os.getppid() != parent_pid:  # it died before the call, and no signal will come
            os._exit(1)

    return set_signal


async def ended(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the process to end; its exit status, or minus the signal that ended it."""
    if process.poll() is not None:  # fetched already, and its pid may be another's by now
        return process.returncode
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:  # a kernel before 5.3, or a sandbox that forbids the call
        while process.poll() is None:
            await asyncio.sleep(0.1)
        return process.wait()
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    loop.add_reader(pidfd, end.set)
    try:
        await end.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
